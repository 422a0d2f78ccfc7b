"""Launches as data: recorded from a program that has no device, compiled, found again on one.

What a recorded launch compiles to lies in triton's own cache, under the key that the same launch on
a device looks for. `python -m fullres.kernels.launches LAUNCH.json REPORT.json` compiles one, into
the cache that TRITON_CACHE_DIR names; `build` runs that for many.
"""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, MockTensor

from .aot import TARGETS, Report, excess, excuse, report_of


@dataclass(frozen=True)
class Launch:
    """A kernel launch to compile: which kernel, for which target, and triton's description of it.

    `kernel` is "module:name"; `description` the types, constants, alignments and options, in the
    text from which triton itself can compile again; `tuned` the constants that a tuner chose, with
    spaces between.
    """

    kernel: str
    target: str
    description: str
    tuned: str = ""

    @property
    def label(self) -> str:
        """Return the constants and options that tell this launch from the kernel's others."""
        d = json.loads(self.description)
        names = list(d["signature"])
        constants = zip(d["constant_keys"], d["constant_vals"], strict=True)
        words = [f"{names[key[0]]}={value}" for key, value in constants if value is not None]
        types = sorted({t for t in d["signature"].values() if str(t).startswith("*")})
        options = d["options"]
        words += [f"warps={options['num_warps']}", f"stages={options['num_stages']}"]
        return " ".join([*types, *words])

    @property
    def problem(self) -> tuple[str, ...]:
        """Return what it has in common with the launches that a tuner would try in its place."""
        chosen = {*self.tuned.split(), "warps", "stages"} if self.tuned else ()
        words = [word for word in self.label.split() if word.partition("=")[0] not in chosen]
        return self.kernel, self.target, *words


@contextmanager
def recorded(
    target: str, as_argument: Callable[[Any], Any], first: bool = False
) -> Iterator[dict[Launch, None]]:
    """Record the launches made inside for a target of TARGETS; none runs, none is compiled.

    An autotuned kernel is recorded in each of its configurations, since a device times them all.

    Args:
        target: what to pretend to be.
        as_argument: returns what stands for an argument of a launch: `tensor_argument` of a
            tensor's dtype, bytes and alignment, any other argument itself.
        first: record each kernel's first configuration alone.

    Yields the launches, in the order of their first occurrence.
    """
    launches: dict[Launch, None] = {}
    run, tuned = JITFunction.run, ""

    def note(*, fn, compile, **_):  # triton's hook before it compiles; true stops it
        kernel = f"{fn.module}:{fn.name}"
        launches[Launch(kernel, target, compile["specialization_data"], tuned)] = None
        return True

    def launch(self, *args, grid, warmup, **kwargs):
        args = [as_argument(a) for a in args]
        kwargs = {name: as_argument(a) for name, a in kwargs.items()}
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def tune(self, *args, **kwargs):
        nonlocal tuned
        configs = self.every_config[:1] if first else self.every_config
        for config in reversed(configs):  # the first last: callers ask what was best
            self.best_config, tuned = config, " ".join(config.kwargs)
            self.fn.run(*args, **kwargs, **config.all_kwargs())
        tuned = ""

    with (
        posing_as(target),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note),
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(Autotuner, "run", tune),
    ):
        yield launches


def tensor_argument(dtype: Any, data_bytes: int) -> MockTensor:
    """Return what stands for a tensor at launch: aligned to 16 bytes, of that dtype and size."""
    argument = MockTensor(dtype)
    argument.ptr_range = lambda: data_bytes  # AMD's buffer instructions end at 2 GiB
    return argument


def compile_launch(launch: Launch) -> Report:
    """Compile a launch into triton's cache, unless it is there; return what it takes."""
    module, name = launch.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    with posing_as(launch.target):
        compiled = kernel.preload(launch.description)
        # Else a later recording in this process would find it compiled, and not record it.
        kernel.device_caches.pop(triton.runtime.driver.active.get_current_device(), None)
    return report_of(compiled, launch.target)


def build(
    launches: Iterable[Launch], out: Path, progress: Callable[[int, int], object] = lambda *_: None
) -> list[tuple[Launch, Report]]:
    """Compile launches in parallel into out/cache, those alone whose source or arguments changed.

    out/build.ninja drives it: an edge a launch. With TRITON_CACHE_DIR=out/cache a process that
    makes these launches on such a device compiles nothing. Interrupted, it goes on where it was.
    progress is called with how many of those to compile are compiled, and how many there are.

    Raises:
        RuntimeError: a launch does not compile; the compiler's words are in the message.
    """
    import ninja

    folder = out.resolve()
    (folder / "launches").mkdir(parents=True, exist_ok=True)
    package = Path(__file__).resolve().parent
    sources = " ".join(_ninja_path(p) for p in sorted(package.glob("*.py")))
    lines = [
        "rule compile",
        f"  command = {_quoted(sys.executable)} -m {__spec__.name} $in $out",
        "  description = $kernel",
        "",
    ]
    files = {}
    for launch in launches:
        text = json.dumps(asdict(launch), indent=1, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        name = f"{launch.kernel.split(':')[1]}-{launch.target}-{digest}"
        file = folder / "launches" / f"{name}.json"
        if not file.exists():
            file.write_text(text)
        files[launch] = folder / "reports" / f"{name}.json"
        edge = f"build {_ninja_path(files[launch])}: compile {_ninja_path(file)} | {sources}"
        lines += [edge, f"  kernel = {name}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    run = subprocess.Popen(
        [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-k", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")},
    )
    said = []
    with run as process:
        for line in process.stdout:
            if count := re.match(r"\[(\d+)/(\d+)\]", line):
                progress(int(count[1]), int(count[2]))
            else:
                said.append(line)
    if process.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed:\n{''.join(said)}")
    return [(launch, Report(**json.loads(file.read_text()))) for launch, file in files.items()]


def judged(built: Iterable[tuple[Launch, Report]]) -> list[dict[str, Any]]:
    """Return a row a launch: its report, its label as "variant", "excess" and "excuse".

    "excess" is what it takes beyond the limits in aot.py, in words, and "excuse" why it ships all
    the same: both "" where there is none.
    """
    built = list(built)
    fitting = {launch.problem for launch, report in built if "shared_bytes" not in excess(report)}
    rows = []
    for launch, report in built:
        over = excess(report)
        excuses = {name: excuse(report, launch.label, name) for name in over}
        if "shared_bytes" in over and launch.problem in fitting:
            excuses["shared_bytes"] = "the tuner passes over it and takes one that fits"
        said = "; ".join(excuses.values()) if all(excuses.values()) else ""
        rows.append(
            {
                **report.row(),
                "variant": launch.label,
                "excess": ", ".join(f"{name} {over[name]}" for name in over),
                "excuse": said,
            }
        )
    return rows


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''").replace("$", "$$") + "'"


@contextmanager
def posing_as(target: str, device: str = "posing") -> Iterator[None]:
    """Let triton find a device of this target inside, which compiles and cannot launch.

    Of a device of another name, triton keeps compiled kernels apart.
    """
    posed = SimpleNamespace(
        get_current_target=lambda: TARGETS[target],
        get_current_device=lambda: f"{device} as {target}",
        get_current_stream=lambda device: 0,
    )
    with mock.patch.object(triton.runtime.driver, "_active", posed):
        yield


if __name__ == "__main__":
    made = compile_launch(Launch(**json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[2]).write_text(json.dumps(made.row(), indent=1))
