"""The textbook softmax focal loss, and the blockwise arithmetic that pixel losses share.

With p the softmax over C classes, y the label and q = 1 - p_y, each a value of one pixel:

    ce = -log p_y                 loss = alpha_y * q**gamma * ce
    d(loss)/d(logit_j) = k * (p_j - [j = y]),   k = alpha_y * q**gamma * (1 + gamma * p_y * ce / q)

An image fits where its fp32 softmax does not. So every pass walks over blocks of pixels, keeps
nothing but the logits and labels that the caller holds already, and softmax is taken again in
backward. q is the sum of the other classes' probabilities and not 1 - p_y, which in fp32 would
leave no digit of it at the many pixels that are classified well.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from .autograd import first_order

BLOCK_ELEMENTS = 1 << 22  # 16 MiB of fp32: small beside a batch, and worth a device's launches

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)


def softmax_focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | Sequence[float] | torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Return the focal loss -alpha_y (1 - p_y)^gamma log(p_y), its gradient through all factors.

    Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection", ICCV 2017: equation
    4 without and 5 with alpha, over a softmax instead of their sigmoid.

    Saves for backward: logits and labels as they were given, and nothing of their size besides.
    Temporaries are bounded by `BLOCK_ELEMENTS`, so uint8 labels are widened one block at a time.
    Sums run in a fixed order, without atomics. Backward runs as often as the graph is retained;
    with create_graph=True it raises RuntimeError, as there are no second derivatives.

    Args:
        logits: [N, C, ...] or [M, C], float16, bfloat16, float32 or float64, any memory format.
        labels: [N, ...] or [M], uint8, int32 or int64, each `ignore_index` or in [0, C).
        gamma: focusing exponent, >= 0. At 0 the result is the (weighted) cross entropy.
        alpha: None, one factor for all classes, or [C] factors, one a class. Constants: no
            gradient flows to them.
        ignore_index: label of pixels that count for nothing. One that the labels' dtype cannot
            hold ignores no pixel.
        reduction: "none", "sum", or "mean", which divides by the number of pixels that count,
            each weighed by its class's alpha where alpha is one a class (as the weight of
            `torch.nn.functional.cross_entropy`); one factor for all classes scales the mean.

    Returns:
        A scalar, or for "none" [N, ...] with 0 at ignored pixels; float32, and float64 for
        float64 logits. The mean over no pixel is 0, and so is its gradient.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not the above.
        IndexError: a label on the CPU is out of range; on an accelerator that is a device-side
            assertion, since looking would wait for the device. As in torch's cross entropy.
    """
    _check(logits, labels, gamma, reduction)
    alpha, scale = _class_weights(alpha, logits)
    if reduction == "none":
        loss = _FocalLossMap.apply(logits, labels, gamma, alpha, ignore_index)
    else:
        mean = reduction == "mean"
        loss = _FocalLossSum.apply(logits, labels, gamma, alpha, ignore_index, mean)
    return loss if scale is None else loss * scale


def softmax_focal_loss_reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | Sequence[float] | torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Return the same as `softmax_focal_loss`, from differentiable torch operations.

    It defines the meaning. It keeps several float and int64 tensors of the image's size, and its
    gradient is NaN where p_y rounds to 1 and 0 < gamma < 1.
    """
    _check(logits, labels, gamma, reduction)
    alpha, scale = _class_weights(alpha, logits)
    labels = labels.long()
    counts = labels != ignore_index
    labels = labels.masked_fill(~counts, 0)
    log_p = logits.to(accumulator_dtype(logits)).log_softmax(1)
    log_p = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    weight = counts.to(log_p.dtype) if alpha is None else alpha[labels] * counts
    factor = 1.0 if gamma == 0 else (1 - log_p.exp()) ** gamma
    loss = -weight * factor * log_p
    if scale is not None:
        loss = loss * scale
    if reduction == "none":
        return loss
    total = weight.sum() if reduction == "mean" else torch.ones_like(loss.sum())
    return loss.sum() / torch.where(total == 0, 1, total)


def accumulator_dtype(logits: torch.Tensor) -> torch.dtype:
    """Return the dtype that losses of `logits` are computed in: float32, or float64 if given."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def pixel_blocks(logits: torch.Tensor) -> Iterator[tuple[slice, ...]]:
    """Yield index tuples over labels [N, ...] that cover each pixel of `logits` once, in order.

    A block holds at most `BLOCK_ELEMENTS` logits, or one pixel; `logits_index` turns its index
    into that of the logits. Its slices are views for any memory format.
    """
    limit = max(1, BLOCK_ELEMENTS // max(1, logits.shape[1]))
    return _slices((logits.shape[0], *logits.shape[2:]), limit)


def logits_index(block: tuple[slice, ...]) -> tuple[slice, ...]:
    """Return the index into logits [N, C, ...] of a block of labels [N, ...]."""
    return block[0], slice(None), *block[1:]


def label_probabilities(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (ce, q, others) of one block: logits [n, C, ...], int64 labels [n, ...] in [0, C).

    ce = -log p_y and q = 1 - p_y are [n, ...]; others [n, C, ...] is the softmax with 0 in the
    label's place. All in the accumulator's dtype, q to full relative precision.
    """
    log_p = logits.to(accumulator_dtype(logits)).log_softmax(1)
    index = labels.unsqueeze(1)
    try:
        ce = -log_p.gather(1, index).squeeze(1)
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        raise IndexError(
            f"labels must be ignore_index or in [0, {logits.shape[1]}), got {error}"
        ) from error
    others = log_p.exp_().scatter_(1, index, 0.0)
    q = others.sum(1).clamp_(max=1.0)
    # -log(1 - q) has all digits where q is small and log_softmax has none; above, the reverse.
    return torch.where(q < 0.5, -torch.log1p(-q), ce), q, others


def logits_gradient(
    k: torch.Tensor, q: torch.Tensor, others: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return k * (p_j - [j = y]) of one block, [n, C, ...], written into `others`."""
    return others.scatter_(1, labels.unsqueeze(1), -q.unsqueeze(1)).mul_(k.unsqueeze(1))


def focal_slope(ce: torch.Tensor, q: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return q^gamma (1 + gamma p_y ce / q), the k of the focal loss with alpha 1.

    ce / q tends to 1 as q vanishes; taken so, the slope is finite for every gamma and every q.
    """
    if gamma == 0:
        return torch.ones_like(q)
    ratio = torch.where(q > 0, (1 - q) * ce / torch.where(q > 0, q, 1), 1)
    return q**gamma * (1 + gamma * ratio)


def _slices(sizes: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    inner = math.prod(sizes[1:])
    if inner > limit:
        for i in range(sizes[0]):
            for rest in _slices(sizes[1:], limit):
                yield slice(i, i + 1), *rest
        return
    step = limit // max(1, inner)
    for start in range(0, sizes[0] if inner else 0, step):
        yield slice(start, min(start + step, sizes[0])), *(slice(None) for _ in sizes[1:])


def _check(logits: torch.Tensor, labels: torch.Tensor, gamma: float, reduction: str) -> None:
    if logits.ndim < 2 or logits.shape[1] < 1 or logits.dtype not in _LOGITS_DTYPES:
        raise ValueError(
            "logits must be [N, C, ...] with C >= 1, of float16, bfloat16, float32 or float64; "
            f"got {list(logits.shape)} of {logits.dtype}"
        )
    wanted = [logits.shape[0], *logits.shape[2:]]
    if list(labels.shape) != wanted or labels.dtype not in _LABEL_DTYPES:
        raise ValueError(
            f"labels must be {wanted} for logits {list(logits.shape)}, of uint8, int32 or int64; "
            f"got {list(labels.shape)} of {labels.dtype}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels must be on {logits.device} like logits; got {labels.device}")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be finite and >= 0; got {gamma}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none"; got {reduction!r}')


def _class_weights(
    alpha: float | Sequence[float] | torch.Tensor | None, logits: torch.Tensor
) -> tuple[torch.Tensor | None, float | torch.Tensor | None]:
    """Return (alpha a class [C] or None, one factor for all or None)."""
    if alpha is None:
        return None, None
    if isinstance(alpha, torch.Tensor) and alpha.requires_grad:
        raise ValueError("alpha must not require a gradient: it is a constant; got one that does")
    if isinstance(alpha, int | float):
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be finite and >= 0; got {alpha}")
        return None, alpha
    alpha = torch.as_tensor(alpha, dtype=accumulator_dtype(logits), device=logits.device)
    if alpha.ndim == 0:
        return None, alpha
    if alpha.shape != logits.shape[1:2]:
        raise ValueError(
            f"alpha must be None, one number or [{logits.shape[1]}], one a class of logits; "
            f"got {list(alpha.shape)}"
        )
    return alpha, None


def _widen(labels: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int64 labels with 0 where ignored, mask of ignored pixels) of one block.

    Compared after widening: uint8 would take -100 for 156.
    """
    labels = labels.long()
    ignored = labels == ignore_index
    return labels.masked_fill(ignored, 0), ignored


class _FocalLossSum(torch.autograd.Function):
    """The sum of the weighted losses, divided by the sum of weights if `mean`."""

    @staticmethod
    def forward(ctx, logits, labels, gamma, alpha, ignore_index, mean):
        dtype = accumulator_dtype(logits)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        divisor = torch.zeros_like(total)
        for block in pixel_blocks(logits):
            y, ignored = _widen(labels[block], ignore_index)
            ce, q, _ = label_probabilities(logits[logits_index(block)], y)
            loss = (ce if gamma == 0 else q**gamma * ce).masked_fill_(ignored, 0.0)
            if alpha is None:
                divisor += (~ignored).sum()
            else:
                weight = alpha[y].masked_fill_(ignored, 0.0)
                loss *= weight
                divisor += weight.sum()
            total += loss.sum()
        if not mean:
            divisor.fill_(1.0)
        divisor.masked_fill_(divisor == 0, 1.0)
        # Softmax is taken again in backward, so the caller's own logits are all it needs.
        ctx.save_for_backward(logits, labels, alpha, divisor)
        ctx.gamma, ctx.ignore_index = gamma, ignore_index
        return (total / divisor).to(dtype)

    @staticmethod
    @first_order
    def backward(ctx, dloss):
        logits, labels, alpha, divisor = ctx.saved_tensors
        scale = (dloss / divisor).to(dloss.dtype)
        return _focal_loss_gradient(ctx, logits, labels, alpha, lambda block: scale)


class _FocalLossMap(torch.autograd.Function):
    """The weighted loss of each pixel."""

    @staticmethod
    def forward(ctx, logits, labels, gamma, alpha, ignore_index):
        loss = torch.empty(labels.shape, dtype=accumulator_dtype(logits), device=logits.device)
        for block in pixel_blocks(logits):
            y, ignored = _widen(labels[block], ignore_index)
            ce, q, _ = label_probabilities(logits[logits_index(block)], y)
            if gamma:
                ce = q**gamma * ce
            if alpha is not None:
                ce = ce * alpha[y]
            loss[block] = ce.masked_fill(ignored, 0.0)
        ctx.save_for_backward(logits, labels, alpha)
        ctx.gamma, ctx.ignore_index = gamma, ignore_index
        return loss

    @staticmethod
    @first_order
    def backward(ctx, dloss):
        logits, labels, alpha = ctx.saved_tensors
        dlogits = _focal_loss_gradient(ctx, logits, labels, alpha, lambda block: dloss[block])
        return dlogits[:-1]


def _focal_loss_gradient(ctx, logits, labels, alpha, dloss):
    dlogits = torch.empty_like(logits)
    for block in pixel_blocks(logits):
        y, ignored = _widen(labels[block], ctx.ignore_index)
        ce, q, others = label_probabilities(logits[logits_index(block)], y)
        k = focal_slope(ce, q, ctx.gamma) * dloss(block)
        if alpha is not None:
            k = k * alpha[y]
        # Masked, not multiplied by 0: an ignored pixel may hold any logits, NaN included.
        others.masked_fill_(ignored.unsqueeze(1), 0.0)
        k, q = k.masked_fill_(ignored, 0.0), q.masked_fill_(ignored, 0.0)
        dlogits[logits_index(block)] = logits_gradient(k, q, others, y)
    return dlogits, None, None, None, None, None
