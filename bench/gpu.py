"""What `make gpu` and `fullres bench all` run: device tests and benchmarks, and their page.

`python -m fullres.bench.gpu [--only tests,kernels] [--seconds 585] [--smoke]`. Every section is a
process of its own with a box of time, so that one that crashes or hangs costs only itself; what a
box leaves goes to the sections that come later or are incomplete. Run again with the same commit
and card, sections that passed are not repeated unless --only names them, and the others go on where
they stopped. Exits with 1 if a section failed, 3 if one is incomplete, 2 if there is no GPU.
Nothing is fetched from anywhere.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

from . import SECTIONS, summary
from .headline import how_failed
from .record import NOT_BEGUN, NOT_FINISHED, ROOT, environment, resumed, save, table

SECONDS = 585  # of a whole call, so that it ends within ten minutes
LEAST = 15  # seconds; in less no section begins anything
GRACE = 0.15  # of its box, in which a section that is out of time ends and saves
LAST = 8  # seconds that the page and the archive get
ROUNDS = 3  # how often an incomplete section goes on while there is time
PASSED, REHEARSED, FAILED = "passed", "rehearsed", "FAILED"
TIMED_OUT, INCOMPLETE, NOT_REACHED = "TIMED OUT", "INCOMPLETE", "NOT REACHED"
ARCHIVE = "results.tar.gz"


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, print their outcomes as a table, return the exit status."""
    options = _options(arguments)
    until = options.begun + options.seconds - LAST
    facts = environment()
    if not torch.cuda.is_available() and not options.smoke:
        print("make gpu: there is NO GPU that torch can use on this machine; nothing was run.")
        print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, driver {facts['driver']}.")
        return 2

    out = options.out or default_folder(facts)
    out.mkdir(parents=True, exist_ok=True)
    print(f"results in {out}\n" + "\n".join(f"  {k}: {v}" for k, v in facts.items()), flush=True)
    if "+changes" in facts["commit"]:
        print("The checkout has changes that are not committed: a next call keeps nothing of this.")
    (out / "device.txt").write_text(_device())
    calls = [*resumed("calls", out), {"date": _now(), "command": facts["command"], "seconds": 0.0}]
    rows = {row["section"]: row for row in resumed("gpu", out) if row["section"] in SECTIONS}
    done = {name for name, row in rows.items() if row["outcome"] in (PASSED, REHEARSED)}
    chosen = options.only or [name for name in SECTIONS if name not in done]
    spent = {name: rows[name]["seconds"] if name in rows else 0.0 for name in SECTIONS}
    rows |= {name: _row(name, NOT_REACHED, spent[name], NOT_BEGUN) for name in chosen}

    def record() -> None:  # after each section, so that a call cut short leaves what it did
        calls[-1]["seconds"] = round(time.time() - options.begun, 1)
        save("gpu", [rows[name] for name in SECTIONS if name in rows], out)
        save("calls", calls, out)
        summary.write(out)
        _pack(out, facts, options.copy_to)

    record()
    todo = [name for name in SECTIONS if name in chosen]
    for _ in range(ROUNDS):
        for number, name in enumerate(todo):
            boxes = [SECTIONS[later][1] for later in todo[number:]]
            allowed = (until - time.time()) * boxes[0] / sum(boxes)
            if allowed < LEAST and rows[name]["outcome"] != NOT_REACHED:
                continue  # it has begun in this call, and goes on in the next
            if until - time.time() < LEAST:
                break
            print(f"\n== {name}, {allowed:.0f} s ==", flush=True)
            found = _section(name, out, allowed)
            spent[name] = found["seconds"] = round(spent[name] + found["seconds"], 1)
            rows[name] = found
            record()
        todo = [name for name in todo if NOT_FINISHED in rows[name]["detail"]]
        if not todo or until - time.time() < LEAST:
            break
    print(f"\n{table([rows[name] for name in SECTIONS if name in rows])}\n\nresults in {out}")
    print(f"the page: {out / summary.PAGE}; everything: {out / ARCHIVE}")
    if not torch.cuda.is_available():
        print("NOT RUN ON A CARD: this was a rehearsal of the script, no device code ran.")
    outcomes = {rows[name]["outcome"] for name in chosen}
    return 1 if outcomes & {FAILED, TIMED_OUT} else 3 if outcomes - {PASSED, REHEARSED} else 0


def default_folder(facts: dict) -> Path:
    """Return bench/results/<card>/<date>-<commit>, of an earlier day if there is one."""
    card = re.sub(r"[^a-z0-9]+", "-", str(facts["card"]).lower()).strip("-")
    folder = ROOT / "bench" / "results" / card
    earlier = sorted(folder.glob(f"????-??-??-{facts['commit']}"))
    return earlier[-1] if earlier else folder / f"{facts['date']}-{facts['commit']}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="results; bench/results/<card>/<date>-<commit>")
    parser.add_argument("--only", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole call")
    parser.add_argument("--begun", type=float, default=time.time(), help="time.time() of its start")
    parser.add_argument("--copy-to", type=Path, help=f"folder for {summary.PAGE} and {ARCHIVE}")
    parser.add_argument("--smoke", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args(arguments)
    options.out = options.out and options.out.resolve()
    options.only = options.only.split(",") if options.only else None
    if unknown := sorted({*(options.only or ())} - {*SECTIONS}):
        parser.error(f"--only: want some of {','.join(SECTIONS)}, got {','.join(unknown)}")
    return options


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")


def _device() -> str:
    """Return what nvidia-smi or rocm-smi say: clocks, power limit and who else uses the card."""
    texts = []
    for command in (["nvidia-smi"], ["nvidia-smi", "-q", "-d", "CLOCK,POWER"], ["rocm-smi"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            continue
        texts.append(done.stdout)
    return "\n".join(texts) or "no nvidia-smi, no rocm-smi\n"


def _section(name: str, out: Path, allowed: float) -> dict:
    """Run a section for at most so many seconds; return its row."""
    module, result = SECTIONS[name][0], out / f"{name}.json"
    stop = time.time() + allowed * (1 - GRACE)
    program = f"""
import inspect, sys, time
from pathlib import Path
out, stop, sys.argv = Path(sys.argv[1]), float(sys.argv[2]), ["make gpu", "ONLY={name}"]
from fullres.bench.{module} import run
takes = "seconds" in inspect.signature(run).parameters
run(out, **({{"seconds": max(0.0, stop - time.time())}} if takes else {{}}))
"""
    before = result.stat().st_mtime_ns if result.exists() else None
    command = ["-c", program, str(out), str(stop)]
    status, seconds, timed_out = _run(name, command, out, allowed)
    if not result.exists() or result.stat().st_mtime_ns == before:
        outcome = TIMED_OUT if timed_out else FAILED
        return _row(name, outcome, seconds, f"saved no result: {_reason(out / f'{name}.log')}")
    rows = json.loads(result.read_text())["rows"]
    left = [row for row in rows if NOT_FINISHED in how_failed(row)]
    ours = [row for row in rows if how_failed(row) and _is_ours(row) and row not in left]
    others = sum(bool(how_failed(row)) for row in rows) - len(left) - len(ours)
    said = [f"{len(rows)} rows"]
    said += [f"{len(left)} {NOT_FINISHED}"] if left else []
    said += [f"{others} failed"] if others else []
    if status or ours:
        wrong = [f"{row.get('provider', '')}: {how_failed(row)}" for row in ours[:3]]
        said += wrong if ours else [_reason(out / f"{name}.log")]
    fine = PASSED if torch.cuda.is_available() else REHEARSED
    outcome = TIMED_OUT if timed_out else FAILED if status or ours else INCOMPLETE if left else fine
    return _row(name, outcome, seconds, "; ".join(said))


def _is_ours(row: dict) -> bool:
    return str(row.get("provider", "")).startswith("fullres")


def _row(section: str, outcome: str, seconds: float, detail: str) -> dict:
    return {
        "section": section,
        "outcome": outcome,
        "seconds": round(seconds, 1),
        "detail": detail[:400],
    }


def _reason(log: Path) -> str:
    """Return a log's last line that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _run(name: str, command: list[str], out: Path, limit: float) -> tuple[int, float, bool]:
    """Run python with the command, kept in out/name.log; return status, time, overdue.

    Nothing that it began outlives it: it leads a process group, which is ended.
    """
    surroundings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if name != "tests":  # those run side by side, and what their tuner chose is noise
        surroundings["TRITON_CACHE_DIR"] = str(out / "compiled" / "cache")
    start, timed_out = time.perf_counter(), False
    log = out / f"{name}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=surroundings,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGINT)  # a benchmark still saves what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-60:]), flush=True)
    return process.returncode, time.perf_counter() - start, timed_out


def _pack(out: Path, facts: dict, copy_to: Path | None) -> None:
    """Write the archive; unpacked at the root of a checkout, its files lie where they are kept.

    What compiling and training leave in folders is not in it.
    """
    inside = default_folder(facts).relative_to(ROOT)
    files = [path for path in sorted(out.iterdir()) if path.is_file()]
    files += sorted((out / "tests").glob("*.log"))
    part = out / f"{ARCHIVE}.part"
    with tarfile.open(part, "w:gz") as archive:
        for path in files:
            if not path.name.startswith(ARCHIVE) and path.suffix != ".part":
                archive.add(path, inside / path.relative_to(out))
    part.replace(out / ARCHIVE)
    if copy_to:
        copy_to.mkdir(parents=True, exist_ok=True)
        for name in (summary.PAGE, ARCHIVE):
            shutil.copyfile(out / name, copy_to / name)


if __name__ == "__main__":
    sys.exit(main())
