"""The bytes of the tensors that live, operator by operator, of fake tensors and of real ones.

A storage counts from the operator that first returns it until it dies, however many views share it.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .fakes import tensors_in


class Sample(NamedTuple):
    """The live bytes right after one operator, its inputs among them."""

    phase: str  # "forward", "criterion", "backward" or "optimizer"
    module: str  # the innermost module it ran for, by its name in the model; "" if for none
    operator: str  # such as "aten.convolution.default"
    live: int  # bytes
    host: int = 0  # bytes that live elsewhere, where the mode has a device


class Span(NamedTuple):
    """The life of one storage."""

    phase: str  # in which it was made
    module: str  # for which
    operator: str  # which returned it
    bytes: int
    first: int  # the sample in which it first counts
    last: int  # and the last


class LiveBytes(TorchDispatchMode):
    """A mode that counts the bytes of the living storages that were made under it.

    It does not see what an operator allocates and frees inside itself, such as a convolution's
    workspace, nor an allocator's rounding.

    Attributes:
        now: the live bytes.
        host: the live bytes of other devices than the mode's, and of storages moved to the host.
        timeline: one Sample an operator that returned a tensor.
        phase: what the caller says is going on; it labels storages and samples.
        modules: the names of the modules that are running, innermost last, as the caller says.
        run: what calls an operator: run(func, args, kwargs).
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Start with nothing alive.

        device: the only one whose tensors count as live; None for any.
        """
        super().__init__()
        self.now = self.host = 0
        self.timeline: list[Sample] = []
        self.phase = ""
        self.modules: list[str] = []
        self.run: Callable[[Any, tuple, dict[str, Any]], Any] = _call
        self._device = device
        self._alive: dict[int, _Storage] = {}  # by address
        self._dead: list[tuple[_Storage, int]] = []  # with the number of samples at its death
        self._recorder: dict[int, str] = {}  # the module behind each autograd node, by its number
        self._inside: list[str] = []
        self._names: dict[Any, str] = {}

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return max((sample.live for sample in self.timeline), default=0)

    def made_by(self, phase: str) -> dict[str, int]:
        """Return the live bytes that were made in a phase, by the module that made them."""
        total: Counter[str] = Counter()
        for storage in self._alive.values():
            if storage.phase == phase and not storage.on_host:
                total[storage.module] += storage.size
        return dict(total)

    def alive_at(self, number: int) -> list[Span]:
        """Return what was alive in a sample, in the order in which it was made; not the host's."""
        end = len(self.timeline)
        lives = [*self._dead, *((storage, end) for storage in self._alive.values())]
        spans = [
            Span(s.phase, s.module, s.operator, s.size, s.born, died - 1)
            for s, died in lives
            if s.born <= number < died and not s.on_host
        ]
        return sorted(spans, key=lambda span: span.first)

    def restart(self) -> None:
        """Forget all samples; what is alive was there from the start."""
        self.timeline.clear()
        self._dead.clear()
        for storage in self._alive.values():
            storage.born = 0

    def label(self, tensors: Iterable[Tensor], phase: str, module: str, name: str) -> None:
        """Name tensors of which the caller knows better than the operator what they are.

        What was made outside the mode begins to count.
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive:
                self._count(storage, tensor.device, "", "")
            known = self._alive[storage._cdata]
            known.phase, known.module, known.operator = phase, module, name

    def move_to_host(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as the host's, from its birth on.

        Fake tensors of a host copy and of what it is a copy of may lie on the same device.
        """
        known = self._alive.get(storage._cdata)
        if known is None:  # made out of the mode's sight
            self._count(storage, None, self.modules[-1] if self.modules else "", "")
            known = self._alive[storage._cdata]
        if known.on_host:
            return
        known.on_host = True
        self.now -= known.size
        self.host += known.size
        for number in range(known.born, len(self.timeline)):
            sample = self.timeline[number]
            self.timeline[number] = sample._replace(
                live=sample.live - known.size, host=sample.host + known.size
            )

    @contextmanager
    def inside(self, func: Any) -> Iterator[None]:
        """Count what is made while an operator runs, in its name, from the mode's own `run`."""
        self._inside.append(self._name(func))
        try:
            with self:  # a mode is off while it is asked
                yield
        finally:
            self._inside.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, count the storages it made, and take a sample."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return self.run(func, args, kwargs)
        module = self._module()
        out = self.run(func, args, kwargs)
        made = tensors_in(out)
        if not made:
            return out
        operator = self._inside[-1] if self._inside else self._name(func)
        given = None
        for tensor in made:
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = self._alive.get(key)
            if known is None:
                if given is None:
                    given = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
                # Older than the mode, so not ours to count; torch.tensor() alone lifts a new one.
                if key in given and func is not torch.ops.aten.lift_fresh.default:
                    continue
            elif known.size == storage.nbytes():
                continue
            self._count(storage, tensor.device, module, operator)
        self.timeline.append(Sample(self.phase, module, operator, self.now, self.host))
        return out

    def _count(
        self, storage: torch.UntypedStorage, device: torch.device | None, module: str, operator: str
    ) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._forget(key)  # its size before the operator resized it
        # A storage keeps its Python object, so this reference dies with the last tensor over it.
        reference = weakref.ref(storage, lambda _: self._forget(key))
        on_host = None not in (device, self._device) and device != self._device
        born = len(self.timeline)
        self._alive[key] = _Storage(reference, size, self.phase, module, operator, born, on_host)
        if on_host:
            self.host += size
        else:
            self.now += size

    def _forget(self, key: int) -> None:
        known = self._alive.pop(key, None)
        if known is None:
            return
        if known.on_host:
            self.host -= known.size
        else:
            self.now -= known.size
        known.reference = None
        if known.born < len(self.timeline):  # else no sample has seen it
            self._dead.append((known, len(self.timeline)))

    def _name(self, func: Any) -> str:
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = str(func)
        return name

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


class _Storage:
    __slots__ = ("born", "module", "on_host", "operator", "phase", "reference", "size")

    def __init__(
        self,
        reference: weakref.ref | None,
        size: int,
        phase: str,
        module: str,
        operator: str,
        born: int,
        on_host: bool,
    ):
        self.reference, self.size, self.phase, self.module = reference, size, phase, module
        self.operator, self.born, self.on_host = operator, born, on_host


def _call(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)
