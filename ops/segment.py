"""Running a segment: one node of the autograd graph over a `Program`, forward and backward.

A program has no side effects, so it may run any number of times: `run` moves the running statistics
once, outside it, and the random numbers that a call draws are drawn again as they were. What is
made again uses the norms of the forward pass. Ranks talk when a norm is made and when its gradient
is, never when something is made again. Of slots that wait in host memory, what leaves the device
and what returns, and when, is the program's to say; the bits are the same. A program that goes
through the batch a few images at a time (ops/parts.py) is still one node.

The outputs' gradients do not come to the segment's own node, which would hold all of them until
its last step is done, but to nodes of their own, which lay each where its step takes it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor

from .autograd import first_order
from .conv_backward import conv2d_backward
from .conv_dgrad import conv2d_dgrad
from .conv_fwd import conv2d_fwd
from .conv_wgrad import conv2d_wgrad
from .fuse import resampled_size
from .geometry import Geometry, want
from .norm import batch_norm_backward, batch_norm_eval, batch_norm_forward, merge_moments
from .offload import Offloaded
from .parts import apart, keeps, part_size, parts, whole
from .pointwise import moments as moments_of
from .pointwise import normalised_gradient, prologue, prologue_backward
from .program import (
    Call,
    Conv,
    Program,
    Source,
    Stay,
    Step,
    Term,
    first_leaves,
    made,
    parsed,
    read,
    source_asks,
    term_asks,
    watchers,
)
from .walk import Walk


def run(
    program: Program,
    inputs: Sequence[Tensor],
    convs: Sequence[nn.Module],
    norms: Sequence[nn.Module],
    layers: Sequence[nn.Module] = (),
) -> tuple[Tensor, ...]:
    """Return the program's outputs, [N, C, H, W] in channels_last, of the inputs' dtype.

    With a convolution, under autocast, inputs and its parameters are cast as torch casts them;
    normalisations' parameters stay as they are. Running statistics move as torch's layers move
    them, once a call. Differentiable once.

    Args:
        program: its parameters are numbered as `convs`, `norms` and `layers` have them: of each
            convolution weight and bias, of each normalisation weight, bias, running_mean and
            running_var, of each layer all of `parameters()`.
        inputs: [N, C, H, W], all of one device.
        convs: what the program's convolutions are taken from.
        norms: modules like torch.nn.BatchNorm2d, one a norm of the program. Those with a
            `process_group` attribute share statistics with its other ranks.
        layers: what its calls call; without buffers.

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
    for layer in layers:
        parameters += layer.parameters()
    batch = [norm.training or norm.running_mean is None for norm in norms]
    eps = [norm.eps for norm in norms]
    groups = [_group(norm) if b else "" for norm, b in zip(norms, batch, strict=True)]

    tensors = [*inputs, *parameters]
    recording = torch.is_grad_enabled()
    needs = [recording and t is not None and t.requires_grad for t in tensors]
    if torch.compiler.is_compiling():
        results = _Operator.apply(program, batch, eps, ",".join(groups), needs, *tensors)
        outputs, moments = results[: len(program.outputs)], results[len(program.outputs) :]
    else:
        pass_ = Pass(program, batch, eps, groups, needs, tuple(layers))
        if any(needs):
            token = _Segment.apply(pass_, *tensors)
            numbers = range(len(program.outputs))
            outputs = tuple(_Output.apply(token, pass_, number) for number in numbers)
        else:
            outputs = tuple(pass_.forward(tensors, ()).outputs)
        moments = pass_.moments
        pass_.moments = []
    rest = iter(moments)
    for norm, of_batch in zip(norms, batch, strict=True):
        if of_batch:
            own = next(rest)
            if norm.training and norm.track_running_stats:
                _move(norm, own)
    return outputs


@_disable_dynamo
def run_whole(
    program: Program,
    inputs: Sequence[Tensor],
    convs: Sequence[nn.Module],
    norms: Sequence[nn.Module],
    layers: Sequence[nn.Module] = (),
) -> tuple[Tensor, ...]:
    """Return what `run` does; torch.compile leaves it as it is.

    A planned network's memory is decided on, and its calls are no operators of ours.
    """
    return run(program, inputs, convs, norms, layers)


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


@contextmanager
def _running(program: Program, number: int) -> Iterator[None]:
    for names in watchers:
        names.append(program.names[number] if program.names else "")
    try:
        yield
    finally:
        for names in watchers:
            names.pop()


# Whoever watches segments adds a function here, called with a pass and what begins or has ended of
# it: "forward", "forward done", "backward" or "backward done".
followers: list[Callable[["Pass", str], None]] = []


def _tell(pass_: "Pass", what: str) -> None:
    for follower in followers:
        follower(pass_, what)


# The nodes of autograd


@dataclass(frozen=True)
class _Made:
    """What a forward pass leaves."""

    outputs: list[Tensor]
    moments: list[Tensor]  # of each norm of the batch
    norms: list[Tensor]
    kept: list[Tensor]
    sizes: dict[int, list[int]]  # of all slots


@dataclass
class Pass:
    """One run of a program: what its forward pass tells its backward pass.

    Attributes:
        needs: whether each input and parameter asks for a gradient.
        outputs: by number, until each is taken.
        gradients: of outputs, by number, until their steps take them.
        sizes: of all slots.
        shapes: of the parameters.
        dtype: of the inputs, and so of all images that fused steps read.
        autocast: what it was, or None where it was off.
        drawn: the states of the random generators before each call that draws, by its slot.
        offloaded: slots that wait in host memory.
        images: how many go through it at a time; 0 for all.
    """

    program: Program
    batch: Sequence[bool]
    eps: Sequence[float]
    groups: Sequence[str]
    needs: Sequence[bool]
    layers: tuple[nn.Module, ...] = ()
    moments: list[Tensor] = field(default_factory=list)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, list[int]] = field(default_factory=dict)
    shapes: list[torch.Size | None] = field(default_factory=list)
    dtypes: list[torch.dtype | None] = field(default_factory=list)
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    drawn: dict[int, list[Tensor]] = field(default_factory=dict)
    offloaded: dict[int, Offloaded] = field(default_factory=dict)
    images: int = 0

    def forward(
        self, tensors: Sequence[Tensor | None], kept: Sequence[int], stays: Sequence[Stay] = ()
    ) -> _Made:
        """Run forward; tensors are inputs and parameters, kept and stays as of `Schedule`."""
        device, self.dtype = tensors[0].device.type, tensors[0].dtype
        if torch.is_autocast_enabled(device):
            self.autocast = torch.get_autocast_dtype(device)
        inputs = [t.shape for t in tensors[: self.program.inputs]]
        self.images = part_size(self.program, self.batch, inputs)
        made = _forward_in_parts(self, tensors, kept) if self.images else None
        if made is None:
            self.images = 0
            made = _forward(self, tensors, kept, stays)
        self.moments = made.moments
        return made


class _Segment(torch.autograd.Function):
    """A program. What it returns is nothing but the place where `_Output`s hang."""

    @staticmethod
    def forward(ctx, pass_, *tensors):
        program = pass_.program
        schedule = program.schedule(pass_.needs)
        _tell(pass_, "forward")
        found = pass_.forward(tensors, schedule.kept, schedule.stays)
        pass_.outputs = dict(enumerate(found.outputs))
        pass_.sizes = found.sizes
        pass_.shapes = [None if t is None else t.shape for t in tensors[program.inputs :]]
        pass_.dtypes = [None if t is None else t.dtype for t in tensors]
        parameters = [
            t if number in program.convolution_parameters else None
            for number, t in enumerate(tensors[program.inputs :])
        ]
        # Images that backward reads, and norms and parameters, which are small. An output's own
        # tensor would lead to its node, and from there back here: a circle that nobody frees.
        outputs = {id(t) for t in found.outputs}
        kept = [t.detach() if id(t) in outputs else t for t in found.kept]
        ctx.save_for_backward(*kept, *found.norms, *parameters)
        ctx.pass_ = pass_
        ctx.set_materialize_grads(False)
        _tell(pass_, "forward done")
        return tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    @first_order
    def backward(ctx, _):
        pass_ = ctx.pass_
        kept = pass_.program.schedule(pass_.needs).kept
        saved = ctx.saved_tensors
        slots = dict(zip(kept, saved, strict=False))
        norms = saved[len(kept) :][: len(pass_.program.norms)]
        parameters = saved[len(kept) + len(norms) :]
        del saved
        hosted = dict(pass_.offloaded)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.maybe_clear_saved_tensors()  # so that each is freed when its step is done
            pass_.offloaded = {}
        _tell(pass_, "backward")
        gradients, pass_.gradients = pass_.gradients, {}
        made = _backward(pass_, gradients, slots, norms, parameters, hosted)
        _tell(pass_, "backward done")
        results = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(made, pass_.dtypes, strict=True)
        ]
        return None, *results


class _Output(torch.autograd.Function):
    """An output of a segment."""

    @staticmethod
    def forward(ctx, token, pass_, number):
        ctx.pass_, ctx.number, ctx.device = pass_, number, token.device
        ctx.set_materialize_grads(False)
        return pass_.outputs.pop(number)

    @staticmethod
    @first_order
    def backward(ctx, gradient):
        if gradient is not None:
            ctx.pass_.gradients[ctx.number] = gradient
        return torch.zeros((), device=ctx.device), None, None


# Forward


class _Mixed(Exception):
    """A call may mix images."""


def _forward(
    pass_: Pass,
    tensors: Sequence[Tensor | None],
    kept: Sequence[int],
    stays: Sequence[Stay],
    known: Sequence[Tensor] = (),
    apart_alone: bool = False,
) -> _Made:
    """Run a program; tensors are its inputs and parameters, kept the slots to return.

    known: its norms, where they have been made. apart_alone: raise _Mixed before a call that may
    mix images.
    """
    program, batch = pass_.program, pass_.batch
    values = dict(enumerate(tensors[: program.inputs]))
    parameters = tensors[program.inputs :]
    norms: dict[int, Tensor] = dict(enumerate(known))
    moments: dict[int, Tensor] = {}
    sizes = {slot: list(t.shape) for slot, t in values.items()}
    leaves = first_leaves(stays)
    held = {*program.outputs, *kept, *leaves}

    def normalise(slot: int, found: Tensor | None) -> None:
        for number in program.norms_of.get(slot, ()):
            if number in norms:
                continue
            norm = program.norms[number]
            weight, bias, mean, var = (
                None if index is None else parameters[index]
                for index in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            )
            if not batch[number]:
                norms[number] = batch_norm_eval(mean, var, weight, bias, pass_.eps[number])
                continue
            if found is None:
                found = moments_of(values[slot])
            count = values[slot].numel() // max(1, values[slot].shape[1])
            if not pass_.groups[number] and count == 1:
                raise ValueError(
                    "input: want more than one value a channel in training, got "
                    f"{list(values[slot].shape)}"
                )
            moments[number] = _all_moments(found, pass_.groups[number])
            norms[number] = batch_norm_forward(
                moments[number], weight, bias, None, None, None, 0.0, pass_.eps[number]
            )

    for slot in range(program.inputs):
        normalise(slot, None)
    for number, step in enumerate(program.steps):
        if apart_alone and isinstance(step, Call) and not keeps(step, sizes):
            raise _Mixed
        with _running(program, number):
            wanted = any(batch[n] for n in program.norms_of.get(step.out, ()))
            found = _execute(pass_, step, values, norms, parameters, wanted, first=True)
            for slot in made(step):
                sizes[slot] = list(values[slot].shape)
                normalise(slot, found if slot == step.out else None)
                if slot in leaves:
                    pass_.offloaded[slot] = Offloaded(values[slot])
        for slot in {*read(step), *made(step)}:
            if program.last_reader.get(slot, -1) <= number and slot not in held:
                values.pop(slot, None)
        for slot, place in leaves.items():
            if place == number + 1:
                values.pop(slot)
                pass_.offloaded[slot].settle()
    return _Made(
        [values[slot] for slot in program.outputs],
        [moments[n] for n in range(len(program.norms)) if batch[n]],
        [norms[n] for n in range(len(program.norms))],
        [values[slot] for slot in kept],
        sizes,
    )


def _forward_in_parts(
    pass_: Pass, tensors: Sequence[Tensor | None], kept: Sequence[int]
) -> _Made | None:
    """Run a program on some images at a time; kept: inputs. None where calls would mix images."""
    program = pass_.program
    inputs, parameters = tensors[: program.inputs], tensors[program.inputs :]
    count, fake = inputs[0].shape[0], isinstance(inputs[0], FakeTensor)
    outputs: list[Tensor] = []
    norms: list[Tensor] = []
    sizes: dict[int, list[int]] = {}
    for first, last in parts(count, pass_.images, fake):
        own = [*(x[first:last] for x in inputs), *parameters]
        try:
            made = _forward(pass_, own, (), (), norms, apart_alone=not outputs)
        except _Mixed:
            return None
        if not outputs:
            if not apart(program, made.sizes, last - first):
                return None
            sizes = {slot: [count, *size[1:]] for slot, size in made.sizes.items()}
            outputs, norms = [whole(out, count) for out in made.outputs], made.norms
        for number, out in enumerate(outputs):
            out[first:last] = made.outputs[number]
        del made
    return _Made(outputs, [], norms, [tensors[slot] for slot in kept], sizes)


def _read(
    source: Source, values: dict[int, Tensor], norms: dict[int, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, str, float, str]:
    """Return the arguments that operators take of a `Prologue`."""
    x, table, residual, residual_table = values[source.x.slot], None, None, None
    if source.x.norm is not None:
        table = norms[source.x.norm]
    if source.residual is not None:
        residual = values[source.residual.slot]
        if residual.shape != x.shape:
            residual = residual.expand(x.shape)  # spread over it, as torch does
        if source.residual.norm is not None:
            residual_table = norms[source.residual.norm]
    return x, table, residual, residual_table, source.act, source.slope, source.resample


def _execute(
    pass_: Pass,
    step: Step,
    values: dict[int, Tensor],
    norms: dict[int, Tensor],
    parameters: Sequence[Tensor | None],
    moments: bool,
    first: bool = False,
) -> Tensor | None:
    """Put what a step makes into `values`; return the moments of a convolution, if asked.

    first: whether this is the forward pass, where random states are noted.
    """
    if isinstance(step, Call):
        images = [values[slot] for slot in step.slots]
        out = _called(pass_, step, images, parameters, first)
        if step.cast and out.is_floating_point():
            out = out.to(pass_.dtype)
        values[step.out] = out.view_as(out) if any(out is image for image in images) else out
        return None
    if not isinstance(step, Conv):
        values[step.out] = prologue(*_read(step.source, values, norms))
        return None
    source, keep = step.sources[0], step.keep
    if keep is not None and step.out in values:  # made again for the written image alone
        values[keep] = prologue(*_read(replace(source, resample="none"), values, norms))
        return None
    if keep in values:  # made again without it
        source, keep = Source(Term(keep), resample=source.resample), None
    one = _read(source, values, norms)
    two = (None, None, "none", 0.0, "none")
    if len(step.sources) == 2:
        x2, norm2, residual, _, act2, slope2, resample2 = _read(step.sources[1], values, norms)
        if residual is not None:
            raise ValueError("sources: want a second one without a residual, got one with")
        two = x2, norm2, act2, slope2, resample2
    dtype = one[0].dtype
    weight = _weight(parameters[step.weight], dtype)
    bias = None if step.bias is None else parameters[step.bias].to(dtype)
    values[step.out], found, z = conv2d_fwd(
        *one, *two, weight, bias, step.stride, step.padding, step.dilation, step.groups,
        moments, keep is not None,
    )  # fmt: skip
    if keep is not None:
        values[keep] = z
    return found if moments else None


def _called(
    pass_: Pass,
    step: Call,
    images: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    first: bool,
) -> Tensor:
    """Return what a call makes, by the parameters of the forward pass and its random numbers."""
    numbers, layers = iter(step.parameters), []
    for index in step.layers:
        layer = pass_.layers[index]
        names = [name for name, _ in layer.named_parameters()]
        layers.append(_Bound(layer, {name: parameters[next(numbers)] for name in names}))
    device = images[0].device
    with ExitStack() as stack:
        if not first:
            enabled = pass_.autocast is not None
            stack.enter_context(
                torch.autocast(device.type, pass_.autocast, enabled=enabled, cache_enabled=False)
            )
        if step.random:
            own = [] if device.type == "cpu" else [device]
            if first:
                states = [torch.get_rng_state()]
                states += [getattr(torch, d.type).get_rng_state(d) for d in own]
                pass_.drawn[step.out] = states
            else:
                stack.enter_context(torch.random.fork_rng(own, device_type=device.type))
                states = pass_.drawn[step.out]
                torch.set_rng_state(states[0])
                for d, state in zip(own, states[1:], strict=True):
                    getattr(torch, d.type).set_rng_state(state, d)
        return step.function(*images, *layers)


@dataclass(frozen=True)
class _Bound:
    """A layer with the parameters to call it with."""

    layer: nn.Module
    parameters: dict[str, Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.parameters:
            return self.layer(*args, **kwargs)
        return torch.func.functional_call(self.layer, self.parameters, args, kwargs)


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


# Backward


def _backward(
    pass_: Pass,
    gradients: dict[int, Tensor],
    values: dict[int, Tensor],
    norms: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    hosted: dict[int, Offloaded],
) -> list[Tensor | None]:
    """Return a gradient for each input and parameter, None where none flows or is asked for.

    gradients: of outputs, by their numbers; they are taken out as they are used, as are values and
    what is hosted.
    """
    program = pass_.program
    if not gradients:
        return [None] * len(pass_.needs)
    if pass_.images:
        return _backward_in_parts(pass_, gradients, values, norms, parameters)
    run = _Backward(pass_, gradients, values, dict(enumerate(norms)), parameters, hosted)
    run.steps(0, len(program.steps), run.schedule.stretches)
    found = [run.image_gradient(slot) for slot in range(program.inputs)]
    found += [run.parameter_gradients.get(n) for n in range(program.parameters)]
    return [g if need else None for g, need in zip(found, pass_.needs, strict=True)]


def _backward_in_parts(
    pass_: Pass,
    gradients: dict[int, Tensor],
    values: dict[int, Tensor],
    norms: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return what `_backward` does, having gone through some images at a time."""
    program, steps = pass_.program, len(pass_.program.steps)
    count = pass_.sizes[0][0]
    fake = isinstance(next(iter(gradients.values())), FakeTensor)
    of_inputs: dict[int, Tensor] = {}
    of_parameters: dict[int, Tensor] = {}
    for first, last in parts(count, pass_.images, fake):
        sizes = {slot: [last - first, *size[1:]] for slot, size in pass_.sizes.items()}
        own = {slot: value[first:last] for slot, value in values.items()}
        if last == count:  # a gradient is free when its step has used it for the last time
            given = {number: gradients.pop(number)[first:last] for number in [*gradients]}
        else:
            given = {number: gradient[first:last] for number, gradient in gradients.items()}
        run = _Backward(
            replace(pass_, sizes=sizes), given, own, dict(enumerate(norms)), parameters, {}
        )
        run.parameter_gradients = of_parameters
        run.steps(0, steps, run.schedule.stretches)
        for slot in range(program.inputs):
            gradient = run.image_gradient(slot)
            if gradient is None or not pass_.needs[slot]:
                continue
            if slot not in of_inputs:
                of_inputs[slot] = whole(gradient, count)
            of_inputs[slot][first:last] = gradient
            del gradient
        del run, own, given
    found = [of_inputs.get(slot) for slot in range(program.inputs)]
    found += [of_parameters.get(number) for number in range(program.parameters)]
    return [g if need else None for g, need in zip(found, pass_.needs, strict=True)]


class _Backward(Walk):
    """The backward pass of one program, with images.

    Attributes:
        gradients: of slots as they are, and whether the tensor is ours to change; a norm's
            gradients are in norm_gradients, (g, sums).
        parameter_gradients: of parameters, by number.
    """

    def __init__(self, pass_, outputs, values, norms, parameters, hosted):
        self.schedule = pass_.program.schedule(pass_.needs)
        super().__init__(pass_.program, self.schedule.reads, values, self.schedule.stays)
        self.pass_, self.sizes = pass_, pass_.sizes
        self.outputs, self.norms, self.parameters = outputs, norms, parameters
        self.hosted = hosted
        self.asks, self.of = self.schedule.asks, pass_.needs[self.program.inputs :]
        self.numbers = {slot: number for number, slot in enumerate(self.program.outputs)}
        self.gradients: dict[int, tuple[Tensor, bool]] = {}
        self.norm_gradients: dict[int, tuple[Tensor, Tensor]] = {}
        self.parameter_gradients: dict[int, Tensor] = {}

    def add(self, slot: int, gradient: Tensor, own: bool) -> None:
        """Add to the gradient of a slot, if anybody asks.

        own: whether nobody else has the tensor, so that it may be changed.
        """
        if slot not in self.asks:
            return
        if list(gradient.shape) != self.sizes[slot]:  # the slot was spread over a larger image
            gradient, own = gradient.sum_to_size(self.sizes[slot]), True
        known, known_own = self.gradients.get(slot, (None, False))
        if known is None:
            self.gradients[slot] = gradient, own
        elif known_own and known.dtype == gradient.dtype:
            known += gradient
        elif own and known.dtype == gradient.dtype:
            gradient += known
            self.gradients[slot] = gradient, True
        else:
            self.gradients[slot] = known + gradient, True

    def add_parameter(self, number: int | None, gradient: Tensor | None) -> None:
        """Add to the gradient of a parameter, if it asks."""
        if number is not None and gradient is not None and self.of[number]:
            if self.pass_.images:  # of many parts, the sum is not to be rounded each time
                gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            known = self.parameter_gradients.get(number)
            self.parameter_gradients[number] = gradient if known is None else known + gradient

    # What `Walk` asks

    def execute(self, number: int) -> None:
        """Run a step again."""
        with _running(self.program, number):
            step = self.program.steps[number]
            _execute(self.pass_, step, self.values, self.norms, self.parameters, False)

    def drop(self, slot: int) -> None:
        """Let a slot go."""
        self.values.pop(slot, None)

    def prefetch(self, slot: int) -> None:
        """Begin to copy a slot back."""
        self.hosted[slot].prefetch()

    def fetch(self, slot: int, last: bool) -> None:
        """Put a slot back; the last time, the host's memory is free, unless the graph is kept."""
        there = self.hosted.pop(slot) if last else self.hosted[slot]
        self.values[slot] = there.wait()
        there.release()

    def value(self, slot: int) -> Tensor:
        """Return a slot, made again where it is not held."""
        self.ensure(slot)
        return self.values[slot]

    def take(self, number: int) -> None:
        """Take the gradient of what a step makes to what it reads."""
        step = self.program.steps[number]
        with _running(self.program, number):
            if isinstance(step, Conv):
                self.convolution(step)
            elif isinstance(step, Call):
                self.call(step)
            else:
                dz = self.image_gradient(step.out)
                if dz is not None:
                    self.through(step.source, dz)

    # Gradients

    def output_gradient(self, slot: int) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Return (g, y, coefficients) of a slot's gradient, as operators take it; None if none."""
        given = self.outputs.pop(self.numbers.get(slot, -1), None)
        if given is not None:
            self.add(slot, given, own=False)
            del given
        plain, own = self.gradients.pop(slot, (None, False))
        parts = []
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
        while parts:
            dy = normalised_gradient(*parts.pop(0))
            plain = dy if plain is None else plain.add_(dy) if own else plain + dy
            own = True
        return plain, None, None

    def image_gradient(self, slot: int) -> Tensor | None:
        """Return a slot's gradient as an image; None if none flows."""
        found = self.output_gradient(slot)
        if found is None or found[2] is None:
            return found and found[0]
        return normalised_gradient(*found)

    def coefficients(self, number: int, g: Tensor, sums: Tensor) -> Tensor:
        """Return a norm's coefficients, having added the gradients of its weight and bias."""
        norm, table, batch = self.program.norms[number], self.norms[number], self.pass_.batch
        pixels, group = g.numel() // g.shape[1], self.pass_.groups[number]
        count = max(1, pixels)
        coef, dweight, dbias = batch_norm_backward(sums, table, count, batch[number])
        self.add_parameter(norm.weight, dweight)  # this rank's part, for whoever averages
        self.add_parameter(norm.bias, dbias)
        if batch[number] and group:
            sums = _mean_sums(sums, pixels, count, group)
            coef, _, _ = batch_norm_backward(sums, table, count, batch[number])
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
            asks = source_asks(self.program, source, self.asks, self.of)
            if wants_weight or (asks and not source.linear):
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
                read = nothing if source.linear else _read(source, self.values, self.norms)
                gradient, found = conv2d_dgrad(*product, size, *read, add, *geometry, sums)
            kept = add = product = read = None
            if number == len(step.sources) - 1:
                g = y = coef = None  # before the sums below ask for memory
            if asks:
                self.spread(source, gradient, found)
                del gradient
            if wants_weight:
                parts.append(dw)
            if with_bias:
                self.add_parameter(step.bias, db)
        if wants_weight:
            dw = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            self.add_parameter(step.weight, dw)

    def call(self, step: Call) -> None:
        """Take the gradient of what a call made to its images and parameters."""
        gradient = self.image_gradient(step.out)
        if gradient is None:
            return
        images = []
        for slot in step.slots:
            if step.linear:  # only its size matters
                value = gradient.new_zeros((), dtype=self.pass_.dtype).expand(self.sizes[slot])
            else:
                value = self.value(slot)
            asks = slot in self.asks and value.is_floating_point()
            images.append(value.detach().requires_grad_(asks))
        own = {n: self.parameters[n].detach().requires_grad_(self.of[n]) for n in step.parameters}
        parameters = [own.get(n, p) for n, p in enumerate(self.parameters)]
        with torch.enable_grad():
            out = _called(self.pass_, step, images, parameters, False)
        wanted = [t for t in (*images, *own.values()) if t.requires_grad]
        if not wanted or not out.requires_grad:
            return
        found = torch.autograd.grad(out, wanted, gradient.to(out.dtype), allow_unused=True)
        del out, gradient
        by_tensor = dict(zip(map(id, wanted), found, strict=True))
        for slot, image in zip(step.slots, images, strict=True):
            if (dx := by_tensor.get(id(image))) is not None:
                self.add(slot, dx, own=False)  # perhaps a view of another's
        for number, parameter in own.items():
            self.add_parameter(number, by_tensor.get(id(parameter)))

    def through(self, source: Source, dz: Tensor) -> None:
        """Take the gradient of a source's value to what it reads."""
        if not source_asks(self.program, source, self.asks, self.of):
            return
        if source.linear:
            for term in source.terms:
                self.add(term.slot, dz, own=False)
            return
        for term in source.terms:
            self.value(term.slot)
        sums = any(term.norm is not None for term in source.terms)
        read = _read(source, self.values, self.norms)
        self.spread(source, *prologue_backward(dz, None, *read, sums))

    def spread(self, source: Source, g: Tensor, sums: Tensor) -> None:
        """Give the gradient of a sum to its terms, with sums [3, C] as operators return them."""
        plain = sum(term.norm is None for term in source.terms)
        for term, row in zip(source.terms, (1, 2), strict=False):
            if term.norm is None:
                self.add(term.slot, g, own=plain == len(source.terms) == 1)
            elif term_asks(self.program, term, self.asks, self.of):
                known = self.norm_gradients.get(term.norm)
                own = sums if row == 1 else sums[[0, 2, 1]]
                together = (g, own) if known is None else (known[0] + g, known[1] + own)
                self.norm_gradients[term.norm] = together


# Under torch.compile a pass is one operator: what it keeps is decided here, not by a partitioner.


class _Operator(torch.autograd.Function):
    """A program: its outputs, and the moments, norms and slots that `_Made` has."""

    @staticmethod
    def forward(program, batch, eps, groups, needs, *tensors):
        kept = program.schedule(needs).kept
        own = [slot for slot in kept if slot >= program.inputs and slot not in program.outputs]
        return tuple(_forward_operator(program.text, tensors, batch, eps, groups, own, any(needs)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        program, batch, _, groups, needs, *tensors = inputs
        ctx.set_materialize_grads(False)
        outputs, moments = len(program.outputs), sum(batch)
        ctx.mark_non_differentiable(*output[outputs:])
        if not any(needs):
            return
        kept = program.schedule(needs).kept
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
        made = _backward_operator(
            program.text, gradients, slots, kept, norms, parameters, ctx.sizes, ctx.batch,
            ctx.groups, needs,
        )  # fmt: skip
        results, rest = [], iter(made)
        for need, dtype in zip(needs, ctx.dtypes, strict=True):
            gradient = next(rest) if need else None
            # No element: none flows there.
            results.append(gradient.to(dtype) if need and gradient.numel() else None)
        return (None,) * 5 + tuple(results)


def _forward_listed(
    text: str,
    tensors: Sequence[Tensor | None],
    batch: Sequence[bool],
    eps: Sequence[float],
    groups: str,
    kept: Sequence[int],
    saving: bool,
) -> list[Tensor]:
    """Return the outputs, the moments of each norm of the batch, and if `saving` what to save.

    That is all norms, and the slots of `kept`.
    """
    pass_ = Pass(parsed(text), batch, eps, groups.split(","), ())
    made = pass_.forward(tensors, kept)
    return [*made.outputs, *made.moments, *(made.norms + made.kept if saving else ())]


def _backward_listed(
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
    inputs = [sizes[i : i + 4] for i in range(0, len(sizes), 4)]
    pass_ = Pass(program, batch, (), groups.split(","), needs)
    pass_.sizes = slot_sizes(program, inputs, [None if p is None else p.shape for p in parameters])
    pass_.images = part_size(program, batch, inputs)
    given = {number: g for number, g in enumerate(gradients) if g is not None}
    like = norms[0] if norms else slots[0] if slots else next(iter(given.values()))
    found = _backward(pass_, given, dict(zip(kept, slots, strict=True)), norms, parameters, {})
    return [
        like.new_empty(0) if gradient is None else gradient
        for gradient, need in zip(found, needs, strict=True)
        if need
    ]


def slot_sizes(
    program: Program,
    inputs: Sequence[Sequence[int]],
    shapes: Sequence[Sequence[int] | None],
) -> dict[int, list[int]]:
    """Return [N, C, H, W] of every slot of a program without calls.

    inputs: the sizes of its inputs; shapes: of its parameters, by number.
    """
    sizes = {slot: list(size) for slot, size in enumerate(inputs)}
    for step in program.steps:
        source = step.sources[0]
        N, C, H, W = sizes[source.x.slot]
        H_z, W_z = resampled_size(H, W, source.resample)
        if isinstance(step, Conv):
            shape = shapes[step.weight]
            geometry = Geometry(shape, step.stride, step.padding, step.dilation, step.groups)
            sizes[step.out] = [N, shape[0], *geometry.output_size(H_z, W_z)]
            if step.keep is not None:
                sizes[step.keep] = [N, C, H, W]
        else:
            sizes[step.out] = [N, C, H_z, W_z]
    return sizes


_forward_operator = torch.library.custom_op(
    "fullres::segment_forward", _forward_listed, mutates_args=()
)
_backward_operator = torch.library.custom_op(
    "fullres::segment_backward", _backward_listed, mutates_args=()
)
_forward_operator.register_fake(_forward_listed)
_backward_operator.register_fake(_backward_listed)
