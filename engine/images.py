"""What running a program a few images at a time takes: the parts of a batch one after another.

Of a schedule, everything is said of one part; the parts' outputs and inputs' gradients are copied
into whole tensors, and parameters' gradients are added up. So memory hardly grows with the batch
beyond what enters and leaves, for the time of one more forward pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..ops.program import Program
from .cards import Hardware
from .schedule import Costs, Outcome, Walked, Way, walked


@dataclass(frozen=True)
class Parts:
    """A program's costs by parts of the batch.

    Attributes:
        images: of a part; the last may have fewer.
        whole: the costs of all images at once.
        one: those of a part.
        last: those of the last part.
        count: how many parts there are, two or more.
        hardware: whose rates copies take.
    """

    images: int
    whole: Costs
    one: Costs
    last: Costs
    count: int
    hardware: Hardware

    def way(self, way: Way) -> Way:
        """Return a way of the whole as one by parts: each part goes through it by itself."""
        program = way.program.changed(images=self.images)
        return Way(program, way.joined, self.outcome(program, way.joined))

    def walks(self, program: Program, joined: Sequence[int]) -> list[tuple[int, Walked]]:
        """Return what happens in the first part, those like the second, and the last: how often."""
        program = program.joined(joined)
        outputs = dict.fromkeys(program.outputs, 0)  # their gradients are views, but in the last

        def of(costs: Costs, graded: Iterable[int]) -> Walked:
            return walked(costs.joined(program, joined) if joined else costs, program, graded)

        first = of(replace(self.one, given=outputs), ())
        found = [(1, first)]
        if self.count > 2:
            between = of(replace(self.one, given=outputs), first.graded)
            found.append((self.count - 2, between))
        found.append((1, of(replace(self.last, given=self._given(program)), first.graded)))
        return found

    def outcome(self, program: Program, joined: Sequence[int]) -> Outcome:
        """Return what a schedule of a part costs, all parts together."""
        walks, whole, one = self.walks(program, joined), self.whole, self.one
        asking = [slot for slot in range(program.inputs) if whole.needs[slot]]
        outputs = sum(whole.bytes[slot] for slot in program.outputs)
        inputs = sum(whole.bytes[slot] for slot in asking)
        given = sum(self._given(program).values())
        first, last = walks[0][1], walks[-1][1]
        graded = sum(one.parameters.get(number, 0) for number in first.graded)
        # Whole tensors are made when the first part has ended.
        flow = [first.outcome.flow, outputs + sum(one.bytes[slot] for slot in program.outputs)]
        peak = [given + first.outcome.peak]
        peak += [given + graded + inputs + sum(one.bytes[slot] for slot in asking)]
        for _, walk in walks[1:]:
            flow.append(outputs + walk.outcome.flow)
            held = inputs if walk is last else inputs + given
            peak.append(held + walk.outcome.peak)
        seconds = sum(times * walk.outcome.seconds for times, walk in walks)
        seconds += 2 * (outputs + inputs) / self.hardware.copy
        seconds += (self.count - 1) * 3 * graded / self.hardware.copy
        copies = self.count * (len(program.outputs) + len(asking))
        sums = (self.count - 1) * len(first.graded)
        seconds += (copies + sums) * self.hardware.launch
        return Outcome(0, max(flow), max(peak), seconds)

    def _given(self, program: Program) -> dict[int, int]:
        """Return the bytes of the gradients that outputs come with."""
        asks = program.schedule(self.whole.needs).asks
        whole = self.whole
        return {s: whole.given.get(s, whole.bytes[s]) for s in program.outputs if s in asks}


def part_sizes(images: int) -> list[int]:
    """Return the numbers of images to run at a time, of so many: powers of two."""
    return [1 << power for power in range(max(0, images - 1).bit_length()) if 1 << power < images]
