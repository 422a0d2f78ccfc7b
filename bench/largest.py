"""The largest batch that really trains in a memory: found by running steps until one fits no more.

An attempt builds a network and its batch in a process of its own and runs whole steps; its memory
is what torch's allocator may reserve (`torch.cuda.set_per_process_memory_fraction`), so that a
40 GiB card is what a larger one shows. Out of memory, it does not fit; the search begins at the
batch that `batches.py` foretold, and stands once a batch fits and the next larger one does not.
A card's context, about half a GiB, lies outside of that memory, but for the whole card's.

Everybody has the allocator's expandable segments, without which fragments count too. Our batches
run by `fullres.plan` for 97 % of the memory, as a run with `memory="auto"` does; where that
does not suffice, by the plan of least memory.

What needs no device is done beside another process' attempt: importing, planning, compiling. So
`step_s` says little, the less as our kernels run in their first configuration: choosing another
takes a tuner minutes, and changes no memory but that of partial sums. `training.py` measures speed.

Without a GPU the memory is simulated: live bytes of steps on the CPU, at a small image.
"""

import gc
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from ..engine import InfeasibleError, Plan
from ..engine.live_bytes import LiveBytes
from . import batches
from .record import NOT_BEGUN, NOT_FINISHED, ROOT, environment, resumed, save, table
from .steps import (
    COMPILED,
    GIB,
    IMAGE,
    NETWORKS,
    OURS,
    PROVIDERS,
    PUBLISHED,
    SMALL,
    Step,
    compile_all,
    compile_kernels,
    kept_plan,
    untuned,
)
from .turns import Behind, FailedError, HungError, UnfinishedError, take
from .worker import Worker, reason

RESULTS = ROOT / "bench" / "results"
MEMORIES = (40.0, 80.0)  # GiB, beside the whole card
NAMES = (OURS, "eager bf16", "checkpoint each block, bf16", "eager float32", *COMPILED)
STEPS, LONG = 2, 8.0  # a step that takes more seconds than that is the only one
PREPARING, COMPILING, RUNNING = 180, 400, 90  # seconds in which an attempt must get ready, and end
LEFT = 256 * 2**20  # bytes: a process that holds more after an attempt is of no more use
WITHOUT = {  # a GPU
    "image": (3, 64, 96),
    "memories": (0.008,),
    "networks": (SMALL,),
    "providers": (OURS, "eager bf16", "checkpoint each block, bf16", "eager float32"),
}
ALLOCATOR = dict.fromkeys(
    ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True"
)
COLUMNS = (
    "network", "provider", "image", "memory_gib", "batch", "next_batch", "predicted_batch",
    "peak_gib", "predicted_peak_gib", "reserved_gib", "used_gib", "allocator_retries", "steps",
    "step_s", "images_per_s", "attempts", "seconds", "device", "failed",
)  # fmt: skip
# What libraries say that ask the driver for memory by themselves.
NO_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|cudaErrorMemoryAllocation", re.IGNORECASE)


@dataclass(frozen=True)
class Cell:
    """Whose largest batch is looked for, and where.

    Attributes:
        network, provider: names in `NETWORKS` and `PROVIDERS`.
        image: [C, H, W].
        memory: bytes.
        device: "cuda" or "cpu".
        whole: whether that is all that the card has.
        work: a folder for what our kernels are compiled to.
        plans: a folder that keeps plans; None to make each anew.
    """

    network: str
    provider: str
    image: tuple[int, ...]
    memory: int
    device: str
    whole: bool = False
    work: Path | None = None
    plans: Path | None = None

    def blank(self) -> dict:
        """Return a row that knows nothing but whose it is."""
        found = dict.fromkeys(COLUMNS) | {"attempts": 0, "seconds": 0.0}
        return found | {
            "network": self.network,
            "provider": self.provider,
            "image": "x".join(map(str, self.image)),
            "memory_gib": round(self.memory / GIB, 4),
            "device": _device(self.device),
            "failed": NOT_BEGUN,
        }


# In the process of an attempt


def attempt(cell: Cell, batch: int, ready: Callable[[], None]) -> dict[str, Any]:
    """Run steps on a batch; return how that went, and what they took."""
    try:
        found = _trained(cell, batch, ready)
    except Exception as error:
        found = _failure(error)
    gc.collect()
    stale = False
    if torch.cuda.is_initialized():
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        stale = torch.cuda.memory_allocated() > LEFT
    return {**found, "stale": stale}


def _limit(cell: Cell) -> None:
    """Let torch's allocator reserve no more than the cell's memory."""
    if cell.device == "cuda":
        whole = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cell.memory / whole))


def _failure(error: Exception) -> dict[str, Any]:
    """Return what an exception says: that memory is too little, or that something is wrong."""
    text = reason(error)
    if isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(str(error)):
        return {"outcome": "memory", "why": text}
    return {"outcome": "failed", "why": text}


def _trained(cell: Cell, batch: int, ready: Callable[[], None]) -> dict[str, Any]:
    """Run steps; return what they took."""
    network, plan = NETWORKS[cell.network], None
    if cell.provider == OURS:
        plan = _plan(cell, batch)
        if cell.work is not None:
            compile_kernels(network, cell.image, batch, plan, cell.work / cell.network)
    if cell.provider in COMPILED:  # whose parameters and batch lie on the device meanwhile
        _limit(cell)
    began = [0.0]

    def begin() -> None:
        ready()
        began[0] = time.perf_counter()
        _limit(cell)

    def make() -> Step:
        return PROVIDERS[cell.provider](
            network, cell.image, batch, device=cell.device, plan=plan, ready=begin
        )

    with untuned():
        found = (_simulated if cell.device == "cpu" else _measured)(make, began)
    if max(found["peak"], found["reserved"] or 0) > cell.memory:
        raise torch.OutOfMemoryError(f"out of memory: {found['peak']} bytes at the peak")
    return {
        "outcome": "fits",
        "predicted_peak": None if plan is None else plan.peak_bytes,
        **found,
    }


def _steps(step: Step, began: Sequence[float], before: Callable[[], None]) -> tuple[float, int]:
    """Run a few steps; return the seconds of the last, and how many they were.

    began: when it was our turn, which for compiled steps is within the first.
    """
    for number in range(1, STEPS + 1):
        before()
        start = time.perf_counter()
        loss = step.run().item()  # which waits for the device
        took = time.perf_counter() - max(start, began[0])
        if loss != loss or abs(loss) == float("inf"):
            raise FloatingPointError(f"loss: want a finite one, got {loss} in step {number}")
        if took > LONG:
            break
    return took, number


def _measured(make: Callable[[], Step], began: Sequence[float]) -> dict[str, Any]:
    """Run steps on a GPU."""
    step = make()
    took, count = _steps(step, began, torch.cuda.reset_peak_memory_stats)
    torch.cuda.synchronize()
    free, whole = torch.cuda.mem_get_info()
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "used": whole - free,
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "step_s": took,
        "steps": count,
    }


def _simulated(make: Callable[[], Step], began: Sequence[float]) -> dict[str, Any]:
    """Run steps on the CPU and count the bytes of their tensors."""
    with LiveBytes(torch.device("cpu")) as live:
        step = make()
        took, count = _steps(step, began, live.restart)
    return {
        "peak": live.peak, "reserved": None, "used": None, "retries": None,
        "step_s": took, "steps": count,
    }  # fmt: skip


def _plan(cell: Cell, batch: int) -> Plan:
    """Return the plan of a batch; raises torch.OutOfMemoryError if there is none."""
    try:
        return kept_plan(cell.network, cell.image, batch, cell.memory, cell.plans)
    except InfeasibleError as error:
        raise torch.OutOfMemoryError(f"no plan fits: {error.least} bytes are the least") from None


# The search


def search(start: int, fits: int = 0, fails: int | None = None) -> Generator[int, bool, None]:
    """Yield the batches to try, each answered by whether it fits, until the largest is known.

    Args:
        start: where to begin.
        fits: the largest that is known to fit.
        fails: the smallest that is known not to; None if none is.
    """
    batch, stride = max(1, start), 1
    if not fits < batch < (fails or batch + 1):
        batch = fits + 1 if fails is None else (fits + fails) // 2
    while fails != fits + 1:
        if (yield batch):
            fits = batch
        else:
            fails = batch
        if fails is None:
            batch, stride = fits + stride, 2 * stride
        elif fits == 0:
            batch, stride = max(1, fails - stride), 2 * stride
        else:
            batch = (fits + fails) // 2


Try = Callable[[Cell, int, float], dict[str, Any]]  # a batch, until a time.time()


class Attempts:
    """Tries batches of one cell in a process beside this one, which a failure replaces."""

    def __init__(self, turn: threading.Lock):
        """Take the lock of whose turn on the device it is."""
        self.turn, self.worker = turn, Worker()

    def __call__(self, cell: Cell, batch: int, until: float) -> dict[str, Any]:
        """Return what an attempt finds; raises UnfinishedError if the time is over before."""

        def after(found: dict[str, Any]) -> None:
            if cell.whole or found["outcome"] != "fits" or found["stale"]:
                self.worker.end()  # while it is our turn, so that its memory is free

        limit = COMPILING if cell.provider in COMPILED else PREPARING
        try:
            return take(
                self.worker, self.turn, attempt, cell, batch,
                getting_ready=limit, running=RUNNING, until=until, after=after,
            )  # fmt: skip
        except (FailedError, HungError) as error:
            return {"outcome": "failed", "why": str(error), "stale": True}

    def end(self) -> None:
        """End the process."""
        self.worker.end()


def largest(
    cell: Cell, row: dict, counted: Sequence[dict], trial: Try, until: float
) -> Generator[dict, None, None]:
    """Look for a cell's largest batch; yield its row, whenever more of it is known.

    Args:
        cell: whose.
        row: what is known, as `blank` or an earlier call left it.
        counted: rows of `batches.py`, which foretell where to begin.
        trial: tries a batch.
        until: the time.time() at which to stop; the row then says that it is not finished.
    """
    foretold = foretell(counted, cell)[0]
    row = {**row, "predicted_batch": foretold, "failed": ""}
    begun, spent = time.perf_counter(), row["seconds"]
    tries = search(foretold or 1, row["batch"] or 0, row["next_batch"])
    batch = next(tries, None)
    while batch is not None:
        try:
            if time.time() >= until:
                raise UnfinishedError
            found = trial(cell, batch, until)
        except UnfinishedError:
            words = "not finished" if row["attempts"] else "not begun"
            yield {**row, "failed": f"{words} {NOT_FINISHED}"}
            return
        row["attempts"] += 1
        row["seconds"] = round(spent + time.perf_counter() - begun, 2)
        if found["outcome"] == "failed":
            yield {**row, "failed": f"batch {batch}: {found['why']}"[:300]}
            return
        if found["outcome"] == "fits":
            row |= {"batch": batch, **_figures(cell, batch, found, counted)}
        else:
            row["next_batch"] = batch
        try:
            batch = tries.send(found["outcome"] == "fits")
        except StopIteration:
            break
        yield {**row, "failed": f"not finished {NOT_FINISHED}"}
    yield {**row, "batch": row["batch"] or 0}


def _figures(
    cell: Cell, batch: int, found: dict[str, Any], counted: Sequence[dict]
) -> dict[str, Any]:
    """Return the columns of a batch that fits."""
    predicted = found["predicted_peak"]
    if predicted is None:
        predicted = foretell(counted, cell, batch).peak
    return {
        "peak_gib": found["peak"] / GIB,
        "predicted_peak_gib": _gib(predicted),
        "reserved_gib": _gib(found["reserved"]),
        "used_gib": _gib(found["used"]),
        "allocator_retries": found["retries"],
        "steps": found["steps"],
        "step_s": found["step_s"],
        "images_per_s": batch / found["step_s"],
    }


def _gib(size: float | None) -> float | None:
    return None if size is None else size / GIB


# What was foretold


class Foretold(NamedTuple):
    """A largest batch, and the peak of a batch."""

    batch: int | None = None
    peak: float | None = None  # bytes


def foretell(counted: Sequence[dict], cell: Cell, batch: int | None = None) -> Foretold:
    """Return what rows of `batches.py` say of a cell's largest batch, and of a batch's peak.

    By the row of the nearest memory, along its line; None of what was not counted. Of our peaks
    nothing is said: a plan takes what it is allowed.
    """
    provider = {"torch.compile, bf16": "torch.compile, budget 1.0, bf16"}.get(cell.provider)
    wanted = cell.network, provider or cell.provider, "x".join(map(str, cell.image))
    rows = [
        row
        for row in counted
        if (row["network"], row["provider"], row["image"]) == wanted and not row["failed"]
    ]
    if not rows:
        return Foretold()
    memory = cell.memory / GIB
    row = min(rows, key=lambda row: abs(row["memory_gib"] - memory))
    most, peak = row["batch"], row["peak_gib"]
    if not most:
        return Foretold(0)
    slope = row["next_peak_gib"] - peak
    if cell.provider == OURS:
        peak, slope = row["next_peak_gib"], row["next_peak_gib"] / (most + 1)
        if abs(row["memory_gib"] - memory) > 1e-3:
            most = max(0, most + 1 + math.floor((memory - peak) / slope))
        return Foretold(most)
    if abs(row["memory_gib"] - memory) > 1e-3:
        most = max(0, most + math.floor((memory - peak) / slope))
    return Foretold(most, None if batch is None else (peak + (batch - row["batch"]) * slope) * GIB)


def recorded(out: Path) -> list[dict]:
    """Return the rows of batches.json in out, or else of the newest one under bench/results."""
    found = sorted(
        RESULTS.glob("*/*/batches.json"), key=lambda p: (p.parent.name[:10], p.stat().st_mtime)
    )
    path = out / "batches.json"
    path = path if path.exists() else found[-1] if found else None
    return json.loads(path.read_text())["rows"] if path else []


# All cells


def run(
    out: Path,
    seconds: float | None = None,
    networks: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    image: Sequence[int] | None = None,
    memories: Sequence[float] | None = None,
    workers: int | None = None,
) -> list[dict]:
    """Look for every largest batch; print a table, save it with a picture in out, return its rows.

    Called again with the same out, commit and card it goes on where it stopped.

    Args:
        out: the folder of the results.
        seconds: after which it stops; rows say what is not finished.
        networks: some of `steps.NETWORKS`; None for `PUBLISHED`, without a GPU for a small choice.
        providers: some of `steps.PROVIDERS`; None for `NAMES`, without a GPU for a small choice.
        image: [C, H, W].
        memories: in GiB; None for those of `MEMORIES` that the card has, and the whole card.
        workers: processes at a time, of which one runs on the device.
    """
    until = float("inf") if seconds is None else time.time() + seconds
    gpu = torch.cuda.is_available()
    if not gpu:
        print("Largest batches: NOT RUN ON A CARD. There is no GPU here: the memory is simulated,")
        print("by the live bytes of real steps on the CPU, at a small image.\n")
    networks = networks or (PUBLISHED if gpu else WITHOUT["networks"])
    providers = providers or (NAMES if gpu else WITHOUT["providers"])
    image = tuple(image or (IMAGE if gpu else WITHOUT["image"]))
    limits, whole = _limits(memories, gpu)
    work = (out / "compiled").resolve() if gpu else None
    commit = str(environment()["commit"])
    plans = None if "+changes" in commit else (out / "plans" / commit).resolve()

    def cells(compiled: bool, all_of_it: bool) -> list[Cell]:
        return [
            Cell(
                network, provider, image, limit, "cuda" if gpu else "cpu", limit == whole, work,
                plans,
            )
            for limit in limits
            for provider in providers
            for network in networks
            if (limit == whole) == all_of_it and (provider in COMPILED) == compiled
        ]  # fmt: skip

    # Compiling holds a context and a batch on the device, which the whole card can't spare.
    phases = [(cells(compiled, all_of_it), compiled and all_of_it)
              for compiled in (False, True) for all_of_it in (False, True)]  # fmt: skip
    rows = {cell: cell.blank() for phase, _ in phases for cell in phase}
    known = {_key(row): row for row in resumed("largest", out)}
    for cell, row in rows.items():
        rows[cell] = known.get(_key(row), row)
        if NOT_FINISHED not in rows[cell]["failed"] and rows[cell]["failed"]:
            rows[cell] = row  # it is tried again from the start
    counted = recorded(out) if gpu else _count_small(rows)
    saving, turn = threading.Lock(), threading.Lock()

    def look(cell: Cell) -> None:
        if not rows[cell]["failed"]:
            return
        attempts = Attempts(turn)
        try:
            for row in largest(cell, rows[cell], counted, attempts, until):
                with saving:
                    rows[cell] = row
                    save("largest", list(rows.values()), out)
        finally:
            attempts.end()

    save("largest", list(rows.values()), out)
    behind = ()
    if gpu:
        os.environ.setdefault("TRITON_CACHE_DIR", str(work / "cache"))
        if OURS in providers:  # what `training.py` will need, as long as this takes
            behind = [(compile_all, network, image, work) for network in networks]
    many = workers or max(2, min(8, (os.cpu_count() or 2) // 2))
    with mock.patch.dict(os.environ, ALLOCATOR), Behind(behind):
        for phase, alone in phases:
            with ThreadPoolExecutor(1 if alone else many) as pool:
                list(pool.map(look, phase))  # which raises what a thread has raised
    found = list(rows.values())
    print(compact(found))
    for row in found:
        if row["failed"]:
            print(f"{row['network']}, {row['provider']}, {row['memory_gib']} GiB: {row['failed']}")
    draw(out / "largest.png", found)
    return found


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in ("network", "provider", "image", "memory_gib", "device"))


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu, simulated memory"


def _limits(memories: Sequence[float] | None, gpu: bool) -> tuple[list[int], int | None]:
    """Return the memories in bytes, and the whole card's."""
    if not gpu:
        return [int(memory * GIB) for memory in memories or WITHOUT["memories"]], None
    whole = torch.cuda.get_device_properties().total_memory
    limits = [int(memory * GIB) for memory in memories or MEMORIES]
    limits = [limit for limit in limits if limit < whole]
    return (limits if memories else [*limits, whole]), whole


def _count_small(cells: Iterable[Cell]) -> list[dict]:
    """Return what `batches.py` counts of small cells."""
    return [
        row
        for cell in cells
        if cell.provider in batches.PROVIDERS
        for row in batches.measure(cell.network, cell.provider, cell.image, [cell.memory / GIB])
    ]


def compact(rows: Sequence[dict]) -> str:
    """Return the largest batches as a text table, a column a memory; in brackets as foretold."""
    lines: dict[tuple[str, str], dict] = {}
    for row in rows:
        key = row["network"], row["provider"]
        line = lines.setdefault(key, {"network": key[0], "provider": key[1]})
        text = "-" if row["batch"] is None else str(row["batch"])
        if row["failed"]:
            text += " so far" if NOT_FINISHED in row["failed"] else " FAILED"
        if row["predicted_batch"] is not None:
            text += f" ({row['predicted_batch']})"
        line[f"{row['memory_gib']:g} GiB"] = text
    return table(list(lines.values()))


def draw(path: Path, rows: Sequence[dict]) -> None:
    """Write a PNG of the largest batches, a panel a network and memory, beside those foretold."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows))
    memories = list(dict.fromkeys(row["memory_gib"] for row in rows))
    size = 4.5 * len(memories), 2.6 * len(networks) + 1
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(networks), len(memories), squeeze=False)
    for line, network in zip(panels, networks, strict=True):
        for axes, memory in zip(line, memories, strict=True):
            here = [r for r in rows if (r["network"], r["memory_gib"]) == (network, memory)]
            places, names = range(len(here)), [r["provider"] for r in here]
            axes.barh(places, [r["batch"] or 0 for r in here], label="trained")
            axes.plot(
                [r["predicted_batch"] or 0 for r in here], places, "k|", ms=12, label="foretold"
            )
            axes.set(yticks=places, title=f"{network}, {memory:g} GiB", xlabel="images")
            axes.set_yticklabels(names, fontsize=7)
            axes.invert_yaxis()
    panels[0][0].legend(fontsize=7)
    figure.suptitle(f"Largest batch of {rows[0]['image']} on {rows[0]['device']}")
    figure.savefig(path, dpi=130)
