"""What the meter says of a training step's memory: numbers, a table, a picture."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .live_bytes import Sample, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What is there before the step, by the phase that its spans carry.
GIVEN = {
    "parameters": "parameters",
    "buffers": "buffers",
    "state": "optimizer's state",
    "input": "input",
}
_ROWS = 12  # of what is alive at the peak, in a table
_AREAS = 9  # in a picture, and one for the rest
_COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#ff9da7",
    "#9c755f", "#bab0ac",
)  # fmt: skip
_PHASE_COLOURS = {
    "forward": "#eef4fb",
    "criterion": "#fdf3e3",
    "backward": "#fbeeee",
    "optimizer": "#eef8ee",
}


class Alive(NamedTuple):
    """Tensors that were alive at the peak, of one origin."""

    phase: str  # in which they were made; "parameters", "buffers", "state" or "input" if before
    module: str  # for which
    operator: str  # which made them; of what was there before, its name in the module
    bytes: int  # of all together
    count: int  # of storages


@dataclass(frozen=True)
class MemoryReport:
    """One training step's memory, in bytes; every storage counts once. `str` makes a table of it.

    All numbers but `host_peak` are those of the model's own device.
    """

    input: int
    parameters: int
    buffers: int  # and other tensors that are attributes of modules
    optimizer: int  # its state
    gradients: int  # the parameters', after the backward pass
    stored: int  # made by the forward pass and alive after it: for the backward pass, or as output
    after_forward: int  # input + parameters + buffers + optimizer + stored
    peak: int
    stored_by_module: dict[str, int] = field(repr=False)  # stored, by the module that made it
    timeline: tuple[Sample, ...] = field(repr=False)  # one sample an operator
    spans: tuple[Span, ...] = field(repr=False, default=())  # of each storage alive at the peak
    host_peak: int = 0  # of tensors on other devices, and of those offloaded to the host
    device: str = "fake"  # or that on which the step ran
    allocated: int | None = None  # the most that the device's allocator had handed out, if it tells
    reserved: int | None = None  # and had taken of the device

    @property
    def peak_at(self) -> Sample:
        """The first moment at which the peak was reached."""
        return self.timeline[self._peak_number]

    @cached_property
    def _peak_number(self) -> int:
        return max(range(len(self.timeline)), key=lambda number: self.timeline[number].live)

    @cached_property
    def at_peak(self) -> tuple[Alive, ...]:
        """What was alive at the peak, the largest first; its bytes add up to the peak."""
        size: Counter[tuple[str, str, str]] = Counter()
        count: Counter[tuple[str, str, str]] = Counter()
        for span in self.spans:
            size[span[:3]] += span.bytes
            count[span[:3]] += 1
        alive = (Alive(*origin, size[origin], count[origin]) for origin in size)
        return tuple(sorted(alive, key=lambda a: (-a.bytes, a[:3])))

    def __str__(self) -> str:
        """Return a table: what makes up the memory, where the peak is, what is alive at it."""
        at = self.peak_at
        where = f"in {at.phase}, after {at.operator}" + (f" of {at.module}" if at.module else "")
        lines = [
            ("input", self.input, ""),
            ("parameters", self.parameters, ""),
            ("buffers", self.buffers, ""),
            ("gradients", self.gradients, "of the parameters, after the backward pass"),
            ("optimizer", self.optimizer, "its state"),
            ("stored", self.stored, "for the backward pass, or as output"),
            ("after forward", self.after_forward, "all of these but gradients"),
            ("peak", self.peak, where),
        ]
        if self.host_peak:
            lines.append(("peak on the host", self.host_peak, "not part of the peak"))
        if self.allocated is not None:
            lines.append(("allocated", self.allocated, "at most, by the device's allocator"))
        if self.reserved is not None:
            lines.append(("reserved", self.reserved, "at most, by the device's allocator"))
        sums = [(name, readable(size), note) for name, size, note in lines]
        largest = [("alive at the peak", "", "made in", "by", "of module", "tensors")]
        shown, rest = self.at_peak[:_ROWS], self.at_peak[_ROWS:]
        for a in shown:
            share = f"{100 * a.bytes / max(1, self.peak):.1f}%"
            given = GIVEN.get(a.phase)
            made = ("before", f"{given}: {a.operator}") if given else (a.phase, a.operator)
            largest.append((readable(a.bytes), share, *made, a.module, str(a.count)))
        if rest:
            size, count = sum(a.bytes for a in rest), sum(a.count for a in rest)
            share = f"{100 * size / max(1, self.peak):.1f}%"
            largest.append((readable(size), share, "", "the rest", "", str(count)))
        kind = "on fake tensors" if self.device == "fake" else f"on {self.device}"
        return f"A training step {kind}\n{_table(sums)}\n\n{_table(largest)}"

    def as_dict(self, timeline: bool = False) -> dict[str, Any]:
        """Return numbers, strings, lists and dicts, as JSON holds them.

        timeline: with the sample of each operator, of which there are thousands.
        """
        apart = ("timeline", "spans")
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        numbers["peak_at"] = self.peak_at._asdict()
        numbers["at_peak"] = [alive._asdict() for alive in self.at_peak]
        if timeline:
            numbers["timeline"] = [sample._asdict() for sample in self.timeline]
        return numbers

    def plot(self, path: str | Path) -> Path:
        """Draw the live bytes over the operators of the step into a file; return its path.

        What is alive at the peak lies below the line, by groups of modules; the room up to the line
        is what comes and goes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "plot needs matplotlib: pip install 'fullres[train]', or matplotlib alone"
            ) from error
        figure = Figure(figsize=(12, 6), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        self._draw(figure.subplots())
        path = Path(path)
        figure.savefig(path)
        return path

    def _draw(self, axes: "Axes") -> None:
        import numpy as np

        unit, word = next((u, w) for u, w in _UNITS if self.peak >= u or u == 1)
        live = np.array([sample.live for sample in self.timeline]) / unit
        x = np.arange(len(live))
        areas = self._areas()
        heights = np.zeros((len(areas), len(live)))
        for row, spans in enumerate(areas.values()):
            for span in spans:
                heights[row, span.first : span.last + 1] += span.bytes / unit
        axes.stackplot(
            x, heights, labels=list(areas), colors=_COLOURS, step="mid", linewidth=0, alpha=0.85
        )
        axes.step(x, live, where="mid", color="#222222", linewidth=0.9, label="all that is alive")
        for phase, first, last in self._phases():
            axes.axvspan(
                first - 0.5, last + 0.5, color=_PHASE_COLOURS.get(phase, "white"), zorder=-1
            )
            if last - first > 0.06 * len(live):  # room for the word
                middle, frame = (first + last) / 2, axes.get_xaxis_transform()
                axes.text(middle, 1.01, phase, ha="center", transform=frame)
        at, number = self.peak_at, self._peak_number
        axes.plot(number, live[number], "o", color="#c00000", markersize=5)
        said = f"{readable(self.peak)}\n{at.module}\n{at.operator}".replace("\n\n", "\n")
        left = number > 0.6 * len(live)
        axes.annotate(
            said, (number, live[number]), (-12 if left else 12, -4), textcoords="offset points",
            ha="right" if left else "left", va="top", fontsize=8,
            bbox={"boxstyle": "round", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
        )  # fmt: skip
        axes.set(
            xlabel="operators of the step", ylabel=f"live {word}", xlim=(-0.5, len(live) - 0.5),
            ylim=(0, 1.05 * max(live[number], 1e-9)),
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        axes.figure.legend(
            handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8,
            title="alive at the peak",
        )  # fmt: skip

    def _phases(self) -> list[tuple[str, int, int]]:
        """Return each stretch of one phase: name, first and last sample."""
        stretches: list[tuple[str, int, int]] = []
        for number, sample in enumerate(self.timeline):
            if stretches and stretches[-1][0] == sample.phase:
                stretches[-1] = (sample.phase, stretches[-1][1], number)
            else:
                stretches.append((sample.phase, number, number))
        return stretches

    def _areas(self) -> dict[str, list[Span]]:
        """Return the spans by group, what was there before first, then in order of birth."""
        depth = _depth({span.module for span in self.spans if span.phase not in GIVEN})
        groups: dict[str, list[Span]] = {name: [] for name in GIVEN.values()}
        for span in self.spans:
            groups.setdefault(_group(span, depth), []).append(span)
        groups = {name: spans for name, spans in groups.items() if spans}
        size = {name: sum(span.bytes for span in spans) for name, spans in groups.items()}
        large = set(sorted(size, key=lambda name: -size[name])[:_AREAS])
        areas = {name: spans for name, spans in groups.items() if name in large}
        rest = [span for name in groups if name not in large for span in groups[name]]
        return areas | ({"the rest": rest} if rest else {})


def _depth(modules: Iterable[str]) -> int:
    """Return how many parts of a module's name tell groups apart, so that they are few."""
    parts = [name.split(".") for name in modules]
    deepest = max((len(p) for p in parts), default=1)
    for depth in range(2, deepest + 1):
        if len({tuple(p[:depth]) for p in parts}) > _AREAS:
            return depth - 1
    return deepest


def _group(span: Span, depth: int) -> str:
    if span.phase in GIVEN:
        return GIVEN[span.phase]
    module = ".".join(span.module.split(".")[:depth]) or "between modules"
    return module if span.phase == "forward" else f"{module}, {span.phase}"


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def readable(size: int) -> str:
    """Return a number of bytes with a unit of 1024s, such as "1.50 GiB"."""
    unit, word = next((u, w) for u, w in _UNITS if size >= u or u == 1)
    return f"{size} {word}" if unit == 1 else f"{size / unit:.2f} {word}"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )
