"""How every benchmark records itself: the machine it ran on, its rows, and a table for people."""

import csv
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch


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


def environment() -> dict[str, str | int]:
    """Return what a number depends on: card, driver, processor, versions, commit and command."""
    root = str(Path(__file__).resolve().parents[1])
    commit = _output("git", "-C", root, "rev-parse", "--short", "HEAD") or "unknown"
    if commit != "unknown" and _output("git", "-C", root, "status", "--porcelain", "-uno"):
        commit += "+changes"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver.splitlines()[0] if driver else "none",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", "h5py", "fullres")},
        "commit": commit,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


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
    path.write_text(json.dumps({"environment": environment(), "rows": list(rows)}, indent=1) + "\n")
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return path
