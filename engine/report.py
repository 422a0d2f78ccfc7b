"""What `convert` made of a network, layer by layer, and what that saves."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..ops.losses import SigmoidFocalLoss
from .convert import conversions, exchanged, revert
from .meter import meter

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One layer."""

    layer: str  # its name in the network
    kind: str  # its class
    became: str  # the segment that computes it, our layer that does, or "as before"
    why: str  # why it is as before, where there is something to say
    before: int | None = None  # bytes stored for backward, None where no size was given
    after: int | None = None


@dataclass(frozen=True)
class Report:
    """A row a layer, and their sums; `str` makes a table of it."""

    rows: tuple[Row, ...]
    before: int | None = None
    after: int | None = None

    def __str__(self) -> str:
        """Return the table."""
        table = [("layer", "kind", "became", "MiB before", "MiB after", "")]
        table += [
            (row.layer, row.kind, row.became, _mib(row.before), _mib(row.after), row.why)
            for row in self.rows
        ]
        table.append(("all", "", "", _mib(self.before), _mib(self.after), ""))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        )


def report(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    *,
    autocast: torch.dtype | None = torch.bfloat16,
) -> Report:
    """Return what became of each layer of a network that `convert` returned.

    Args:
        model: the converted network, in the mode (training or evaluation) to look at. Or one of
            `fullres.nn`'s losses: then what it stores beside the same loss composed in torch.
        input_shape: of its one input, such as [N, C, H, W]; then the bytes stored for backward are
            measured, on fake tensors, for the network as it is and as it was. A loss needs it:
            that of its logits or features.
        autocast: the compute dtype of that measurement; None for that of the parameters.

    Raises:
        ValueError: the network is not converted.
    """
    if hasattr(model, "composed"):
        if input_shape is None:
            raise ValueError("input_shape: want that of the loss's logits or features, got None")
        return _loss_report(model, input_shape, autocast or torch.float32)
    if not any(True for _ in conversions(model)) and not exchanged(model):
        raise ValueError("model: want one that fullres.convert returned, got one as it was")
    before: Counter[str] | None = None
    after: Counter[str] | None = None
    if input_shape is not None:
        before = Counter(meter(revert(model), input_shape, autocast=autocast).stored_by_module)
        after = Counter(meter(model, input_shape, autocast=autocast).stored_by_module)
    became: dict[str, str] = {}
    why: dict[str, str] = {}
    for name, _, conversion in conversions(model):
        prefix = f"{name}." if name else ""
        became |= {prefix + target: prefix + s for target, s in conversion.became.items()}
        why |= {prefix + target: reason for target, reason in conversion.left.items()}
    ours = exchanged(model)
    rows = []
    for name, module in model.named_modules():
        if next(module.children(), None) is not None:
            continue
        kind = type(module).__name__
        became_ = became.get(name) or (f"fullres.nn.{kind}" if module in ours else "as before")
        sizes = [None if count is None else count.pop(name, 0) for count in (before, after)]
        rows.append(Row(name, kind, became_, why.get(name, ""), *sizes))
    if before is None or after is None:
        return Report(tuple(rows))
    rest = [name for name in dict.fromkeys([*before, *after]) if before[name] or after[name]]
    rows += [Row(name or "between layers", "", "", "", before[name], after[name]) for name in rest]
    return Report(
        tuple(rows), sum(row.before or 0 for row in rows), sum(row.after or 0 for row in rows)
    )


def _loss_report(loss: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> Report:
    """Return one row: the bytes that a loss keeps besides its inputs and its parameters."""
    kind = type(loss).__name__
    sizes = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = torch.empty(tuple(shape), dtype=dtype, requires_grad=True)
        pixels = tuple(shape) if isinstance(loss, SigmoidFocalLoss) else (shape[0], *shape[2:])
        labels = torch.empty(pixels, dtype=torch.uint8)
        fake = {id(t): mode.from_tensor(t.to(dtype)) for t in loss.parameters()}
        given = [x, labels, *fake.values()]
        known = {t.untyped_storage()._cdata for t in given}
        with torch.nn.utils.stateless._reparametrize_module(
            loss, {name: fake[id(t)] for name, t in loss.named_parameters()}
        ):
            for call in (loss.composed, loss):
                kept: dict[int, int] = {}

                def pack(t: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
                    storage = t.untyped_storage()
                    if storage._cdata not in known:
                        kept[storage._cdata] = storage.nbytes()
                    return t

                with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    result = call(x, labels)
                sizes.append(sum(kept.values()))
                del result
    return Report((Row("", kind, f"fullres.nn.{kind}", "", *sizes),), *sizes)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.1f}"
