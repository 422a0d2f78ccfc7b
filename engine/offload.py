"""Which of the maps that a schedule holds wait in host memory, when they leave and return.

Making a map again takes a card far less time than moving it: so what counts is that copies run
beside computation. A slot's copy begins when it is made; it leaves the device at the first place
of the forward pass, after its last reader there, by which the copies before it and its own should
be done, or at the end, where computation then waits. It returns as late as leaves time for its copy
and for those of the slots that are read after it; or as backward begins, and computation waits. One
that is read again much later leaves meanwhile, which takes no other copy than the one back.

The slots that leave first return last: so the first of them gain most, and how many do is the only
choice.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from ..ops.program import Call, Program, Stay
from .schedule import Costs, Walked, Way, walked, way_of

LEAST = 0.01  # of what is held: a smaller slot stays
WORTH = 3  # times as long as its copy takes, a slot is not read: then it leaves again


def movable(costs: Costs) -> frozenset[int]:
    """Return the slots of a program that may wait in host memory, if they are held."""
    program = costs.program
    # What a call makes may be a view of what stays.
    slots = {
        slot
        for slot, number in program.producers.items()
        if not isinstance(program.steps[number], Call)
    }
    return frozenset(slots).difference(program.outputs)


class Leaving:
    """A way whose slots may wait in host memory.

    Attributes:
        slots: that may, in the order in which they can leave.
    """

    def __init__(self, costs: Costs, way: Way):
        """Look at what the way holds and when."""
        self.costs, self.way = costs, way
        program = self._program = way.program.joined(way.joined)
        kept = movable(costs).intersection(program.schedule(costs.needs).kept)
        least = LEAST * sum(costs.bytes[slot] for slot in kept)
        large = [slot for slot in kept if costs.bytes[slot] >= least]
        self.slots = sorted(large, key=lambda slot: (_unread(program, slot), slot))
        # When all is where it is wanted: nobody waits, and a slot returns when it is read.
        on_demand = tuple(Stay(slot, _unread(program, slot), 0) for slot in self.slots)
        there = costs.joined(program, way.joined) if way.joined else costs
        there = replace(there, host=float("inf"))
        self._walk = walked(there, program.changed(offloaded=on_demand))
        self._places = _before_joining(len(way.program.steps), way.joined)
        self._known: dict[int, Way] = {0: way}

    def way_with(self, count: int) -> Way:
        """Return the way with the first so many slots in host memory."""
        if count not in self._known:
            stays = tuple(
                Stay(stay.slot, self._places[stay.leaves], self._places[stay.returns])
                for stay in _stays(self.costs, self._program, self._walk, self.slots[:count])
            )
            program = self.way.program.changed(offloaded=stays)
            self._known[count] = way_of(self.costs, program, self.way.joined)
        return self._known[count]


def _unread(program: Program, slot: int) -> int:
    """Return the place of the forward pass after which nobody reads a slot."""
    return max(program.producers[slot], program.last_reader.get(slot, -1)) + 1


def _stays(costs: Costs, program: Program, walk: Walked, slots: Sequence[int]) -> list[Stay]:
    """Return when slots leave and return, by the clock of a walk; first who returns first."""
    seconds = {slot: costs.bytes[slot] / costs.host for slot in slots}
    leaves, bus = {}, 0.0
    for slot in sorted(slots, key=lambda slot: program.producers[slot]):
        bus = max(bus, walk.places[program.producers[slot] + 1]) + seconds[slot]
        done = bisect_left(walk.places, bus)
        leaves[slot] = min(max(done, _unread(program, slot)), len(program.steps))
    places, times = zip(*walk.arrivals, strict=True)
    asked = []  # (when, slot, the place where it leaves before)
    for slot in slots:
        asked.append((walk.asked[slot][0], slot, leaves[slot]))
        for before, after in pairwise(walk.asked[slot]):
            if after - before > WORTH * seconds[slot]:
                asked.append((after, slot, places[bisect_right(times, before)]))
    stays, until = [], walk.clock
    for when, slot, left in sorted(asked, reverse=True):
        until = min(until, when) - seconds[slot]
        returns = places[max(0, bisect_right(times, until) - 1)]
        stays.append(Stay(slot, left, returns))
    return stays[::-1]


def _before_joining(steps: int, joined: Sequence[int]) -> list[int]:
    """Return the places that a program of so many steps has before writes are joined, by place."""
    places: dict[int, int] = {}
    for place in range(steps + 1):
        places.setdefault(place - bisect_left(joined, place), place)
    return [places[place] for place in range(len(places))]
