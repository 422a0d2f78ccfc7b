"""What a training step keeps in memory, exactly, at any size, without the memory or the device.

The step runs on fake tensors, which have shapes, dtypes, strides and storages but no bytes, under
a mode that sees every operator, those of autograd's backward pass too. A storage counts from the
operator that first returns it until it dies, however many views share it.
"""

import copy
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..ops import program
from .convert import fused_away


@dataclass(frozen=True)
class Sample:
    """The live bytes right after one operator, its inputs among them."""

    phase: str  # "forward", "criterion", "backward" or "optimizer"
    module: str  # the innermost module it ran for, by its name in the model; "" if for none
    operator: str  # such as "aten.convolution.default"
    live: int  # bytes


@dataclass(frozen=True)
class MemoryReport:
    """One training step's memory, in bytes; every storage counts once."""

    input: int
    parameters: int
    buffers: int  # and other tensors that are attributes of modules
    optimizer: int  # its state
    gradients: int  # the parameters', after the backward pass
    stored: int  # made by the forward pass and alive after it: for the backward pass, or as output
    after_forward: int  # input + parameters + buffers + optimizer + stored
    peak: int
    stored_by_module: dict[str, int] = field(repr=False)  # stored, by the module that made it
    timeline: tuple[Sample, ...] = field(repr=False)  # one sample an operator

    @property
    def peak_at(self) -> Sample:
        """The first moment at which the peak was reached."""
        return max(self.timeline, key=lambda sample: sample.live)


class _Storage(NamedTuple):
    reference: weakref.ref
    size: int
    phase: str
    module: str


class LiveBytes(TorchDispatchMode):
    """A mode that counts the bytes of the living storages that were made under it.

    For fake tensors and for real ones. It does not see what an operator allocates and frees inside
    itself, such as a convolution's workspace, nor an allocator's rounding.

    Attributes:
        now: the live bytes.
        timeline: one Sample an operator that returned a tensor.
        phase: what the caller says is going on; it labels storages and samples.
        modules: the names of the modules that are running, innermost last, as the caller says.
    """

    def __init__(self) -> None:
        """Start with nothing alive."""
        super().__init__()
        self.now = 0
        self.timeline: list[Sample] = []
        self.phase = ""
        self.modules: list[str] = []
        self._alive: dict[int, _Storage] = {}  # by address
        self._recorder: dict[int, str] = {}  # the module behind each autograd node, by its number

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return max((sample.live for sample in self.timeline), default=0)

    def made_by(self, phase: str) -> dict[str, int]:
        """Return the live bytes that were made in a phase, by the module that made them."""
        total: Counter[str] = Counter()
        for storage in self._alive.values():
            if storage.phase == phase:
                total[storage.module] += storage.size
        return dict(total)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, count the storages it made, and take a sample."""
        kwargs = kwargs or {}
        module = self._module()
        out = func(*args, **kwargs)
        made, given = _tensors(out), None
        for tensor in made:
            storage = tensor.untyped_storage()
            known = self._alive.get(storage._cdata)
            if known is None:
                if given is None:
                    given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
                # Older than the mode, so not ours to count; torch.tensor() alone lifts a new one.
                if storage._cdata in given and func is not torch.ops.aten.lift_fresh.default:
                    continue
            elif known.size == storage.nbytes():
                continue
            self._count(storage, module)
        if made:
            self.timeline.append(Sample(self.phase, module, str(func), self.now))
        return out

    def _count(self, storage: torch.UntypedStorage, module: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._forget(key)  # its size before the operator resized it
        # A storage keeps its Python object, so this reference dies with the last tensor over it.
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._alive[key] = _Storage(reference, size, self.phase, module)
        self.now += size

    def _forget(self, key: int) -> None:
        if known := self._alive.pop(key, None):
            self.now -= known.size

    def _module(self) -> str:
        # Autograd numbers its nodes in the order of recording, right before the operator runs, so
        # in the backward pass a node's number tells the module. One that recomputes is on the
        # stack again.
        node = torch._C._current_autograd_node()
        if node is not None and not self.modules:
            return self._recorder.get(node._sequence_nr(), "")
        module = self.modules[-1] if self.modules else ""
        self._recorder.setdefault(torch._C._autograd._get_sequence_nr() - 1, module)
        return module


def meter(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    criterion: Callable[[Any], Tensor] | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
) -> MemoryReport:
    """Return the memory of one training step of model on one input.

    The model is copied without its bytes and left as it was. It may lie on any device, also on
    "meta", where building it costs nothing. Under `torch.no_grad()` there is no backward pass, and
    the report is that of inference. The output and the loss are held to the end, as in a plain
    training loop.

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

    Raises:
        ValueError: the model has no parameter.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError("model: want at least one parameter, got none")
    device = _device(first)
    mixed = torch.autocast(device.type, autocast) if autocast else nullcontext()

    fake, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    live.phase = "preparation"
    with fake, live:
        replaced = _fakes(model, dtype)
    model = copy.deepcopy(model, replaced)
    with fake, live, ExitStack() as hooks:
        parameters = [p for p in model.parameters() if p.requires_grad]
        steps = optimizer(parameters) if optimizer else None
        state = _make_state(steps, parameters) if steps else []
        x = torch.empty(tuple(input_shape), dtype=dtype or first.dtype, device=device)
        unseen = fused_away(model)
        for name, module in model.named_modules():
            if module not in unseen:
                hooks.enter_context(_named(module, name, live.modules))
        program.watchers.append(live.modules)
        hooks.callback(program.watchers.remove, live.modules)
        prepared, before = len(live.timeline), live.now

        live.phase = "forward"
        with mixed:
            out = model(x)
            after_forward, stored_by_module = live.now, live.made_by("forward")
            live.phase = "criterion"
            loss = criterion(out) if criterion else sum(t.sum() for t in _tensors(out))
        live.phase = "backward"
        if loss.requires_grad:
            loss.backward()
        gradients = _size(p.grad for p in parameters)
        live.phase = "optimizer"
        if steps and loss.requires_grad:
            steps.step()

        timeline = tuple(live.timeline[prepared:])
        return MemoryReport(
            input=_size([x]),
            parameters=_size(model.parameters()),
            buffers=_size(_others(model)),
            optimizer=_size(state),
            gradients=gradients,
            stored=after_forward - before,
            after_forward=after_forward,
            peak=max(sample.live for sample in timeline),
            stored_by_module=stored_by_module,
            timeline=timeline,
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensors: Iterable[Tensor | None]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _others(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that are not parameters: buffers, and plain attributes of modules."""
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _fakes(model: nn.Module, dtype: torch.dtype | None) -> dict[int, Any]:
    """Return a fake tensor for each of the model's, by id; two share a storage if those do."""
    whole: dict[int, Tensor] = {}  # by the storage's address
    fakes: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), _others(model)):
        storage = tensor.untyped_storage()
        if storage._cdata not in whole:
            kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
            count = storage.nbytes() // tensor.element_size()
            whole[storage._cdata] = torch.empty(count, dtype=kind, device=_device(tensor))
        fake = whole[storage._cdata].as_strided(
            tensor.size(), tensor.stride(), tensor.storage_offset()
        )
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake.detach(), requires_grad=tensor.requires_grad)
        fakes[id(tensor)] = fake
    return fakes


def _make_state(steps: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Take a first step with gradients of zero, forget them, and return the optimizer's state."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    steps.step()
    steps.zero_grad(set_to_none=True)
    return _tensors(list(steps.state.values()))


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
