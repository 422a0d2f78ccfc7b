"""The softmax focal loss of pixels, of which cross entropy is the case gamma = 0.

`focal_blocks.py` says what it means, `kernels/focal_loss.py` computes it on a device. Nothing of
the logits' size is stored or made besides the gradient: backward reads logits and labels again.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from .autograd import first_order
from .focal_blocks import (
    Focal,
    accumulator_dtype,
    add_block,
    block_gradient,
    block_terms,
    by_label,
    count_block,
    logits_index,
    pixel_blocks,
)
from .geometry import want
from .pixels import Pixels, pixels_of

Reduction = Literal["none", "mean", "sum", "weighted_mean"]
Factors = float | Sequence[float] | torch.Tensor

LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
MOST_CLASSES = 1024  # of a pixel, which the kernels hold in registers; beyond, blocks serve
MOST_COUNTED = 32  # classes: a program keeps a matrix of them in shared memory

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def softmax_focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 2.0,
    alpha: Factors | None = None,
    weight: Sequence[float] | torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    detach_factor: bool = False,
) -> torch.Tensor:
    """Return the focal loss alpha_y (1 - p_y)^gamma cross(logits, y) of pixels, reduced.

    Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection", ICCV 2017: equation
    4 without and 5 with alpha, over a softmax instead of their sigmoid. `cross` is each pixel's
    `torch.nn.functional.cross_entropy` with this weight and label_smoothing; p_y is the
    probability of the label itself, smoothed or not.

    Saves for backward: logits and labels as they were given, and a few numbers. On a GPU planar,
    channels_last and [M, C] logits are read where they lie, windows of images too. The sums have
    one order: the same arguments give the same bits. Backward runs as often as the graph is
    retained; with create_graph=True it raises RuntimeError, as there are no second derivatives.

    Args:
        logits: [N, C, ...] or [M, C], float16, bfloat16, float32 or float64, any memory format.
        labels: [N, ...] or [M], uint8, int32 or int64, each `ignore_index` or in [0, C).
        gamma: focusing exponent, >= 0. At 0 the result is the cross entropy.
        alpha: None, one factor for all classes, or [C] factors, one a class. Constants, like
            weight: no gradient flows to them.
        weight: None, or [C] factors as torch's cross entropy has them.
        ignore_index: label of pixels that count for nothing. One that the labels' dtype cannot
            hold ignores no pixel.
        label_smoothing: share of the label's unit that is spread over all classes, in [0, 1].
        reduction: of the pixels that count: "none" for each one's loss; their "sum"; "mean",
            sum(loss) / sum(weight_y), their number without weight, whatever alpha is; or
            "weighted_mean", sum(loss) / sum(alpha_y weight_y (1 - p_y)^gamma), in which alpha and
            the modulating factor are weights of a mean.
        detach_factor: whether the modulating factor is a constant to the gradient, in numerator
            and denominator.

    Returns:
        A scalar, or for "none" [N, ...] with 0 at ignored pixels; float32, and float64 for
        float64 logits. A mean over no weight is 0, and so is its gradient.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not the above.
        IndexError: a label on the CPU is out of range. On an accelerator the loss is NaN, and the
            gradient at that pixel, since looking would wait for the device.
    """
    check_reduction(reduction, ("none", "mean", "sum", "weighted_mean"))
    focal = focal_options(logits, labels, gamma, alpha, weight, ignore_index, label_smoothing)
    if reduction == "none":
        return _FocalLossMap.apply(logits, labels, focal, detach_factor)
    sums, _ = _FocalLossSums.apply(logits, labels, focal, detach_factor, False, False)
    return reduced(sums[0], reduction).to(accumulator_dtype(logits))


def softmax_focal_loss_sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 2.0,
    alpha: Factors | None = None,
    weight: Sequence[float] | torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    detach_factor: bool = False,
    by_class: bool = False,
    confusion: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of which `softmax_focal_loss` is a quotient, and counts of its predictions.

    Sums of tiles, planes and ranks may be added before they are divided: the loss and the
    gradients of the whole. Differentiable as the loss is; the arguments are the same, besides

    Args:
        logits: as above, and so the following.
        labels: as above.
        gamma: as above.
        alpha: as above.
        weight: as above.
        ignore_index: as above.
        label_smoothing: as above.
        detach_factor: as above.
        by_class: whether sums are those of the pixels of each label.
        confusion: whether to count labels and predictions, for C <= 32.

    Returns:
        float64 [3], or by_class [C, 3]: sum(loss), sum(alpha_y weight_y (1 - p_y)^gamma) and
        sum(weight_y) of the pixels that count; and the confusion matrix int64 [C, C], label by
        row, prediction by column, else [0, 0]. The prediction is the first of the largest logits,
        NaN being below all.

    Raises:
        ValueError: as above.
        IndexError: as above.
    """
    focal = focal_options(logits, labels, gamma, alpha, weight, ignore_index, label_smoothing)
    sums, counts = _FocalLossSums.apply(logits, labels, focal, detach_factor, by_class, confusion)
    return sums if by_class else sums[0], counts


def reduced(sums: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """Return the loss of sums [3], which may be those of several calls added up; 0 for 0 / 0."""
    loss, factor, weight = sums.unbind()
    if reduction == "sum":
        return loss
    divisor = factor if reduction == "weighted_mean" else weight.detach()
    return loss / (divisor + (divisor == 0))


def softmax_focal_loss_reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 2.0,
    alpha: Factors | None = None,
    weight: Sequence[float] | torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    detach_factor: bool = False,
) -> torch.Tensor:
    """Return the same as `softmax_focal_loss`, from differentiable torch operations.

    The definition, to read. It keeps several float and int64 tensors of the image's size, and its
    gradient is NaN where p_y rounds to 1 and 0 < gamma < 1.
    """
    check_reduction(reduction, ("none", "mean", "sum", "weighted_mean"))
    focal = focal_options(logits, labels, gamma, alpha, weight, ignore_index, label_smoothing)
    labels = labels.long()
    counts = labels != ignore_index
    labels = labels.masked_fill(~counts, 0)
    x = logits.to(accumulator_dtype(logits))
    cross = torch.nn.functional.cross_entropy(
        x, labels, focal.weight, reduction="none", label_smoothing=label_smoothing
    )
    p = x.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    factor = torch.ones_like(p) if gamma == 0 else (1 - p) ** gamma
    factor = factor.detach() if detach_factor else factor
    factor = factor if focal.alpha is None else factor * focal.alpha[labels]
    weight = counts.to(x.dtype) if focal.weight is None else focal.weight[labels] * counts
    loss = factor * cross * counts
    if reduction == "none":
        return loss
    sums = torch.stack([loss.sum(), (factor * weight).sum(), weight.sum()])
    return reduced(sums, reduction)


def focal_options(
    logits: torch.Tensor,
    labels: torch.Tensor,
    gamma: float,
    alpha: Factors | None,
    weight: Sequence[float] | torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    classes: int | None = None,
) -> Focal:
    """Return the checked options of a loss of logits [N, C, ...], or of C = classes.

    Raises ValueError, naming argument, wanted and given.
    """
    holds = logits.dim() >= 2 and logits.shape[1] >= 1 and logits.dtype in _LOGITS_DTYPES
    if classes is None:
        want(
            holds, "logits", "[N, C, ...], C >= 1, of float16, bfloat16, float32 or float64",
            f"{list(logits.shape)} of {logits.dtype}",
        )  # fmt: skip
    shape = [logits.shape[0], *logits.shape[2:]]
    want(
        list(labels.shape) == shape and labels.dtype in LABEL_DTYPES,
        "labels", f"{shape} of uint8, int32 or int64", f"{list(labels.shape)} of {labels.dtype}",
    )  # fmt: skip
    want(labels.device == logits.device, "labels", f"device {logits.device}", labels.device)
    want(0 <= gamma < math.inf, "gamma", "a finite number >= 0", gamma)
    want(0 <= label_smoothing <= 1, "label_smoothing", "a number in [0, 1]", label_smoothing)
    C = logits.shape[1] if classes is None else classes
    return Focal(
        _factors("alpha", alpha, logits, C),
        _factors("weight", weight, logits, C),
        float(gamma),
        float(label_smoothing),
        ignore_index,
    )


def check_reduction(reduction: str, known: Sequence[str]) -> None:
    """Raise ValueError for an unknown reduction."""
    want(reduction in known, "reduction", f"one of {', '.join(known)}", repr(reduction))


def _factors(name: str, given: Factors | None, logits: torch.Tensor, C: int) -> torch.Tensor | None:
    """Return factors a class [C] in the accumulator's dtype, or None."""
    if given is None:
        return None
    dtype = accumulator_dtype(logits)
    if isinstance(given, torch.Tensor):
        want(not given.requires_grad, name, "a constant", "a tensor that requires a gradient")
        if name == "alpha" and given.dim() == 0:
            given = given.expand(C)
    elif name == "alpha" and isinstance(given, int | float):
        want(0 <= given < math.inf, name, "a finite number >= 0", given)
        return torch.full((C,), float(given), dtype=dtype, device=logits.device)
    factors = torch.as_tensor(given, dtype=dtype, device=logits.device)
    either = "one number or " if name == "alpha" else ""
    want(list(factors.shape) == [C], name, f"None, {either}[{C}]", list(factors.shape))
    return factors.contiguous()


class _FocalLossSums(torch.autograd.Function):
    """Sums [1 or C, 3] of loss, factor and weight; and counts."""

    @staticmethod
    def forward(ctx, logits, labels, focal, detach, by_class, confusion):
        sums, _, counts = focal_loss_forward(
            logits, labels, focal.alpha, focal.weight, focal.gamma, focal.smoothing,
            focal.ignore_index, by_class, False, confusion,
        )  # fmt: skip
        # Softmax is taken again in backward, so the caller's own logits are all it needs.
        ctx.save_for_backward(logits, labels, focal.alpha, focal.weight)
        ctx.options = focal.gamma, focal.smoothing, focal.ignore_index, detach
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @first_order
    def backward(ctx, dsums, _):
        logits, *others = ctx.saved_tensors
        scale = scales(dsums, accumulator_dtype(logits))
        dlogits = focal_loss_backward(logits, *others, *ctx.options, scale, None)
        return dlogits, None, None, None, None, None


class _FocalLossMap(torch.autograd.Function):
    """The loss of each pixel."""

    @staticmethod
    def forward(ctx, logits, labels, focal, detach):
        _, loss, _ = focal_loss_forward(
            logits, labels, focal.alpha, focal.weight, focal.gamma, focal.smoothing,
            focal.ignore_index, False, True, False,
        )  # fmt: skip
        ctx.save_for_backward(logits, labels, focal.alpha, focal.weight)
        ctx.options = focal.gamma, focal.smoothing, focal.ignore_index, detach
        return loss

    @staticmethod
    @first_order
    def backward(ctx, dloss):
        return focal_loss_backward(*ctx.saved_tensors, *ctx.options, None, dloss), None, None, None


def scales(dsums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [3, R] for backward, of gradients dsums [R, 3] of sums: a, b and their divisor.

    A sum of tiny factors has a huge inverse, which float64 holds and float32 may not: what is above
    1 goes into the divisor, by which backward divides the factors first.
    """
    a, b = dsums[:, 0], dsums[:, 1]
    divisor = 1 / torch.maximum(a.abs(), b.abs()).clamp(1, 1e37)
    return torch.stack([a * divisor, b * divisor, divisor]).to(dtype)


@torch.library.custom_op("fullres::softmax_focal_loss", mutates_args=(), device_types="cpu")
def focal_loss_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: torch.Tensor | None,
    weight: torch.Tensor | None,
    gamma: float,
    smoothing: float,
    ignore_index: int,
    by_class: bool,
    pixels: bool,
    confusion: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sums, losses and counts of `softmax_focal_loss_sums`; there is no autograd.

    Args:
        logits: as for `softmax_focal_loss`, and so the rest, besides
        labels: as there.
        alpha: [C] in the accumulator's dtype, or None.
        weight: as alpha.
        gamma: as there.
        smoothing: label_smoothing.
        ignore_index: as there.
        by_class: whether sums are by label.
        pixels: whether the loss of each pixel is asked for.
        confusion: whether counts are asked for.

    Returns:
        sums float64 [C, 3] or [1, 3]; loss as labels, in the accumulator's dtype, or [0]; counts
        int64 [C, C] or [0, 0].

    Raises:
        ValueError: as there.
        IndexError: as there.
    """
    focal = Focal(alpha, weight, gamma, smoothing, ignore_index)
    _check(logits, labels, focal, confusion)
    return _forward_in_blocks(logits, labels, focal, by_class, pixels, confusion)


@focal_loss_forward.register_kernel("cuda")
def focal_loss_forward_triton(
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: torch.Tensor | None,
    weight: torch.Tensor | None,
    gamma: float,
    smoothing: float,
    ignore_index: int,
    by_class: bool,
    pixels: bool,
    confusion: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return focal_loss_forward by Triton: on a GPU, or interpreted on the CPU."""
    focal = Focal(alpha, weight, gamma, smoothing, ignore_index)
    _check(logits, labels, focal, confusion)
    lie = pixels_of(logits, labels, channels=(1, None))
    if lie is None or not _on_kernels(logits):
        return _forward_in_blocks(logits, labels, focal, by_class, pixels, confusion)
    from ..kernels import focal_loss as kernels  # here: importing ops must not need triton
    from .norm import merge_sums_triton

    sums, loss, counts = _empty_results(logits, labels, by_class, pixels, confusion)
    if not lie.count:
        return sums.zero_(), loss, counts.zero_()
    C = logits.shape[1]
    T = kernels.programs(lie.count)
    parts = torch.empty(T, *sums.shape, dtype=sums.dtype, device=sums.device)
    bins = 1 << (C * C).bit_length() if confusion else 0
    found = counts.new_empty(T, bins, dtype=torch.int32) if confusion else None
    with torch.cuda.device_of(logits):  # triton launches on the current device
        kernels.softmax_focal_loss_kernel[(T,)](
            logits, labels, alpha, weight, loss if pixels else None, parts, found,
            lie.N, lie.H, lie.P, *lie.strides[0], logits.stride(1), *lie.strides[1],
            gamma, smoothing, ignore_index,
            **_constants(lie, gamma, smoothing, logits), BY_CLASS=by_class, BINS=bins,
        )  # fmt: skip
    if confusion:
        counts.copy_(found.sum(0)[: C * C].view(C, C))
    return merge_sums_triton(parts), loss, counts


@focal_loss_forward.register_fake
def _(
    logits, labels, alpha, weight, gamma, smoothing, ignore_index, by_class, pixels, confusion
):  # fmt: skip
    _check(logits, labels, Focal(alpha, weight, gamma, smoothing, ignore_index), confusion)
    return _empty_results(logits, labels, by_class, pixels, confusion)


@torch.library.custom_op(
    "fullres::softmax_focal_loss_backward", mutates_args=(), device_types="cpu"
)
def focal_loss_backward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: torch.Tensor | None,
    weight: torch.Tensor | None,
    gamma: float,
    smoothing: float,
    ignore_index: int,
    detach: bool,
    scale: torch.Tensor | None,
    dloss: torch.Tensor | None,
) -> torch.Tensor:
    """Return the gradient of the logits, of their dtype and memory format.

    (a dsums_0 + b dsums_1) / divisor for scale = (a, b, divisor) [3, 1], or [3, C] by label; or
    for dloss, the gradient of each pixel's loss. One of the two, in the accumulator's dtype.
    detach is `detach_factor`, the other arguments are those of forward.

    Raises:
        ValueError: as forward.
        IndexError: as forward.
    """
    focal = Focal(alpha, weight, gamma, smoothing, ignore_index)
    _check_backward(logits, labels, focal, scale, dloss)
    return _backward_in_blocks(logits, labels, focal, detach, scale, dloss)


@focal_loss_backward.register_kernel("cuda")
def focal_loss_backward_triton(
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: torch.Tensor | None,
    weight: torch.Tensor | None,
    gamma: float,
    smoothing: float,
    ignore_index: int,
    detach: bool,
    scale: torch.Tensor | None,
    dloss: torch.Tensor | None,
) -> torch.Tensor:
    """Return focal_loss_backward by Triton."""
    focal = Focal(alpha, weight, gamma, smoothing, ignore_index)
    _check_backward(logits, labels, focal, scale, dloss)
    dlogits = torch.empty_like(logits)
    tensors = [logits, dlogits, labels, *([] if dloss is None else [dloss])]
    lie = pixels_of(*tensors, channels=(1, 1, None, None)[: len(tensors)])
    if lie is None or not _on_kernels(logits):
        return _backward_in_blocks(logits, labels, focal, detach, scale, dloss)
    from ..kernels import focal_loss as kernels

    if lie.count:
        x, dx, y, *of_loss = lie.strides
        with torch.cuda.device_of(logits):  # triton launches on the current device
            kernels.softmax_focal_loss_backward_kernel[(kernels.programs(lie.count),)](
                logits, labels, alpha, weight,
                None if scale is None else scale.contiguous(), dloss, dlogits,
                lie.N, lie.H, lie.P, *x, logits.stride(1), *y, *dx, dlogits.stride(1),
                *(of_loss[0] if of_loss else (0, 0, 0)), gamma, smoothing, ignore_index,
                **_constants(lie, gamma, smoothing, logits, dlogits),
                BY_CLASS=scale is not None and scale.shape[1] > 1, DETACH=detach,
            )  # fmt: skip
    return dlogits


@focal_loss_backward.register_fake
def _(logits, labels, alpha, weight, gamma, smoothing, ignore_index, detach, scale, dloss):
    focal = Focal(alpha, weight, gamma, smoothing, ignore_index)
    _check_backward(logits, labels, focal, scale, dloss)
    return torch.empty_like(logits)


def _on_kernels(logits: torch.Tensor) -> bool:
    return logits.dtype != torch.float64 and logits.shape[1] <= MOST_CLASSES


def _forward_in_blocks(logits, labels, focal, by_class, pixels, confusion):
    sums, loss, counts = _empty_results(logits, labels, by_class, pixels, confusion)
    sums.zero_()
    counts.zero_()
    for block in pixel_blocks(logits):
        x = logits[logits_index(block)]
        terms = block_terms(x, labels[block], focal)
        values = add_block(sums, terms)
        if pixels:
            loss[block] = values[0]
        if confusion:
            count_block(counts, x, terms)
    return sums, loss, counts


def _backward_in_blocks(logits, labels, focal, detach, scale, dloss):
    dlogits = torch.empty_like(logits)
    for block in pixel_blocks(logits):
        terms = block_terms(logits[logits_index(block)], labels[block], focal)
        if dloss is not None:
            factors = dloss[block], 0.0, 1.0
        else:
            factors = by_label(scale, terms.labels)
        dlogits[logits_index(block)] = block_gradient(terms, focal, *factors, detach)
    return dlogits


def _constants(lie: Pixels, gamma: float, smoothing: float, *tensors: torch.Tensor) -> dict:
    """Return the constants that both kernels take."""
    from ..kernels import focal_loss as kernels

    C = tensors[0].shape[1]
    dense = all(
        t.stride(1) == 1 and strides[2] == C or C == 1 and strides[2] == 1
        for t, strides in zip(tensors, lie.strides, strict=False)
    )
    return {
        "C": C,
        "LAYOUT": kernels.layout(C, dense),
        "TILE": kernels.tile_size(lie.P),
        "POWER": int(gamma) if gamma in (0, 1, 2) else -1,
        "SMOOTH": smoothing > 0,
    }


def _empty_results(logits, labels, by_class, pixels, confusion):
    C = logits.shape[1]
    sums = logits.new_empty(C if by_class else 1, 3, dtype=torch.float64)
    loss = logits.new_empty(labels.shape if pixels else 0, dtype=accumulator_dtype(logits))
    return sums, loss, logits.new_empty((C, C) if confusion else (0, 0), dtype=torch.int64)


def _check(logits: torch.Tensor, labels: torch.Tensor, focal: Focal, confusion: bool) -> None:
    options = focal.alpha, focal.weight, focal.ignore_index, focal.smoothing
    focal_options(logits, labels, focal.gamma, *options)
    C = logits.shape[1]
    want(not confusion or C <= MOST_COUNTED, "confusion", f"C <= {MOST_COUNTED}", f"C = {C}")


def _check_backward(logits, labels, focal, scale, dloss) -> None:
    _check(logits, labels, focal, False)
    want((scale is None) != (dloss is None), "scale", "it or dloss", "both or neither")
    dtype, C = accumulator_dtype(logits), logits.shape[1]
    if scale is not None:
        known = scale.dim() == 2 and len(scale) == 3 and scale.shape[1] in (1, C)
        want(known and scale.dtype == dtype, "scale", f"[3, 1 or {C}] of {dtype}", scale)
    else:
        holds = dloss.shape == labels.shape and dloss.dtype == dtype
        given = f"{list(dloss.shape)} of {dloss.dtype}"
        want(holds, "dloss", f"{list(labels.shape)} of {dtype}", given)
