"""What a training step costs in memory and in time, against the image's size and the batch.

Images grow at a batch of one, and the batch at the image of the detector. Both are pixels, and a
convolutional network's cost should be a line over these, which is an exponent of 1 between the two.
A plan is another matter: it takes what memory there is, so its bytes are fitted only as far as the
memory does not limit them; from there on it is time that grows.

Bytes are predicted on fake tensors, which needs no GPU. On a card each step is run as well, from
small to large, until one does not fit. Without one, parts of an image are run on the CPU.
"""

import contextlib
import gc
import math
import os
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..engine import InfeasibleError, Plan, convert, meter
from ..engine.cards import HARDWARE, Hardware, hardware
from ..training.memory import FREE_SHARE
from .batches import Labelled
from .record import NOT_BEGUN, NOT_FINISHED, resumed, save, table
from .steps import GIB, IMAGE, NETWORKS, PROVIDERS, make_plan, quick_tuning
from .worker import FailedError, Worker, leave_with, reason

EAGER, KEEP, PLANNED = "eager {}", "fullres, keep, {}", "fullres, {}"
IMAGES = ((640, 1024), IMAGE[1:], (2048, 2048), (4096, 4096), (8192, 8192))
BATCHES = (2, 4, 8, 16, 32)
# Finding a plan takes seconds, so fewer are looked for.
PLANNED_IMAGES, PLANNED_BATCHES = (*IMAGES[:2], *IMAGES[3:]), (2, 8, 32)
SMALL_IMAGES = ((96, 128), (192, 256), (384, 512))  # without a GPU
NETS = ("a21", "uresnet")
STEPS, LONG = 3, 1.0  # timed steps, of which none begins after so many seconds
LIMIT = 60  # seconds that a point may take, its kernels' compiling included
PATIENCE = 2  # seconds beyond the box that a step may take to its end
NO_MEMORY = re.compile(r"out of memory|ALLOC_FAILED", re.IGNORECASE)
PREDICTED = ("predicted_peak_gib", "predicted_stored_gib")
MEASURED = ("peak_gib", "step_s")
NOWHERE = "none, predicted"


@dataclass(frozen=True)
class Point:
    """A step whose cost is wanted.

    Attributes:
        network, provider: names in `NETWORKS` and `PROVIDERS`.
        image: rows and columns.
        batch: images.
        device: where it runs, "cuda" or "cpu"; None for nowhere.
    """

    network: str
    provider: str
    image: tuple[int, int]
    batch: int
    device: str | None

    @property
    def pixels(self) -> int:
        """Of the batch, in one plane."""
        return self.batch * math.prod(self.image)

    @property
    def planned(self) -> bool:
        """Whether a plan is to be found first."""
        return self.provider in (PLANNED.format("bf16"), PLANNED.format("float32"))

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return torch.float32 if self.provider.endswith("float32") else torch.bfloat16

    @property
    def name(self) -> str:
        """For files."""
        words = f"{self.network}-{self.provider}-{self.batch}x{self.image[0]}x{self.image[1]}"
        return re.sub(r"[^a-z0-9]+", "-", words)


def points(gpu: bool) -> list[Point]:
    """Return what is to be known, the small and the telling first."""
    shapes = [(image, 1) for image in IMAGES] + [(IMAGE[1:], batch) for batch in BATCHES]
    planned = [(image, 1) for image in PLANNED_IMAGES]
    planned += [(IMAGE[1:], batch) for batch in PLANNED_BATCHES]
    whole = [
        Point(network, provider.format("bf16"), *shape, "cuda" if gpu else None)
        for network in NETS
        for shape in shapes
        for provider in (EAGER, KEEP, PLANNED)
        if provider is not PLANNED or shape in planned
    ]
    small = [
        Point(NETS[0], provider.format("float32"), image, 1, "cpu")
        for image in SMALL_IMAGES
        for provider in (EAGER, KEEP, PLANNED)
    ]
    return whole if gpu else small + whole


def run(
    out: Path, seconds: float | None = None, wanted: Sequence[Point] | None = None
) -> list[dict]:
    """Predict and measure; print tables, save them with a picture in out, return the rows.

    The exponents are saved as scaling_fits. Called again with the same out, commit and machine, it
    goes on with the rows that are not there yet or that failed.

    Args:
        out: folder of the results; `scaling.work` in it holds plans until all is done.
        seconds: after which nothing else is begun.
        wanted: None takes `points`.
    """
    until = math.inf if seconds is None else time.time() + seconds
    gpu = torch.cuda.is_available()
    wanted = points(gpu) if wanted is None else wanted
    card = hardware() if gpu else HARDWARE["h200"]
    if not gpu:
        print(f"NOT RUN ON A CARD: bytes are predicted, plans are for an {card.name}'s memory;")
        print("seconds are of small steps on the CPU, and say nothing of a card.")
    if gpu:
        os.environ.setdefault("TRITON_CACHE_DIR", str((out / "compiled" / "cache").resolve()))
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    rows = {point: _row(point) for point in wanted}
    work, kept = out / "scaling.work", {_key(row): row for row in resumed("scaling", out)}
    if not kept:  # plans of another commit, if there are any
        shutil.rmtree(work, ignore_errors=True)
    rows |= {point: kept[_key(row)] for point, row in rows.items() if _key(row) in kept}
    table_ = _Table(out, rows)
    try:
        _fill(table_, work, card, until)
    finally:
        table_.save()
    found = list(rows.values())
    save("scaling_fits", fits(found), out)
    _show(found, out)
    if not any(row["failed"] for row in found):
        shutil.rmtree(work, ignore_errors=True)
    return found


def _row(point: Point) -> dict:
    """Return the row of a point that has not begun."""
    card = torch.cuda.get_device_name() if point.device == "cuda" else point.device or NOWHERE
    return {
        "network": point.network,
        "provider": point.provider,
        "image": "x".join(map(str, (3, *point.image))),
        "batch": point.batch,
        "pixels": point.pixels,
        **dict.fromkeys((*PREDICTED, "time_ratio", *MEASURED, "fastest_s", "slowest_s")),
        "device": card,
        "ends": "",
        "failed": NOT_BEGUN,
    }


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in ("network", "provider", "image", "batch", "device"))


class _Table:
    """The rows, by their points; saving takes a while, for the environment is asked each time."""

    def __init__(self, out: Path, rows: dict[Point, dict]):
        self.out, self.rows, self.saved = out, rows, 0.0

    def save(self) -> None:
        """Write the rows."""
        save("scaling", list(self.rows.values()), self.out)
        self.saved = time.time()

    def set(self, point: Point, **values: Any) -> None:
        """Change a row, and save them all if they have not been for a second."""
        self.rows[point] |= values
        if time.time() - self.saved > 1:
            self.save()


# Going through the points


def _fill(table_: _Table, work: Path, card: Hardware, until: float) -> None:
    """Predict what has to be, and run it as soon as it is predicted, in the points' order."""
    rows = table_.rows
    todo = [point for point, row in rows.items() if row["failed"]]
    # What failed or hung before comes last, so that it cannot keep the others from their turn.
    todo.sort(key=lambda point: rows[point]["failed"] != NOT_BEGUN)
    if not todo or time.time() >= until:
        return
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n")
    spare = 2 if any(point.device == "cuda" for point in todo) else 0  # for what is being timed
    workers = min(len(todo), max(1, (os.cpu_count() or 1) - spare))
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_alone, initargs=(os.getpid(),)
    )
    try:
        with Worker() as worker:
            started = {pool.submit(predict, p, _memory(p, card), card, work): p for p in todo}
            if devices := {point.device for point in todo} - {None}:
                with contextlib.suppress(FailedError, TimeoutError):  # which the points will meet
                    worker(_begin, devices.pop(), until=until)  # while others are predicted
            while started:
                rest = None if until == math.inf else max(0.0, until - time.time())
                done, _ = wait(started, rest, FIRST_COMPLETED)
                if not done or time.time() >= until:
                    return
                future = next(f for f in started if f in done)
                point = started.pop(future)
                _settle(table_, point, future, worker, work, until)
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()  # a prediction cannot be told to stop
        pool.shutdown(wait=False, cancel_futures=True)


def _settle(
    table_: _Table, point: Point, future: Future, worker: Worker, work: Path, until: float
) -> None:
    """Write what was predicted into a point's row, then what is measured."""
    try:
        values = future.result()
    except Exception as error:  # one point's failure must not cost the others
        table_.set(point, failed=reason(error))
        return
    failed = values.get("failed", "")
    if failed or values["ends"] or point.device is None:
        table_.set(point, **{"failed": "", **values})
        return
    table_.set(point, **values)
    if ended := _ended_before(table_.rows, point):
        table_.set(point, ends=f"out of memory already at {ended}", failed="")
        return
    limit = time.time() + LIMIT
    try:
        found = worker(_measured, point, work, until=min(limit, until + PATIENCE))
    except TimeoutError:
        late = until + PATIENCE < limit
        found = {"failed": f"not finished {NOT_FINISHED}" if late else f"took over {LIMIT} s"}
    except FailedError as error:
        found = {"failed": str(error)}
    table_.set(point, **{"failed": "", **found})


def _ended_before(rows: dict[Point, dict], point: Point) -> str:
    """Return the smaller step of the same kind that did not fit, if one was tried; else ""."""
    for other, row in rows.items():
        alike = (other.network, other.provider, other.device) == (
            point.network, point.provider, point.device,
        )  # fmt: skip
        smaller = other.pixels <= point.pixels and other != point
        same_way = other.batch == point.batch == 1 or other.image == point.image
        if alike and smaller and same_way and row["ends"].startswith("out of memory"):
            return f"{row['batch']} x {row['image']}"
    return ""


# In a process of the pool: bytes


def _alone(parent: int) -> None:
    """Leave with the parent; leave other cores to other processes, and the GPU to who measures."""
    leave_with(parent)
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _memory(point: Point, card: Hardware) -> int | None:
    """Return the bytes that a plan is for: what a run takes of a free card; on the CPU any."""
    return None if point.device == "cpu" else int(FREE_SHARE["gpu"] * card.memory)


def predict(point: Point, memory: int | None, card: Hardware, work: Path) -> dict:
    """Return the predicted columns of a point's row; leave its plan in work, if it has one."""
    network, image = NETWORKS[point.network], (IMAGE[0], *point.image)
    try:
        if point.planned:
            found = _plan(point, memory, card, work)
            ratio, peak, stored = found.time_ratio, found.peak_bytes, found.report.stored
        else:
            with torch.device("meta"):
                model = network.build()
                labels = network.labels(point.batch, image)
            if point.provider == KEEP.format(point.provider.split()[-1]):
                model = convert(model, policy="keep")
            report = meter(
                Labelled(model, partial(network.labels, point.batch, image)),
                (point.batch, *image),
                criterion=lambda found: network.loss(*found),
                optimizer=torch.optim.AdamW,
                autocast=None if point.dtype == torch.float32 else point.dtype,
                hold_output=False,
            )
            ratio, peak = None, report.peak
            stored = report.stored - labels.untyped_storage().nbytes()
    except InfeasibleError as error:
        ends = (
            f"no plan for {memory / GIB:.4g} GiB, {error.least / GIB:.4g} GiB are the least found"
        )
        return {"ends": ends}
    except Exception as error:
        return {"failed": reason(error)}
    over = point.device is None and peak > card.memory  # on the card itself it is tried
    return {
        "predicted_peak_gib": peak / GIB,
        "predicted_stored_gib": stored / GIB,
        "time_ratio": ratio,
        "ends": f"over an {card.name}'s {card.memory / GIB:.4g} GiB" if over else "",
    }


def _plan(point: Point, memory: int | None, card: Hardware, work: Path) -> Plan:
    path = work / f"{point.name}.json"
    if path.exists():
        return Plan.load(path)
    found = make_plan(
        NETWORKS[point.network],
        (IMAGE[0], *point.image),
        point.batch,
        memory,
        dtype=point.dtype,
        hardware=card,
    )
    part = path.with_suffix(".part")
    found.save(part)
    part.replace(path)
    return found


# In the worker: seconds


def _begin(device: str) -> None:
    """Take up the device, which takes seconds."""
    torch.ones(1, device=device).item()


def _measured(point: Point, work: Path) -> dict:
    """Run a point's step a few times; return the measured columns of its row."""
    gpu = point.device == "cuda"
    if not gpu:
        torch.set_num_threads(1)
    before = torch.cuda.memory_allocated() if gpu else 0
    try:
        return _steps(point, work, before)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(str(error)):
            return {"ends": f"out of memory: {reason(error)}"}
        raise
    finally:
        gc.collect()  # an exception's traceback held the step
        if gpu:
            torch.cuda.empty_cache()


def _steps(point: Point, work: Path, before: int) -> dict:
    plan = Plan.load(work / f"{point.name}.json") if point.planned else None
    step = PROVIDERS[point.provider](
        NETWORKS[point.network],
        (IMAGE[0], *point.image),
        point.batch,
        device=point.device,
        plan=plan,
    )
    gpu, taken = point.device == "cuda", []
    with quick_tuning():
        loss = step.run().item()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    while len(taken) < STEPS and sum(taken) < LONG:
        start = time.perf_counter()
        loss = step.run().item()  # waits for the forward pass alone
        if gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss: want a finite one, got {loss}")
    return {
        "step_s": statistics.median(taken),
        "fastest_s": min(taken),
        "slowest_s": max(taken),
        "peak_gib": (torch.cuda.max_memory_allocated() - before) / GIB if gpu else None,
    }


# What it shows


def fit(values: Sequence[tuple[float, float]]) -> float | None:
    """Return b of y = a x^b by least squares on logarithms; None with less than three points."""
    if len({x for x, _ in values}) < 3:
        return None
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in values), strict=True)
    return statistics.linear_regression(xs, ys).slope


def fits(rows: Sequence[dict]) -> list[dict]:
    """Return a row for each network, provider and direction of growth, with its exponents.

    A column `..._exponent` is the power of the pixels with which the quantity grows: 1 is a line.
    `ends` says what was the first not to fit. Bytes of a plan are left out where its memory limited
    it, which is where `time_ratio` is above 1.
    """
    result = []
    for network, provider, device in dict.fromkeys(
        (row["network"], row["provider"], row["device"]) for row in rows
    ):
        own = [
            row
            for row in rows
            if (row["network"], row["provider"], row["device"]) == (network, provider, device)
        ]
        base = next((row["image"] for row in own if row["batch"] > 1), None)
        for axis, along in {
            "image": [row for row in own if row["batch"] == 1],
            "batch": [row for row in own if row["image"] == base],
        }.items():
            if not along:
                continue
            line = {"network": network, "provider": provider, "device": device, "axis": axis}
            for name in (*PREDICTED, *MEASURED):
                limited = name != "step_s"
                known = [
                    (row["pixels"], row[name])
                    for row in along
                    if row[name] is not None and not (limited and (row["time_ratio"] or 1) > 1.001)
                ]
                quantity = name.removesuffix("_gib").removesuffix("_s")
                line[f"{quantity}_points"] = len(known)
                line[f"{quantity}_exponent"] = fit(known)
            stopped = [row for row in along if row["ends"]]
            first = min(stopped, key=lambda row: row["pixels"], default=None)
            line["ends"] = f"{first['batch']} x {first['image']}" if first else ""
            line["left"] = sum(bool(row["failed"]) for row in along)
            result.append(line)
    return result


def _show(rows: Sequence[dict], out: Path) -> None:
    hidden = ("fastest_s", "slowest_s", "pixels")
    print(table([{k: v for k, v in row.items() if k not in hidden} for row in rows]))
    print("\nExponents: cost as a power of the pixels; 1 is a line.\n")
    print(table([{k: v for k, v in r.items() if not k.endswith("_points")} for r in fits(rows)]))
    draw(out / "scaling.png", rows)


def draw(path: Path, rows: Sequence[dict]) -> None:
    """Write a PNG of memory and time over the pixels, a line of panels a network and device.

    Circles are images of growing size, squares growing batches; empty ones are predicted.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["network"], row["device"]) for row in rows))
    figure = Figure(figsize=(11, 4 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for (memory, seconds), (network, device) in zip(panels, groups, strict=True):
        own = [row for row in rows if (row["network"], row["device"]) == (network, device)]
        base = next((row["image"] for row in own if row["batch"] > 1), None)
        for number, provider in enumerate(dict.fromkeys(row["provider"] for row in own)):
            for marker, along in (
                ("o", [r for r in own if r["provider"] == provider and r["batch"] == 1]),
                ("s", [r for r in own if r["provider"] == provider and r["image"] == base]),
            ):
                for axes, name, face in (
                    (memory, "predicted_peak_gib", "none"),
                    (memory, "peak_gib", f"C{number}"),
                    (seconds, "step_s", f"C{number}"),
                ):
                    line = sorted((r["pixels"], r[name]) for r in along if r[name] is not None)
                    if line:
                        axes.plot(
                            *zip(*line, strict=True),
                            marker=marker,
                            color=f"C{number}",
                            markerfacecolor=face,
                            linewidth=0.8,
                            linestyle="--" if face == "none" else "-",
                            label=provider if marker == "o" and name != "peak_gib" else None,
                        )
        for axes, label in ((memory, "peak of a step, GiB"), (seconds, "step, s")):
            axes.set(xlabel="pixels of a batch's plane", ylabel=label)
            axes.set_title(f"{network}, {device}", fontsize=10)
            axes.grid(which="both", linewidth=0.2)
            if axes.lines:
                axes.set(xscale="log", yscale="log")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
            if not axes.lines:
                axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    figure.savefig(path, dpi=130)
