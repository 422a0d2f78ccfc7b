"""A budget in bytes, and the fastest way for a network's training step to stay within it.

`plan` reads the network as a whole, finds the schedules worth having (engine/schedule.py), adds
what lives outside of segments (engine/ladder.py), and takes the fastest that fits. What it promises
is then counted, on fake tensors, by running the very step. Nothing here needs a device.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.program import Program
from .cards import Hardware
from .convert import conversions, exchanged
from .images import Parts
from .ladder import Ladder, Rung
from .live_bytes import Sample, Span
from .memory_report import MemoryReport, readable
from .schedule import Costs, walked

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
    "sgd": torch.optim.SGD,
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VERSION = 3  # of the file
_LISTS = ("dropped", "remote", "joined")  # of numbers, in a segment's plan
_TUPLES = ("again", "offloaded")  # of such lists


@dataclass(frozen=True)
class Row:
    """Steps that are treated alike."""

    layers: str  # the first and the last module
    policy: str  # "keep", "closing", or "series" with how deep it nests; "offload"; image by image
    stored: int  # bytes from forward to backward, on the device
    again: float  # seconds of what is made again
    why: str


@dataclass(frozen=True)
class SegmentPlan:
    """How one segment is to run; the lists are those of `ops.program.Program`.

    `again` and `offloaded` number the steps as they are before `joined` writes are joined.
    """

    name: str  # of its module, and of it there
    signature: str  # of its steps
    dropped: tuple[int, ...]
    remote: tuple[int, ...]
    again: tuple[tuple[int, int], ...]
    joined: tuple[int, ...]
    offloaded: tuple[tuple[int, int, int], ...]
    images: int  # that run at a time; 0: all, or else the rest is said of each such part
    rows: tuple[Row, ...]

    def __post_init__(self):
        """Look at the number of images, which a file may have wrong."""
        if type(self.images) is not int or self.images < 0:
            raise ValueError(f"images: want a number from 0 on, got {self.images!r}")


@dataclass(frozen=True)
class Plan:
    """How a network's training step runs in a budget; `fullres.convert(model, plan=plan)` runs it.

    `print` makes a table of it, `plot` a picture of the step's memory, `save` a JSON file.

    Attributes:
        model: the network's class.
        input_shape: [N, C, H, W].
        memory: the budget, in bytes.
        dtype: of compute, as autocast has it; parameters stay as they are.
        hardware: the card whose rates were used.
        optimizer: its name.
        reserve: bytes that were left free for what lies beside the step.
        peak_bytes: of the step, reserve among them.
        host_bytes: that wait in pinned host memory between forward and backward.
        seconds: of the segments' steps, by roofline.
        time_ratio: by how much longer that is than without a limit of memory.
        segments: their schedules.
        report: of the step, operator by operator.
    """

    model: str
    input_shape: tuple[int, ...]
    memory: int
    dtype: torch.dtype
    hardware: str
    optimizer: str
    reserve: int
    peak_bytes: int
    host_bytes: int
    seconds: float
    time_ratio: float
    segments: tuple[SegmentPlan, ...]
    report: MemoryReport = field(repr=False)

    def __str__(self) -> str:
        """Return a table: what is stored and what is made again, and why."""
        r = self.report
        shape = " x ".join(map(str, self.input_shape))
        lines = [
            f"{self.model}, {shape}, {_name(self.dtype)}, {self.optimizer}: "
            f"{readable(self.peak_bytes)} of {readable(self.memory)}, "
            f"{self.time_ratio:.2f} times the time without a limit ({self.hardware}, by roofline)",
            f"input {readable(r.input)}, parameters {readable(r.parameters)}, gradients "
            f"{readable(r.gradients)}, optimizer {readable(r.optimizer)}, stored "
            f"{readable(r.stored)}, reserve {readable(self.reserve)}; on the host "
            f"{readable(self.host_bytes)}; the peak is in {r.peak_at.phase}, at "
            f"{r.peak_at.module or 'no module'}",
            "",
        ]
        table = [("layers", "policy", "stored", "made again", "why")]
        for part in self.segments:
            table += [
                (
                    _short(row.layers),
                    row.policy,
                    readable(row.stored),
                    f"{1e3 * row.again:.2f} ms",
                    row.why,
                )
                for row in part.rows
            ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw the live bytes over the step, with what is alive at the peak; return the path.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return self.report.plot(path)

    def as_dict(self) -> dict[str, Any]:
        """Return numbers, strings, lists and dicts, as JSON holds them, without the timeline."""
        raw = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        raw |= {"dtype": _name(self.dtype), "report": self.report.as_dict()}
        raw["segments"] = [dataclasses.asdict(part) for part in self.segments]
        return raw

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON; return the path."""
        raw = self.as_dict() | {"version": VERSION}
        raw["report"] = self.report.as_dict(timeline=True)
        raw["report"]["spans"] = [span._asdict() for span in self.report.spans]
        path = Path(path)
        path.write_text(json.dumps(raw))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that `save` wrote.

        Raises:
            ValueError: the file holds none.
        """
        try:
            raw = json.loads(Path(path).read_text())
            if raw.pop("version") != VERSION:
                raise ValueError("another version's")
            report = raw["report"]
            for name in ("peak_at", "at_peak"):
                del report[name]
            report["timeline"] = tuple(Sample(**sample) for sample in report["timeline"])
            report["spans"] = tuple(Span(**span) for span in report["spans"])
            raw["report"] = MemoryReport(**report)
            raw["dtype"] = DTYPES[raw["dtype"]]
            raw["input_shape"] = tuple(raw["input_shape"])
            raw["segments"] = tuple(
                SegmentPlan(
                    **part
                    | {name: tuple(part[name]) for name in _LISTS}
                    | {name: tuple(map(tuple, part[name])) for name in _TUPLES}
                    | {"rows": tuple(Row(**row) for row in part["rows"])}
                )
                for part in raw["segments"]
            )
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"path: want a file that Plan.save wrote, got {path}: {error}"
            ) from None


class InfeasibleError(ValueError):
    """No plan fits; `least` is the smallest peak found, in bytes."""

    def __init__(self, message: str, least: int):
        """Say why."""
        super().__init__(message)
        self.least = least

    def __reduce__(self):
        """Be pickled whole: it may come from another process."""
        return type(self), (*self.args, self.least)


def plan(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    criterion: Callable[[Any], Tensor] | None = None,
    memory: int | str = "40GiB",
    dtype: torch.dtype = torch.bfloat16,
    hardware: str | Hardware | None = None,
    optimizer: str | Optimizer | None = "adamw",
    reserve: int | str = 0,
    host_memory: int | str = 0,
    split_batch: bool = False,
) -> Plan:
    """Return the fastest way to train a network on one input within a budget of memory.

    All of the step counts: input, parameters, their gradients, the optimizer's state, what is
    stored, and what comes and goes, in the order in which it will run; but not what an operator
    takes inside itself, such as a convolution's workspace, nor an allocator's rounding. The same
    arguments give the same plan, and a larger budget never a slower one. It takes seconds, and
    neither the memory nor a device: the model may lie on "meta".

    Args:
        model: in training mode, as it is before `fullres.convert`. It is not changed.
        input_shape: of its one input, such as [N, C, H, W].
        criterion: takes the model's output, returns the loss. Tensors that it makes, such as
            labels, count while they live. None ends the step at the outputs and their gradients.
        memory: the budget: bytes, or text such as "40GiB", "40 GB" or "512MiB".
        dtype: of compute; float16 and bfloat16 as under autocast, so that parameters stay as
            they are.
        hardware: the card whose rates weigh time: one of `engine.cards.HARDWARE`; None for the
            present one, and where there is none an H200.
        optimizer: "adamw", "adam", "momentum", "sgd", what makes one of parameters, or None.
        reserve: bytes to leave for what lies beside the step, such as labels or workspaces.
        host_memory: bytes of host memory, which is pinned, that stored maps may wait in. Copies
            run beside computation, as far as that goes on long enough; where making a map again
            takes less time than waiting for its copy, it is made again.
        split_batch: whether segments may run a few images at a time, which takes the time of one
            more forward pass and hardly more memory for more images. Gradients of parameters are
            then sums over parts, and may differ from other plans' in their last bits. It is done
            where each image is computed by itself: without normalisation by the batch, dropout, or
            an operator that is not known to keep images apart.

    Raises:
        ValueError: an argument is not one of these, the model is already converted.
        InfeasibleError: a ValueError; the smallest budget that suffices is named.
    """
    budget, free = parse_memory(memory, "memory"), parse_memory(reserve, "reserve")
    host = parse_memory(host_memory, "host_memory")
    ladder = _ladder(model, input_shape, criterion, dtype, hardware, optimizer, split=split_batch)
    found = ladder.within(budget - free, host)
    if found is None:
        least = ladder.least(host).peak + free
        beside = f" and {readable(host)} of the host's" if host else ""
        raise InfeasibleError(
            f"memory: want at least {readable_up(least)}{beside} for {_shown(input_shape)} in "
            f"{_name(dtype)}, got {readable(budget)}",
            least,
        )
    return _plan_of(ladder, found, budget, free, optimizer)


def max_batch(
    model: nn.Module,
    image_shape: Sequence[int],
    *,
    memory: int | str = "40GiB",
    limit: int = 65_536,
    **options: Any,
) -> int:
    """Return the largest batch that a budget of memory suffices for; 0 if not for one image.

    Args:
        model: as for `plan`.
        image_shape: [C, H, W].
        memory: the budget.
        limit: the largest batch to think of.
        options: of `plan`.

    Raises:
        ValueError: as `plan`.
    """
    if len(image_shape) != 3:
        raise ValueError(f"image_shape: want [C, H, W], got {list(image_shape)}")
    budget = parse_memory(memory, "memory") - parse_memory(options.pop("reserve", 0), "reserve")

    def shape(n: int) -> tuple[int, ...]:
        return (n, *image_shape)

    # One image is not run in parts, so that is not where to begin.
    found = _largest(model, budget, 2 if options.get("split_batch") else 1, limit, shape, options)
    return found or _largest(model, budget, 1, min(limit, 1), shape, options)


def max_image(
    model: nn.Module,
    batch: int = 1,
    *,
    channels: int = 3,
    aspect: float = 1.0,
    multiple: int = 64,
    memory: int | str = "40GiB",
    limit: int = 1 << 20,
    **options: Any,
) -> tuple[int, int]:
    """Return the largest image, (H, W), that a budget of memory suffices for; (0, 0) if for none.

    Args:
        model: as for `plan`.
        batch: images at once.
        channels: of an image.
        aspect: W / H.
        multiple: of which H and W are.
        memory: the budget.
        limit: the largest H to think of.
        options: of `plan`.

    Raises:
        ValueError: as `plan`.
    """
    if batch < 1 or channels < 1 or aspect <= 0 or multiple < 1:
        given = f"batch={batch}, channels={channels}, aspect={aspect}, multiple={multiple}"
        raise ValueError(f"batch, channels, aspect, multiple: want them positive, got {given}")
    budget = parse_memory(memory, "memory") - parse_memory(options.pop("reserve", 0), "reserve")

    def size(n: int) -> tuple[int, int]:
        return n * multiple, max(1, round(n * aspect)) * multiple

    def shape(n: int) -> tuple[int, ...]:
        return (batch, channels, *size(n))

    # A network may have no use for an image of a few pixels, so that is not where to begin.
    n = _largest(model, budget, -(-512 // multiple), limit // multiple, shape, options)
    return size(n) if n else (0, 0)


def _largest(
    model: nn.Module,
    budget: int,
    first: int,
    limit: int,
    shape: Callable[[int], tuple[int, ...]],
    options: dict[str, Any],
) -> int:
    """Return the largest number whose shape fits into a budget, at most `limit`; 0 if none does.

    The schedule that takes least is much the same for all sizes. So it is found at the first size,
    run where it may just fit, and found anew one size larger, until that does not fit.
    """
    known = {"criterion", "dtype", "hardware", "optimizer", "host_memory", "split_batch"}
    if unknown := {*options} - known:
        raise TypeError(f"unexpected argument {', '.join(sorted(unknown))}")
    host = parse_memory(options.get("host_memory", 0), "host_memory")
    first = min(first, limit)

    def ladder(n: int) -> Ladder:
        return _ladder(
            model, shape(n), options.get("criterion"), options.get("dtype", torch.bfloat16),
            options.get("hardware"), options.get("optimizer", "adamw"),
            split=options.get("split_batch", False), least=True,
        )  # fmt: skip

    largest, size = 0, first
    while True:  # a schedule found at one size may be worse than another at the next
        found = ladder(size)
        least = found.least(host).peak
        if least > budget and size != first:
            return largest
        taken = {size: least}

        def peak(n: int, size: int = size, found: Ladder = found, taken: dict = taken) -> int:
            if n not in taken:
                # A schedule's bytes are close to proportional to the pixels, on the host too.
                share = host * _pixels(shape(size)) // _pixels(shape(n))
                taken[n] = found.peak_at(shape(n), found.least(share))
            return taken[n]

        largest = max(largest, _along(peak, shape, budget, size, limit))
        if largest in (0, limit):
            return largest
        size = largest + 1


def _along(
    peak: Callable[[int], int],
    shape: Callable[[int], tuple[int, ...]],
    budget: int,
    size: int,
    limit: int,
) -> int:
    """Return the largest number whose peak fits; the peak is close to a line over the pixels."""
    other = max(1, size // 2) if size > 1 else min(2, limit)
    low, high = 0, limit + 1
    tried = sorted({size, other})
    for n in tried:
        low, high = (max(low, n), high) if peak(n) <= budget else (low, min(high, n))
    while high - low > 1:
        if low and high <= limit:
            a, b = low, high
        else:  # the line of those that are nearest
            a, b = (tried[-1], tried[-2:][0]) if low else (tried[0], tried[:2][-1])
        if a == b:
            return low
        slope = (peak(b) - peak(a)) / (_pixels(shape(b)) - _pixels(shape(a)))
        pixels = _pixels(shape(a)) + (budget - peak(a)) / max(slope, 1e-9)
        left, right = low + 1, high - 1
        while left < right:
            middle = (left + right + 1) // 2
            fits = _pixels(shape(middle)) <= pixels
            left, right = (middle, right) if fits else (left, middle - 1)
        low, high = (left, high) if peak(left) <= budget else (low, left)
        tried = sorted({*tried, left})
    return low


def _pixels(shape: Sequence[int]) -> int:
    return shape[0] * shape[2] * shape[3]


def parse_memory(value: int | str, name: str = "memory") -> int:
    """Return bytes of a number of them or of text such as "40GiB"; ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(i?)B?\s*", str(value), re.IGNORECASE)
    if not isinstance(value, str) or not found:
        raise ValueError(f"{name}: want bytes, or text such as '40GiB', got {value!r}")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def readable_up(size: int) -> str:
    """Return bytes in GiB or MiB, rounded up, so that the text suffices as a budget."""
    unit, word = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{-(-100 * size // unit) / 100:.2f} {word}"


def _short(layers: str) -> str:
    """Return names with "main_module.main_module.main_module" as "main_module*3"."""
    return re.sub(r"\b(\w+)((?:\.\1)+)\b", lambda m: f"{m[1]}*{m[2].count('.') + 1}", layers)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _ladder(
    model: nn.Module,
    input_shape: Sequence[int],
    criterion: Callable[[Any], Tensor] | None,
    dtype: torch.dtype,
    hardware: str | Hardware | None,
    optimizer: str | Optimizer | None,
    split: bool = False,
    least: bool = False,
) -> Ladder:
    """Return the plans of a training step, having looked at the arguments."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: want a torch.nn.Module, got {type(model).__name__}")
    if next(conversions(model), None) is not None or exchanged(model):
        raise ValueError("model: want one not yet converted (revert it first), got a converted one")
    if not model.training:
        raise ValueError("model: want one in training mode, got one in evaluation mode")
    if not input_shape or not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(f"input_shape: want positive numbers, got {list(input_shape)}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: want one of {', '.join(DTYPES)}, got {_name(dtype)}")
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: want one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
        optimizer = OPTIMIZERS[optimizer]
    if not isinstance(split, bool):
        raise ValueError(f"split_batch: want True or False, got {split!r}")
    return Ladder(
        model, tuple(input_shape), criterion, dtype, hardware, optimizer, split=split, least=least
    )


def _plan_of(
    ladder: Ladder, rung: Rung, budget: int, free: int, optimizer: str | Optimizer | None
) -> Plan:
    """Return a rung of a ladder as a plan."""
    segments = []
    for name, (program, joined, _) in rung.ways.items():
        if program.images:
            rows = _rows_of_parts(ladder.parts(name, program.images), program, joined)
        else:
            whole = program.joined(joined)
            rows = [row for _, row in _rows(ladder.costs[name].joined(whole, joined), whole)]
        segments.append(
            SegmentPlan(
                name, program.signature, program.dropped, program.remote, program.again,
                joined, program.offloaded, program.images, tuple(rows),
            )
        )  # fmt: skip
    if optimizer is not None and not isinstance(optimizer, str):
        optimizer = getattr(optimizer, "__name__", type(optimizer).__name__)
    return Plan(
        model=type(ladder.model).__name__,
        input_shape=ladder.shape,
        memory=budget,
        dtype=ladder.dtype,
        hardware=ladder.hardware.name,
        optimizer=optimizer or "no optimizer",
        reserve=free,
        peak_bytes=rung.peak + free,
        host_bytes=rung.host,
        seconds=rung.seconds,
        time_ratio=rung.seconds / ladder.fastest,
        segments=tuple(segments),
        report=rung.report,
    )


def _rows(costs: Costs, program: Program) -> list[tuple[range, Row]]:
    """Return what a plan's table says of a segment: steps and their row."""
    schedule = program.schedule(costs.needs)
    counts = walked(costs, program).counts
    kept = {slot for slot in schedule.kept if slot >= program.inputs}
    hosted = {stay.slot for stay in schedule.stays}
    ends, edges = {s.start: s.stop for s in schedule.stretches}, {0, len(program.steps)}
    edges |= {edge for s in schedule.stretches for edge in (s.start, s.stop)}
    rows = []
    order = sorted(edges)
    for start, stop in zip(order, order[1:], strict=False):
        steps = range(start, stop)
        names = [program.names[n] for n in steps if program.names[n]] or [""]
        layers = names[0] if names[0] == names[-1] else f"{names[0]} ... {names[-1]}"
        stored = sum(costs.bytes[s] for s in kept if start <= program.producers[s] < stop)
        again = sum(costs.again[n] * counts[n] for n in steps)
        inside = {slot for n in steps for slot in schedule.reads[n]}
        whole = sum(costs.bytes[s] for s in inside if start <= program.producers.get(s, -1) < stop)
        saved, dropped = whole - stored, [s for s in inside if s in program.dropped]
        if ends.get(start) == stop:
            depth = _depth(program.again, start, stop)
            policy = "series" if depth == 1 else f"series, {depth} deep"
            why = f"{readable(max(0, saved))} less for {1e3 * again:.2f} ms"
        elif dropped:
            policy = "closing"
            why = f"{readable(max(0, saved))} less for {1e3 * again:.2f} ms"
        else:
            policy, why = "keep", "fits"
        if away := sum(costs.bytes[s] for s in hosted if start <= program.producers[s] < stop):
            policy, why = f"{policy}, offload", f"{why}; {readable(away)} on the host"
        rows.append((steps, Row(layers, policy, stored, again, why)))
    return rows


def _rows_of_parts(parts: Parts, program: Program, joined: tuple[int, ...]) -> list[Row]:
    """Return what a plan's table says of a segment that runs a few images at a time.

    It holds nothing from forward to backward; each part goes forward once more.
    """
    inner = program.changed(images=0).joined(joined)
    one, last = (costs.joined(inner, joined) for costs in (parts.one, parts.last))
    *walks, (_, end) = parts.walks(program, joined)
    seconds = [
        last.again[n] * end.counts[n]
        + sum(times * one.again[n] * walk.counts[n] for times, walk in walks)
        for n in range(len(inner.steps))
    ]
    images = program.images
    how = "image by image" if images == 1 else f"{images} images at a time"
    rows = []
    for steps, row in _rows(one, inner):
        again = sum(seconds[n] for n in steps)
        why = f"{readable(row.stored)} of a part at once, for {1e3 * again:.2f} ms"
        rows.append(Row(row.layers, f"{how}, {row.policy}", 0, again, why))
    return rows


def _depth(again: Sequence[tuple[int, int]], start: int, stop: int) -> int:
    """Return how deep stretches nest within one."""
    inside = [s for s in again if start <= s[0] and s[1] <= stop]
    return max(sum(a <= s[0] and s[1] <= b for a, b in inside) for s in inside)
