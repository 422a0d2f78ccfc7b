"""How backward goes through a program: what it makes again and when, what returns, what it lets go.

This order is kept once, for who runs it, with images (ops/segment.py), and for who counts what it
will take, with numbers in their place (engine/schedule.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, MutableMapping, MutableSet, Sequence

from .program import Program, Stay, Stretch, made, read


class Walk(ABC):
    """A backward pass of a program, step by step from the last.

    Attributes:
        reads: of `Schedule`.
        values: the slots that are there.
        away: the slots that are on the host.
    """

    def __init__(
        self,
        program: Program,
        reads: Sequence[frozenset[int]],
        values: MutableMapping[int, object] | MutableSet[int],
        stays: Sequence[Stay] = (),
    ):
        """Begin at the end of the program; stays: as of `Schedule`."""
        self.program, self.reads, self.values = program, reads, values
        self.away = {stay.slot for stay in stays}
        later = [
            stay for n, stay in enumerate(stays) if any(s.slot == stay.slot for s in stays[:n])
        ]
        # Of both, what is next is the last.
        self._leaving = sorted(later, key=lambda stay: stay.leaves)
        self._returning = sorted(reversed(stays), key=lambda stay: stay.returns)
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

    @abstractmethod
    def prefetch(self, slot: int) -> None:
        """Begin to copy a slot back that is away, unless that has begun."""

    @abstractmethod
    def fetch(self, slot: int, last: bool) -> None:
        """Put a slot that is away into `values`; last: whether it does not go there again."""

    def has(self, slot: int) -> bool:
        """Whether a slot is there."""
        return slot in self.values

    def ensure(self, slot: int) -> None:
        """Fetch a slot, or make it again, where it is not there."""
        if self.has(slot):
            return
        if slot in self.away:
            self._return(slot)
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
        for slot in made(self.program.steps[number]):
            if slot in self.away:  # rather than make it, too
                self._return(slot)
        before = {slot for slot in made(self.program.steps[number]) if slot in self.values}
        self.execute(number)
        return [slot for slot in made(self.program.steps[number]) if slot not in before]

    def again(self, stretch: Stretch) -> None:
        """Run a stretch again, so that what its backward reads is there."""
        known = {*self.values, *self.away}
        wanted = [slot for slot in stretch.held if slot not in known]
        steps: set[int] = set()
        while wanted:
            number = self.program.producers[wanted.pop()]
            if number in steps:
                continue
            steps.add(number)
            wanted += [
                slot
                for slot in read(self.program.steps[number])
                if slot not in known
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

    def arrive(self, place: int) -> None:
        """Note that backward has come to a place: the steps behind it are done."""
        while self._leaving and self._leaving[-1].leaves >= place:
            slot = self._leaving.pop().slot
            if slot in self.values:
                self.drop(slot)
                self.away.add(slot)
        while self._returning and self._returning[-1].returns >= place:
            slot = self._returning.pop().slot
            if slot in self.away:
                self.prefetch(slot)

    def _return(self, slot: int) -> None:
        self.away.remove(slot)
        self.fetch(slot, last=all(stay.slot != slot for stay in self._leaving))

    def steps(self, start: int, stop: int, inner: Sequence[Stretch]) -> None:
        """Go through steps from the last to the first, running `inner` again on the way."""
        stretches = {stretch.stop: stretch for stretch in inner}
        own = set(range(start, stop)).difference(*(range(s.start, s.stop) for s in inner))
        readers: dict[int, int] = {}  # the step at which a slot is read for the last time
        for number in sorted(own, reverse=True):
            readers |= dict.fromkeys(self.reads[number], number)
        number = stop
        while number > start:
            self.arrive(number)
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
                self.away.discard(slot)
                self.drop(slot)
            # What was made again for this step goes, unless an earlier one here reads it too.
            kept = [slot for slot in self._fresh if readers.get(slot, number) < number]
            for slot in {*self._fresh} - {*kept}:
                self.drop(slot)
            self._fresh = kept
