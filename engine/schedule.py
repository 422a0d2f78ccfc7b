"""When a program's slots are held, dropped and made again: what that costs in bytes and seconds.

`simulate` walks through the forward and backward pass of a program as ops/segment.py does, with
numbers in place of images, so a schedule's cost is known exactly in a millisecond.

`frontier` finds the schedules worth having, by dynamic programming over ranges of steps. A range is
gone through as a chain of units; a unit is a range that either holds what its backward reads, or
holds nothing but what leaves it and is run again, then itself as a chain of smaller units. With so
many bytes to spare a chain's first unit takes what it holds from those behind it, and has all of
them when backward comes to it. So

    seconds(range, bytes) = min over its first unit with peak <= bytes of
                            seconds(unit, bytes) + seconds(rest of range, bytes - held by unit)

as for chains of layers in Beaumont et al., "Optimal checkpointing for heterogeneous chains" (2019).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ..ops.program import (
    Call,
    Conv,
    Program,
    Source,
    Stay,
    cheap,
    closing,
    expanded,
    first_leaves,
    made,
    read,
    source_asks,
    term_asks,
)
from ..ops.walk import Walk

WINDOW = 24  # the most parts of a unit; a longer range is a chain of several
LEAF = 4  # the most parts of a unit that is held
GRID = 1024
LOOKS = 64  # the most budgets of a grid for which a schedule is looked at


@dataclass(frozen=True)
class Costs:
    """A program with the bytes of its slots and the seconds of its steps.

    Attributes:
        needs: whether each input and parameter asks for a gradient.
        bytes: of each slot.
        forward: seconds of each step.
        again: seconds of each step where it is made again, without moments.
        backward: seconds of each step's gradients.
        parameters: the bytes of each parameter's gradient, by number.
        joins: of writes that can be joined, the seconds of the convolution that does them too:
            forward, again and backward.
        given: the bytes of outputs' gradients as they come, where they are not an image's.
        host: bytes a second to host memory and back.
    """

    program: Program
    needs: tuple[bool, ...]
    bytes: Mapping[int, int]
    forward: Sequence[float]
    again: Sequence[float]
    backward: Sequence[float]
    parameters: Mapping[int, int] = field(default_factory=dict)
    joins: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)
    given: Mapping[int, int] = field(default_factory=dict)
    host: float = float("inf")

    @property
    def seconds(self) -> float:
        """The step's time where nothing is made again."""
        return sum(self.forward) + sum(self.backward)

    def saved(self, write: int) -> float:
        """Return the seconds that joining a write saves."""
        forward, _, backward = self.joins[write]
        apart = sum(self.forward[n] + self.backward[n] for n in (write, write + 1))
        return apart - forward - backward

    def joined(self, program: Program, writes: Iterable[int]) -> "Costs":
        """Return the costs of `program`, whose steps are these with some writes joined."""
        writes = {*writes}
        columns = []
        for column, apart in enumerate((self.forward, self.again, self.backward)):
            seconds = [
                self.joins[number - 1][column] if number - 1 in writes else apart[number]
                for number in range(len(apart))
                if number not in writes
            ]
            columns.append(tuple(seconds))
        return Costs(
            program, self.needs, self.bytes, *columns, self.parameters, given=self.given,
            host=self.host,
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a schedule costs.

    Attributes:
        held: bytes from forward to backward, the program's inputs not counted.
        flow: the most bytes alive in the forward pass, outputs among them.
        peak: the most bytes alive in the backward pass, with the gradients of outputs, until they
            are used, and of parameters; inputs and their gradients' users are not counted.
        seconds: of the whole step.
        host: bytes that wait in host memory.
    """

    held: int
    flow: int
    peak: int
    seconds: float
    host: int = 0

    @property
    def most(self) -> int:
        """The most bytes alive in both passes."""
        return max(self.flow, self.peak)


def simulate(costs: Costs, program: Program | None = None) -> Outcome:
    """Return what a schedule costs: that of `program`, or else of costs.program."""
    return walked(costs, program or costs.program).outcome


def walked(costs: Costs, program: Program, graded: Iterable[int] = ()) -> "Walked":
    """Return what happens when a schedule is walked through.

    graded: parameters that have a gradient before, to which another is added.
    """
    schedule = program.schedule(costs.needs)
    walk = Walked(costs, schedule.asks, schedule.reads, stays=schedule.stays)
    walk.forward(0, len(program.steps), {*schedule.kept, *program.outputs})
    flow = walk.peak
    for slot in program.outputs:
        if slot not in schedule.kept:
            walk.drop(slot)
    held = walk.now
    walk.begin(len(program.steps))
    for number in graded:
        walk.parameter(number)
    walk.peak = walk.now
    walk.steps(0, len(program.steps), schedule.stretches)
    host = sum(costs.bytes[slot] for slot in {stay.slot for stay in schedule.stays})
    walk.outcome = Outcome(held, flow, walk.peak, costs.seconds + walk.seconds, host)
    return walk


class Walked(Walk):
    """A pass through a program, with bytes in place of images.

    Attributes:
        outcome: what it costs, of a whole program.
        counts: how often each step is made again.
        places: when forward came to each, from 0 on.
        arrivals: (place, when) as backward came to each for the first time.
        asked: when backward asked for each slot that can be away.
        gradients: slot or (norm,): the storage that its gradient is in.
        storages: bytes, users, and whether it may be added to in place.
    """

    outcome: Outcome

    def __init__(
        self,
        costs: Costs,
        asks: frozenset[int],
        reads: Sequence[frozenset[int]],
        since: int = 0,
        gone: frozenset[int] = frozenset(),
        stays: Sequence[Stay] = (),
    ):
        """Begin with nothing alive.

        asks, reads, stays: as of `Schedule`. since: what steps before it make is there, and weighs
        nothing, but for slots in `gone`, which nobody holds.
        """
        super().__init__(costs.program, reads, set(), stays)
        self.leaves = first_leaves(stays)
        self.costs, self.asks, self.since, self.gone = costs, asks, since, gone
        self.of = costs.needs[self.program.inputs :]
        self.gradients: dict[int | tuple[int], int] = {}
        self.storages: dict[int, list] = {}
        self.now, self.peak, self.seconds, self.numbers = 0, 0, 0.0, 0
        self.counts = [0] * len(self.program.steps)
        self.clock, self.bus = 0.0, 0.0  # until when steps, and copies, are done
        self.copied: dict[int, float] = {}  # when the last copy of a slot, there or back, is done
        self.coming: set[int] = set()
        self.places, self.arrivals = [0.0], []
        self.asked: dict[int, list[float]] = {slot: [] for slot in self.leaves}
        self.graded: set[int] = set()  # parameters that have a gradient

    # Values

    def weight(self, slot: int) -> int:
        """Return the bytes of a slot, where it is not outside."""
        outside = self.program.producers[slot] < self.since and slot not in self.gone
        return 0 if outside else self.costs.bytes[slot]

    def put(self, slot: int) -> None:
        """Make a slot."""
        if slot not in self.values and slot >= self.program.inputs:
            self.values.add(slot)
            # One that was dropped weighs wherever it is made again.
            self.grow(self.weight(slot))

    def drop(self, slot: int) -> None:
        """Free a slot, if it is there."""
        if slot in self.values:
            self.values.remove(slot)
            self.now -= self.weight(slot)

    def grow(self, size: int) -> None:
        """Count bytes that are made."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def forward(self, start: int, stop: int, held: set[int]) -> None:
        """Run steps, as in the forward pass; `held` stay."""
        for number in range(start, stop):
            step = self.program.steps[number]
            self.clock += self.costs.forward[number]
            for slot in made(step):
                self.put(slot)
                if slot in self.leaves:
                    self.copy(slot)
            for slot in {*read(step), *made(step)}:
                known = slot in held or slot in self.leaves
                if self.program.last_reader.get(slot, -1) <= number and not known:
                    self.drop(slot)
            for slot, place in self.leaves.items():
                if place == number + 1:
                    self.wait(slot)
                    self.drop(slot)
            self.places.append(self.clock)

    # Host memory

    def copy(self, slot: int) -> None:
        """Copy a slot to the host or back, after the copies that are under way."""
        self.bus = max(self.clock, self.bus) + self.costs.bytes[slot] / self.costs.host
        self.copied[slot] = self.bus

    def wait(self, slot: int) -> None:
        """Wait until a slot's copy is done."""
        waited = max(0.0, self.copied[slot] - self.clock)
        self.clock += waited
        self.seconds += waited

    # What `Walk` asks

    def has(self, slot: int) -> bool:
        """Whether a slot is there, or outside."""
        if slot < self.program.inputs or slot in self.values:
            return True
        return self.program.producers[slot] < self.since and slot not in self.gone

    def execute(self, number: int) -> None:
        """Note that a step runs again."""
        for slot in made(self.program.steps[number]):
            self.put(slot)
        self.counts[number] += 1
        self.seconds += self.costs.again[number]
        self.clock += self.costs.again[number]

    def arrive(self, place: int) -> None:
        """Note when."""
        if not self.arrivals or place < self.arrivals[-1][0]:
            self.arrivals.append((place, self.clock))
        super().arrive(place)

    def prefetch(self, slot: int) -> None:
        """Begin to copy a slot back."""
        if slot not in self.coming:
            self.coming.add(slot)
            self.copy(slot)
            self.grow(self.weight(slot))

    def fetch(self, slot: int, last: bool) -> None:
        """Have a slot back."""
        self.prefetch(slot)
        self.coming.remove(slot)
        self.asked[slot].append(self.clock)
        self.wait(slot)
        self.values.add(slot)

    def ensure(self, slot: int) -> None:
        """Note who asks."""
        if slot in self.asked and slot in self.values:
            self.asked[slot].append(self.clock)
        super().ensure(slot)

    # Gradients

    def begin(self, stop: int) -> None:
        """Put the gradients there that backward has made when it comes to `stop` from behind."""
        for slot in self.asks:
            made_at = self.program.producers.get(slot, -1)
            if made_at < stop and slot in self.program.outputs:
                size = self.costs.given.get(slot, self.costs.bytes[slot])
                self.gradients[slot] = self.storage(size, False)
        for number in range(stop, len(self.program.steps)):
            for source in self.program.steps[number].sources:
                for term in source.terms:
                    early = self.program.producers.get(term.slot, -1) < stop
                    if early and term_asks(self.program, term, self.asks, self.of):
                        key = term.slot if term.norm is None else (term.norm,)
                        if key not in self.gradients:
                            size = self.costs.bytes[term.slot]
                            self.gradients[key] = self.storage(size, True)

    def storage(self, size: int, own: bool) -> int:
        """Return a new storage, with one user."""
        self.numbers += 1
        self.storages[self.numbers] = [size, 1, own]
        self.grow(size)
        return self.numbers

    def free(self, storage: int | None) -> None:
        """Take a user from a storage."""
        if storage is not None:
            entry = self.storages[storage]
            entry[1] -= 1
            if not entry[1]:
                self.now -= self.storages.pop(storage)[0]

    def add(self, slot: int, storage: int) -> None:
        """Add a storage, whose user is handed over, to a slot's gradient."""
        if slot not in self.asks:
            return self.free(storage)
        known = self.gradients.get(slot)
        if known is None:
            self.gradients[slot] = storage
        elif self.storages[known][2]:
            self.free(storage)
        elif self.storages[storage][2]:
            self.gradients[slot] = storage
            self.free(known)
        else:
            self.gradients[slot] = self.storage(self.costs.bytes[slot], True)
            self.free(storage)
            self.free(known)
        return None

    def output_gradient(self, slot: int) -> tuple[int | None, bool]:
        """Return a slot's gradient and whether it comes through a norm."""
        plain = self.gradients.pop(slot, None)
        parts = []
        for number in self.program.norms_of.get(slot, ()):
            if (number,) in self.gradients:
                self.ensure(slot)
                parts.append(self.gradients.pop((number,)))
        if slot not in self.asks:
            for each in (plain, *parts):
                self.free(each)
            return None, False
        if not parts:
            return plain, False
        if len(parts) == 1 and plain is None:
            return parts[0], True
        for part in parts:
            dy = self.storage(self.costs.bytes[slot], True)
            self.free(part)
            if plain is None:
                plain = dy
            elif self.storages[plain][2]:
                self.free(dy)
            else:
                total = self.storage(self.costs.bytes[slot], True)
                self.free(dy)
                self.free(plain)
                plain = total
        return plain, False

    def image_gradient(self, slot: int) -> int | None:
        """Return a slot's gradient as an image."""
        storage, normed = self.output_gradient(slot)
        if storage is None or not normed:
            return storage
        dy = self.storage(self.costs.bytes[slot], True)
        self.free(storage)
        return dy

    def take(self, number: int) -> None:
        """Go backward through one step."""
        step = self.program.steps[number]
        if isinstance(step, Conv):
            self.convolution(step)
        elif isinstance(step, Call):
            self.call(number, step)
        else:
            dz = self.image_gradient(step.out)
            if dz is not None:
                self.through(step.source, dz)
        self.clock += self.costs.backward[number]

    def convolution(self, step: Conv) -> None:
        """Go backward through a convolution."""
        kept = None if step.keep is None else self.image_gradient(step.keep)
        g, _ = self.output_gradient(step.out)
        if g is None:
            if kept is not None:
                self.through(_unresampled(step.sources[0]), kept)
            return
        wants_weight, last = self.of[step.weight], len(step.sources) - 1
        for number, source in enumerate(step.sources):
            asks = source_asks(self.program, source, self.asks, self.of)
            if wants_weight or (asks and not source.linear):
                for term in source.terms:
                    self.ensure(term.slot)
            gradient = None
            if wants_weight and number == last:
                self.parameter(step.weight)
            if asks:
                gradient = self.storage(self.costs.bytes[source.x.slot], True)
            self.free(kept)
            kept = None
            if number == last:
                self.free(g)
            if gradient is not None:
                self.spread(source, gradient)

    def parameter(self, number: int) -> None:
        """Make a gradient of a parameter, or add to it."""
        size = self.costs.parameters.get(number, 0)
        if number in self.graded:
            self.grow(2 * size)
            self.now -= 2 * size
        elif self.of[number]:
            self.graded.add(number)
            self.grow(size)

    def call(self, number: int, step: Call) -> None:
        """Go backward through a call, which is run again for it."""
        g = self.image_gradient(step.out)
        if g is None:
            return
        if not step.linear:
            for slot in step.slots:
                self.ensure(slot)
        out = self.storage(self.costs.bytes[step.out], True)
        found = [
            (slot, self.storage(self.costs.bytes[slot], False))
            for slot in step.slots
            if slot in self.asks
        ]
        self.free(out)
        self.free(g)
        for parameter in step.parameters:
            self.parameter(parameter)
        for slot, storage in found:
            self.add(slot, storage)

    def through(self, source: Source, dz: int) -> None:
        """Go backward through a source."""
        if not source_asks(self.program, source, self.asks, self.of):
            return self.free(dz)
        if source.linear:
            self.storages[dz][2] = False
            self.storages[dz][1] += len(source.terms) - 1
            for term in source.terms:
                self.add(term.slot, dz)
            return None
        for term in source.terms:
            self.ensure(term.slot)
        g = self.storage(self.costs.bytes[source.x.slot], True)
        self.free(dz)
        return self.spread(source, g)

    def spread(self, source: Source, g: int) -> None:
        """Give a sum's gradient to its terms."""
        self.storages[g][2] = len(source.terms) == 1 and source.x.norm is None
        self.storages[g][1] += len(source.terms) - 1
        for term in source.terms:
            if term.norm is None:
                self.add(term.slot, g)
            elif not term_asks(self.program, term, self.asks, self.of):
                self.free(g)
            elif (known := self.gradients.get((term.norm,))) is None:
                self.gradients[(term.norm,)] = g
            else:
                self.gradients[(term.norm,)] = self.storage(self.costs.bytes[term.slot], True)
                self.free(known)
                self.free(g)


def _unresampled(source: Source) -> Source:
    return Source(source.x, source.residual, source.act, source.slope)


# The search

_INFINITE = float("inf")
_WAYS = 4  # to go through a unit: to hold all, but the cheap, but the closing; to run it again


class _Leaf(NamedTuple):
    """A unit that holds what its backward reads, but for `dropped`.

    Attributes:
        held, flow, peak, seconds: as of `Outcome`, of the unit alone.
        tail: seconds of running it again so that what it holds is there.
    """

    dropped: frozenset[int]
    held: int
    flow: int
    peak: int
    seconds: float
    tail: float


class Way(NamedTuple):
    """A schedule of a program, and what it costs.

    Attributes:
        program: with the schedule, its writes not yet joined.
        joined: the writes to join.
        outcome: when they are.
    """

    program: Program
    joined: tuple[int, ...]
    outcome: Outcome


def frontier(
    costs: Costs,
    remote: Iterable[int] = (),
    *,
    several: bool = False,
    small: bool = False,
    grid: int = GRID,
    window: int = WINDOW,
    everywhere: bool = False,
) -> list[Way]:
    """Return schedules of costs.program, each the fastest of its peak; the fastest first.

    Args:
        costs: its program's own schedule does not matter.
        remote: slots to make again wherever they are read but near where they were made first.
        several: whether other programs run between the passes of this, so that what it holds
            matters beside its own peak; then all that were looked at are returned.
        small: whether only those of little memory matter.
        grid: of how many parts budgets are, to which bytes are rounded.
        window: the most parts of a range that is gone through as one unit.
        everywhere: whether ranges may be cut before any step, and not where little crosses alone.
    """
    search = _Search(costs, frozenset(remote), window, everywhere)
    found: dict[tuple[Program, tuple[int, ...]], Way] = {}

    def look(limit: int, load: int = 0) -> int:
        for program in search.programs(limit, grid, load):
            for joined in dict.fromkeys((_uncut(costs, program), ())):
                if (program, joined) not in found:
                    found[program, joined] = way_of(costs, program, joined)
        return min((way.outcome.most for way in found.values()), default=limit)

    plain = search.program.changed(dropped=(), remote=(), again=())
    for joined in (_uncut(costs, plain), ()):
        found[plain, joined] = way_of(costs, plain, joined)
    limit = max(1, *(way.outcome.most for way in found.values()))
    least = look(limit)
    for share in (1.25,) if small else (1.25, 3.0):
        if share * least < limit:
            least = min(least, look(int(share * least)))
    if several:
        for share in (0.25, 0.5, 0.75):
            look(limit, int(share * limit))
        return [*found.values()]
    return fastest(found.values())


def way_of(costs: Costs, program: Program, joined: tuple[int, ...] = ()) -> Way:
    """Return a program of these costs, with a schedule, as a way."""
    whole = program.joined(joined)
    return Way(program, joined, simulate(costs.joined(whole, joined) if joined else costs, whole))


def _uncut(costs: Costs, program: Program) -> tuple[int, ...]:
    """Return the writes that can be joined, for no stretch ends after them."""
    edges = {edge for stretch in program.again for edge in stretch}
    return tuple(sorted(write for write in costs.joins if write + 1 not in edges))


def fastest(found: Iterable[Way]) -> list[Way]:
    """Return those that no other is at least as good as in seconds and peak, the fastest first."""
    ladder: list[Way] = []
    for way in sorted(found, key=lambda w: (w.outcome.seconds, w.outcome.most, w.outcome.held)):
        if not ladder or way.outcome.most < ladder[-1].outcome.most:
            ladder.append(way)
    return ladder


class _Search:
    """Dynamic programming over the ranges of a program's steps, for all budgets at once.

    A vector has a number for each budget: the bytes that may be alive while backward goes through a
    range, in parts of `unit` bytes, but for what was held when the range began.

    Attributes:
        cuts: the numbers of the steps before which a range may end or begin.
        borrowing: whether each step has to do with a remote slot.
        repeated: for ranges by the positions of their cuts, the seconds of running them again and
            of what is made again then.
        choices: what to do with a range's first unit: _WAYS * its parts, and the way.
    """

    def __init__(
        self,
        costs: Costs,
        remote: frozenset[int],
        window: int,
        everywhere: bool,
    ):
        self.costs, self.program, self.weights = costs, costs.program, costs.bytes
        self.window, self.grid, self.unit = window, 1, 1
        plain = self.program.changed(dropped=(), remote=(), again=())
        schedule = plain.schedule(costs.needs)
        self.asks, self.reads = schedule.asks, schedule.reads
        self.remote = remote.difference(self.program.outputs)
        steps = len(self.program.steps)
        self.cuts = [*range(steps + 1)] if everywhere else self._cuts()
        self.cheap, self.closing = cheap(self.program), closing(self.program)
        self.borrowing = [
            not self.remote.isdisjoint((*read(step), *made(step), *self.reads[number]))
            for number, step in enumerate(self.program.steps)
        ]
        self.summed = [0.0, *accumulate(costs.again)]
        # A range that ends between a write and its convolution keeps them apart.
        self.apart = {write + 1: costs.saved(write) for write in costs.joins}
        self.repeated: dict[tuple[int, int], np.ndarray] = {}
        self.choices: dict[tuple[int, int], np.ndarray] = {}
        self._tails: dict[tuple[int, int], np.ndarray] = {}
        self._tail_choices: dict[tuple[int, int], np.ndarray] = {}
        self._leaves: dict[tuple[int, int], list[_Leaf]] = {}
        self._gradients: dict[int, int] = {}
        self._facts: dict[tuple[int, int], tuple[int, int]] = {}

    def _cuts(self) -> list[int]:
        """Return the steps before which the least crosses, but few where all is small."""
        steps, weights = self.program.steps, self.weights
        change = [0] * (len(steps) + 2)
        for slot, number in self.program.producers.items():
            change[number + 1] += weights[slot]
            change[max(self.program.last_reader.get(slot, number), number) + 1] -= weights[slot]
        crossing = list(accumulate(change))
        made_by = [sum(weights[slot] for slot in made(step)) for step in steps]
        least = sum(made_by) / 400
        cuts, since = [0], 0
        for number in range(1, len(steps)):
            since += made_by[number - 1]
            low = crossing[number] <= min(crossing[number - 1], crossing[number + 1])
            if low and (since >= least or made_by[number] >= least):
                cuts.append(number)
                since = 0
        return [*cuts, len(steps)]

    # Vectors

    def _parts(self, size: int) -> int:
        return (size + self.unit // 2) // self.unit

    def _shifted(self, vector: np.ndarray, size: int) -> np.ndarray:
        """Return a vector where `size` bytes less are there for each budget."""
        parts = self._parts(size)
        result = np.full(self.grid + 1, _INFINITE)
        if parts <= self.grid:
            result[parts:] = vector[: self.grid + 1 - parts]
        return result

    def _fitting(self, peak: int, seconds: float = 0.0) -> np.ndarray:
        """Return `seconds` for the budgets that a peak fits into."""
        result = np.full(self.grid + 1, _INFINITE)
        result[self._parts(peak) :] = seconds
        return result

    def programs(self, limit: int, grid: int, load: int = 0) -> Iterator[Program]:
        """Yield the program in the fastest way for budgets of which each allows a faster one.

        limit: the largest budget; grid: its parts; load: bytes to be free when all is held.
        """
        self.grid, self.unit = grid, max(1, round(limit / grid))
        last = len(self.cuts) - 1
        for first in range(last - 1, -1, -1):
            for to in range(first + 1, min(first + self.window, last) + 1):
                self._repeat(first, to)
        rest: list[np.ndarray | None] = [None] * last
        rest.append(self._fitting(load))
        taken: list[np.ndarray | None] = [None] * (last + 1)
        for first in range(last - 1, -1, -1):
            ways: dict[int, np.ndarray] = {}
            for to in range(first + 1, min(first + self.window, last) + 1):
                following = rest[to] + self.apart.get(self.cuts[to], 0.0)
                held, flow = self._streamed(first, to)
                later = self._shifted(following, held)
                ways[_WAYS * (to - first) + 3] = self.repeated[first, to] + later
                if not any(self.borrowing[self.cuts[first] : self.cuts[to]]):
                    for way, leaf in enumerate(self.leaves(first, to)):
                        later = self._shifted(following, leaf.held)
                        fits = self._fitting(max(leaf.flow, leaf.peak), leaf.seconds)
                        ways[_WAYS * (to - first) + way] = fits + later
            rest[first], taken[first] = _best(ways)
        seconds, before, budget = rest[0], _INFINITE, 0
        while budget <= self.grid:
            if seconds[budget] < before:
                before = seconds[budget]
                yield self._program(taken, budget)
                budget += max(1, self.grid // LOOKS)
            else:
                budget += 1

    def _repeat(self, first: int, last: int) -> None:
        """Work out a range that is run again as a whole, and as a chain's end inside such a one.

        In `tails` are the seconds of what is made again in a chain's units, and of running them so
        that what they hold is there. The last of them need not run if it is itself run again.
        """
        start, stop = self.cuts[first], self.cuts[last]
        gradients = self._gradients_at(stop)
        ways: dict[int, np.ndarray] = {}
        for to in range(first + 1, last + 1):
            again = self.summed[self.cuts[to]] - self.summed[start]
            held, flow = self._streamed(first, to)
            leaves = self.leaves(first, to)
            if to == last:
                for way, leaf in enumerate(leaves):
                    peak = max(gradients + leaf.flow, leaf.peak)
                    fits = self._fitting(peak, leaf.seconds + leaf.tail)
                    ways[_WAYS * (to - first) + way] = fits
                continue
            following = self._tails[to, last] + self.apart.get(self.cuts[to], 0.0)
            fits = self._fitting(gradients + flow, again)
            later = self._shifted(following, held)
            ways[_WAYS * (to - first) + 3] = self.repeated[first, to] + fits + later
            for way, leaf in enumerate(leaves):
                fits = self._fitting(max(gradients + leaf.flow, leaf.peak), leaf.seconds + again)
                later = self._shifted(following, leaf.held)
                ways[_WAYS * (to - first) + way] = fits + later
        inside, choice = _best(ways)
        held, flow = self._streamed(first, last)
        whole = inside + self._fitting(max(flow, held))
        self.repeated[first, last], self.choices[first, last] = whole, choice
        again = _WAYS * (last - first) + 3
        self._tails[first, last] = np.minimum(whole, inside)
        self._tail_choices[first, last] = np.where(whole < inside, again, choice)

    def leaves(self, first: int, last: int) -> list[_Leaf]:
        """Return a range that holds what its backward reads, in the ways to do so; or none."""
        key = first, last
        if key in self._leaves:
            return self._leaves[key]
        found: list[_Leaf] = []
        start, stop = self.cuts[first], self.cuts[last]
        steps = self.program.steps[start:stop]
        inside = frozenset(slot for step in steps for slot in made(step))
        wanted = {slot for number in range(start, stop) for slot in self.reads[number]}
        exports = self._exports(start, stop)
        ways = (frozenset(), self.cheap & inside - exports, self.closing & inside - exports)
        for dropped in dict.fromkeys(ways) if last - first <= LEAF else ():
            held = {*expanded(self.program, wanted, dropped) & inside, *exports}
            walk = self._walk(start)
            walk.forward(start, stop, held)
            flow = walk.peak
            walk = self._walk(start)
            for slot in held:
                walk.put(slot)
            size = walk.now
            walk.begin(stop)
            walk.steps(start, stop, ())
            tail = self._rerun(start, stop, held - exports)
            found.append(_Leaf(dropped, size, flow, walk.peak, walk.seconds, tail))
        self._leaves[key] = found
        return found

    def _walk(self, since: int) -> Walked:
        return Walked(self.costs, self.asks, self.reads, since, self.remote)

    def _rerun(self, start: int, stop: int, wanted: Iterable[int]) -> float:
        """Return the seconds of making slots inside a range again."""
        steps: set[int] = set()
        pending = list(wanted)
        while pending:
            number = self.program.producers.get(pending.pop(), -1)
            if start <= number < stop and number not in steps:
                steps.add(number)
                pending += read(self.program.steps[number])
        return sum(self.costs.again[number] for number in steps)

    def _exports(self, start: int, stop: int) -> frozenset[int]:
        """Return what a range makes for later steps, which is held for them."""
        return frozenset(
            slot
            for step in self.program.steps[start:stop]
            for slot in made(step)
            if self.program.last_reader.get(slot, -1) >= stop and slot not in self.remote
        )

    def _streamed(self, first: int, last: int) -> tuple[int, int]:
        """Return the bytes that leave a range, and the peak of running it where no other stays."""
        key = first, last
        if key not in self._facts:
            start, stop = self.cuts[first], self.cuts[last]
            exports = self._exports(start, stop)
            walk = self._walk(start)
            walk.forward(start, stop, {*exports})
            self._facts[key] = sum(self.weights[slot] for slot in exports), walk.peak
        return self._facts[key]

    def _gradients_at(self, stop: int) -> int:
        """Return the bytes of the gradients that are there when backward comes to a step."""
        if stop not in self._gradients:
            walk = self._walk(0)
            walk.begin(stop)
            self._gradients[stop] = walk.now
        return self._gradients[stop]

    def _program(self, taken: Sequence[np.ndarray | None], budget: int) -> Program:
        """Return the program with the schedule that was found for a budget."""
        again: set[tuple[int, int]] = set()
        dropped: set[int] = set()

        def unit(first: int, code: int, budget: int) -> tuple[int, int]:
            """Note a unit; return where it ends and the budget of what follows."""
            to, way = first + code // _WAYS, code % _WAYS
            if way == 3:
                again.add((self.cuts[first], self.cuts[to]))
                inside(first, to, budget)
                return to, budget - self._parts(self._streamed(first, to)[0])
            leaf = self.leaves(first, to)[way]
            dropped.update(leaf.dropped)
            return to, budget - self._parts(leaf.held)

        def inside(first: int, last: int, budget: int) -> None:
            """Note the units of a range that is run again."""
            table = self.choices
            while first < last:
                first, budget = unit(first, int(table[first, last][budget]), budget)
                table = self._tail_choices

        first = 0
        while first < len(self.cuts) - 1:
            first, budget = unit(first, int(taken[first][budget]), budget)
        return self.program.changed(
            dropped=tuple(sorted(dropped)),
            remote=tuple(sorted(self.remote)),
            again=tuple(sorted(again)),
        )


def _best(ways: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the least of several vectors, and where it is from."""
    codes, vectors = np.array(list(ways), dtype=np.int16), np.stack(list(ways.values()))
    choice = vectors.argmin(0)
    return np.take_along_axis(vectors, choice[None], 0)[0], codes[choice]
