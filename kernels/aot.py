"""Compiling a kernel ahead of time, without its device, and reading what the compiler made.

A `Variant` is a kernel with arguments written down by hand, to look at. A `Launch` is one that a
program made, recorded in place of running it; its compilation ends in triton's own cache, under the
key that the same launch on a device looks for.

`python -m fullres.kernels.aot LAUNCH.json REPORT.json` compiles one launch into the cache that
TRITON_CACHE_DIR names.
"""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, MockTensor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a program may take, which the compiler does not check: it only fails when launched.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}


@dataclass(frozen=True)
class Variant:
    """One kernel to compile: its runtime arguments' types, its constants, its configuration.

    `signature` maps runtime arguments to triton's type names ("*bf16", "i32"); `constexprs` holds
    the other arguments, a pointer that is None among them. All pointers, and the integers named in
    `divisible`, are taken to be multiples of 16, as triton finds them at launch; without that no
    load is wider than an element.
    """

    kernel: object
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    config: triton.Config
    divisible: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What one compiled variant takes of its target.

    Counts are of instructions in the program text, loops counted once. `spill_bytes` is a
    thread's stack on NVIDIA, its scratch memory on AMD; None where the tools that tell are absent
    (cuobjdump and nvdisasm come with triton).
    """

    kernel: str
    target: str
    warps: int
    shared_bytes: int
    registers: int | None = None
    spill_bytes: int | None = None
    wgmma: int | None = None  # Hopper's warp-group products
    mma_sync: int | None = None  # a warp's products
    mfma: int | None = None  # AMD's
    loads: int | None = None  # from global memory, of any width
    loads_16: int | None = None  # those of 16 bytes a lane
    async_copies: int | None = None  # those that go to shared memory by themselves
    stores_16: int | None = None
    compiled: CompiledKernel | None = field(default=None, repr=False, compare=False)

    def row(self) -> dict:
        """Return the figures as a flat dictionary, for a table."""
        return {name: value for name, value in vars(self).items() if name != "compiled"}


def compile_variant(variant: Variant, target: str) -> CompiledKernel:
    """Return the kernel compiled for a target of TARGETS; its `asm` holds every stage's text.

    Raises:
        ValueError: for an unknown target, or arguments that are not the kernel's.
        RuntimeError: under TRITON_INTERPRET=1, where kernels are not compilable functions.
    """
    if target not in TARGETS:
        raise ValueError(f"want target in {list(TARGETS)}, got {target!r}")
    fn = variant.kernel
    if isinstance(fn, Autotuner):
        fn = fn.fn
    if not isinstance(fn, triton.JITFunction):
        raise RuntimeError(f"want a jitted kernel (is TRITON_INTERPRET set?), got {type(fn)}")

    constexprs = {**variant.constexprs, **variant.config.kwargs}
    given, wanted = {*variant.signature, *constexprs}, set(fn.arg_names)
    if given != wanted:
        raise ValueError(
            f"{fn.__name__}: missing arguments {sorted(wanted - given)}, "
            f"unknown arguments {sorted(given - wanted)}"
        )
    signature = {name: variant.signature.get(name, "constexpr") for name in fn.arg_names}
    aligned = [k for k, v in signature.items() if v.startswith("*") or k in variant.divisible]
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    source = ASTSource(fn, signature, constexprs, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def report(variant: Variant, target: str) -> Report:
    """Return what a variant, compiled for a target of TARGETS, takes of it. Raises as compiling."""
    return _report(compile_variant(variant, target), target)


@dataclass(frozen=True)
class Launch:
    """A kernel launch to compile: which kernel, for which target, and triton's description of it.

    `kernel` is "module:name"; `description` the types, constants, alignments and options, in the
    text from which triton itself can compile again.
    """

    kernel: str
    target: str
    description: str

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


@contextmanager
def recorded(target: str, as_argument: Callable[[Any], Any]) -> Iterator[dict[Launch, None]]:
    """Record the launches made inside for a target of TARGETS; none runs, none is compiled.

    An autotuned kernel is recorded in each of its configurations, since a device times them all.

    Args:
        target: what to pretend to be.
        as_argument: returns what stands for an argument of a launch: `tensor_argument` of a
            tensor's dtype, bytes and alignment, any other argument itself.

    Yields the launches, in the order of their first occurrence.
    """
    launches: dict[Launch, None] = {}
    run = JITFunction.run

    def note(*, fn, compile, **_):  # triton's hook before it compiles; true stops it
        kernel = f"{fn.module}:{fn.name}"
        launches[Launch(kernel, target, compile["specialization_data"])] = None
        return True

    def launch(self, *args, grid, warmup, **kwargs):
        args = [as_argument(a) for a in args]
        kwargs = {name: as_argument(a) for name, a in kwargs.items()}
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def tune(self, *args, **kwargs):
        for config in reversed(self.every_config):  # the first last: callers ask what was best
            self.best_config = config
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    with (
        _posing_as(target),
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
    with _posing_as(launch.target):
        return _report(kernel.preload(launch.description), launch.target)


def build(launches: Mapping[Launch, None] | list[Launch], out: Path) -> list[tuple[Launch, Report]]:
    """Compile launches in parallel into out/cache, those alone whose source or arguments changed.

    out/build.ninja drives it: an edge a launch. With TRITON_CACHE_DIR=out/cache a process that
    makes these launches on such a device compiles nothing.

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
    done = subprocess.run(
        [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-k", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")},
    )
    if done.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed:\n{done.stdout}{done.stderr}")
    return [(launch, Report(**json.loads(file.read_text()))) for launch, file in files.items()]


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''").replace("$", "$$") + "'"


@contextmanager
def _posing_as(target: str) -> Iterator[None]:
    """Let triton find a device of this target, which can compile and not launch."""
    posed = SimpleNamespace(
        get_current_target=lambda: TARGETS[target],
        get_current_device=lambda: f"posing as {target}",  # triton keeps kernels by device
        get_current_stream=lambda device: 0,
    )
    with mock.patch.object(triton.runtime.driver, "_active", posed):
        yield


def _report(compiled: CompiledKernel, target: str) -> Report:
    figures = _nvidia(compiled) if "cubin" in compiled.asm else _amd(compiled.asm["amdgcn"])
    return Report(
        kernel=compiled.name,
        target=target,
        warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        compiled=compiled,
        **figures,
    )


def _nvidia(compiled: CompiledKernel) -> dict[str, int | None]:
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        try:
            usage = _output(tools.cuobjdump.path, "-res-usage", file.name)
            text = _output(tools.nvdisasm.path, "-c", file.name)
        except (OSError, RuntimeError):  # RuntimeError is how triton says that it has no such tool
            return {}
    wide = {"loads_16": r"LDG(STS)?\S*\.128", "stores_16": r"STG\S*\.128"}
    patterns = {"wgmma": "HGMMA", "mma_sync": "HMMA", "loads": "LDG", "async_copies": "LDGSTS"}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "mfma": 0,
        **{name: _count(rf"\b{pattern}", text) for name, pattern in (patterns | wide).items()},
    }


def _amd(text: str) -> dict[str, int]:
    def field_of(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    return {
        "registers": field_of("vgpr_count"),  # the accumulation registers included
        "spill_bytes": field_of("private_segment_fixed_size"),
        "wgmma": 0,
        "mma_sync": 0,
        "mfma": _count(r"\bv_mfma", text),
        "loads": _count(r"\b(global|buffer)_load", text),
        "loads_16": _count(r"\b(global|buffer)_load_dwordx4", text),
        "async_copies": _count(r"\b(global|buffer)_load\S*.*\blds\b", text),
        "stores_16": _count(r"\b(global|buffer)_store_dwordx4", text),
    }


def _count(pattern: str, text: str) -> int:
    return sum(1 for _ in re.finditer(pattern, text))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    made = compile_launch(Launch(**json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[2]).write_text(json.dumps(made.row(), indent=1))
