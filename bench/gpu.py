"""What `make gpu` runs: device tests and device benchmarks, recorded with the machine they ran on.

`python -m fullres.bench.gpu [--out FOLDER] [--only tests,kernels] [--smoke]`. Every section is a
process of its own with a time limit, so that one that crashes or hangs costs only itself. Run again
with the same commit, machine and folder, what has passed is not repeated unless --only names it.
Exits with 1 if a section failed, with 2 if there is no GPU. Nothing is fetched from anywhere.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

from .record import environment, save, table

ROOT = Path(__file__).resolve().parents[1]
TESTS_LIMIT = 300  # seconds; with those below inside ten minutes
# Benchmarks, by module name, each with run(out: Path, **options) -> rows: seconds allowed, options.
BENCHMARKS: dict[str, tuple[int, dict]] = {
    "kernels": (230, {"seconds": 190}),  # goes on where it stopped: --only kernels
    "focal_loss": (65, {}),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, print their outcomes as a table, return the exit status."""
    options = _options(arguments)
    facts = environment()
    if not torch.cuda.is_available() and not options.smoke:
        print("make gpu: there is NO GPU that torch can use on this machine; nothing was run.")
        print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, driver {facts['driver']}.")
        return 2

    out = options.out or default_folder(facts)
    out.mkdir(parents=True, exist_ok=True)
    print(f"results in {out}\n" + "\n".join(f"  {k}: {v}" for k, v in facts.items()), flush=True)
    (out / "device.txt").write_text(_device())
    passed = _passed(out, facts)
    rows = [row for name, row in passed.items() if name not in (options.only or ())]
    for name in options.only or [name for name in sections() if name not in passed]:
        print(f"\n== {name} ==", flush=True)
        rows.append(_tests(out) if name == "tests" else _benchmark(name, out))
        save("gpu", rows, out)  # after each, so that a run cut short leaves what it did
    print(f"\n{table(rows)}\n\nresults in {out}")
    if not torch.cuda.is_available():
        print("NOT RUN ON A CARD: this was a rehearsal of the script, no device code ran.")
    return int(any(row["outcome"] not in ("passed", "rehearsed") for row in rows))


def sections() -> list[str]:
    """Return the names of all sections, in the order in which they run."""
    return ["tests", *BENCHMARKS]


def _passed(out: Path, facts: dict) -> dict[str, dict]:
    """Return the rows of sections that passed in this folder, for this commit and machine."""
    path = out / "gpu.json"
    if not path.exists() or "+changes" in facts["commit"]:
        return {}
    saved = json.loads(path.read_text())
    if any(saved["environment"].get(k) != v for k, v in facts.items() if k != "command"):
        return {}
    return {row["section"]: row for row in saved["rows"] if row["outcome"] == "passed"}


def default_folder(facts: dict) -> Path:
    """Return bench/results/<card>/<date>-<commit>, where runs are kept."""
    card = re.sub(r"[^a-z0-9]+", "-", str(facts["card"]).lower()).strip("-")
    return ROOT / "bench" / "results" / card / f"{datetime.date.today()}-{facts['commit']}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None)
    parser.add_argument("--only", help=f"some of {','.join(sections())}")
    parser.add_argument("--smoke", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args(arguments)
    options.out = options.out and Path(options.out).resolve()
    options.only = options.only.split(",") if options.only else None
    if unknown := sorted({*(options.only or ())} - {*sections()}):
        parser.error(f"--only: want some of {','.join(sections())}, got {','.join(unknown)}")
    return options


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


def _tests(out: Path) -> dict:
    report = out / "tests.xml"
    report.unlink(missing_ok=True)
    command = ["-m", "pytest", "-m", "gpu", f"--junitxml={report}", "-q", "--durations=10"]
    status, seconds, timed_out = _run("tests", command, out, TESTS_LIMIT)
    if not report.exists():
        return _row("tests", False, seconds, timed_out, f"pytest left with {status}: see tests.log")
    suite = ET.parse(report).getroot().find("testsuite")
    count = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            print(f"FAILED {case.get('classname')}::{case.get('name')}")
    detail = f"{passed} passed, {count['failures'] + count['errors']} failed"
    detail += f", {count['skipped']} skipped"
    # Where nothing could run, nothing is proved; a rehearsal skips every device test by itself.
    rehearsed = not torch.cuda.is_available() and count["skipped"] == count["tests"] > 0
    return _row("tests", status == 0 and (passed > 0 or rehearsed), seconds, timed_out, detail)


def _benchmark(name: str, out: Path) -> dict:
    limit, options = BENCHMARKS[name]
    program = f"""
import sys
from pathlib import Path
out, sys.argv = Path(sys.argv[1]), ["fullres.bench.gpu", "--only", "{name}"]  # what is recorded
from fullres.bench.{name} import run
run(out, **{options})
"""
    command = ["-c", program, str(out)]
    status, seconds, timed_out = _run(name, command, out, limit)
    saved = (out / f"{name}.json").exists()
    detail = f"{name}.json" if saved else "no result was saved"
    return _row(name, status == 0 and saved, seconds, timed_out, f"{detail}, {name}.log")


def _row(section: str, good: bool, seconds: float, timed_out: bool, detail: str) -> dict:
    fine = "passed" if torch.cuda.is_available() else "rehearsed"
    outcome = "TIMED OUT" if timed_out else fine if good else "FAILED"
    return {"section": section, "outcome": outcome, "seconds": round(seconds, 1), "detail": detail}


def _run(name: str, command: list[str], out: Path, limit: int) -> tuple[int, float, bool]:
    """Run python with the command, shown and kept in out/name.log; return status, time, overdue."""
    surroundings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    start, timed_out = time.perf_counter(), False
    log = out / f"{name}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=surroundings, stdout=file, stderr=file
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGINT)  # pytest still writes its report
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    lines = log.read_text().splitlines()
    print("\n".join(lines[-60:]), flush=True)
    return process.returncode, time.perf_counter() - start, timed_out


if __name__ == "__main__":
    sys.exit(main())
