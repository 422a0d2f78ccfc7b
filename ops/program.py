"""A segment's program: a straight line of fused layers over slots, and what its backward needs.

Slots are images: the inputs, raw outputs of convolutions, and images written out because several
steps read them. Normalisations, activations, sums, pooling and enlargement are no steps; they are
in the `Source` through which a later step reads a slot. What torch's own operators do between is a
`Call`.

A program says what it computes, and what of it is held for backward: all that its gradients need,
but slots in `dropped`, which are made again where they are read; those in `remote`, which are so
outside of the stretch that makes them; and what is made inside a stretch of `again`, which backward
runs once more before it goes through it. Some of what is held may be `offloaded` meanwhile. Where
each image is computed by itself, the batch may be gone through a few `images` at a time: then only
inputs are held, and what else is said is of one such part. `schedule` works that out.
"""

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Term:
    """A slot as a source reads it: as it is, or through the norm of this number."""

    slot: int
    norm: int | None = None


@dataclass(frozen=True)
class Source:
    """resample(act(x + residual)): see `fuse.Prologue`."""

    x: Term
    residual: Term | None = None
    act: str = "none"
    slope: float = 0.01
    resample: str = "none"

    @property
    def terms(self) -> tuple[Term, ...]:
        """Return x and, where there is one, the residual."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def bare(self) -> bool:
        """Whether this is a slot as it is."""
        return self == Source(Term(self.x.slot), slope=self.slope)

    @property
    def linear(self) -> bool:
        """Whether this is a slot as it is, or the sum of two: its gradient is that of each."""
        return self.act == self.resample == "none" and all(t.norm is None for t in self.terms)


@dataclass(frozen=True)
class Conv:
    """out = a convolution of one source or of two, their channels joined.

    weight and bias are numbers of parameters. keep: a slot that the first source's activated value
    is written to.
    """

    sources: tuple[Source, ...]
    weight: int
    bias: int | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    out: int
    keep: int | None = None


@dataclass(frozen=True)
class Write:
    """out = a source."""

    source: Source
    out: int

    @property
    def sources(self) -> tuple[Source, ...]:
        """Return the source, as `Conv` has several."""
        return (self.source,)


@dataclass(frozen=True)
class Call:
    """out = function(*images, *layers), by torch's own operators, which backward runs once more.

    Attributes:
        function: without side effects.
        slots: the images that it takes.
        layers: numbers of the layers that it takes then.
        parameters: the numbers of these layers' parameters.
        out: the slot that it makes.
        linear: whether its gradient depends on the images' sizes alone, and not on their values.
        random: whether it draws random numbers; backward draws the same.
        cast: whether its value is an image that a fused step reads, and so of their dtype.
        apart: the least rank of its images from which on it computes the rows of dimension 0 each
            by itself, if all are of one rank; 0 if it may mix them.
    """

    function: Callable[..., Tensor]
    slots: tuple[int, ...]
    layers: tuple[int, ...]
    parameters: tuple[int, ...]
    out: int
    linear: bool = False
    random: bool = False
    cast: bool = True
    apart: int = 0

    @property
    def sources(self) -> tuple[Source, ...]:
        """Return the images, each as it is."""
        return tuple(Source(Term(slot)) for slot in self.slots)


Step = Conv | Write | Call


class Stay(NamedTuple):
    """A slot's stay in host memory; the places are the numbers of the steps that come after them.

    Attributes:
        slot: which; it is copied when it is made.
        leaves: the device has it until forward comes to this place, or for another than a slot's
            first stay, backward.
        returns: its copy back begins when backward comes to this place, or when it is read.
    """

    slot: int
    leaves: int
    returns: int


@dataclass(frozen=True)
class Norm:
    """A batch normalisation of a slot; the rest are numbers of parameters, or None."""

    slot: int
    weight: int | None = None
    bias: int | None = None
    running_mean: int | None = None
    running_var: int | None = None


@dataclass(frozen=True)
class Program:
    """Steps in the order in which they run; the first slots are the inputs.

    Attributes:
        parameters: how many there are.
        outputs: the slots that are returned.
        names: of the steps: the modules that they were.
        dropped: slots that are never held for backward, but made again when it reads them.
        remote: slots that no other than a stretch that makes them holds.
        again: stretches of steps (start, stop), which may nest but not overlap otherwise. Backward
            comes to a stretch from behind, runs it again, and goes through it.
        offloaded: where slots wait in host memory, if they are held for backward; what is to be
            back first comes first.
        images: how many go through forward, and then through backward, at a time; 0 for all.
            Where they cannot, for a norm is of the batch or a call mixes them, all go at once.
        text: the program as JSON, from which `parsed` makes it again; none where it has calls.
        norms_of: the numbers of each slot's norms.
        producers: the number of the step that makes each slot but the inputs.
        last_reader: the number of the last step that reads a slot.
        convolution_parameters: the numbers of weights and biases, and of calls' parameters.
    """

    inputs: int
    parameters: int
    steps: tuple[Step, ...]
    norms: tuple[Norm, ...]
    outputs: tuple[int, ...]
    names: tuple[str, ...] = ()
    dropped: tuple[int, ...] = ()
    remote: tuple[int, ...] = ()
    again: tuple[tuple[int, int], ...] = ()
    offloaded: tuple[Stay, ...] = ()
    images: int = 0
    _schedules: dict[tuple[bool, ...], "Schedule"] = field(
        default_factory=dict, repr=False, compare=False
    )
    # What follows from the steps alone, and is the same whatever the schedule.
    _facts: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        """Work out what every run asks, once, so that torch.compile reads constants."""
        if not self._facts:
            norms_of: dict[int, list[int]] = {}
            for number, norm in enumerate(self.norms):
                norms_of.setdefault(norm.slot, []).append(number)
            reads = [
                (slot, number) for number, step in enumerate(self.steps) for slot in read(step)
            ]
            self._facts["norms_of"] = norms_of
            self._facts["producers"] = {
                s: i for i, step in enumerate(self.steps) for s in made(step)
            }
            self._facts["last_reader"] = dict(reads)
            self._facts["convolution_parameters"] = {
                number for step in self.steps for number in parameters_of(step)
            }
        for name in ("norms_of", "producers", "last_reader", "convolution_parameters"):
            object.__setattr__(self, name, self._facts[name])
        if not any(isinstance(step, Call) for step in self.steps):
            plain = {name: getattr(self, name) for name in _PLAIN}
            if "steps" not in self._facts:
                self._facts["steps"] = {
                    "steps": [asdict(step) for step in self.steps],
                    "norms": [asdict(norm) for norm in self.norms],
                    "kinds": [type(step).__name__ for step in self.steps],
                }
            object.__setattr__(self, "text", json.dumps(plain | self._facts["steps"]))

    def __deepcopy__(self, memo: dict) -> "Program":
        """Return itself: nothing of it changes."""
        return self

    @property
    def signature(self) -> str:
        """Return what tells it from other programs, whatever their schedules."""
        told = [self.inputs, self.parameters, self.outputs, self.norms]
        for step in self.steps:
            code = getattr(getattr(step, "function", None), "text", "")
            # What follows from the code is not told twice.
            rest = {k: v for k, v in vars(step).items() if k not in ("function", "apart")}
            told.append((type(step).__name__, code, sorted(rest.items())))
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def changed(self, **changes: Any) -> "Program":
        """Return the program with other `dropped`, `remote`, `again`, `offloaded` or `images`."""
        return replace(self, **changes, _schedules={})

    def joinable(self) -> frozenset[int]:
        """Return the numbers of the writes that the convolution right after them can do."""
        found = set()
        for number, (step, after) in enumerate(pairwise(self.steps)):
            if isinstance(step, Write) and isinstance(after, Conv) and after.keep is None:
                others = [slot for source in after.sources[1:] for slot in _slots(source)]
                bare = after.sources[0].bare and after.sources[0].x.slot == step.out
                if bare and step.source.resample == "none" and step.out not in others:
                    found.add(number)
        return frozenset(found)

    def joined(self, writes: Iterable[int]) -> "Program":
        """Return the program where convolutions do these writes as they read what is written.

        Raises:
            ValueError: a write is not joinable, or a stretch ends between it and its convolution,
                or a slot leaves or returns there.
        """
        writes = frozenset(writes)
        edges = {edge for stretch in self.again for edge in stretch}
        edges |= {place for stay in self.offloaded for place in stay[1:]}
        if not writes <= self.joinable() or any(number + 1 in edges for number in writes):
            raise ValueError(f"writes: want some that can be joined, got {sorted(writes)}")
        if not writes:
            return self
        steps: list[Step] = []
        names: list[str] = []
        position = []
        for number, step in enumerate(self.steps):
            position.append(len(steps))
            if number in writes:
                continue
            if number - 1 in writes:
                write = self.steps[number - 1]
                sources = (write.source, *step.sources[1:])
                step = replace(step, sources=sources, keep=write.out)
            steps.append(step)
            names += self.names[number : number + 1]
        position.append(len(steps))
        again = tuple((position[start], position[stop]) for start, stop in self.again)
        offloaded = tuple(Stay(s, position[a], position[b]) for s, a, b in self.offloaded)
        return replace(
            self, steps=tuple(steps), names=tuple(names), again=again, offloaded=offloaded,
            _schedules={}, _facts={},
        )  # fmt: skip

    def schedule(self, needs: Sequence[bool]) -> "Schedule":
        """Return what backward needs and when.

        needs: whether each input and parameter asks for a gradient.
        """
        key = tuple(needs)
        if key not in self._schedules:
            self._schedules[key] = _schedule(self, key)
        return self._schedules[key]


_PLAIN = (
    "inputs", "parameters", "outputs", "names", "dropped", "remote", "again", "offloaded", "images",
)  # fmt: skip


@cache
def parsed(text: str) -> Program:
    """Return the program of a `Program.text`."""
    raw = json.loads(text)

    def source(s: dict) -> Source:
        residual = s["residual"] and Term(**s["residual"])
        return Source(**{**s, "x": Term(**s["x"]), "residual": residual})

    def step(s: dict, kind: str) -> Step:
        if kind == "Write":
            return Write(source(s["source"]), s["out"])
        pairs = {name: tuple(s[name]) for name in ("stride", "padding", "dilation")}
        return Conv(**{**s, **pairs, "sources": tuple(source(each) for each in s["sources"])})

    kinds = raw.pop("kinds")
    raw["steps"] = tuple(step(s, kind) for s, kind in zip(raw["steps"], kinds, strict=True))
    raw["norms"] = tuple(Norm(**n) for n in raw["norms"])
    raw["again"] = tuple(tuple(stretch) for stretch in raw["again"])
    raw["offloaded"] = tuple(Stay(*stay) for stay in raw["offloaded"])
    lists = ("outputs", "names", "dropped", "remote")
    return Program(**raw | {name: tuple(raw[name]) for name in lists})


def made(step: Step) -> Iterator[int]:
    """Yield the slots that a step makes."""
    yield step.out
    if isinstance(step, Conv) and step.keep is not None:
        yield step.keep


def _slots(source: Source) -> list[int]:
    return [term.slot for term in source.terms]


def read(step: Step) -> Iterator[int]:
    """Yield the slots that a step reads."""
    for source in step.sources:
        for term in source.terms:
            yield term.slot


def parameters_of(step: Step) -> tuple[int, ...]:
    """Return the numbers of the parameters that a step reads, but those of norms."""
    if isinstance(step, Conv):
        return (step.weight,) if step.bias is None else (step.weight, step.bias)
    return step.parameters if isinstance(step, Call) else ()


# Whoever meters a program adds a list here; its last item names the module that runs.
watchers: list[list[str]] = []


# What backward needs


@dataclass(frozen=True)
class Stretch:
    """Steps that backward runs again: numbers start to stop - 1.

    Attributes:
        held: the slots made inside that are held then, until backward has gone through.
        outside: the slots made before that it reads, itself or to make others again.
        inner: stretches inside it.
    """

    start: int
    stop: int
    held: frozenset[int]
    outside: frozenset[int]
    inner: tuple["Stretch", ...]


@dataclass(frozen=True)
class Schedule:
    """What the backward pass of a program needs, where these inputs and parameters ask.

    Attributes:
        asks: the slots whose gradient somebody upstream asks for.
        reads: the slots that each step's backward reads.
        kept: the slots to keep on the device from forward to backward, in order.
        stretches: the outermost stretches that are run again.
        stays: of the slots that are kept on the host instead.
    """

    asks: frozenset[int]
    reads: tuple[frozenset[int], ...]
    kept: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    stays: tuple[Stay, ...] = ()


def term_asks(program: Program, term: Term, asks: Iterable[int], of: Sequence[bool]) -> bool:
    """Whether a term's gradient is asked for; `of`: which parameters ask."""
    if term.slot in asks:
        return True
    if term.norm is None:
        return False
    norm = program.norms[term.norm]
    return any(index is not None and of[index] for index in (norm.weight, norm.bias))


def source_asks(program: Program, source: Source, asks: Iterable[int], of: Sequence[bool]) -> bool:
    """Whether the gradient of one of a source's terms is asked for."""
    return any(term_asks(program, term, asks, of) for term in source.terms)


def _asking_slots(program: Program, needs: Sequence[bool]) -> frozenset[int]:
    of = needs[program.inputs :]
    asks = {slot for slot in range(program.inputs) if needs[slot]}
    for step in program.steps:
        wanted = [source_asks(program, source, asks, of) for source in step.sources]
        if any(wanted) or any(of[number] for number in parameters_of(step)):
            asks.add(step.out)
        if isinstance(step, Conv) and step.keep is not None and wanted[0]:
            asks.add(step.keep)
    return frozenset(asks)


def _backward_reads(
    program: Program, step: Step, asks: frozenset[int], of: Sequence[bool]
) -> Iterator[int]:
    if isinstance(step, Call):
        if step.out in asks and not step.linear:
            yield from step.slots
    else:
        for source in step.sources:
            own = isinstance(step, Conv) and of[step.weight]
            if own or (not source.linear and source_asks(program, source, asks, of)):
                yield from (term.slot for term in source.terms)
    yield from (slot for slot in made(step) if slot in asks and slot in program.norms_of)


def _schedule(program: Program, needs: Sequence[bool]) -> Schedule:
    if ("asks", needs) not in program._facts:
        asks, of = _asking_slots(program, needs), needs[program.inputs :]
        reads = tuple(frozenset(_backward_reads(program, s, asks, of)) for s in program.steps)
        program._facts["asks", needs] = asks, reads
    asks, reads = program._facts["asks", needs]
    root = _stretch(program, reads, 0, len(program.steps), sorted(program.again, key=_outer_first))
    kept = expanded(program, root.held | root.outside, {*program.dropped, *program.remote})
    kept |= {slot for slot in range(program.inputs) if slot in program.norms_of} & asks
    stays = _stays(program, kept)
    if program.images:
        if program.images < 0 or stays:
            wanted = "a number of images at a time, and then no slot that is offloaded"
            raise ValueError(f"images: want {wanted}, got {program.images} and {len(stays)}")
        steps = len(program.steps)
        held = frozenset(kept.difference(range(program.inputs)))
        outside = frozenset((kept - held) | _entering(program, held, 0, steps))
        part = Stretch(0, steps, held, outside, root.inner)
        return Schedule(asks, reads, tuple(sorted(outside)), (part,))
    kept -= {stay.slot for stay in stays}
    return Schedule(asks, reads, tuple(sorted(kept)), root.inner, stays)


def first_leaves(stays: Iterable[Stay]) -> dict[int, int]:
    """Return the place of the forward pass at which each slot leaves."""
    found: dict[int, int] = {}
    for stay in stays:
        found.setdefault(stay.slot, stay.leaves)
    return found


def _stays(program: Program, kept: Container[int]) -> tuple[Stay, ...]:
    """Return when slots that are kept are on the host; inputs and outputs are others' to hold."""
    for slot, place in first_leaves(program.offloaded).items():
        unread = max(program.producers.get(slot, -1), program.last_reader.get(slot, -1)) + 1
        if not unread <= place <= len(program.steps):
            wanted = f"slot {slot} to leave between {unread} and {len(program.steps)}"
            raise ValueError(f"offloaded: want {wanted}, got {place}")
    outside = {*range(program.inputs), *program.outputs}
    return tuple(s for s in program.offloaded if s.slot in kept and s.slot not in outside)


def _outer_first(stretch: tuple[int, int]) -> tuple[int, int]:
    return stretch[0], -stretch[1]


def _stretch(
    program: Program,
    reads: Sequence[frozenset[int]],
    start: int,
    stop: int,
    inside: Sequence[tuple[int, int]],
) -> Stretch:
    """Return a stretch, given the stretches inside it, outer ones first."""
    inner: list[Stretch] = []
    dropped = frozenset(program.dropped)
    rest = list(inside)
    while rest:
        first, last = rest.pop(0)
        if not start <= first < last <= stop or (inner and first < inner[-1].stop):
            raise ValueError(f"again: want stretches that nest, got {program.again}")
        nested = [each for each in rest if each[0] < last]
        rest = rest[len(nested) :]
        inner.append(_stretch(program, reads, first, last, nested))
    own = set(range(start, stop)).difference(*(range(s.start, s.stop) for s in inner))
    wanted = {slot for number in own for slot in reads[number]}
    wanted |= {slot for stretch in inner for slot in stretch.outside}
    wanted = expanded(program, wanted, dropped)
    held = {slot for slot in wanted if start <= program.producers.get(slot, -1) < stop}
    outside = (wanted - held) | _entering(program, held, start, stop)
    outside = expanded(program, outside, dropped)
    return Stretch(start, stop, frozenset(held), frozenset(outside), tuple(inner))


def _entering(program: Program, held: Iterable[int], start: int, stop: int) -> set[int]:
    """Return the slots from outside that making these again inside a stretch reads."""
    outside: set[int] = set()
    pending, seen = list(held), set(held)
    while pending:
        for slot in read(program.steps[program.producers[pending.pop()]]):
            if start <= program.producers.get(slot, -1) < stop:
                if slot not in seen:
                    seen.add(slot)
                    pending.append(slot)
            else:
                outside.add(slot)
    return outside


def expanded(program: Program, wanted: Iterable[int], dropped: Container[int]) -> set[int]:
    """Return the slots to hold so that these can be read, where dropped ones are made again."""
    found: set[int] = set()
    pending, seen = list(wanted), set()
    while pending:
        slot = pending.pop()
        if slot in seen:
            continue
        seen.add(slot)
        if slot in dropped and slot in program.producers and slot not in program.outputs:
            # Not +=, which torch 2.11 cannot compile for what is no list.
            pending.extend(read(program.steps[program.producers[slot]]))
        else:
            found.add(slot)
    return found


def cheap(program: Program) -> frozenset[int]:
    """Return the slots that elementwise work makes of one other image."""
    writes = [step for step in program.steps if isinstance(step, Write)]
    slots = {step.out for step in writes if step.source.residual is None}
    return frozenset(slots).difference(program.outputs)


def closing(program: Program) -> frozenset[int]:
    """Return these, and the convolutions' outputs that are terms of a sum."""
    sums = [e for step in program.steps for e in step.sources if e.residual is not None]
    outs = {step.out for step in program.steps if isinstance(step, Conv)}
    slots = {term.slot for source in sums for term in source.terms} & outs
    return cheap(program) | frozenset(slots).difference(program.outputs)
