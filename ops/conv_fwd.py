"""A convolution of what a prologue makes of stored images, with its output's batch statistics."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .fuse import Prologue, activated, preactivation, prologue_reference, resampled_size
from .geometry import Geometry, check_geometry, check_like, check_prologue, empty_image, want
from .pointwise import moments as moments_of


@torch.library.custom_op("fullres::conv2d_fwd", mutates_args=(), device_types="cpu")
def conv2d_fwd(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    slope: float,
    resample: str,
    x2: torch.Tensor | None,
    norm2: torch.Tensor | None,
    act2: str,
    slope2: float,
    resample2: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    moments: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y = weight * z + bias, y's moments, and the activated input.

    z is what a `Prologue` of the first seven arguments makes; with x2, its channels are followed by
    those of what a prologue of the next five makes. z is rounded to x's dtype before the product
    and is 0 where the convolution pads; the sum over taps and channels is float32, rounded once.
    There is no autograd.

    Args:
        x: [N, C, H, W], any N, also 0; float32, float16 or bfloat16, on the CPU also float64.
        norm: [4, C], float32 (float64 for float64 images), or None.
        residual: as x, or None.
        residual_norm: as norm; None without a residual.
        act: "none", "relu", "leaky_relu" with slope, or "silu".
        slope: of "leaky_relu".
        resample: "none", "pool2" or "up2".
        x2: [N, C2, H2, W2] of x's dtype, of x's size once both are resampled; or None.
        norm2: [4, C2] as norm, or None.
        act2: as act.
        slope2: as slope.
        resample2: as resample.
        weight: [K, C / groups, R, S], of x's dtype; with x2 [K, C + C2, R, S] and groups 1.
        bias: [K] of x's dtype, or None.
        stride: of rows and of columns.
        padding: rows and columns of zeros on each side of z.
        dilation: of rows and of columns.
        groups: a divisor of C and of K.
        moments: whether y's moments are asked for.
        keep: whether act(norm(x) + residual_norm(residual)) is; only where resample is "none".

    Images are best in channels_last, else copies of them are made.

    Returns:
        y: [N, K, P, Q] of x's dtype, in channels_last.
        moments: count, mean and M2 over y's pixels, as y is stored: float32 [3, K] (float64 for
            float64 images), or [0]. Summed in a fixed order: the same arguments, the same bits.
        z: [N, C, H, W] of x's dtype, in channels_last; or [0].

    Raises:
        ValueError: for any other shape, dtype, device or name.
    """
    sources = _sources(
        x, norm, residual, residual_norm, act, slope, resample, x2, norm2, act2, slope2, resample2
    )
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    _check(sources, weight, bias, geometry, keep)
    return conv2d_fwd_reference(sources, weight, bias, geometry, moments, keep)


def conv2d_fwd_reference(
    sources: Sequence[Prologue],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    moments: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what conv2d_fwd means, in plain torch; any device."""
    first = sources[0]
    y, stats, kept = _empty_results(sources, geometry, moments, keep)
    dtype, wide = first.x.dtype, torch.promote_types(first.x.dtype, torch.float32)
    with torch.autocast(first.x.device.type, enabled=False):  # the arguments' dtype decides
        z = torch.cat([prologue_reference(p).to(dtype).to(wide) for p in sources], 1)
        b = None if bias is None else bias.to(wide)
        g = geometry
        y.copy_(F.conv2d(z, weight.to(wide), b, g.stride, g.padding, g.dilation, g.groups))
        if moments:
            stats.copy_(moments_of(y))
        if keep:
            kept.copy_(activated(preactivation(first), first.act, first.slope))
    return y, stats, kept


@conv2d_fwd.register_fake
def _(
    x, norm, residual, residual_norm, act, slope, resample, x2, norm2, act2, slope2, resample2,
    weight, bias, stride, padding, dilation, groups, moments, keep,
):  # fmt: skip
    sources = _sources(
        x, norm, residual, residual_norm, act, slope, resample, x2, norm2, act2, slope2, resample2
    )
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    _check(sources, weight, bias, geometry, keep)
    return _empty_results(sources, geometry, moments, keep)


def _sources(
    x, norm, residual, residual_norm, act, slope, resample, x2, norm2, act2, slope2, resample2
) -> list[Prologue]:
    sources = [Prologue(x, norm, residual, residual_norm, act, slope, resample)]
    if x2 is not None:
        sources.append(Prologue(x2, norm2, None, None, act2, slope2, resample2))
    return sources


def _empty_results(
    sources: Sequence[Prologue], geometry: Geometry, moments: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, K = sources[0].x, geometry.weight_shape[0]
    size = geometry.output_size(*resampled_size(*x.shape[2:], sources[0].resample))
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        empty_image(x, [x.shape[0], K, *size]),
        x.new_empty((3, K) if moments else 0, dtype=wide),
        empty_image(x) if keep else x.new_empty(0),
    )


def _check(
    sources: Sequence[Prologue],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    keep: bool,
) -> None:
    """Raise ValueError, naming argument, wanted and given, for what no path computes."""
    first = sources[0]
    for p, name in zip(sources, ("x", "x2"), strict=False):
        check_prologue(p, name)
    sizes = [resampled_size(*p.x.shape[2:], p.resample) for p in sources]
    if len(sources) == 2:
        second = sources[1].x
        N, C2 = first.x.shape[0], second.shape[1]
        check_like(first.x, second.shape, x2=second)
        holds = second.shape[0] == N and sizes[1] == sizes[0]
        wanted = f"{N} images of {sizes[0]}, once resampled, as x"
        want(holds, "x2", wanted, f"{second.shape[0]} of {sizes[1]}")
        want(geometry.groups == 1, "groups", "1 with x2", geometry.groups)
        want(C2 > 0, "x2", "at least one channel", list(second.shape))
    want(weight.dim() == 4, "weight", "[K, C / groups, R, S]", list(weight.shape))
    check_geometry(geometry, sum(p.x.shape[1] for p in sources), sizes[0])
    check_like(first.x, weight.shape, weight=weight)
    check_like(first.x, weight.shape[:1], bias=bias)
    want(not keep or first.resample == "none", "keep", "False where x is resampled", keep)
