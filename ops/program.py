"""A segment: a straight-line program of fused layers that is one node of the autograd graph.

Its values are images in slots: the inputs, raw outputs of convolutions, and images written out
because several steps read them. Normalisations, activations, sums, pooling and enlargement are no
steps; they are in the `Source` through which a later step reads a slot. For backward a program
keeps the slots that its gradients need, and a norm [4, C] for each normalisation; slots listed in
`dropped` are not kept but made again, from the slots that are, with the norms of the forward pass.

A program has no side effects, so it may run any number of times: `run` moves the running statistics
once, outside it. Under torch.compile a program's two passes are one operator each.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .autograd import first_order
from .conv_backward import conv2d_backward
from .conv_dgrad import conv2d_dgrad
from .conv_fwd import conv2d_fwd
from .conv_wgrad import conv2d_wgrad
from .fuse import resampled_size
from .geometry import Geometry, want
from .norm import batch_norm_backward, batch_norm_eval, batch_norm_forward, merge_moments
from .pointwise import moments as moments_of
from .pointwise import normalised_gradient, prologue, prologue_backward

# The program


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

    Slots in `dropped` are made again for backward.

    Attributes:
        text: the program as JSON, from which `parsed` makes it again.
        norms_of: the numbers of each slot's norms.
        producers: the step that makes each slot but the inputs.
        last_reader: the number of the last step that reads a slot.
        residual_inputs: the inputs that are added to an image, with its slot.
        convolution_parameters: the numbers of weights and biases.
    """

    inputs: int
    parameters: int
    steps: tuple[Conv | Write, ...]
    norms: tuple[Norm, ...]
    outputs: tuple[int, ...]
    names: tuple[str, ...] = ()  # of the steps: the modules that they were
    dropped: tuple[int, ...] = ()

    def __post_init__(self):
        """Work out what every run asks, once, so that torch.compile reads constants."""
        kinds = [type(step).__name__ for step in self.steps]
        norms_of: dict[int, list[int]] = {}
        for number, norm in enumerate(self.norms):
            norms_of.setdefault(norm.slot, []).append(number)
        reads = [
            (term.slot, number)
            for number, step in enumerate(self.steps)
            for source in _sources(step)
            for term in source.terms
        ]
        convs = [step for step in self.steps if isinstance(step, Conv)]
        facts = {
            "text": json.dumps({**asdict(self), "kinds": kinds}),
            "norms_of": norms_of,
            "producers": {slot: step for step in self.steps for slot in _made(step)},
            "last_reader": dict(reads),
            "residual_inputs": [
                (source.residual.slot, source.x.slot)
                for step in self.steps
                for source in _sources(step)
                if source.residual is not None and source.residual.slot < self.inputs
            ],
            "convolution_parameters": {c.weight for c in convs} | {c.bias for c in convs} - {None},
        }
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def dropping(self, slots: Iterable[int]) -> "Program":
        """Return the program that makes these slots again for backward."""
        return replace(self, dropped=tuple(sorted(set(slots))))


@cache
def parsed(text: str) -> Program:
    """Return the program of a `Program.text`."""
    raw = json.loads(text)

    def source(s: dict) -> Source:
        residual = s["residual"] and Term(**s["residual"])
        return Source(**{**s, "x": Term(**s["x"]), "residual": residual})

    def step(s: dict, kind: str) -> Conv | Write:
        if kind == "Write":
            return Write(source(s["source"]), s["out"])
        pairs = {name: tuple(s[name]) for name in ("stride", "padding", "dilation")}
        return Conv(**{**s, **pairs, "sources": tuple(source(each) for each in s["sources"])})

    kinds = raw.pop("kinds")
    raw["steps"] = tuple(step(s, kind) for s, kind in zip(raw["steps"], kinds, strict=True))
    raw["norms"] = tuple(Norm(**n) for n in raw["norms"])
    return Program(**raw | {name: tuple(raw[name]) for name in ("outputs", "names", "dropped")})


def _sources(step: Conv | Write) -> tuple[Source, ...]:
    return step.sources if isinstance(step, Conv) else (step.source,)


def _made(step: Conv | Write) -> Iterator[int]:
    yield step.out
    if isinstance(step, Conv) and step.keep is not None:
        yield step.keep


# Whoever meters a program adds a list here; its last item names the module that runs.
watchers: list[list[str]] = []


@contextmanager
def _running(program: Program, number: int) -> Iterator[None]:
    for names in watchers:
        names.append(program.names[number] if program.names else "")
    try:
        yield
    finally:
        for names in watchers:
            names.pop()


# Running it as a layer


def run(
    program: Program,
    inputs: Sequence[Tensor],
    convs: Sequence[nn.Module],
    norms: Sequence[nn.Module],
) -> tuple[Tensor, ...]:
    """Return the program's outputs, [N, C, H, W] in channels_last, of the inputs' dtype.

    With a convolution, under autocast, inputs and its parameters are cast as torch casts them;
    normalisations' parameters stay as they are. Running statistics move as torch's layers move
    them, once a call. Differentiable once.

    Args:
        program: its parameters are numbered as `convs` and `norms` have them: of each convolution
            weight and bias, of each normalisation weight, bias, running_mean and running_var.
        inputs: [N, C, H, W], all of one device.
        convs: what the program's convolutions are taken from.
        norms: modules like torch.nn.BatchNorm2d, one a norm of the program. Those with a
            `process_group` attribute share statistics with its other ranks.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        RuntimeError: backward with create_graph=True.
    """
    device = inputs[0].device.type
    if convs and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        inputs = [x if x.dtype == torch.float64 else x.to(dtype) for x in inputs]
    else:  # sums of two dtypes are taken in the wider one
        given = reduce(torch.promote_types, (x.dtype for x in inputs))
        inputs = [x.to(given) for x in inputs]
        for conv in convs:
            want(conv.weight.dtype == given, "input", f"weight's dtype {conv.weight.dtype}", given)
    parameters: list[Tensor | None] = []
    for conv in convs:
        parameters += conv.weight, conv.bias
    for norm in norms:
        parameters += norm.weight, norm.bias, norm.running_mean, norm.running_var
    batch = [norm.training or norm.running_mean is None for norm in norms]
    eps = [norm.eps for norm in norms]
    groups = ",".join(_group(norm) if b else "" for norm, b in zip(norms, batch, strict=True))

    inputs = _spread_residuals(program, inputs, parameters)
    tensors = [*inputs, *parameters]
    recording = torch.is_grad_enabled()
    needs = [recording and t is not None and t.requires_grad for t in tensors]
    results = _Segment.apply(program, batch, eps, groups, needs, *tensors)
    moments = iter(results[len(program.outputs) :])
    for norm, of_batch in zip(norms, batch, strict=True):
        if of_batch:
            own = next(moments)
            if norm.training and norm.track_running_stats:
                _move(norm, own)
    return results[: len(program.outputs)]


def _spread_residuals(
    program: Program, inputs: Sequence[Tensor], parameters: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """Return the inputs, those that are added to larger images spread over them, as torch does."""
    if not program.residual_inputs:
        return inputs
    sizes = _slot_sizes(program, [x.shape for x in inputs], parameters)
    inputs = list(inputs)
    for slot, image in program.residual_inputs:
        if list(inputs[slot].shape) != sizes[image]:
            inputs[slot] = inputs[slot].expand(sizes[image])
    return inputs


def _move(norm: nn.Module, moments: Tensor) -> None:
    """Move a layer's running statistics, once."""
    if norm.running_mean is not None or norm.num_batches_tracked is not None:
        batch_norm_forward(
            moments, None, None, norm.running_mean, norm.running_var, norm.num_batches_tracked,
            norm.momentum, norm.eps,
        )  # fmt: skip


def _group(norm: nn.Module) -> str:
    """Return the name of the ranks that share a layer's statistics; "" for none but this one."""
    if not hasattr(norm, "process_group") or not (dist.is_available() and dist.is_initialized()):
        return ""
    group = norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


class _Segment(torch.autograd.Function):
    """A program: its outputs, and what `_forward_direct` returns behind them."""

    @staticmethod
    def forward(program, batch, eps, groups, needs, *tensors):
        forward = _forward_operator if torch.compiler.is_compiling() else _forward_direct
        kept = kept_slots(program, needs)
        return tuple(forward(program.text, tensors, batch, eps, groups, kept, any(needs)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        program, batch, _, groups, needs, *tensors = inputs
        ctx.set_materialize_grads(False)
        outputs, moments = len(program.outputs), sum(batch)
        ctx.mark_non_differentiable(*output[outputs:])
        if not any(needs):
            return
        # Images that backward reads, and norms and parameters, which are small.
        kept = kept_slots(program, needs)
        slots = dict(zip(program.outputs, output, strict=False))
        slots |= dict(enumerate(tensors[: program.inputs]))
        norms = output[outputs + moments :][: len(program.norms)]
        made = output[outputs + moments + len(norms) :]
        slots |= dict(zip([slot for slot in kept if slot not in slots], made, strict=True))
        parameters = [
            t if number in program.convolution_parameters else None
            for number, t in enumerate(tensors[program.inputs :])
        ]
        ctx.save_for_backward(*[slots[slot] for slot in kept], *norms, *parameters)
        ctx.program, ctx.batch, ctx.groups, ctx.needs, ctx.kept = (
            program,
            batch,
            groups,
            needs,
            kept,
        )
        ctx.sizes = [size for t in tensors[: program.inputs] for size in t.shape]
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]

    @staticmethod
    @first_order
    def backward(ctx, *gradients):
        program, kept, needs = ctx.program, ctx.kept, ctx.needs
        saved = ctx.saved_tensors
        slots, norms = saved[: len(kept)], saved[len(kept) :][: len(program.norms)]
        parameters = saved[len(kept) + len(program.norms) :]
        gradients = gradients[: len(program.outputs)]
        if all(g is None for g in gradients):
            return (None,) * (5 + len(needs))
        backward = _backward_operator if torch.compiler.is_compiling() else _backward_direct
        made = backward(
            program.text, gradients, slots, kept, norms, parameters, ctx.sizes, ctx.batch,
            ctx.groups, needs,
        )  # fmt: skip
        results, rest = [], iter(made)
        for need, dtype in zip(needs, ctx.dtypes, strict=True):
            gradient = next(rest) if need else None
            # No element: none flows there.
            results.append(gradient.to(dtype) if need and gradient.numel() else None)
        return (None,) * 5 + tuple(results)


# Forward


def _forward_direct(
    text: str,
    tensors: Sequence[Tensor | None],
    batch: Sequence[bool],
    eps: Sequence[float],
    groups: str,
    kept: Sequence[int],
    saving: bool,
) -> list[Tensor]:
    """Return the outputs, the moments of each norm where `batch`, and if `saving` what to save.

    That is all norms, and the slots to keep but those among inputs and outputs.

    tensors: the inputs and parameters. groups: the norms' groups of ranks, with commas between.
    """
    program, ranks = parsed(text), groups.split(",")
    values = dict(enumerate(tensors[: program.inputs]))
    parameters = tensors[program.inputs :]
    norms: dict[int, Tensor] = {}
    moments: dict[int, Tensor] = {}
    held = {*program.outputs, *kept}

    def normalise(slot: int, found: Tensor | None) -> None:
        for number in program.norms_of.get(slot, ()):
            norm = program.norms[number]
            weight, bias, mean, var = (
                None if index is None else parameters[index]
                for index in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            )
            if not batch[number]:
                norms[number] = batch_norm_eval(mean, var, weight, bias, eps[number])
                continue
            if found is None:
                found = moments_of(values[slot])
            count = values[slot].numel() // max(1, values[slot].shape[1])
            if not ranks[number] and count == 1:
                raise ValueError(
                    "input: want more than one value a channel in training, got "
                    f"{list(values[slot].shape)}"
                )
            moments[number] = _all_moments(found, ranks[number])
            norms[number] = batch_norm_forward(
                moments[number], weight, bias, None, None, None, 0.0, eps[number]
            )

    for slot in range(program.inputs):
        normalise(slot, None)
    for number, step in enumerate(program.steps):
        with _running(program, number):
            wanted = any(batch[n] for n in program.norms_of.get(step.out, ()))
            found = _execute(step, values, norms, parameters, wanted)
            for slot in _made(step):
                normalise(slot, found if slot == step.out else None)
        for source in _sources(step):
            for term in source.terms:
                if program.last_reader[term.slot] == number and term.slot not in held:
                    values.pop(term.slot, None)
    results = [values[slot] for slot in program.outputs]
    results += [moments[n] for n in range(len(program.norms)) if batch[n]]
    if saving:
        results += [norms[n] for n in range(len(program.norms))]
        results += [
            values[slot] for slot in kept if slot >= program.inputs and slot not in program.outputs
        ]
    return results


def _read(
    source: Source, values: dict[int, Tensor], norms: dict[int, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, str, float, str]:
    """Return the arguments that operators take of a `Prologue`."""

    def table(term: Term | None) -> Tensor | None:
        return None if term is None or term.norm is None else norms[term.norm]

    residual = None if source.residual is None else values[source.residual.slot]
    x = values[source.x.slot]
    tables = table(source.x), table(source.residual)
    return x, tables[0], residual, tables[1], source.act, source.slope, source.resample


def _execute(
    step: Conv | Write,
    values: dict[int, Tensor],
    norms: dict[int, Tensor],
    parameters: Sequence[Tensor | None],
    moments: bool,
) -> Tensor | None:
    """Put what a step makes into `values`; return the moments of a convolution, if asked."""
    if isinstance(step, Write):
        values[step.out] = prologue(*_read(step.source, values, norms))
        return None
    first = _read(step.sources[0], values, norms)
    second = (None, None, "none", 0.0, "none")
    if len(step.sources) == 2:
        x2, norm2, residual, _, act2, slope2, resample2 = _read(step.sources[1], values, norms)
        if residual is not None:
            raise ValueError("sources: want a second one without a residual, got one with")
        second = x2, norm2, act2, slope2, resample2
    dtype = first[0].dtype
    weight = _weight(parameters[step.weight], dtype)
    bias = None if step.bias is None else parameters[step.bias].to(dtype)
    values[step.out], found, z = conv2d_fwd(
        *first, *second, weight, bias, step.stride, step.padding, step.dilation, step.groups,
        moments, step.keep is not None,
    )  # fmt: skip
    if step.keep is not None:
        values[step.keep] = z
    return found if moments else None


def _weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight as images of this dtype are convolved with it."""
    return weight.to(dtype, memory_format=torch.channels_last)


# What ranks tell each other. A fake tensor has nothing to tell.


def _all_moments(moments: Tensor, group: str) -> Tensor:
    """Return the moments of all ranks' pixels; every rank finds the same bits."""
    if not group or isinstance(moments, FakeTensor):
        return moments
    ranks = dist.distributed_c10d._resolve_process_group(group)
    parts = [torch.empty_like(moments) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(parts, moments.contiguous(), group=ranks)
    return merge_moments(torch.stack(parts))


def _mean_sums(sums: Tensor, pixels: int, count: int, group: str) -> Tensor:
    """Return all ranks' sums of a gradient, scaled as if all pixels were `count`."""
    if isinstance(sums, FakeTensor):
        return sums
    ranks = dist.distributed_c10d._resolve_process_group(group)
    everywhere = torch.cat([sums[:2], torch.full_like(sums[:1], pixels)])
    dist.all_reduce(everywhere, group=ranks)
    return everywhere * (count / everywhere[2].clamp(min=1))


# What backward needs


def kept_slots(program: Program, needs: Sequence[bool]) -> list[int]:
    """Return the slots to keep for backward, in order.

    needs: whether each input and parameter asks for a gradient.
    """
    asks = _asking_slots(program, needs)
    of = needs[program.inputs :]
    read: set[int] = set()
    for step in program.steps:
        for source in _sources(step):
            slots = {term.slot for term in source.terms}
            if isinstance(step, Conv) and of[step.weight]:
                read |= slots
            if not source.bare and _source_asks(program, source, asks, of):
                read |= slots
    kept: set[int] = set()
    pending = list(read)
    available = {*range(program.inputs), *program.outputs}
    while pending:
        slot = pending.pop()
        if slot in kept:
            continue
        if slot in program.dropped and slot not in available:
            step = program.producers[slot]
            pending += [term.slot for source in _sources(step) for term in source.terms]
        else:
            kept.add(slot)
    return sorted(kept)


def _term_asks(program: Program, term: Term, asks: set[int], of: Sequence[bool]) -> bool:
    if term.slot in asks:
        return True
    if term.norm is None:
        return False
    norm = program.norms[term.norm]
    return any(index is not None and of[index] for index in (norm.weight, norm.bias))


def _source_asks(program: Program, source: Source, asks: set[int], of: Sequence[bool]) -> bool:
    return any(_term_asks(program, term, asks, of) for term in source.terms)


def _asking_slots(program: Program, needs: Sequence[bool]) -> set[int]:
    """Return the slots whose gradient somebody upstream asks for."""
    of = needs[program.inputs :]
    asks = {slot for slot in range(program.inputs) if needs[slot]}
    for step in program.steps:
        source_asks = [_source_asks(program, source, asks, of) for source in _sources(step)]
        own = isinstance(step, Conv) and (
            of[step.weight] or (step.bias is not None and of[step.bias])
        )
        if own or any(source_asks):
            asks.add(step.out)
        if isinstance(step, Conv) and step.keep is not None and source_asks[0]:
            asks.add(step.keep)
    return asks


# Backward


def _backward_direct(
    text: str,
    gradients: Sequence[Tensor | None],
    slots: Sequence[Tensor],
    kept: Sequence[int],
    norms: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    sizes: Sequence[int],
    batch: Sequence[bool],
    groups: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return a gradient for each input and parameter that asks; without elements if none flows."""
    program = parsed(text)
    run = _Backward(
        program, dict(zip(kept, slots, strict=True)), dict(enumerate(norms)), parameters,
        [sizes[i : i + 4] for i in range(0, len(sizes), 4)], batch, groups.split(","), needs,
    )  # fmt: skip
    for slot, gradient in zip(program.outputs, gradients, strict=True):
        if gradient is not None:
            run.add(slot, gradient)
    del gradients
    run.all_steps()
    found = [run.image_gradient(slot) for slot in range(program.inputs)]
    found += [run.parameter_gradients.get(n) for n in range(program.parameters)]
    like = norms[0] if norms else slots[0] if slots else found[0]
    return [
        like.new_empty(0) if gradient is None else gradient
        for gradient, need in zip(found, needs, strict=True)
        if need
    ]


class _Backward:
    """The backward pass of one program, step by step from the last.

    Attributes:
        values: slots that are kept or were made again.
        gradients: of slots as they are; a norm's gradients are in norm_gradients, (g, sums).
        parameter_gradients: of parameters, by number.
    """

    def __init__(self, program, values, norms, parameters, sizes, batch, groups, needs):
        self.program, self.values, self.norms, self.parameters = program, values, norms, parameters
        self.sizes = _slot_sizes(program, sizes, parameters)
        self.batch, self.groups = batch, groups
        self.of = needs[program.inputs :]
        self.asks = _asking_slots(program, needs)
        self.gradients: dict[int, Tensor] = {}
        self.norm_gradients: dict[int, tuple[Tensor, Tensor]] = {}
        self.parameter_gradients: dict[int, Tensor] = {}

    def add(self, slot: int, gradient: Tensor) -> None:
        """Add to the gradient of a slot, if anybody asks; never in place, it may be shared."""
        if slot in self.asks:
            known = self.gradients.get(slot)
            self.gradients[slot] = gradient if known is None else known + gradient

    def add_parameter(self, number: int | None, gradient: Tensor) -> None:
        """Add to the gradient of a parameter, if it asks."""
        if number is not None and self.of[number]:
            known = self.parameter_gradients.get(number)
            self.parameter_gradients[number] = gradient if known is None else known + gradient

    def value(self, slot: int) -> Tensor:
        """Return a slot, made again where it is not kept."""
        if slot not in self.values:
            step = self.program.producers[slot]
            for source in _sources(step):
                for term in source.terms:
                    self.value(term.slot)
            _execute(step, self.values, self.norms, self.parameters, False)
        return self.values[slot]

    def all_steps(self) -> None:
        """Take the gradients of the outputs to those of inputs and parameters."""
        for number, step in reversed(tuple(enumerate(self.program.steps))):
            with _running(self.program, number):
                if isinstance(step, Conv):
                    self.convolution(step)
                else:
                    dz = self.image_gradient(step.out)
                    if dz is not None:
                        self.through(step.source, dz)
            for slot in _made(step):  # nobody before it reads what it made
                self.values.pop(slot, None)

    def output_gradient(self, slot: int) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Return (g, y, coefficients) of a slot's gradient, as operators take it; None if none."""
        plain, parts = self.gradients.pop(slot, None), []
        for number in self.program.norms_of.get(slot, ()):
            if number in self.norm_gradients:
                g, sums = self.norm_gradients.pop(number)
                parts.append((g, self.value(slot), self.coefficients(number, g, sums)))
        if slot not in self.asks:
            return None
        if not parts:
            return None if plain is None else (plain, None, None)
        if len(parts) == 1 and plain is None:
            return parts[0]
        for part in parts:
            dy = normalised_gradient(*part)
            plain = dy if plain is None else plain + dy
        return plain, None, None

    def image_gradient(self, slot: int) -> Tensor | None:
        """Return a slot's gradient as an image; None if none flows."""
        found = self.output_gradient(slot)
        if found is None or found[2] is None:
            return found and found[0]
        return normalised_gradient(*found)

    def coefficients(self, number: int, g: Tensor, sums: Tensor) -> Tensor:
        """Return a norm's coefficients, having added the gradients of its weight and bias."""
        norm, table, batch = self.program.norms[number], self.norms[number], self.batch[number]
        pixels = g.numel() // g.shape[1]
        count = max(1, pixels)
        coef, dweight, dbias = batch_norm_backward(sums, table, count, batch)
        self.add_parameter(norm.weight, dweight)  # this rank's part, for whoever averages
        self.add_parameter(norm.bias, dbias)
        if batch and self.groups[number]:
            sums = _mean_sums(sums, pixels, count, self.groups[number])
            coef, _, _ = batch_norm_backward(sums, table, count, batch)
        return coef

    def convolution(self, step: Conv) -> None:
        """Take the gradient of a convolution's output to its parameters and its sources."""
        kept = None if step.keep is None else self.image_gradient(step.keep)
        found = self.output_gradient(step.out)
        if found is None:
            if kept is not None:
                self.through(replace(step.sources[0], resample="none"), kept)
            return
        g, y, coef = found
        weight = self.parameters[step.weight]
        wants_weight = self.of[step.weight]
        wants_bias = step.bias is not None and self.of[step.bias]
        geometry = step.stride, step.padding, step.dilation, step.groups
        if wants_bias and not wants_weight:
            dy = g if coef is None else normalised_gradient(g, y, coef)
            wide = torch.promote_types(dy.dtype, torch.float32)
            self.add_parameter(step.bias, dy.sum((0, 2, 3), dtype=wide))
            del dy
        parts, first = [], 0
        for number, source in enumerate(step.sources):
            asks = _source_asks(self.program, source, self.asks, self.of)
            if wants_weight or (asks and not source.bare):
                for term in source.terms:
                    self.value(term.slot)
            last = first + self.sizes[source.x.slot][1]
            part = weight if len(step.sources) == 1 else weight[:, first:last]
            first = last
            if not (wants_weight or asks):
                continue
            with_bias = wants_bias and wants_weight and number == 0
            add = kept if number == 0 else None
            product = g, y, coef, _weight(part, g.dtype)
            sums = any(term.norm is not None for term in source.terms)
            size = self.sizes[source.x.slot]
            if wants_weight and asks:
                read = _read(source, self.values, self.norms)
                gradient, found, dw, db = conv2d_backward(
                    *product, *read, add, *geometry, sums, with_bias
                )
            elif wants_weight:
                read = _read(source, self.values, self.norms)
                dw, db = conv2d_wgrad(*read, g, y, coef, part.shape, *geometry, with_bias)
            else:
                nothing = None, None, None, None, "none", 0.0, "none"
                read = nothing if source.bare else _read(source, self.values, self.norms)
                gradient, found = conv2d_dgrad(*product, size, *read, add, *geometry, sums)
            if asks:
                self.spread(source, gradient, found)
            if wants_weight:
                parts.append(dw)
            if with_bias:
                self.add_parameter(step.bias, db)
        if wants_weight:
            dw = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            self.add_parameter(step.weight, dw)

    def through(self, source: Source, dz: Tensor) -> None:
        """Take the gradient of a source's value to what it reads."""
        if not _source_asks(self.program, source, self.asks, self.of):
            return
        if source.bare:
            self.add(source.x.slot, dz)
            return
        for term in source.terms:
            self.value(term.slot)
        sums = any(term.norm is not None for term in source.terms)
        read = _read(source, self.values, self.norms)
        self.spread(source, *prologue_backward(dz, None, *read, sums))

    def spread(self, source: Source, g: Tensor, sums: Tensor) -> None:
        """Give the gradient of a sum to its terms, with sums [3, C] as operators return them."""
        for term, row in zip(source.terms, (1, 2), strict=False):
            if term.norm is None:
                self.add(term.slot, g)
            elif _term_asks(self.program, term, self.asks, self.of):
                known = self.norm_gradients.get(term.norm)
                own = sums if row == 1 else sums[[0, 2, 1]]
                together = (g, own) if known is None else (known[0] + g, known[1] + own)
                self.norm_gradients[term.norm] = together


def _slot_sizes(
    program: Program, inputs: Sequence[Sequence[int]], parameters: Sequence[Tensor | None]
) -> dict[int, list[int]]:
    """Return [N, C, H, W] of every slot."""
    sizes = {slot: list(size) for slot, size in enumerate(inputs)}
    for step in program.steps:
        source = _sources(step)[0]
        N, C, H, W = sizes[source.x.slot]
        H_z, W_z = resampled_size(H, W, source.resample)
        if isinstance(step, Conv):
            shape = parameters[step.weight].shape
            geometry = Geometry(shape, step.stride, step.padding, step.dilation, step.groups)
            sizes[step.out] = [N, shape[0], *geometry.output_size(H_z, W_z)]
            if step.keep is not None:
                sizes[step.keep] = [N, C, H, W]
        else:
            sizes[step.out] = [N, C, H_z, W_z]
    return sizes


# Under torch.compile a pass is one operator: what it keeps is decided here, not by a partitioner.


@torch.library.custom_op("fullres::segment_forward", mutates_args=())
def _forward_operator(
    text: str,
    tensors: Sequence[Tensor | None],
    batch: Sequence[bool],
    eps: Sequence[float],
    groups: str,
    kept: Sequence[int],
    saving: bool,
) -> list[Tensor]:
    return _forward_direct(text, tensors, batch, eps, groups, kept, saving)


@torch.library.custom_op("fullres::segment_backward", mutates_args=())
def _backward_operator(
    text: str,
    gradients: Sequence[Tensor | None],
    slots: Sequence[Tensor],
    kept: Sequence[int],
    norms: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    sizes: Sequence[int],
    batch: Sequence[bool],
    groups: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    return _backward_direct(
        text, gradients, slots, kept, norms, parameters, sizes, batch, groups, needs
    )


_forward_operator.register_fake(_forward_direct)
_backward_operator.register_fake(_backward_direct)
