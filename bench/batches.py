"""The largest batch of whole detector images whose training step fits a memory, without a GPU.

The step is forward, loss, backward and AdamW, its state there from the start; input and labels are
held throughout, the network's output only as long as the loss needs it. Peaks are those of the
meter on fake tensors, for torch.compile those of `compiled.py`. Both leave out what a device adds:
its context, workspaces and the allocator's rounding; so on a card all of them are upper bounds.

The peak is close to a line over the batch: two batches foretell the answer, which stands once it
fits and the next larger batch does not.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine import InfeasibleError, max_batch, meter, plan
from .compiled import compiled_step
from .memory import checkpoint_blocks
from .record import save, table
from .steps import GIB, IMAGE, NETWORKS, PUBLISHED, HeldLabels, Network

MEMORIES = (16, 24, 40, 80, 141)  # GiB


class Found(NamedTuple):
    """The largest batch that fits."""

    batch: int  # 0 where one image does not
    peak: int | None  # bytes; None for no image
    next_peak: int | None  # of one image more; None where it is not known
    stored: int | None = None  # bytes kept for the backward pass, outputs among them
    node_by_node: int | None = None  # the peak if nothing were fused, for torch.compile
    time_ratio: float | None = None  # of a plan: to the time without a limit, by roofline


class Use(NamedTuple):
    """The bytes that a step takes."""

    peak: int
    stored: int
    node_by_node: int | None = None


Find = Callable[[int], Found]  # from bytes of memory
Provider = Callable[[Network, Sequence[int]], Find]  # from a network and an image's size


def largest(use: Callable[[int], Use], memory: int) -> Found:
    """Return the largest batch whose peak is at most memory; peaks must grow with the batch.

    use: what a batch takes; called for few batches, but again for those it knows.
    """
    if use(1).peak > memory:
        return Found(0, None, use(1).peak)
    fits, fails = 1, None
    slope = max(1, use(2).peak - use(1).peak)
    while fails != fits + 1:
        guess = fits + max(1, (memory - use(fits).peak) // slope)
        if fails is not None:
            guess = min(guess, fails - 1)
        if use(guess).peak <= memory:
            fits = guess
        else:
            fails = guess
    return Found(fits, use(fits).peak, use(fails).peak, use(fits).stored, use(fits).node_by_node)


def _searched(use: Callable[[int], Use]) -> Find:
    known: dict[int, Use] = {}

    def once(batch: int) -> Use:
        if batch not in known:
            known[batch] = use(batch)
        return known[batch]

    return lambda memory: largest(once, memory)


class Labelled(nn.Module):
    """A network with labels that are there from the first operator of a step to its end."""

    def __init__(self, model: nn.Module, make: Callable[[], Tensor]):
        """Make the labels in each forward pass."""
        super().__init__()
        self.model, self.make = model, make
        self.labels: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Any, Tensor]:
        """Return the network's output and the labels."""
        self.labels = self.make()
        return self.model(x), self.labels


def metered(
    autocast: torch.dtype | None = None,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Provider:
    """Return the provider of a network as `change` makes it, in float32 or under autocast."""

    def provider(network: Network, image: Sequence[int]) -> Find:
        def use(batch: int) -> Use:
            with torch.device("meta"):
                model = change(network.build())
            report = meter(
                Labelled(model, lambda: network.labels(batch, image)),
                (batch, *image),
                criterion=lambda found: network.loss(*found),
                optimizer=torch.optim.AdamW,
                autocast=autocast,
                hold_output=False,
            )
            with torch.device("meta"):
                labels = network.labels(batch, image)
            return Use(report.peak, report.stored - labels.untyped_storage().nbytes())

        return _searched(use)

    return provider


def compiled(budget: float) -> Provider:
    """Return the provider of torch.compile with an activation_memory_budget, under autocast."""

    def provider(network: Network, image: Sequence[int]) -> Find:
        def use(batch: int) -> Use:
            with torch.device("meta"):
                model = network.build()
            step = compiled_step(
                model,
                (batch, *image),
                lambda: network.labels(batch, image),
                network.loss,
                budget=budget,
            )
            return Use(step.peak, step.stored, step.peak_node_by_node)

        return _searched(use)

    return provider


def planned(network: Network, image: Sequence[int]) -> Find:
    """Return what plans find."""
    with torch.device("meta"):
        model = network.build()

    def find(memory: int) -> Found:
        options = {"criterion": HeldLabels(network, image), "memory": memory, "hardware": "h200"}
        batch, best, least = max_batch(model, image, **options), None, 0
        while batch and best is None:
            try:
                best = plan(model, (batch, *image), **options)
            except InfeasibleError as error:  # another search, which need not find as much
                batch, least = batch - 1, error.least
        while not least:
            try:
                best = plan(model, (batch + 1, *image), **options)
                batch += 1
            except InfeasibleError as error:
                least = error.least
        if best is None:
            return Found(0, None, least)
        return Found(batch, best.peak_bytes, least, best.report.stored, time_ratio=best.time_ratio)

    return find


PROVIDERS: dict[str, Provider] = {
    "eager float32": metered(),
    "eager bf16": metered(torch.bfloat16),
    "checkpoint each block, bf16": metered(torch.bfloat16, checkpoint_blocks),
    "torch.compile, budget 1.0, bf16": compiled(1.0),
    "torch.compile, budget 0.5, bf16": compiled(0.5),
    "torch.compile, budget 0.1, bf16": compiled(0.1),
    "fullres, bf16": planned,
}


def measure(
    network: str,
    provider: str,
    image: Sequence[int] = IMAGE,
    memories: Sequence[float] = MEMORIES,
    until: float = float("inf"),
) -> list[dict]:
    """Return a row for each memory in GiB; one that failed says how instead of numbers.

    until: a time.time() after which no other memory is begun.
    """
    rows = []
    find = PROVIDERS[provider](NETWORKS[network], image)
    for memory in memories:
        start, failed = time.perf_counter(), ""
        try:
            if time.time() >= until:
                raise TimeoutError("not begun in the seconds allowed")
            found = find(int(memory * GIB))
        except Exception as error:  # one provider's failure must not cost the table
            found = Found(0, None, None)
            failed = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        rows.append(
            {
                "network": network,
                "provider": provider,
                "image": "x".join(map(str, image)),
                "memory_gib": memory,
                "batch": None if failed else found.batch,
                "peak_gib": _gib(found.peak),
                "next_peak_gib": _gib(found.next_peak),
                "stored_gib": _gib(found.stored),
                "node_by_node_gib": _gib(found.node_by_node),
                "time_ratio": found.time_ratio,
                "seconds": round(time.perf_counter() - start, 2),
                "failed": failed,
            }
        )
    return rows


def run(
    out: Path,
    networks: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    image: Sequence[int] = IMAGE,
    memories: Sequence[float] = MEMORIES,
    workers: int | None = None,
    seconds: float | None = None,
) -> list[dict]:
    """Fill the table; print it, save it and its picture in out, return its rows.

    workers: processes at a time; None takes one a core. What each has found is saved at once.
    seconds: after which no other memory is begun; its row says so.
    """
    jobs = [(n, p) for n in networks or PUBLISHED for p in providers or PROVIDERS]
    options = (image, memories, float("inf") if seconds is None else time.time() + seconds)
    rows: list[dict] = []
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        for job in jobs:
            rows += measure(*job, *options)
            save("batches", rows, out)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for found in [pool.submit(measure, *job, *options) for job in jobs]:
                rows += found.result()
                save("batches", rows, out)
    print(compact(rows))
    for row in rows:
        if row["failed"]:
            print(f"{row['network']}, {row['provider']}, {row['memory_gib']} GiB: {row['failed']}")
    draw(out / "batches.png", rows)
    return rows


def compact(rows: Sequence[dict]) -> str:
    """Return the largest batches as a text table, a column a memory."""
    lines: dict[tuple[str, str], dict] = {}
    for row in rows:
        key = row["network"], row["provider"]
        line = lines.setdefault(key, {"network": key[0], "provider": key[1]})
        line[f"{row['memory_gib']:g} GiB"] = "FAILED" if row["failed"] else row["batch"]
    return table(list(lines.values()))


def draw(path: Path, rows: Sequence[dict]) -> None:
    """Write a PNG of the largest batch over memory, a panel a network and a line a provider."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(5 * len(networks), 4.5), layout="constrained")
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        for marker, provider in zip("osD^vPX*<>", providers, strict=False):
            line = [
                (row["memory_gib"], row["batch"])
                for row in rows
                if (row["network"], row["provider"]) == (network, provider) and not row["failed"]
            ]
            if line:
                axes.plot(*zip(*line, strict=True), marker=marker, markersize=4, label=provider)
        axes.set(xlabel="memory, GiB", ylabel="largest batch, images", title=network)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.grid(linewidth=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(f"Training steps that fit, images of {rows[0]['image']}, on fake tensors")
    figure.savefig(path, dpi=150)


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB
