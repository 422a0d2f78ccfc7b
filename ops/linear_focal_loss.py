"""A final 1x1 convolution and the softmax focal loss of its logits in one op: logits never exist.

Stored for backward are the features that the convolution is given, which the layer before holds
anyway, and the labels. Each pass reads them once; the logits of a pixel, and their gradient, live
in registers (kernels/linear_focal_loss.py), or in blocks of bounded size on the CPU and for heads
of more than 4,096 weights.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from .autograd import first_order
from .dispatch import tf32_allowed
from .focal_blocks import (
    Focal,
    add_block,
    block_gradient,
    block_terms,
    by_label,
    count_block,
    logits_index,
    pixel_blocks,
)
from .focal_loss import (
    MOST_COUNTED,
    Factors,
    check_reduction,
    focal_options,
    reduced,
    scales,
)
from .fuse import (
    Activation,
    Prologue,
    activated,
    preactivation,
    prologue_backward_reference,
)
from .geometry import want
from .pixels import pixels_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")


def linear_focal_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    act: Activation = "none",
    slope: float = 0.01,
    gamma: float = 2.0,
    alpha: Factors | None = None,
    class_weight: Sequence[float] | torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "weighted_mean"] = "mean",
    detach_factor: bool = False,
) -> torch.Tensor:
    """Return softmax_focal_loss(conv2d(act(norm(features)), weight, bias), labels).

    The logits are float32 sums that are never rounded, where a convolution rounds them to its
    dtype. Under autocast features and weight are rounded as torch's convolution would, but weight's
    gradient is not. Products of float32 follow torch's settings for TF32.

    Saves for backward: features and labels as they were given, weight, bias, and a few numbers.
    Sums have one order: the same bits twice. With create_graph=True backward raises RuntimeError,
    as there are no second derivatives.

    Args:
        features: [N, F, H, W], best in channels_last, or [M, F]; float16, bfloat16, float32, on
            the CPU also float64.
        labels: [N, H, W] or [M], uint8, int32 or int64, each `ignore_index` or in [0, C).
        weight: [C, F], or [C, F, 1, 1] as a 1x1 convolution has it, of features' dtype.
        bias: [C], of features' dtype, or None.
        norm: [4, F] as of fuse.py, float32 (float64 for float64 features): mean, scale, shift and
            inverse deviation of the normalisation between features and act; or None. It has a
            gradient too, so that a norm computed from features, or from a weight and a bias of the
            normalisation, passes it on.
        act: "none", "relu", "leaky_relu" with slope, or "silu".
        slope: of "leaky_relu".
        gamma: as for `softmax_focal_loss`, and so the rest.
        alpha: as there.
        class_weight: its weight.
        ignore_index: as there.
        label_smoothing: as there.
        reduction: "mean", "sum" or "weighted_mean".
        detach_factor: as there.

    Returns:
        A scalar, float32, or float64 for float64 features.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not the above.
        IndexError: a label on the CPU is out of range. On an accelerator the loss is NaN.
    """
    check_reduction(reduction, ("mean", "sum", "weighted_mean"))
    sums, _ = linear_focal_loss_sums(
        features, labels, weight, bias, norm=norm, act=act, slope=slope, gamma=gamma, alpha=alpha,
        class_weight=class_weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
        detach_factor=detach_factor,
    )  # fmt: skip
    return reduced(sums, reduction).to(torch.promote_types(features.dtype, torch.float32))


def linear_focal_loss_sums(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    act: Activation = "none",
    slope: float = 0.01,
    gamma: float = 2.0,
    alpha: Factors | None = None,
    class_weight: Sequence[float] | torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    detach_factor: bool = False,
    by_class: bool = False,
    confusion: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of which `linear_focal_loss` is a quotient, and counts of its predictions.

    As `softmax_focal_loss_sums`: float64 [3] or by_class [C, 3], differentiable, to be added up
    over tiles, planes and ranks before `reduced` divides them; and with confusion int64 [C, C].
    """
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
        features = features.to(torch.get_autocast_dtype(device))
    if features.dim() == 2:
        features, labels = features[:, :, None, None], labels[..., None, None]
    focal = _options(
        features, labels, weight, gamma, alpha, class_weight, ignore_index, label_smoothing
    )
    weight = weight.flatten(1) if weight.dim() == 4 else weight
    options = act, float(slope), detach_factor, by_class, confusion
    sums, counts = _LinearFocalLoss.apply(features, norm, labels, weight, bias, focal, options)
    return sums if by_class else sums[0], counts


class _LinearFocalLoss(torch.autograd.Function):
    """Sums [1 or C, 3] of loss, factor and weight; and counts."""

    @staticmethod
    def forward(ctx, features, norm, labels, weight, bias, focal, options):
        act, slope, detach, by_class, confusion = options
        # Under autocast the weight given stays what it was, so that its gradient is not rounded.
        narrow = weight, bias
        if torch.is_autocast_enabled(features.device.type):
            narrow = _narrowed(features, weight, bias)
        sums, counts = linear_forward(
            features, norm, act, slope, labels, *narrow, focal.alpha, focal.weight, focal.gamma,
            focal.smoothing, focal.ignore_index, by_class, confusion,
        )  # fmt: skip
        ctx.save_for_backward(features, norm, labels, weight, bias, focal.alpha, focal.weight)
        ctx.options = act, slope, detach, focal.gamma, focal.smoothing, focal.ignore_index
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @first_order
    def backward(ctx, dsums, _):
        features, norm, labels, weight, bias, alpha, class_weight = ctx.saved_tensors
        act, slope, detach, *focal = ctx.options
        of_features, of_norm, _, of_weight, of_bias, *_ = ctx.needs_input_grad
        scale = scales(dsums, torch.promote_types(features.dtype, torch.float32))
        g, sums, dw, db = linear_backward(
            features, norm, act, slope, labels, *_narrowed(features, weight, bias), alpha,
            class_weight, *focal, detach, scale, of_features or of_norm, of_norm, norm is not None,
            of_weight or of_bias,
        )  # fmt: skip
        dnorm = None
        if of_norm:
            dnorm = torch.stack([-norm[1] * sums[0], sums[1], sums[0], torch.zeros_like(sums[0])])
        return (
            g if of_features else None,
            dnorm,
            None,
            dw.to(weight.dtype) if of_weight else None,
            db.to(bias.dtype) if of_bias else None,
            None,
            None,
        )


@torch.library.custom_op("fullres::linear_focal_loss", mutates_args=(), device_types="cpu")
def linear_forward(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    act: str,
    slope: float,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    gamma: float,
    smoothing: float,
    ignore_index: int,
    by_class: bool,
    confusion: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sums and counts of `linear_focal_loss_sums`; there is no autograd.

    x is its features [N, F, H, W], weight [C, F]; alpha and class_weight are [C], float32 (float64
    for float64 features), or None; the rest is as there, and the errors.

    Returns:
        sums float64 [C, 3] or [1, 3]; counts int64 [C, C] or [0, 0].
    """
    focal = Focal(alpha, class_weight, gamma, smoothing, ignore_index)
    _check(x, norm, act, labels, weight, bias, focal, confusion)
    p = Prologue(x, norm, act=act, slope=slope)
    return _forward_in_blocks(p, labels, weight, bias, focal, by_class, confusion)


@linear_forward.register_kernel("cuda")
def linear_forward_triton(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    act: str,
    slope: float,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    gamma: float,
    smoothing: float,
    ignore_index: int,
    by_class: bool,
    confusion: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return linear_forward by Triton: on a GPU, or interpreted on the CPU."""
    from ..kernels import focal_loss, linear_focal_loss  # here: importing ops must not need triton
    from .norm import merge_sums_triton

    focal = Focal(alpha, class_weight, gamma, smoothing, ignore_index)
    _check(x, norm, act, labels, weight, bias, focal, confusion)
    C, F = weight.shape
    lie = pixels_of(x, labels, channels=(1, None))
    if lie is None or not linear_focal_loss.fits(F, C) or x.dtype == torch.float64:
        p = Prologue(x, norm, act=act, slope=slope)
        return _forward_in_blocks(p, labels, weight, bias, focal, by_class, confusion)
    sums, counts = _empty_sums(x, weight, by_class, confusion)
    if not lie.count:
        return sums.zero_(), counts.zero_()
    T = focal_loss.programs(lie.count)
    parts = torch.empty(T, *sums.shape, dtype=sums.dtype, device=sums.device)
    bins = 1 << (C * C).bit_length() if confusion else 0
    found = counts.new_empty(T, bins, dtype=torch.int32) if confusion else None
    with torch.cuda.device_of(x):  # triton launches on the current device
        linear_focal_loss.linear_focal_loss_kernel[(T,)](
            x, _dense(norm), labels, weight.contiguous(), _dense(bias), alpha, class_weight,
            parts, found, lie.N, lie.H, lie.P, *lie.strides[0], x.stride(1), *lie.strides[1],
            gamma, smoothing, ignore_index,
            **_constants(lie, x, C, act, slope, gamma, smoothing), BY_CLASS=by_class, BINS=bins,
        )  # fmt: skip
    if confusion:
        counts.copy_(found.sum(0)[: C * C].view(C, C))
    return merge_sums_triton(parts), counts


@linear_forward.register_fake
def _(
    x, norm, act, slope, labels, weight, bias, alpha, class_weight, gamma, smoothing, ignore_index,
    by_class, confusion,
):  # fmt: skip
    focal = Focal(alpha, class_weight, gamma, smoothing, ignore_index)
    _check(x, norm, act, labels, weight, bias, focal, confusion)
    return _empty_sums(x, weight, by_class, confusion)


@torch.library.custom_op("fullres::linear_focal_loss_backward", mutates_args=(), device_types="cpu")
def linear_backward(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    act: str,
    slope: float,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    gamma: float,
    smoothing: float,
    ignore_index: int,
    detach: bool,
    scale: torch.Tensor,
    of_features: bool,
    of_norm: bool,
    through_norm: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return g, its sums, dw and db.

    Args:
        x: as forward, and so the following.
        norm: as forward.
        act: as forward.
        slope: as forward.
        labels: as forward.
        weight: as forward.
        bias: as forward.
        alpha: as forward.
        class_weight: as forward.
        gamma: as forward.
        smoothing: as forward.
        ignore_index: as forward.
        detach: `detach_factor`.
        scale: (a, b, divisor) [3, 1], or [3, C] by label: gradients are those of
            (a sums_0 + b sums_1) / divisor, in the weight gradient's dtype.
        of_features: whether g is asked for.
        of_norm: whether the sums are asked for; with of_features alone.
        through_norm: whether g is the gradient of x where the norm is a constant, in place of that
            of what act is applied to, which a batch normalisation's backward takes.
        of_weight: whether dw and db are asked for.

    Returns:
        g, of x's shape, dtype and memory format; the sums of the preactivation's gradient and of
        it times (x - mean) over each feature's pixels, and a row of 0: [3, F], as
        `prologue_backward` has them; dw [C, F]; db [C]. float32, or float64 for float64 features;
        [0] what is not asked for.
    """
    focal = Focal(alpha, class_weight, gamma, smoothing, ignore_index)
    _check_backward(x, norm, act, labels, weight, bias, focal, scale, of_features, of_norm)
    p = Prologue(x, norm, act=act, slope=slope)
    asked = of_features, of_norm, through_norm, of_weight
    return _backward_in_blocks(p, labels, weight, bias, focal, detach, scale, asked)


@linear_backward.register_kernel("cuda")
def linear_backward_triton(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    act: str,
    slope: float,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    gamma: float,
    smoothing: float,
    ignore_index: int,
    detach: bool,
    scale: torch.Tensor,
    of_features: bool,
    of_norm: bool,
    through_norm: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return linear_backward by Triton."""
    from ..kernels import focal_loss, linear_focal_loss
    from .norm import merge_sums_triton

    focal = Focal(alpha, class_weight, gamma, smoothing, ignore_index)
    _check_backward(x, norm, act, labels, weight, bias, focal, scale, of_features, of_norm)
    asked = of_features, of_norm, through_norm, of_weight
    C, F = weight.shape
    g, sums, dw, db = _empty_gradients(x, weight, of_features, of_norm, of_weight)
    tensors = [x, labels, *([g] if of_features else [])]
    lie = pixels_of(*tensors, channels=(1, None, 1)[: len(tensors)])
    if lie is None or not linear_focal_loss.fits(F, C) or x.dtype == torch.float64:
        p = Prologue(x, norm, act=act, slope=slope)
        return _backward_in_blocks(p, labels, weight, bias, focal, detach, scale, asked)
    if not lie.count:
        return g, sums.zero_(), dw.zero_(), db.zero_()
    T = focal_loss.programs(lie.count)
    width = of_weight * (C * F + C) + of_norm * 2 * F
    parts = torch.empty(T, 1, width, dtype=torch.float32, device=x.device)
    constants = _constants(lie, x, C, act, slope, gamma, smoothing)
    if of_features:
        constants["DENSE"] &= g.stride(1) == 1 and lie.strides[2][2] == F
    half = x.dtype != torch.float32 and torch.version.hip is None
    products = "tf32" if half else constants["PRECISION"]
    with torch.cuda.device_of(x):  # triton launches on the current device
        linear_focal_loss.linear_focal_loss_backward_kernel[(T,)](
            x, _dense(norm), labels, weight.contiguous(), _dense(bias), alpha, class_weight,
            scale.contiguous(), g if of_features else None, parts if width else None,
            lie.N, lie.H, lie.P, *lie.strides[0], x.stride(1), *lie.strides[1],
            *(lie.strides[2] if of_features else (0, 0, 0)), g.stride(1) if of_features else 0,
            gamma, smoothing, ignore_index,
            **constants, BY_CLASS=scale.shape[1] > 1, DETACH=detach, THROUGH_NORM=through_norm,
            WEIGHT=of_weight, SUMS=of_norm, PRODUCTS=products,
        )  # fmt: skip
    if width:
        row = merge_sums_triton(parts)[0]
        if of_weight:
            dw.copy_(row[: C * F].view(C, F))
            db.copy_(row[C * F :][:C])
        if of_norm:
            sums[:2] = row[width - 2 * F :].view(2, F)
            sums[2] = 0
    return g, sums, dw, db


@linear_backward.register_fake
def _(
    x, norm, act, slope, labels, weight, bias, alpha, class_weight, gamma, smoothing, ignore_index,
    detach, scale, of_features, of_norm, through_norm, of_weight,
):  # fmt: skip
    focal = Focal(alpha, class_weight, gamma, smoothing, ignore_index)
    _check_backward(x, norm, act, labels, weight, bias, focal, scale, of_features, of_norm)
    return _empty_gradients(x, weight, of_features, of_norm, of_weight)


def _forward_in_blocks(p, labels, weight, bias, focal, by_class, confusion):
    sums, counts = _empty_sums(p.x, weight, by_class, confusion)
    sums.zero_()
    counts.zero_()
    for block in pixel_blocks(p.x, sum(weight.shape)):
        _, _, logits = _block_logits(p, block, weight, bias)
        terms = block_terms(logits, labels[block], focal)
        add_block(sums, terms)
        if confusion:
            count_block(counts, logits, terms)
    return sums, counts


def _backward_in_blocks(p, labels, weight, bias, focal, detach, scale, asked):
    of_features, of_norm, through_norm, of_weight = asked
    g, sums, dw, db = _empty_gradients(p.x, weight, of_features, of_norm, of_weight)
    for t in (sums, dw, db):
        t.zero_()
    for block in pixel_blocks(p.x, sum(weight.shape)):
        part, z, logits = _block_logits(p, block, weight, bias)
        terms = block_terms(logits, labels[block], focal)
        ignored = terms.ignored.unsqueeze(1)
        d = block_gradient(terms, focal, *by_label(scale, terms.labels), detach)
        if of_weight:
            dw += _einsum("nchw,nfhw->cf", d, z.masked_fill(ignored, 0.0))
            db += d.sum((0, 2, 3))
        if not of_features:
            continue
        dz = _einsum("cf,nchw->nfhw", weight.to(d.dtype), d)
        pre = prologue_backward_reference(part, dz).masked_fill(ignored, 0.0)
        if not through_norm:
            pre = pre.to(g.dtype).to(d.dtype)  # the sums are of what is stored
        if of_norm:
            centred = part.x.to(d.dtype) - p.norm[0, :, None, None]
            sums[0] += pre.sum((0, 2, 3))
            sums[1] += (pre * centred).masked_fill(ignored, 0.0).sum((0, 2, 3))
        if through_norm:
            pre = pre * p.norm[1, :, None, None]
        g[logits_index(block)] = pre
    return g, sums, dw, db


def _block_logits(p, block, weight, bias):
    """Return a block's prologue, z and logits."""
    part = Prologue(p.x[logits_index(block)], p.norm, act=p.act, slope=p.slope)
    z = activated(preactivation(part), p.act, p.slope).to(p.x.dtype)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    logits = _einsum("cf,nfhw->nchw", weight.to(z.dtype), z)
    return part, z, logits if bias is None else logits + bias.to(z.dtype)[:, None, None]


def _einsum(equation: str, *factors: torch.Tensor) -> torch.Tensor:
    with torch.autocast(factors[0].device.type, enabled=False):
        return torch.einsum(equation, *factors)


def _constants(lie, x, C, act, slope, gamma, smoothing) -> dict:
    """Return the constants that both kernels take."""
    from ..kernels._tune import interpreting
    from ..kernels.focal_loss import tile_size

    F = x.shape[1]
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    return {
        "F": F, "C": C, "DENSE": x.stride(1) == 1 and lie.strides[0][2] == F,
        "TILE": tile_size(lie.P), "ACT": act, "SLOPE": slope if act == "leaky_relu" else 0.0,
        "POWER": int(gamma) if gamma in (0, 1, 2) else -1, "SMOOTH": smoothing > 0,
        "PRECISION": "tf32" if tf32 else "ieee", "WIDEN": interpreting(),
    }  # fmt: skip


def _narrowed(features, weight, bias):
    """Return weight and bias as autocast hands them to a convolution of these features."""
    return weight.to(features.dtype), None if bias is None else bias.to(features.dtype)


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _empty_sums(x, weight, by_class, confusion):
    C = len(weight)
    sums = x.new_empty(C if by_class else 1, 3, dtype=torch.float64)
    return sums, x.new_empty((C, C) if confusion else (0, 0), dtype=torch.int64)


def _empty_gradients(x, weight, of_features, of_norm, of_weight):
    C, F = weight.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    g = torch.empty_like(x) if of_features else x.new_empty(0)
    sums = x.new_empty((3, F) if of_norm else 0, dtype=wide)
    dw = x.new_empty((C, F) if of_weight else 0, dtype=wide)
    return g, sums, dw, x.new_empty(C if of_weight else 0, dtype=wide)


def _options(features, labels, weight, gamma, alpha, class_weight, ignore_index, smoothing):
    cpu = features.device.type == "cpu"
    dtypes = (*_DTYPES, torch.float64) if cpu else _DTYPES
    holds = features.dim() == 4 and features.shape[1] > 0
    want(holds, "features", "[N, F, H, W] or [M, F], F > 0", list(features.shape))
    want(features.dtype in dtypes, "features", f"a dtype in {dtypes}", features.dtype)
    F = features.shape[1]
    holds = list(weight.shape[1:]) in ([F], [F, 1, 1]) and len(weight) > 0
    want(holds, "weight", f"[C, {F}] or [C, {F}, 1, 1], C > 0", list(weight.shape))
    options = gamma, alpha, class_weight, ignore_index, smoothing
    return focal_options(features, labels, *options, classes=len(weight))


def _check(x, norm, act, labels, weight, bias, focal, confusion) -> None:
    """Raise ValueError, naming argument, wanted and given, for what no path computes."""
    options = focal.gamma, focal.alpha, focal.weight, focal.ignore_index, focal.smoothing
    _options(x, labels, weight, *options)
    C, F = len(weight), x.shape[1]
    want(act in _ACTIVATIONS, "act", f"one of {_ACTIVATIONS}", repr(act))
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, t, shape, dtype in (
        ("norm", norm, [4, F], wide),
        ("weight", weight, [C, F], x.dtype),
        ("bias", bias, [C], x.dtype),
    ):
        if t is not None:
            want(list(t.shape) == shape, name, str(shape), list(t.shape))
            want(t.dtype == dtype, name, str(dtype), t.dtype)
            want(t.device == x.device, name, f"device {x.device}", t.device)
    want(not confusion or C <= MOST_COUNTED, "confusion", f"C <= {MOST_COUNTED}", f"C = {C}")


def _check_backward(x, norm, act, labels, weight, bias, focal, scale, of_features, of_norm) -> None:
    _check(x, norm, act, labels, weight, bias, focal, False)
    wide, C = torch.promote_types(x.dtype, torch.float32), len(weight)
    known = scale.dim() == 2 and len(scale) == 3 and scale.shape[1] in (1, C)
    given = f"{list(scale.shape)} of {scale.dtype}"
    want(known and scale.dtype == wide, "scale", f"[3, 1 or {C}] of {wide}", given)
    holds = not of_norm or (of_features and norm is not None)
    want(holds, "of_norm", "a norm, and of_features", "not both")
