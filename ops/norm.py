"""Batch normalisation as a few numbers a channel: from a convolution's statistics to the next norm.

No image passes here. In forward `batch_norm_forward` turns moments [3, C] into a norm [4, C] and
moves the running statistics, once; in backward `batch_norm_backward` turns the gradient's sums
[3, C] into coefficients [4, C]. Between a convolution and these a caller may join what several
ranks found: moments by `merge_moments` of their stack, sums by adding them.

All are float32, or float64 for float64 images on the CPU.
"""

import torch

from .geometry import want


def merge_moments(parts: torch.Tensor) -> torch.Tensor:
    """Return the moments [3, C] (count, mean, M2) of what parts [T, 3, C] are moments of.

    A part whose count is 0 is left out, whatever else it holds. Joined in a tree of a fixed order
    (Chan, Golub and LeVeque, 1979): the same parts give the same bits.

    Raises ValueError for another shape or dtype.
    """
    if parts.is_cuda:
        return merge_moments_triton(parts)
    _check_parts(parts, rows=3)
    count, mean, m2 = parts.unbind(1)
    filled = count > 0
    mean, m2 = mean.where(filled, 0), m2.where(filled, 0)
    total = count.sum(0)
    share = count / total.clamp(min=1)
    index = filled.to(torch.uint8).argmax(0) if len(parts) else None
    first = mean.gather(0, index[None])[0] if len(parts) else total
    joined = first + ((mean - first).where(filled, 0) * share).sum(0)
    squares = (m2 + count * (mean - joined).square()).where(filled, 0).sum(0)
    return torch.stack([total, joined, squares])


def merge_sums(parts: torch.Tensor) -> torch.Tensor:
    """Return the sum of parts [T, R, C] over T, [R, C], added up in a tree of a fixed order.

    Raises ValueError for another shape or dtype.
    """
    if parts.is_cuda:
        return merge_sums_triton(parts)
    _check_parts(parts)
    return parts.sum(0)


def merge_moments_triton(parts: torch.Tensor) -> torch.Tensor:
    """Return merge_moments' result by the Triton kernel."""
    from ..kernels.norm import merge_moments_kernel

    _check_parts(parts, rows=3)
    return _merge(merge_moments_kernel, parts, parts.shape[2])


def merge_sums_triton(parts: torch.Tensor) -> torch.Tensor:
    """Return merge_sums' result by the Triton kernel."""
    from ..kernels.norm import merge_sums_kernel

    _check_parts(parts)
    return _merge(merge_sums_kernel, parts, parts.shape[1] * parts.shape[2])


@torch.library.custom_op(
    "fullres::batch_norm_forward",
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
    device_types="cpu",
)
def batch_norm_forward(
    moments: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    momentum: float | None,
    eps: float,
) -> torch.Tensor:
    """Return the norm [4, C] of a batch: mean, weight * rstd, bias, rstd = 1 / sqrt(var + eps).

    Updates the running statistics as torch.nn.BatchNorm2d does in training: by `momentum`, or where
    that is None by the mean over all batches; with the unbiased variance, M2 / (count - 1). A batch
    without pixels moves none of them but the counter. torch refuses a batch of one pixel a channel;
    that is the caller's to do, who knows the shape.

    Args:
        moments: [3, C], count, mean and M2 of the batch.
        weight: [C] of any floating dtype, or None for 1.
        bias: as weight, or None for 0.
        running_mean: [C] of any floating dtype, or None; moved in place.
        running_var: as running_mean; None where it is.
        num_batches_tracked: int64 scalar, or None; goes up by 1.
        momentum: share of the batch in the running statistics, or None, which needs the counter.
        eps: added to the variance.

    Raises:
        ValueError: for any other shape or dtype.
    """
    _check_batch_norm(moments, weight, bias, running_mean, running_var, num_batches_tracked)
    _check_momentum(running_mean, num_batches_tracked, momentum)
    count, mean, m2 = moments
    rstd = (m2 / count.clamp(min=1) + eps).rsqrt()
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    shift = torch.zeros_like(mean) if bias is None else bias.to(rstd.dtype)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is not None:
        part = momentum if momentum is not None else 1.0 / num_batches_tracked.to(mean.dtype)
        for running, batch in (running_mean, mean), (running_var, m2 / (count - 1)):
            before = running.to(mean.dtype)
            running.copy_(torch.where(count > 0, before * (1 - part) + batch * part, before))
    return torch.stack([mean, scale, shift, rstd])


@batch_norm_forward.register_kernel("cuda")
def batch_norm_forward_triton(
    moments: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    momentum: float | None,
    eps: float,
) -> torch.Tensor:
    """Return batch_norm_forward's result by the Triton kernel."""
    from ..kernels.norm import BLOCK_C, batch_norm_kernel

    _check_batch_norm(moments, weight, bias, running_mean, running_var, num_batches_tracked)
    _check_momentum(running_mean, num_batches_tracked, momentum)
    C = moments.shape[1]
    norm = moments.new_empty(4, C)
    arguments = moments.contiguous(), weight, bias, norm, running_mean, running_var
    with torch.cuda.device_of(moments):  # triton launches on the current device
        batch_norm_kernel[(-(-C // BLOCK_C),)](
            *arguments, num_batches_tracked if momentum is None else None, C, momentum or 0.0, eps,
            CUMULATIVE=momentum is None and running_mean is not None, BLOCK_C=BLOCK_C,
        )  # fmt: skip
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)  # after: programs of the kernel read what was before
    return norm


@batch_norm_forward.register_fake
def _(moments, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps):
    _check_batch_norm(moments, weight, bias, running_mean, running_var, num_batches_tracked)
    _check_momentum(running_mean, num_batches_tracked, momentum)
    return moments.new_empty(4, moments.shape[1])


def batch_norm_eval(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Return the norm [4, C] of running statistics [C]: of a layer in evaluation, or frozen.

    Differentiable with respect to weight and bias.
    """
    wide = torch.promote_types(running_var.dtype, torch.float32)
    rstd = (running_var.to(wide) + eps).rsqrt()
    scale = rstd if weight is None else rstd * weight.to(wide)
    shift = torch.zeros_like(rstd) if bias is None else bias.to(wide)
    return torch.stack([running_mean.to(wide), scale, shift, rstd])


@torch.library.custom_op("fullres::batch_norm_backward", mutates_args=(), device_types="cpu")
def batch_norm_backward(
    sums: torch.Tensor, norm: torch.Tensor, count: int, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the coefficients [4, C] of dy = a g + b (y - mean) + d, and dweight and dbias [C].

        a = scale    b = -scale rstd^2 sum(g (y - mean)) / count    d = -scale sum(g) / count
        dweight = rstd sum(g (y - mean))                            dbias = sum(g)

    Args:
        sums: [3, C]; of g and of g * (y - mean) over the batch, and a row that is not read.
        norm: [4, C], that of the forward pass.
        count: pixels a channel of the batch, those of all ranks.
        training: whether norm holds the batch's own statistics; else b and d are 0.

    Raises:
        ValueError: for any other shape or dtype.
    """
    _check_backward(sums, norm, count)
    (g, gy, _), (mean, scale, _, rstd) = sums, norm
    b, d = torch.zeros_like(g), torch.zeros_like(g)
    if training:
        b, d = -scale * rstd * rstd * (gy / count), -scale * (g / count)
    return torch.stack([mean, scale, b, d]), gy * rstd, g.clone()


@batch_norm_backward.register_kernel("cuda")
def batch_norm_backward_triton(
    sums: torch.Tensor, norm: torch.Tensor, count: int, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return batch_norm_backward's results by the Triton kernel."""
    from ..kernels.norm import BLOCK_C, batch_norm_backward_kernel

    _check_backward(sums, norm, count)
    C = sums.shape[1]
    coef, dweight, dbias = norm.new_empty(4, C), norm.new_empty(C), norm.new_empty(C)
    with torch.cuda.device_of(sums):  # triton launches on the current device
        batch_norm_backward_kernel[(-(-C // BLOCK_C),)](
            sums.contiguous(), norm.contiguous(), coef, dweight, dbias, C, float(count),
            TRAINING=training, BLOCK_C=BLOCK_C,
        )  # fmt: skip
    return coef, dweight, dbias


@batch_norm_backward.register_fake
def _(sums, norm, count, training):
    _check_backward(sums, norm, count)
    C = sums.shape[1]
    return norm.new_empty(4, C), norm.new_empty(C), norm.new_empty(C)


def _merge(kernel, parts: torch.Tensor, columns: int) -> torch.Tensor:
    """Return parts [T, R, C] joined by the kernel, level by level: [R, C]."""
    from ..kernels.norm import BLOCK_C, FAN_IN

    if not len(parts):
        return parts.new_zeros(parts.shape[1:])
    given = parts = parts.contiguous()
    with torch.cuda.device_of(parts):  # triton launches on the current device
        while (T := len(parts)) > 1:
            merged = parts.new_empty(-(-T // FAN_IN), *parts.shape[1:])
            grid = -(-columns // BLOCK_C), len(merged)
            kernel[grid](parts, merged, T, columns, FAN_IN=FAN_IN, BLOCK_C=BLOCK_C)
            parts = merged
    return parts[0].clone() if parts is given else parts[0]


def _check_parts(parts: torch.Tensor, rows: int | None = None) -> None:
    shape = f"[T, {rows or 'R'}, C]"
    want(parts.dim() == 3 and rows in (None, parts.shape[1]), "parts", shape, list(parts.shape))
    want(parts.dtype in (torch.float32, torch.float64), "parts", "float32 or 64", parts.dtype)
    want(len(parts) <= 65_535 * 64, "parts", "at most 4,194,240 rows", len(parts))


def _check_batch_norm(moments, weight, bias, running_mean, running_var, batches) -> None:
    want(moments.dim() == 2 and len(moments) == 3, "moments", "[3, C]", list(moments.shape))
    wide = moments.dtype in (torch.float32, torch.float64)
    want(wide, "moments", "float32 or float64", moments.dtype)
    C = moments.shape[1]
    channels = {"weight": weight, "bias": bias}
    channels |= {"running_mean": running_mean, "running_var": running_var}
    for name, t in channels.items():
        if t is not None:
            want(t.shape == (C,), name, f"[C] = [{C}]", list(t.shape))
            want(t.is_floating_point(), name, "a floating dtype", t.dtype)
            want(t.is_contiguous(), name, "contiguous memory", f"strides {t.stride()}")
            want(t.device == moments.device, name, str(moments.device), t.device)
    both = (running_mean is None) == (running_var is None)
    want(both, "running_var", "it and running_mean or neither", "one of them")
    if batches is not None:
        scalar = batches.dim() == 0 and batches.dtype == torch.int64
        given = f"{batches.dtype} {list(batches.shape)}"
        want(scalar, "num_batches_tracked", "an int64 scalar", given)
        want(batches.device == moments.device, "num_batches_tracked", str(moments.device), batches)


def _check_momentum(running_mean, batches, momentum) -> None:
    counted = momentum is not None or running_mean is None or batches is not None
    want(counted, "num_batches_tracked", "a counter, since momentum is None", None)


def _check_backward(sums: torch.Tensor, norm: torch.Tensor, count: int) -> None:
    want(sums.dim() == 2 and len(sums) == 3, "sums", "[3, C]", list(sums.shape))
    C = sums.shape[1]
    want(norm.shape == (4, C), "norm", f"[4, C] = [4, {C}]", list(norm.shape))
    want(norm.dtype == sums.dtype, "norm", f"sums' dtype {sums.dtype}", norm.dtype)
    want(norm.device == sums.device, "norm", f"sums' device {sums.device}", norm.device)
    want(count > 0, "count", "at least one pixel", count)
