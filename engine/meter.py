"""What a training step keeps in memory, exactly, at any size, without the memory or the device.

The step runs on fake tensors, which have shapes, dtypes, strides and storages but no bytes, under
a mode that sees every operator, those of autograd's backward pass too. Or, under the same mode, on
a device.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ..ops import offload, program
from .convert import fused_away
from .fakes import Remembered, on_device, stand_in
from .live_bytes import LiveBytes, Sample
from .memory_report import MemoryReport

__all__ = ["LiveBytes", "MemoryReport", "Sample", "meter"]

TARGET = "sm_90"  # for which workspaces are counted on fake tensors; their sizes are all targets'


def meter(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    criterion: Callable[[Any], Tensor] | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    hold_output: bool = True,
    device: torch.device | str | None = None,
    workspaces: bool = False,
) -> MemoryReport:
    """Return the memory of one training step of model on one input.

    By default the step runs on fake tensors: at any size, in seconds, with no device. The model is
    copied without its bytes and left as it was. It may lie on any device, also on "meta", where
    building it costs nothing. Under `torch.no_grad()` there is no backward pass, and the report is
    that of inference. The loss is held to the end, as in a plain training loop. Tensors that were
    there before, such as labels that a criterion holds, do not count.

    Args:
        model: the network, in the mode (training or evaluation) to measure.
        input_shape: the size of its one input, such as [N, C, H, W].
        criterion: takes the model's output, returns the loss. Tensors it makes are fake as well.
            None takes the sum of all tensors in the output.
        optimizer: takes the parameters, returns their optimizer, as torch.optim.AdamW does. The
            step measured is one that finds the optimizer's state already there.
        dtype: that of the input, and of the model's floating-point parameters and buffers, which
            are cast as by `model.to(dtype)`; None keeps the model's, and takes its first
            parameter's for the input.
        autocast: runs the forward pass and the criterion under torch.autocast to this dtype.
        hold_output: whether the output is held to the end, as by `out = model(x)` in a training
            loop. False drops it before the backward pass, as `loss = criterion(model(x))` does,
            so that it lives on only where the loss has saved it.
        device: where to run the step for real, "cpu" or "cuda", on a copy of the model and an input
            of zeros. The live bytes are counted as on fake tensors; on "cuda" the report also has
            the allocator's peaks, in which the workspaces of convolutions and the rounding of sizes
            are included and what was allocated before the call is not; a first step, which tunes
            kernels, is not measured. None runs on fake tensors.
        workspaces: count what our operators allocate inside themselves on a GPU too, such as
            partial sums, in the operators' names. On fake tensors that needs triton, and kernels
            are taken in their first configuration.

    Raises:
        ValueError: the model has no parameter; the device is not there; workspaces where our
            operators have none (the CPU) or triton is not installed.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError("model: want at least one parameter, got none")
    real = device is not None
    place = _there(torch.device(device)) if device is not None else _device(first)
    if workspaces and real and place.type == "cpu":
        raise ValueError("workspaces: want False where a step runs on the CPU, got True")

    def mixed() -> AbstractContextManager:
        return torch.autocast(place.type, autocast) if autocast else nullcontext()

    live, calls = LiveBytes(place), ExitStack()
    with calls:
        if real:
            calls.enter_context(torch.random.fork_rng([place] if place.type == "cuda" else []))
            fake = nullcontext()
        else:
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            live.run = Remembered(fake)
        if workspaces:
            calls.enter_context(_device_code(live, real))
        before = _allocator(place) if real and _has_allocator(place) else None

        with fake, live:
            replaced = _twins(model, dtype, place, real)
        model = copy.deepcopy(model, replaced)
        kind = dtype or first.dtype
        if before is not None:  # kernels are tuned, and cuDNN chooses, in a step of its own
            x = torch.zeros(tuple(input_shape), dtype=kind, device=place)
            _run(model, x, criterion, mixed, hold_output)
            model.zero_grad(set_to_none=True)
            del x

        with fake, live, ExitStack() as hooks:
            parameters = [p for p in model.parameters() if p.requires_grad]
            live.phase = "state"
            steps = optimizer(parameters) if optimizer else None
            state = _make_state(steps, parameters) if steps else {}
            x = torch.zeros(tuple(input_shape), dtype=kind, device=place)
            _label(live, model, state, x)
            live.restart()
            unseen = fused_away(model)
            for name, module in model.named_modules():
                if module not in unseen:
                    hooks.enter_context(_named(module, name, live.modules))
            hooks.enter_context(_watching(live))
            start, forward = live.now, {}

            def at(phase: str) -> None:
                if phase == "criterion":
                    forward["live"], forward["by_module"] = live.now, live.made_by("forward")
                live.phase = phase

            if before is not None:
                _reset_peaks(place)
            loss, out = _run(model, x, criterion, mixed, hold_output, at)
            gradients = _size((p.grad for p in parameters), place)
            at("optimizer")
            if steps and loss.requires_grad:
                steps.step()
            del loss, out
            allocated = reserved = None
            if before is not None:
                allocated, reserved = (
                    most - least for most, least in zip(_peaks(place), before, strict=True)
                )

            timeline = tuple(live.timeline)
            peak = max(sample.live for sample in timeline)
            number = next(n for n, sample in enumerate(timeline) if sample.live == peak)
            return MemoryReport(
                input=_size([x], place),
                parameters=_size(model.parameters(), place),
                buffers=_size(_others(model), place),
                optimizer=_size(_tensors(list(state.values())), place),
                gradients=gradients,
                stored=forward["live"] - start,
                after_forward=forward["live"],
                peak=peak,
                stored_by_module=forward["by_module"],
                timeline=timeline,
                spans=tuple(live.alive_at(number)),
                host_peak=max(sample.host for sample in timeline),
                device=str(place) if real else "fake",
                allocated=allocated,
                reserved=reserved,
            )


def _run(
    model: nn.Module,
    x: Tensor,
    criterion: Callable[[Any], Tensor] | None,
    mixed: Callable[[], AbstractContextManager],
    hold_output: bool,
    at: Callable[[str], None] = lambda phase: None,
) -> tuple[Tensor, Any]:
    """Take x forward and backward; return the loss, and the output where it is held.

    at: told the name of each phase as it begins.
    """
    at("forward")
    with mixed():
        out = model(x)
        at("criterion")
        loss = criterion(out) if criterion else sum(t.sum() for t in _tensors(out))
    if not hold_output:
        out = None
    at("backward")
    if loss.requires_grad:
        loss.backward()
    return loss, out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensors: Iterable[Tensor | None], device: torch.device) -> int:
    storages = [t.untyped_storage() for t in tensors if t is not None and t.device == device]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


# Where the step runs


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _there(device: torch.device) -> torch.device:
    """Return a device with its number; raise ValueError where no step can run on it."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: want cpu, cuda or None, got {str(device)!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"device: want one of this machine's {count} GPUs, got {str(device)!r}")
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def _has_allocator(device: torch.device) -> bool:
    return device.type == "cuda"


def _allocator(device: torch.device) -> tuple[int, int]:
    """Return the bytes that a GPU's allocator has handed out, and those it cannot give back."""
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


def _reset_peaks(device: torch.device) -> None:
    _allocator(device)
    torch.cuda.reset_peak_memory_stats(device)


def _peaks(device: torch.device) -> tuple[int, int]:
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


@contextmanager
def _device_code(live: LiveBytes, real: bool) -> Iterator[None]:
    """Let the mode see into our operators, which run what they run on a GPU."""
    call = live.run

    def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if getattr(func, "namespace", "") != "fullres":
            return call(func, args, kwargs)
        with live.inside(func):
            return on_device(func)(*args, **kwargs)

    live.run = run
    if real:
        yield
        return
    try:
        from ..kernels import launches  # here: importing the engine must not need triton
    except ImportError as error:
        raise ValueError("workspaces: want False without triton, got True") from error
    with launches.recorded(TARGET, stand_in, first=True):
        yield


# The model and what is there before the step


def _others(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that are not parameters: buffers, and plain attributes of modules."""
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _twins(
    model: nn.Module, dtype: torch.dtype | None, device: torch.device, values: bool
) -> dict[int, Any]:
    """Return a tensor on the device for each of the model's, by id; they share as those do.

    values: whether to copy values too, which a fake tensor has not.
    """
    whole: dict[int, Tensor] = {}  # by the storage's address
    twins: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), _others(model)):
        storage = tensor.untyped_storage()
        if storage._cdata not in whole:
            kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
            count = storage.nbytes() // tensor.element_size()
            whole[storage._cdata] = flat = torch.zeros(count, dtype=kind, device=device)
            if values and not tensor.is_meta:
                with torch.no_grad():
                    flat.copy_(tensor.new_empty(0).set_(storage)[:count])
        twin = whole[storage._cdata].as_strided(
            tensor.size(), tensor.stride(), tensor.storage_offset()
        )
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        twins[id(tensor)] = twin
    return twins


def _make_state(
    steps: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> dict[nn.Parameter, Any]:
    """Take a first step with gradients of zero, forget them, and return the optimizer's state."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    steps.step()
    steps.zero_grad(set_to_none=True)
    return dict(steps.state)


def _label(live: LiveBytes, model: nn.Module, state: dict[nn.Parameter, Any], x: Tensor) -> None:
    """Name what is there before the step."""
    live.label([x], "input", "", "x")
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor):
                live.label([value], "buffers", name, attribute)
        for attribute, buffer in module.named_buffers(recurse=False):
            live.label([buffer], "buffers", name, attribute)
        for attribute, parameter in module.named_parameters(recurse=False):
            live.label([parameter], "parameters", name, attribute)
            live.label(_tensors(state.get(parameter, {})), "state", name, attribute)


# Whose operators these are


@contextmanager
def _watching(live: LiveBytes) -> Iterator[None]:
    """Let segments say which of their layers run, and what they make on the host."""
    program.watchers.append(live.modules)
    offload.watchers.append(live.move_to_host)
    try:
        yield
    finally:
        program.watchers.remove(live.modules)
        offload.watchers.remove(live.move_to_host)


@contextmanager
def _named(module: nn.Module, name: str, stack: list[str]) -> Iterator[None]:
    """Keep the module's name on the stack while it runs."""

    def enter(*_: Any) -> None:
        stack.append(name)

    def leave(*_: Any) -> None:
        stack.pop()

    before = module.register_forward_pre_hook(enter, prepend=True)
    after = module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
