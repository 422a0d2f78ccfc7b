"""Events: how fast they are read, generated and written, and the memory of reading many."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from ..events import SIZE, EventFile, EventWriter, SyntheticEvents, generate_file
from ..events.dataset import FILE_SIZE
from .record import save, table

REPEATS = 5


def _row(name: str, events: int, seconds: list[float], **more: float) -> dict:
    """Return a row: events a second, as the median and the half spread of the repeats."""
    rates = sorted(events / s for s in seconds)
    return {
        "measure": name,
        "events": events,
        "repeats": len(seconds),
        "median_events_per_s": statistics.median(rates),
        "spread_events_per_s": (rates[-1] - rates[0]) / 2,
        "file_mib_per_event": more.get("mib_per_event", ""),
        "peak_mib_above_import": more.get("peak_mib", ""),
    }


def _seconds(work: Callable[[], None], repeats: int) -> list[float]:
    work()  # fills the file cache and starts what starts once
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def _resident(field: str) -> float:
    """Return VmRSS, or the peak VmHWM, of this process in MiB; NaN where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def _read_all(path: str) -> None:
    """Read every event of a file; print the peak of resident memory above that after import."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # forgets the peak of importing, often larger than what remains
    before = _resident("VmRSS")
    start = time.perf_counter()
    total = 0.0
    for item in EventFile(path):
        total += float(item["image"][:, ::63, ::64].sum())
    seconds = time.perf_counter() - start
    peak = _resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "total": total}))


def _memory(path: Path) -> dict:
    command = f"from fullres.bench import events; events._read_all({str(path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", command], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def run(out: Path, *, events: int = 64, many: int = 2000, repeats: int = REPEATS) -> list[dict]:
    """Measure the room of events, print a table and save it as events.json and events.csv.

    Files lie in the system's temporary folder, and in the file cache when they are read: what is
    measured is decoding. Each repeat reads, generates or writes all `events`, full size.

    Args:
        out: Folder of the results.
        events: Events of the throughputs.
        many: Events of the file that a process of its own reads for its peak memory.
        repeats: Timed repeats of each throughput.

    Returns:
        Flat rows, one for each measure.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "events.h5"

            def generate() -> None:
                for _ in SyntheticEvents(events, size=SIZE):
                    pass

            rows.append(_row("generate, one thread", events, _seconds(generate, repeats)))

            source = SyntheticEvents(events, size=FILE_SIZE)
            pixels = [source.pixels(k) for k in range(events)]

            def write(pixels: list = pixels) -> None:
                with EventWriter(path, overwrite=True) as writer:
                    for one in pixels:
                        writer.write_pixels(one, FILE_SIZE)

            seconds = _seconds(write, repeats)
            size = path.stat().st_size / 2**20 / events
            rows.append(_row("write pixels", events, seconds, mib_per_event=size))
            del pixels, write

            for workers in (0, 2):
                loader = DataLoader(
                    EventFile(path), num_workers=workers, persistent_workers=workers > 0
                )

                def read(loader: DataLoader = loader) -> None:
                    for _ in loader:
                        pass

                rows.append(_row(f"read, {workers} workers", events, _seconds(read, repeats)))
                del loader, read

            small, large = Path(folder) / "few.h5", Path(folder) / "many.h5"
            for number, target in ((max(1, many // 20), small), (many, large)):
                generate_file(target, number)
                runs = [_memory(target) for _ in range(min(repeats, 3))]
                rows.append(
                    _row(
                        f"read all {number} in a process",
                        number,
                        [r["seconds"] for r in runs],
                        mib_per_event=target.stat().st_size / 2**20 / number,
                        peak_mib=statistics.median(r["peak_mib"] for r in runs),
                    )
                )
        print(table(rows))
        save("events", rows, out)  # here, so that it records the one thread that was used
    finally:
        torch.set_num_threads(threads)
    return rows
