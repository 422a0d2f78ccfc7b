"""The plans that a network's training step has, from the fastest to that of least memory.

What a rung takes is known twice: by sums, from one run of the step in which the bytes outside of
segments are noted, and from `simulate`; and, for the rungs that matter, by running it on fake
tensors. The rungs do not depend on a budget, so more of it never leads to a slower one; nor does
what each becomes where some of what it holds waits in host memory.

Where images may be computed a few at a time, each schedule is a rung by itself, and one for each
size of a part.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..ops import parts, segment
from ..ops.program import Program, read
from .cards import Hardware
from .cards import hardware as card
from .convert import convert_whole, programs, schedule
from .costs import StepTime, step_times
from .images import Parts, part_sizes
from .live_bytes import LiveBytes
from .memory_report import MemoryReport
from .meter import meter
from .offload import Leaving
from .schedule import Costs, Outcome, Way, fastest, frontier, simulate

FAR = 0.1  # of a program's steps, between a slot and its last reader, or at least as many as
FAR_STEPS = 16
GROUPS = 2  # of far slots that may be made again
BESIDE = 0.02  # the sums' error that is allowed for, as a share, until one is known
NEAR = 0.001  # and beside twice those that are known
_STATES = 192  # kept while segments are combined
_STEP = 0.004  # peaks nearer than this share are one rung


@dataclass(frozen=True, eq=False)
class Rung:
    """A plan.

    Attributes:
        ways: its segments' schedules, by name.
        seconds: of the step, by roofline.
        peak: bytes; from `report` where that is there, else by sums.
        report: of the step, where it has been run.
    """

    ways: Mapping[str, Way]
    seconds: float
    peak: int
    report: MemoryReport | None = None

    @property
    def host(self) -> int:
        """The bytes that wait in host memory."""
        return sum(way.outcome.host for way in self.ways.values())

    @property
    def held(self) -> int:
        """The bytes that segments hold on the device from forward to backward."""
        return sum(way.outcome.held for way in self.ways.values())


class _Event(NamedTuple):
    """A stretch of the step: a pass of a segment, or what lies between two.

    Attributes:
        kind: "forward", "backward" or "outside".
        segment: which, where it is a pass.
        base: the bytes that are alive as it begins, or at most where it lies outside, but for what
            segments hold.
        holding: the segments that hold something meanwhile.
    """

    kind: str
    segment: str
    base: int
    holding: tuple[str, ...]


@dataclass(frozen=True)
class _Reading:
    """A network read as a whole: its costs and what happens around segments.

    parts: the ways to part the batch, of segments that may.
    """

    model: nn.Module
    costs: dict[str, Costs]
    parts: dict[str, list[Parts]]
    events: list[_Event]

    def peak(self, outcomes: Mapping[str, Outcome]) -> int:
        """Return the bytes of a step whose segments cost this."""
        most = 0
        for event in self.events:
            size = event.base + sum(outcomes[name].held for name in event.holding)
            if event.kind == "forward":
                size += outcomes[event.segment].flow
            elif event.kind == "backward":
                own = outcomes[event.segment]
                size += own.peak - own.held
            most = max(most, size)
        return most


class Ladder:
    """The plans of one training step.

    Attributes:
        rungs: from the fastest to that of least memory.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        criterion: Callable[[Any], Tensor] | None,
        dtype: torch.dtype,
        hardware: str | Hardware | None,
        optimizer: Any,
        *,
        split: bool = False,
        least: bool = False,
    ):
        """Read the network and find the rungs.

        split: whether segments may run a few images at a time, where each is computed by itself.
        least: only those of little memory.
        """
        self.model, self.shape, self.dtype, self._split = model, shape, dtype, split
        self.hardware = hardware if isinstance(hardware, Hardware) else card(hardware)
        self._criterion, self._optimizer = criterion, optimizer
        self._reading = self._read()
        self.rungs = self._rungs(least)
        self._ran: dict[Rung, Rung] = {}
        self._families: dict[Rung, _Family] = {}

    @property
    def fastest(self) -> float:
        """The seconds of the step without a limit of memory."""
        return self.rungs[0].seconds

    @property
    def costs(self) -> dict[str, Costs]:
        """The segments' costs, by their names."""
        return self._reading.costs

    def parts(self, name: str, images: int) -> Parts:
        """Return the costs of a segment that runs so many images at a time."""
        return next(each for each in self._reading.parts[name] if each.images == images)

    def within(self, budget: int, host: int = 0) -> Rung | None:
        """Return the fastest rung whose step, run on fake tensors, stays within a budget.

        host: bytes of host memory that it may take, too.
        """
        allowed = int(budget * (1 + BESIDE))
        forward = sum(sum(costs.forward) for costs in self.costs.values())

        def bound(rung: Rung) -> float:
            """Return the least seconds of a rung whose excess must leave in the forward pass."""
            excess = max(0, rung.peak - allowed)
            return rung.seconds + max(0.0, excess / self.hardware.host - forward)

        order = sorted(self.rungs, key=bound)
        waiting: list[Rung] = []
        for number, rung in enumerate(order):
            beside = self._offloaded(rung, host, budget) if rung.peak > budget else []
            waiting += [each for each in (rung, *beside) if each.peak <= allowed]
            waiting.sort(key=lambda each: each.seconds)
            later = bound(order[number + 1]) if rung is not order[-1] else float("inf")
            while waiting and waiting[0].seconds <= later:
                first = waiting.pop(0)
                if first.peak <= budget + self._error(budget):
                    rung = self._run(first)
                    if rung.peak <= budget:
                        return rung
        least = self.least(host)  # its sum may have been more than it takes
        return least if least.peak <= budget else None

    def least(self, host: int = 0) -> Rung:
        """Return the rung of least memory, of the least by sums and those run: it does fit."""
        least = self.rungs[-1]
        for rung in reversed(self.rungs) if host else ():
            if rung.peak - min(host, rung.held) < least.peak:
                family = self._family(rung)
                least = min(least, family.rung(family.most(host)), key=lambda each: each.peak)
        self._run(least)
        ran = [rung for rung in self._ran.values() if rung.host <= host]
        return min(ran, key=lambda rung: rung.peak)

    def peak_at(self, shape: Sequence[int], rung: Rung) -> int:
        """Return the bytes of a step on an input of another shape, run as a rung says."""
        return self._report(rung, shape).peak

    def _error(self, budget: int) -> int:
        """Return the bytes by which a sum near a budget may be more than what a rung takes."""
        if not self._ran:
            return int(BESIDE * budget)
        seen = max(abs(ran.peak - rung.peak) for rung, ran in self._ran.items())
        return min(2 * seen + int(NEAR * budget), int(BESIDE * budget))

    def _run(self, rung: Rung) -> Rung:
        """Return a rung with its report."""
        if rung not in self._ran:
            report = self._report(rung, self.shape)
            self._ran[rung] = replace(rung, peak=report.peak, report=report)
        return self._ran[rung]

    def _offloaded(self, rung: Rung, host: int, budget: int) -> list[Rung]:
        """Return a rung with as much in host memory as makes it fit, and with more."""
        if rung.peak - min(host, rung.held) > budget:
            return []
        family, most = self._family(rung), self._family(rung).most(host)
        first, last = 1, most + 1
        while first < last:  # the more is there, the less is here
            middle = (first + last) // 2
            if family.rung(middle).peak <= budget:
                last = middle
            else:
                first = middle + 1
        return [family.rung(count) for count in range(max(1, first - 1), min(first + 3, most) + 1)]

    def _family(self, rung: Rung) -> "_Family":
        if rung not in self._families:
            self._families[rung] = _Family(self._reading, rung)
        return self._families[rung]

    def _report(self, rung: Rung, shape: Sequence[int]) -> MemoryReport:
        model = self._reading.model
        schedule(model, {name: w.program.joined(w.joined) for name, w in rung.ways.items()})
        return self._meter(model, shape)

    def _meter(self, model: nn.Module, shape: Sequence[int]) -> MemoryReport:
        return meter(
            model,
            shape,
            criterion=self._criterion,
            optimizer=self._optimizer,
            autocast=None if self.dtype == torch.float32 else self.dtype,
            hold_output=False,
        )

    # One run, in which all is noted

    def _read(self) -> _Reading:
        model = convert_whole(self.model)
        whole = {
            name: program.changed(again=((0, len(program.steps)),))
            for name, program in programs(model).items()
        }
        schedule(model, whole)
        names = {id(program): name for name, program in whole.items()}
        with _following() as notes:
            report = self._meter(model, self.shape)
        costs: dict[str, Costs] = {}
        passes: dict[str, segment.Pass] = {}
        for note in notes:
            name = names[id(note.pass_.program)]
            if note.what == "forward done" and name not in costs:
                costs[name], passes[name] = self._costs(note.pass_, note.pass_.sizes), note.pass_
            if note.what == "backward":
                outputs = note.pass_.program.outputs
                given = {outputs[number]: size for number, size in note.given.items()}
                costs[name] = replace(costs[name], given=given)
        events = _events(notes, names, costs, whole, report)
        parted = {name: self._parts(pass_, costs[name]) for name, pass_ in passes.items()}
        return _Reading(model, costs, parted, events)

    def _parts(self, pass_: segment.Pass, whole: Costs) -> list[Parts]:
        """Return the ways to part the batch of a segment, the largest parts first; none if none."""
        images = pass_.sizes[0][0] if pass_.sizes[0] else 0
        alone = not any(pass_.batch) and parts.apart(pass_.program, pass_.sizes, images)
        if not self._split or not alone:
            return []

        def costs(count: int) -> Costs:
            return self._costs(pass_, {s: [count, *size[1:]] for s, size in pass_.sizes.items()})

        found = []
        for size in reversed(part_sizes(images)):
            one, rest = costs(size), images % size
            last = costs(rest) if rest else one
            found.append(Parts(size, whole, one, last, -(-images // size), self.hardware))
        return found

    def _costs(self, pass_: segment.Pass, sizes: Mapping[int, Sequence[int]]) -> Costs:
        """Return the costs of a pass whose slots have these sizes."""
        program, size = pass_.program.changed(again=()), pass_.dtype.itemsize
        shapes = {n: shape for n, shape in enumerate(pass_.shapes) if shape is not None}

        def times(program: Program) -> list[StepTime]:
            return step_times(
                program, sizes, shapes, self.dtype, self.hardware, pass_.needs, pass_.batch
            )

        apart, writes = times(program), sorted(program.joinable())
        together = times(program.joined(writes))
        return Costs(
            program,
            tuple(pass_.needs),
            {slot: size * prod(sides) for slot, sides in sizes.items()},
            tuple(time.forward for time in apart),
            tuple(time.again for time in apart),
            tuple(time.backward for time in apart),
            {number: 4 * prod(shape) for number, shape in shapes.items()},
            # Each join before it has made the convolution's number one less.
            {write: tuple(together[write - n]) for n, write in enumerate(writes)},
            host=self.hardware.host,
        )

    # The rungs

    def _rungs(self, least: bool) -> list[Rung]:
        options: dict[str, list[Way]] = {}
        for name, costs in self.costs.items():
            options[name] = []
            for remote in _remote_sets(costs):
                several = len(self.costs) > 1
                options[name] += frontier(costs, remote, several=several, small=least)
            # A part's bytes and times are in proportion: so its best schedules are those of all.
            ways, parted = fastest(options[name]), self._reading.parts[name]
            for part in parted[-1:] if least else parted:
                options[name] += map(part.way, ways)
        found = sorted(_combined(self._reading, options), key=lambda r: (r.seconds, r.peak))
        least_peak = min((rung.peak for rung in found), default=0)
        rungs: list[Rung] = []
        for rung in found:
            near = bool(rungs) and rung.peak > rungs[-1].peak * (1 - _STEP)
            if not near or (rung.peak == least_peak < rungs[-1].peak):
                rungs.append(rung)
        return rungs


class _Family:
    """A rung with the first 0, 1, 2, ... of the slots that may leave in host memory."""

    def __init__(self, reading: _Reading, rung: Rung):
        self._reading = reading
        self._leaving = [
            (name, Leaving(reading.costs[name], way)) for name, way in rung.ways.items()
        ]
        self._known: dict[int, Rung] = {0: rung}
        sizes = [reading.costs[n].bytes[slot] for n, each in self._leaving for slot in each.slots]
        self._sizes = [0, *accumulate(sizes)]

    def most(self, host: int) -> int:
        """Return how many slots host memory suffices for."""
        return bisect_right(self._sizes, host) - 1

    def rung(self, count: int) -> Rung:
        """Return the rung with so many slots there."""
        if count not in self._known:
            ways, left = {}, count
            for name, leaving in self._leaving:
                ways[name] = leaving.way_with(min(left, len(leaving.slots)))
                left -= min(left, len(leaving.slots))
            outcomes = {name: way.outcome for name, way in ways.items()}
            seconds = sum(outcome.seconds for outcome in outcomes.values())
            self._known[count] = Rung(ways, seconds, self._reading.peak(outcomes))
        return self._known[count]


class _Note(NamedTuple):
    pass_: segment.Pass
    what: str
    now: int
    samples: int
    given: dict[int, int]  # the bytes of the outputs' gradients that are there, by number


@contextmanager
def _following() -> Iterator[list[_Note]]:
    """Note the live bytes wherever a pass of a segment begins and ends."""
    notes: list[_Note] = []

    def follow(pass_: segment.Pass, what: str) -> None:
        stack = _get_current_dispatch_mode_stack()
        live = next(mode for mode in stack if isinstance(mode, LiveBytes))
        given = {n: g.untyped_storage().nbytes() for n, g in pass_.gradients.items()}
        notes.append(_Note(pass_, what, live.now, len(live.timeline), given))

    segment.followers.append(follow)
    try:
        yield notes
    finally:
        segment.followers.remove(follow)


def _events(
    notes: Sequence[_Note],
    names: Mapping[int, str],
    costs: Mapping[str, Costs],
    whole: Mapping[str, Program],
    report: MemoryReport,
) -> list[_Event]:
    """Return what happened in a step whose segments ran as in `whole`."""
    ran = {name: simulate(costs[name], whole[name]) for name in costs}
    events: list[_Event] = []
    holding: list[str] = []
    since = 0

    def held() -> int:
        return sum(ran[name].held for name in holding)

    def outside(until: int) -> None:
        if until > since:
            most = max(sample.live for sample in report.timeline[since:until])
            events.append(_Event("outside", "", most - held(), tuple(holding)))

    for note in notes:
        name = names[id(note.pass_.program)]
        if note.what in ("forward", "backward"):
            outside(note.samples)
        if note.what == "forward":
            events.append(_Event("forward", name, note.now - held(), tuple(holding)))
        elif note.what == "forward done":
            holding.append(name)
        elif note.what == "backward":
            base = note.now - held() - sum(note.given.values())
            events.append(_Event("backward", name, base, tuple(holding)))
        else:
            holding.remove(name)
        since = note.samples
    outside(len(report.timeline))
    return events


def _remote_sets(costs: Costs) -> Iterator[frozenset[int]]:
    """Yield sets of slots that may be made again wherever they are read.

    They are slots that wait long for a reader, group by group in the order of the steps, and what
    they are made of.
    """
    yield frozenset()
    program = costs.program
    steps = len(program.steps)
    far: dict[str, list[int]] = {}
    for slot, number in sorted(program.producers.items(), key=lambda item: item[1]):
        wait = program.last_reader.get(slot, number) - number
        if wait >= max(FAR_STEPS, FAR * steps) and slot not in program.outputs:
            far.setdefault(program.names[number], []).append(slot)
    groups = list(far.values())
    largest = max((costs.bytes[s] for slots in groups for s in slots), default=0)
    for count in range(1, min(GROUPS, len(groups)) + 1):
        if 8 * max(costs.bytes[slot] for slot in groups[count - 1]) < largest:
            return
        others = {slot for slots in groups[count:] for slot in slots}
        found: set[int] = set()
        pending = [slot for slots in groups[:count] for slot in slots]
        while pending:
            slot = pending.pop()
            if slot not in found and slot not in others and slot in program.producers:
                found.add(slot)
                pending += read(program.steps[program.producers[slot]])
        yield frozenset(found)


def _combined(reading: _Reading, options: Mapping[str, Sequence[Way]]) -> Iterator[Rung]:
    """Yield the ways to run all segments that are worth having."""
    nothing = {name: Outcome(0, 0, 0, 0.0) for name in options}  # of those not decided on yet
    states: list[tuple[float, dict[str, Way]]] = [(0.0, {})]
    for name, ways in options.items():
        found = []
        for seconds, chosen in states:
            for way in ways:
                taken = chosen | {name: way}
                outcomes = nothing | {key: each.outcome for key, each in taken.items()}
                held = sum(outcome.held for outcome in outcomes.values())
                peak = reading.peak(outcomes)
                found.append((seconds + way.outcome.seconds, peak, held, taken))
        found.sort(key=lambda each: each[:3])
        kept: list[tuple[float, int, int, dict[str, Way]]] = []
        for each in found:
            if not any(k[1] <= each[1] and k[2] <= each[2] for k in kept):
                kept.append(each)
        if len(kept) > _STATES and len(options) > 1:
            kept.sort(key=lambda each: each[1])
            stride = len(kept) / _STATES
            kept = [kept[int(i * stride)] for i in range(_STATES)]
        states = [(each[0], each[3]) for each in kept]
    for seconds, chosen in states:
        outcomes = {name: way.outcome for name, way in chosen.items()}
        yield Rung(chosen, seconds, reading.peak(outcomes))
