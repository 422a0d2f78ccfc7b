"""How operators run on fake tensors: from what they did before, or by their device's code."""

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode


class _Unknown(Exception):
    """An argument of which the result may depend in ways that are not looked at."""


class Remembered:
    """Calls operators; asks a fake kernel once for each kind of arguments, which is most of a step.

    What an operator makes of fake tensors follows from their sizes, strides, types and devices and
    from its other arguments. Remembered, by all objects together, are operators of torch's and ours
    that return new tensors, or the first argument that they write to. All others are called: views,
    resizing, whatever may look at values, and those that raise.
    """

    _results: dict[tuple, Any] = {}
    _excluded: dict[Any, bool] = {}

    def __init__(self, mode: FakeTensorMode) -> None:
        """Call operators on this mode's fake tensors, while it is active."""
        self._mode = mode

    def __call__(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return func(*args, **kwargs)."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # A third of all calls: autograd asks for each tensor's device.
            if not args[0].fake_mode.in_kernel_invocation:
                return args[0].fake_device
        excluded = self._excluded.get(func)
        if excluded is None:
            excluded = self._excluded[func] = _excluded(func)
        if excluded:
            return func(*args, **kwargs)
        try:
            given = _key(tuple(kwargs.items())) if kwargs else ()
            key = func, _key(args), given, torch.get_default_dtype()
        except _Unknown:
            return func(*args, **kwargs)
        known = self._results.get(key)
        if known is _FIRST_ARGUMENT:
            return args[0]
        if known is not None:
            return _made_again(known, self._mode)
        out = func(*args, **kwargs)
        if known := _result(out, args, kwargs):
            if len(self._results) >= _MOST:
                self._results.clear()
            self._results[key] = known
        return out


_MOST = 20_000  # results, some ten times those of a large network's step
_FIRST_ARGUMENT = object()
_NEVER = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}
_PLAIN = (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def _excluded(func: Any) -> bool:
    """Whether what an operator returns is never remembered."""
    if not isinstance(func, OpOverload) or func.namespace not in ("aten", "fullres"):
        return True
    return not _NEVER.isdisjoint(func.tags) or func.is_view


def _key(value: Any) -> Any:
    """Return what a result depends on, so that equal keys mean equal results."""
    kind = type(value)
    if kind is FakeTensor:
        dtype = value.dtype
        # A known value counts too, such as that of an optimizer's step counter.
        if value.constant is not None or dtype.is_complex:
            raise _Unknown
        return value.shape, value.stride(), dtype, value.fake_device, value.layout
    if kind is tuple or kind is list:
        return tuple([_key(item) for item in value])
    if kind is int or kind is float or kind is bool:
        return kind, value  # 1 equals 1.0 and True, but does not promote alike
    if kind in _PLAIN:
        return value
    raise _Unknown


def _result(out: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return what `_made_again` needs to make out again; None where it does not suffice."""
    if args and out is args[0]:
        return _FIRST_ARGUMENT
    several = type(out) in (tuple, list)
    tensors = out if several else (out,)
    seen = {t.untyped_storage()._cdata for t in tensors_in((args, tuple(kwargs.values())))}
    plans = []
    for t in tensors:
        if t is None:
            plans.append(None)
            continue
        if type(t) is not FakeTensor or t.constant is not None or t.layout is not torch.strided:
            return None
        storage = t.untyped_storage()
        extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        size = (extent if t.numel() else 0) * t.element_size()
        if storage._cdata in seen or t.storage_offset() or storage.nbytes() != size:
            return None
        seen.add(storage._cdata)
        plans.append((t.shape, t.stride(), t.dtype, t.fake_device))
    return type(out) if several else None, plans


def _made_again(known: tuple, mode: FakeTensorMode) -> Any:
    kind, plans = known
    made = []
    for plan in plans:
        if plan is None:
            made.append(None)
            continue
        shape, stride, dtype, device = plan
        with in_kernel_invocation_manager(mode):
            empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        made.append(FakeTensor(mode, empty, device))
    return made[0] if kind is None else kind(made)


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among an operator's arguments or results, also those in lists."""
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    if isinstance(values, tuple | list):
        for value in values:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, tuple | list):
                found += tensors_in(value)
            elif isinstance(value, dict):  # of operators that take functions
                found += tensors_in(tuple(value.values()))
    elif isinstance(values, dict):
        found += tensors_in(tuple(values.values()))
    return found


def on_device(func: OpOverload) -> Any:
    """Return the function that one of our operators runs on a GPU."""
    return OPDEFS[func._schema.name]._backend_fns["cuda"]


class DevicePath(TorchDispatchMode):
    """Run the CUDA implementation of our operators, whatever the device of their tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        """Run an operator."""
        if func.namespace == "fullres":
            with self:  # a mode is off while it is asked: operators may call others of ours
                return on_device(func)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def stand_in(argument: Any) -> Any:
    """Return what stands for an argument where `kernels.launches.recorded` records."""
    from ..kernels import launches  # here: importing the engine must not need triton

    if isinstance(argument, Tensor):
        return launches.tensor_argument(argument.dtype, argument.untyped_storage().nbytes())
    return argument
