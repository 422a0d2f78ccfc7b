"""How every benchmark records itself: the machine it ran on, its rows, and a table for people."""

import contextlib
import csv
import datetime
import functools
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = {".venv", "build", "__pycache__"}  # where there are no sources of ours
# In the column `failed` of a row that the next run goes on with:
NOT_FINISHED = "in the seconds allowed"
NOT_BEGUN = f"not begun {NOT_FINISHED}"
# What may differ between two runs of which the second goes on with the first one's results.
INCIDENTAL = {"command", "date"}
OF_NO_CARD = {"processor", "threads"}  # beside a card they are incidental too


@functools.cache  # a run saves often, and is of the commit and driver that it began with
def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _commit() -> str:
    # A copy may belong to another user, and not have all modes.
    git = "git", "-c", "safe.directory=*", "-c", "core.fileMode=false", "-C", str(ROOT)
    # Neither results nor documents change a number: committing them leaves the rest as it is.
    what = "--", ".", ":!bench/results", ":!*.md"
    if commit := _output(*git, "log", "-1", "--format=%h", *what):
        changed = _output(*git, "status", "--porcelain", "--untracked-files=no", *what)
        return f"{commit}+changes" if changed else commit
    found = hashlib.sha256()
    for path in sorted(p for p in ROOT.rglob("*.py") if not HIDDEN & {*p.relative_to(ROOT).parts}):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return f"files-{found.hexdigest()[:8]}"  # a copy without git


def environment() -> dict[str, str | int]:
    """Return what a number depends on: card, driver, processor, versions, commit and command.

    The commit is the last one of more than results and documents, with "+changes" where files of
    it differ; in a copy without git it is a sum over the sources.
    """
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver.splitlines()[0] if driver else "none",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", "h5py", "fullres")},
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def card_answers() -> bool:
    """Return whether this process can still use its card; an illegal address ends that for good."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def table(rows: Sequence[dict]) -> str:
    """Return rows (all with the first one's keys) as an aligned text table."""
    if not rows:
        return "(no rows)"
    cells = [list(rows[0])] + [
        [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def save(name: str, rows: Sequence[dict], folder: Path) -> Path:
    """Write rows beside their environment as folder/name.json and folder/name.csv; return the JSON.

    The rows are flat dictionaries with the same keys; units belong in the keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    saved = {"environment": environment(), "rows": list(rows)}
    with _replacing(path) as file:
        file.write(json.dumps(saved, indent=1) + "\n")
    with _replacing(folder / f"{name}.csv") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return path


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """Open a file that takes path's place once it is whole: who saves may be killed meanwhile."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", newline="") as file:
        yield file
    os.replace(part, path)


def resumed(name: str, folder: Path) -> list[dict]:
    """Return the rows of folder/name.json that a run here may keep, else an empty list.

    They are those of the same commit, without changes, the same card, versions and major version of
    the driver; without a card also of the same processor and threads.
    """
    try:
        saved = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return []
    here = environment()
    incidental = INCIDENTAL | (OF_NO_CARD if here["card"] != "none" else set())
    there = saved["environment"]
    same = all(there.get(k) == v for k, v in here.items() if k not in {*incidental, "driver"})
    same &= str(there.get("driver")).split(".")[0] == str(here["driver"]).split(".")[0]
    return saved["rows"] if same and "+changes" not in str(here["commit"]) else []
