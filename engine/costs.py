"""How long each step of a program takes, by roofline: what a planner weighs memory against.

A step makes passes over images. A pass reads every image that takes part once and writes its
results once; it takes as long as the slower of its bytes, at the rate of a copy, and its FLOP, at
that of a large product, and the launch of its kernels:

    step        forward                           backward
    Conv        reads sources, weight;            each source: reads g, its terms, weight, what is
                writes out, keep                  added; writes g_prev, dw. One pass, or dgrad and
                                                  wgrad, as `conv2d_backward` does them
    Write       reads its source; writes out      reads g, its terms; writes g_prev
    Call        reads its slots; writes out       the same, then reads g and its slots and writes
                                                  their gradients; of FLOP nothing is known

    a normalised out is read with g. What can't be done on the way is a pass of its own: moments of
    what no convolution makes, a pooled input of many channels, a gradient through a second
    normalisation or a resampling, the sum of two gradients.

This is `ops/segment.py` step by step, on our own kernels: no table of ops/dispatch.py is asked.
Not in it are partial sums, halos that miss a cache, instructions, and what a cache saves where
images are small. It is for comparing ways to run a step, more than for predicting one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import torch

from ..ops.conv_backward import takes_one_pass
from ..ops.conv_fwd import POOLED_CHANNELS
from ..ops.dispatch import prefer
from ..ops.fuse import Prologue, resampled_size
from ..ops.geometry import Geometry
from ..ops.program import Call, Conv, Program, Source, Step, made, source_asks, term_asks
from .cards import Hardware

PARAMETER = 4  # bytes of a value of a weight's gradient, float32


class Pass(NamedTuple):
    """A kernel that passes over images, and the small ones that add up its parts."""

    bytes: int
    flop: int = 0
    launches: int = 1


class StepTime(NamedTuple):
    """Seconds of a step: in the forward pass, made again for backward, and its gradients."""

    forward: float
    again: float
    backward: float


@dataclass(frozen=True)
class Work:
    """The passes of a step: in the forward pass, made again for backward, and its gradients."""

    forward: list[Pass]
    again: list[Pass]
    backward: list[Pass] = field(default_factory=list)


def step_times(
    program: Program,
    sizes: Mapping[int, Sequence[int]],
    weight_shapes: Mapping[int, Sequence[int]],
    dtype: torch.dtype,
    hardware: Hardware,
    needs: Sequence[bool],
    batch: Sequence[bool] | None = None,
) -> list[StepTime]:
    """Return the seconds of each step of a program on a card; the arguments are `step_work`'s.

    Raises:
        ValueError: for a dtype that no card takes.
    """
    product = hardware.product_of(dtype)

    def seconds(passes: Sequence[Pass]) -> float:
        return sum(
            max(p.bytes / hardware.copy, p.flop / product) + p.launches * hardware.launch
            for p in passes
        )

    return [
        StepTime(seconds(work.forward), seconds(work.again), seconds(work.backward))
        for work in step_work(program, sizes, weight_shapes, dtype, needs, batch)
    ]


def offload_time(size: int, hardware: Hardware) -> float:
    """Return the seconds in which so many bytes go to the host's pinned memory, or come back."""
    return size / hardware.host + hardware.launch


def step_work(
    program: Program,
    sizes: Mapping[int, Sequence[int]],
    weight_shapes: Mapping[int, Sequence[int]],
    dtype: torch.dtype,
    needs: Sequence[bool],
    batch: Sequence[bool] | None = None,
) -> list[Work]:
    """Return the passes of each step of a program.

    What the first step's inputs need before it, their moments, counts as its own. Backward is that
    of a program all of whose slots are there: making some again is other steps' `again`.

    Args:
        program: any.
        sizes: of each slot, [N, C, H, W].
        weight_shapes: of each convolution's weight, by the number of the parameter.
        dtype: of the images.
        needs: whether each input and parameter asks for a gradient.
        batch: whether each norm is of the batch, and takes moments; None for all.
    """
    batch = [True] * len(program.norms) if batch is None else batch
    images = _Images(sizes, weight_shapes, dtype)
    work = []
    for number, step in enumerate(program.steps):
        again = _forward(step, images)
        normalised = [(slot, False) for slot in range(program.inputs) if number == 0]
        normalised += [(slot, isinstance(step, Conv) and slot == step.out) for slot in made(step)]
        norms = [
            _normalising([batch[n] for n in program.norms_of[slot]], images.bytes(slot), free)
            for slot, free in normalised
            if slot in program.norms_of
        ]
        work.append(Work([*again, *norms], again))
    gradients = _Gradients(program, images, needs)
    for number in reversed(range(len(work))):
        gradients.step(program.steps[number], work[number].backward)
    gradients.of_inputs()
    return work


@dataclass(frozen=True)
class _Images:
    """Slots and weights, as passes count them."""

    sizes: Mapping[int, Sequence[int]]
    weight_shapes: Mapping[int, Sequence[int]]
    dtype: torch.dtype

    def bytes(self, slot: int) -> int:
        """Return the bytes of a slot."""
        return prod(self.sizes[slot]) * self.dtype.itemsize

    def terms(self, source: Source) -> int:
        """Return the bytes that a source reads."""
        x = self.bytes(source.x.slot)
        if source.residual is None:
            return x
        spread = prod(self.sizes[source.residual.slot]) != prod(self.sizes[source.x.slot])
        return x + (2 * x if spread else x)  # it is copied to x's size first

    def resampled(self, source: Source) -> int:
        """Return the bytes of a source's value."""
        N, C, H, W = self.sizes[source.x.slot]
        return N * C * prod(resampled_size(H, W, source.resample)) * self.dtype.itemsize

    def geometry(self, step: Conv, source: Source) -> Geometry:
        """Return the convolution of one of a step's sources by its part of the weight."""
        K, CG, R, S = self.weight_shapes[step.weight]
        if len(step.sources) == 2:
            CG = self.sizes[source.x.slot][1]
        return Geometry((K, CG, R, S), step.stride, step.padding, step.dilation, step.groups)

    def values(self, step: Conv, source: Source) -> int:
        """Return how many values that part of the weight has."""
        return prod(self.geometry(step, source).weight_shape)

    def flop(self, step: Conv, source: Source) -> int:
        """Return the multiplications and additions of one product of one of a step's sources."""
        N, _, P, Q = self.sizes[step.out]
        return 2 * N * P * Q * self.values(step, source)

    def meta(self, size: Sequence[int]) -> torch.Tensor:
        """Return a tensor of this size without memory."""
        return torch.empty(list(size), dtype=self.dtype, device="meta")


def _forward(step: Step, images: _Images) -> list[Pass]:
    """Return the passes that make what a step makes, without the norms of that."""
    if not isinstance(step, Conv):
        return [Pass(sum(map(images.terms, step.sources)) + images.bytes(step.out))]
    passes, first = [], step.sources[0]
    read = images.terms(first)
    written = images.bytes(step.out)
    apart = 0  # what a pass of its own makes of the first source
    if first.resample == "pool2" and images.sizes[first.x.slot][1] > POOLED_CHANNELS:
        apart = images.resampled(first)
    elif step.keep is not None and images.sizes[step.keep][2:] != images.sizes[step.out][2:]:
        apart = images.bytes(step.keep)
    elif step.keep is not None:
        written += images.bytes(step.keep)
    if apart:
        passes.append(Pass(read + apart))
        read = apart
    read += sum(images.terms(source) for source in step.sources[1:])
    read += prod(images.weight_shapes[step.weight]) * images.dtype.itemsize
    flop = sum(images.flop(step, source) for source in step.sources)
    return [*passes, Pass(read + written, flop)]


def _normalising(batch: Sequence[bool], image: int, free: bool) -> Pass:
    """Return what making an image's norms takes; a convolution has its moments for free."""
    if not any(batch):
        return Pass(0, launches=len(batch))
    parts = 1  # moments come in parts, which are merged
    return Pass(0 if free else image, launches=len(batch) + parts + (not free))


class _Gradients:
    """The backward pass, as `_Backward` of ops/segment.py takes it, on bytes for images.

    Attributes:
        plain: the slots that have a gradient as they are.
        normalised: the norms that have one.
        passes: of the step that runs.
    """

    def __init__(self, program: Program, images: _Images, needs: Sequence[bool]):
        self.program, self.images = program, images
        self.of = needs[program.inputs :]
        self.asks = program.schedule(needs).asks
        self.plain: set[int] = {*program.outputs} & self.asks  # these come from outside
        self.normalised: set[int] = set()
        self.passes: list[Pass] = []

    def step(self, step: Step, passes: list[Pass]) -> None:
        """Take the gradient of what a step made to what it read."""
        self.passes = passes
        if isinstance(step, Conv):
            self.convolution(step)
        elif not self.image(step.out):
            return
        elif isinstance(step, Call):
            self.call(step)
        else:
            self.through(step.source, self.images.resampled(step.source))

    def of_inputs(self) -> None:
        """Make the inputs' gradients images."""
        for slot in range(self.program.inputs):
            self.image(slot)

    def add(self, slot: int, gradient: int) -> None:
        """Add a gradient of so many bytes to that of a slot, if anybody asks."""
        if slot not in self.asks:
            return
        if gradient != (size := self.images.bytes(slot)):  # the slot was spread
            self.passes.append(Pass(gradient + size))
        if slot in self.plain:
            self.passes.append(Pass(3 * size))
        self.plain.add(slot)

    def output(self, slot: int) -> int:
        """Return how many images a convolution reads its output's gradient from: 0 if none is.

        One, or two where it is taken through a normalisation on the way; where there are several
        gradients they become one first.
        """
        norms = [n for n in self.program.norms_of.get(slot, ()) if n in self.normalised]
        plain, size = slot in self.plain, self.images.bytes(slot)
        self.normalised.difference_update(norms)
        self.plain.discard(slot)
        if norms:  # their coefficients
            self.passes.append(Pass(0, launches=len(norms)))
        if slot not in self.asks or not (norms or plain):
            return 0
        if len(norms) == 1 and not plain:
            return 2
        for _ in norms:
            self.passes.append(Pass(3 * size))
            if plain:
                self.passes.append(Pass(3 * size))
            plain = True
        return 1

    def image(self, slot: int) -> bool:
        """Make a slot's gradient one image, and return whether there is one."""
        found = self.output(slot)
        if found == 2:
            self.passes.append(Pass(3 * self.images.bytes(slot)))
        return found > 0

    def convolution(self, step: Conv) -> None:
        """Take the gradient of a convolution's output to its parameters and its sources."""
        images = self.images
        kept = step.keep is not None and self.image(step.keep)
        found = self.output(step.out)
        if not found:
            if kept:
                self.through(replace(step.sources[0], resample="none"), images.bytes(step.keep))
            return
        dy = found * images.bytes(step.out)
        wants_weight = self.of[step.weight]
        wants_bias = step.bias is not None and self.of[step.bias]
        if wants_bias and not wants_weight:
            if found == 2:
                self.passes.append(Pass(dy + images.bytes(step.out)))
            self.passes.append(Pass(images.bytes(step.out)))
        for number, source in enumerate(step.sources):
            asks = source_asks(self.program, source, self.asks, self.of)
            add = kept and number == 0
            with_bias = wants_bias and number == 0
            flop, parts = images.flop(step, source), 1 + with_bias
            moved = dy + images.terms(source) + images.values(step, source) * PARAMETER
            if wants_weight and asks and self.one_pass(step, source, found == 2, add):
                moved += (1 + add) * images.bytes(source.x.slot)
                moved += images.values(step, source) * images.dtype.itemsize
                self.passes.append(Pass(moved, 2 * flop, 1 + parts + _normalises(source)))
            else:
                if asks:
                    self.dgrad(step, source, dy, add)
                if wants_weight:
                    self.passes.append(Pass(moved, flop, 1 + parts))
            if asks:
                self.spread(source)

    def one_pass(self, step: Conv, source: Source, normalised: bool, add: bool) -> bool:
        """Return whether one kernel makes both gradients."""
        images = self.images
        geometry = images.geometry(step, source)
        g, x = images.meta(images.sizes[step.out]), images.meta(images.sizes[source.x.slot])
        residual = None if source.residual is None else x
        prologue = Prologue(x, residual=residual, act=source.act, resample=source.resample)
        weight = images.meta(geometry.weight_shape)
        y, added = g if normalised else None, x if add else None
        try:
            with prefer("triton"):
                return takes_one_pass(g, y, weight, prologue, added, geometry, _normalises(source))
        except ImportError:  # there is no triton, which has a say in it: two passes always work
            return False

    def dgrad(self, step: Conv, source: Source, dy: int, add: bool) -> None:
        """Make the gradient of what a source's act is applied to."""
        images = self.images
        weight = images.values(step, source) * images.dtype.itemsize
        moved, flop = dy + weight + images.resampled(source), images.flop(step, source)
        if source.resample != "none":
            self.passes.append(Pass(moved, flop))
            self.through_prologue(source, images.resampled(source), add)
            return
        sums = _normalises(source)
        if source.act != "none" or sums:
            moved += images.terms(source)
        self.passes.append(Pass(moved + add * images.bytes(source.x.slot), flop, 1 + sums))

    def call(self, step: Call) -> None:
        """Take the gradient of what a call made to its images: torch runs it once more for that."""
        out, read = self.images.bytes(step.out), [self.images.bytes(slot) for slot in step.slots]
        values = 0 if step.linear else sum(read)  # without them it runs on zeros of their size
        self.passes.append(Pass(values + out))
        asked = [slot for slot in step.slots if slot in self.asks]
        self.passes.append(Pass(out + values + sum(map(self.images.bytes, asked))))
        for slot in asked:
            self.add(slot, self.images.bytes(slot))

    def through(self, source: Source, dz: int) -> None:
        """Take the gradient of a source's value to what it reads."""
        if not source_asks(self.program, source, self.asks, self.of):
            return
        if not source.bare:
            self.through_prologue(source, dz, False)
        self.spread(source)

    def through_prologue(self, source: Source, dz: int, add: bool) -> None:
        """Make the gradient of what a source's act is applied to, in a pass of its own."""
        sums = _normalises(source)
        moved = dz + (1 + add) * self.images.bytes(source.x.slot)
        if source.act != "none" or sums or source.resample == "pool2":
            moved += self.images.terms(source)
        self.passes.append(Pass(moved, launches=1 + sums))

    def spread(self, source: Source) -> None:
        """Give the gradient of a sum to its terms."""
        g = self.images.bytes(source.x.slot)
        for term in source.terms:
            if term.norm is None:
                self.add(term.slot, g)
            elif term_asks(self.program, term, self.asks, self.of):
                if term.norm in self.normalised:
                    self.passes.append(Pass(3 * g))
                self.normalised.add(term.norm)


def _normalises(source: Source) -> bool:
    """Return whether a term of a source is read through a norm: then its gradient is summed up."""
    return any(term.norm is not None for term in source.terms)
