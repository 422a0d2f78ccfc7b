"""The gradient of a convolution's input, taken back through its prologue to what is stored."""

from collections.abc import Sequence

import torch

from .fuse import (
    Prologue,
    gradient_reference,
    gradient_sums_reference,
    prologue_backward_reference,
    resampled_size,
)
from .geometry import (
    Geometry,
    check_geometry,
    check_like,
    check_prologue,
    check_tables,
    empty_image,
    want,
)


@torch.library.custom_op("fullres::conv2d_dgrad", mutates_args=(), device_types="cpu")
def conv2d_dgrad(
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    input_size: Sequence[int],
    x: torch.Tensor | None,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    slope: float,
    resample: str,
    add: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of what the prologue's act is applied to, and its sums over pixels.

    dy = coef applied to (g, y), or g without coef, is rounded to g's dtype; dz is its convolution
    with the turned weight, summed in float32; da is dz taken back through resample, plus `add`; the
    result is da through act, rounded once. Where x is resampled, dz may be rounded to g's dtype in
    between. Without x there is no prologue, and the result is dz + add. There is no autograd.

    Args:
        g: [N, K, P, Q], any N, also 0; float32, float16 or bfloat16, on the CPU also float64.
        y: as g, or None.
        coef: [4, K], float32 (float64 for float64 images); None where y is.
        weight: [K, C / groups, R, S], of g's dtype.
        input_size: [N, C, H, W], of x.
        x: [N, C, H, W] of g's dtype, or None; and so the rest of a `Prologue`: norm, residual,
            residual_norm, act, slope, resample. Without x these are None, "none" and "none".
        norm: [4, C], float32 (float64 for float64 images), or None.
        residual: as x, or None.
        residual_norm: as norm; None without a residual.
        act: "none", "relu", "leaky_relu" with slope, or "silu".
        slope: of "leaky_relu".
        resample: "none", "pool2" or "up2".
        add: another gradient of act's result before it is resampled: [N, C, H, W] of g's dtype, or
            None.
        stride: of rows and of columns.
        padding: rows and columns of zeros on each side of z.
        dilation: of rows and of columns.
        groups: a divisor of C and of K.
        sums: whether the sums are asked for; they need x.

    Images are best in channels_last, else copies of them are made.

    Returns:
        The gradient, [N, C, H, W] of g's dtype, in channels_last; and the sums of it, of it times
        (x - mean) and of it times (residual - residual's mean) over each channel's pixels, of the
        gradient as it is stored: float32 [3, C] (float64 for float64 images), a row of 0 without a
        residual, means 0 without a norm; [0] if not asked for. Summed in a fixed order.

    Raises:
        ValueError: for any other shape, dtype, device or name.
    """
    prologue = _prologue(g, input_size, x, norm, residual, residual_norm, act, slope, resample)
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    _check(g, y, coef, weight, input_size, prologue, x is None, add, geometry, sums)
    return conv2d_dgrad_reference(g, y, coef, weight, prologue, add, geometry, sums)


def conv2d_dgrad_reference(
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    prologue: Prologue,
    add: torch.Tensor | None,
    geometry: Geometry,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what conv2d_dgrad means, in plain torch; any device. x is read where sums need it."""
    p, dtype = prologue, g.dtype
    N, C, H, W = p.x.shape
    wide = torch.promote_types(dtype, torch.float32)
    result = empty_image(g, p.x.shape)
    with torch.autocast(g.device.type, enabled=False):
        dy = gradient_reference(g, y, coef).to(dtype).to(wide)
        z = dy.new_zeros(()).expand(N, C, *resampled_size(H, W, p.resample))  # its shape alone
        dz = torch.ops.aten.convolution_backward(
            dy, z, weight.to(wide), None, geometry.stride, geometry.padding, geometry.dilation,
            False, [0, 0], geometry.groups, [True, False, False],
        )[0]  # fmt: skip
        if p.act == "none" and p.resample == "none":
            result.copy_(dz if add is None else dz + add.to(wide))
        else:
            result.copy_(prologue_backward_reference(p, dz, add))
        if not sums:
            return result, result.new_empty(0, dtype=wide)
        return result, gradient_sums_reference(p, result)


@conv2d_dgrad.register_fake
def _(
    g, y, coef, weight, input_size, x, norm, residual, residual_norm, act, slope, resample, add,
    stride, padding, dilation, groups, sums,
):  # fmt: skip
    prologue = _prologue(g, input_size, x, norm, residual, residual_norm, act, slope, resample)
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    _check(g, y, coef, weight, input_size, prologue, x is None, add, geometry, sums)
    wide = torch.promote_types(g.dtype, torch.float32)
    shape = (3, input_size[1]) if sums else (0,)
    return empty_image(g, input_size), g.new_empty(shape, dtype=wide)


def _prologue(
    g: torch.Tensor, input_size: Sequence[int], x: torch.Tensor | None, *rest
) -> Prologue:
    """Return the prologue, around an image of one element's memory where x is None."""
    if x is None:
        want(len(input_size) == 4, "input_size", "[N, C, H, W]", list(input_size))
        x = g.new_zeros(()).expand(list(input_size))
    return Prologue(x, *rest)


def _check(
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    input_size: Sequence[int],
    prologue: Prologue,
    plain: bool,
    add: torch.Tensor | None,
    geometry: Geometry,
    sums: bool,
) -> None:
    """Raise ValueError, naming argument, wanted and given, for what no path computes."""
    p = prologue
    check_prologue(p)
    if plain:
        nothing = p.norm is None and p.residual is None and p.act == p.resample == "none"
        want(nothing and not sums, "x", "an image for the prologue or the sums", None)
    want(list(p.x.shape) == list(input_size), "input_size", str(list(p.x.shape)), list(input_size))
    want(weight.dim() == 4, "weight", "[K, C / groups, R, S]", list(weight.shape))
    N, C, H, W = p.x.shape
    size = check_geometry(geometry, C, resampled_size(H, W, p.resample))
    K = weight.shape[0]
    want((y is None) == (coef is None), "y", "it and coef or neither", "one of them")
    check_like(p.x, [N, K, *size], g=g, y=y)
    check_like(p.x, weight.shape, weight=weight)
    check_like(p.x, add=add)
    check_tables(p.x, K, coef=coef)
