"""How backward goes through a program: what it makes again and when, and what it lets go.

This order is kept once, for who runs it, with images (ops/segment.py), and for who counts what it
will take, with numbers in their place (engine/schedule.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, MutableMapping, MutableSet, Sequence

from .program import Program, Stretch, made, read


class Walk(ABC):
    """A backward pass of a program, step by step from the last.

    Attributes:
        reads: of `Schedule`.
        values: the slots that are there.
    """

    def __init__(
        self,
        program: Program,
        reads: Sequence[frozenset[int]],
        values: MutableMapping[int, object] | MutableSet[int],
    ):
        """Begin at the end of the program."""
        self.program, self.reads, self.values = program, reads, values
        self._fresh: list[int] = []  # slots that were made again when they were asked for
        self._asked: Collection[int] = ()  # what the step under way reads

    @abstractmethod
    def execute(self, number: int) -> None:
        """Put what a step makes into `values`; what it reads is there."""

    @abstractmethod
    def take(self, number: int) -> None:
        """Take the gradient of what a step makes to what it reads, calling `ensure` for slots."""

    @abstractmethod
    def drop(self, slot: int) -> None:
        """Take a slot out of `values`, if it is there."""

    def has(self, slot: int) -> bool:
        """Whether a slot is there."""
        return slot in self.values

    def ensure(self, slot: int) -> None:
        """Make a slot again, where it is not held."""
        if self.has(slot):
            return
        number, known = self.program.producers[slot], len(self._fresh)
        for each in read(self.program.steps[number]):
            self.ensure(each)
        self._fresh += self._executed(number)
        for each in self._fresh[known:]:
            if each != slot and each not in self._asked:  # only needed to make this one
                self.drop(each)

    def _executed(self, number: int) -> list[int]:
        """Run a step again; return the slots that were not there."""
        before = {slot for slot in made(self.program.steps[number]) if slot in self.values}
        self.execute(number)
        return [slot for slot in made(self.program.steps[number]) if slot not in before]

    def again(self, stretch: Stretch) -> None:
        """Run a stretch again, so that what its backward reads is there."""
        wanted = [slot for slot in stretch.held if slot not in self.values]
        steps: set[int] = set()
        while wanted:
            number = self.program.producers[wanted.pop()]
            if number in steps:
                continue
            steps.add(number)
            wanted += [
                slot
                for slot in read(self.program.steps[number])
                if slot not in self.values
                and stretch.start <= self.program.producers.get(slot, -1) < stretch.stop
            ]
        held, order = {*self.values, *stretch.held}, sorted(steps)
        last = {slot: n for n in order for slot in read(self.program.steps[n])}
        outer, self._fresh = self._fresh, []
        for number in order:
            self._asked = {*read(self.program.steps[number])}
            for slot in self._asked:
                self.ensure(slot)
            self._fresh += self._executed(number)
            for slot in self._fresh:
                if slot not in held and last.get(slot, -1) <= number:
                    self.drop(slot)
        self._fresh = outer

    def steps(self, start: int, stop: int, inner: Sequence[Stretch]) -> None:
        """Go through steps from the last to the first, running `inner` again on the way."""
        stretches = {stretch.stop: stretch for stretch in inner}
        own = set(range(start, stop)).difference(*(range(s.start, s.stop) for s in inner))
        readers: dict[int, int] = {}  # the step at which a slot is read for the last time
        for number in sorted(own, reverse=True):
            readers |= dict.fromkeys(self.reads[number], number)
        number = stop
        while number > start:
            if number in stretches:
                stretch = stretches[number]
                self.again(stretch)
                self.steps(stretch.start, stretch.stop, stretch.inner)
                number = stretch.start
                continue
            number -= 1
            self._asked = self.reads[number]
            self.take(number)
            for slot in made(self.program.steps[number]):  # nobody before it reads what it made
                self.drop(slot)
            # What was made again for this step goes, unless an earlier one here reads it too.
            kept = [slot for slot in self._fresh if readers.get(slot, number) < number]
            for slot in {*self._fresh} - {*kept}:
                self.drop(slot)
            self._fresh = kept
