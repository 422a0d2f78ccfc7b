"""The gradient of a convolution's input, taken back through its prologue to what is stored."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .cudnn import as_ours
from .dispatch import Shape, implementation, tf32_allowed
from .fuse import (
    Prologue,
    gradient_reference,
    gradient_sums_reference,
    prologue_backward_reference,
    resampled_size,
)
from .geometry import (
    Geometry,
    as_image,
    check_geometry,
    check_like,
    check_prologue,
    check_tables,
    dense,
    empty_image,
    want,
)
from .norm import merge_sums_triton
from .pointwise import normalised_gradient_triton, prologue_backward_triton


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
    result is da through act, rounded once. Where x is resampled, and where cuDNN takes the product,
    dz may be rounded to g's dtype in between. Without x there is no prologue, and the result is
    dz + add. There is no autograd.

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
    with torch.autocast(g.device.type, enabled=False):
        dy = gradient_reference(g, y, coef).to(dtype).to(wide)
        z = dy.new_zeros(()).expand(N, C, *resampled_size(H, W, p.resample))  # its shape alone
        dz = torch.ops.aten.convolution_backward(
            dy, z, weight.to(wide), None, geometry.stride, geometry.padding, geometry.dilation,
            False, [0, 0], geometry.groups, [True, False, False],
        )[0]  # fmt: skip
        if p.act == "none" and p.resample == "none":
            result = dz if add is None else dz.add_(add.to(wide))
        else:
            result = prologue_backward_reference(p, dz, add)
        result = as_image(result.to(dtype))
        if not sums:
            return result, result.new_empty(0, dtype=wide)
        return result, gradient_sums_reference(p, result)


@conv2d_dgrad.register_kernel("cuda")
def conv2d_dgrad_triton(
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
    """Return conv2d_dgrad by Triton: on a GPU, or on the CPU while kernels are interpreted.

    Where `dispatch` says so, torch's convolution takes the product, between passes of ours.
    """
    p = _prologue(g, input_size, x, norm, residual, residual_norm, act, slope, resample)
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    _check(g, y, coef, weight, input_size, p, x is None, add, geometry, sums)
    N, C, H, W = input_size
    if not N:
        return empty_image(g, input_size), g.new_zeros((3, C) if sums else 0, dtype=torch.float32)
    shape = Shape(
        "dgrad", g.dtype, C, weight.shape[0], tuple(weight.shape[2:]), tuple(stride),
        tuple(dilation), groups,
    )  # fmt: skip
    apart = implementation(shape, g.device) == "cudnn"
    if not apart and resample == "none":
        return launch(g, y, coef, weight, p, x is None, add, geometry, sums)

    plain = Prologue(g.new_empty(()).expand(N, C, *resampled_size(H, W, resample)))
    if apart:
        dz = _by_torch(g, y, coef, weight, plain.x, geometry)
    else:
        dz, _ = launch(g, y, coef, weight, plain, True, None, geometry, False)
    if x is None:
        return dz if add is None else dz.add_(add), g.new_empty(0, dtype=torch.float32)
    return prologue_backward_triton(
        dz, add, p.x, p.norm, p.residual, p.residual_norm, p.act, p.slope, p.resample, sums
    )


def _by_torch(
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    z: torch.Tensor,
    geometry: Geometry,
) -> torch.Tensor:
    """Return dz, rounded to g's dtype, by torch's convolution; only z's shape is read."""
    dy = dense(g) if coef is None else normalised_gradient_triton(g, y, coef)
    with torch.autocast(g.device.type, enabled=False), as_ours():
        dz = torch.ops.aten.convolution_backward(
            dy, z, dense(weight), None, geometry.stride, geometry.padding, geometry.dilation,
            False, [0, 0], geometry.groups, [True, False, False],
        )[0]  # fmt: skip
    return as_image(dz)


def launch(
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    p: Prologue,
    plain: bool,
    add: torch.Tensor | None,
    geometry: Geometry,
    sums: bool,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return conv2d_dgrad by our kernels, of an image that is not resampled, plus bias [C].

    `plain` says that only the shape of p's image counts. What g covers is g's own to say: pixels
    that it has no rows for are met by no tap.
    """
    from ..kernels import dgrad as kernels  # here: importing ops must not need triton
    from ..kernels._tune import interpreting

    (N, C, H, W), (_, K, P, Q), (_, CG, R, S) = p.x.shape, g.shape, weight.shape
    stride, padding, dilation = map(tuple, (geometry.stride, geometry.padding, geometry.dilation))
    groups = geometry.groups
    x = None if plain or not (sums or p.act != "none") else p.x
    norm, residual, residual_norm = (
        (None, None, None) if x is None else (p.norm, p.residual, p.residual_norm)
    )
    images = (
        dense(add), dense(x), _table(norm), dense(residual), _table(residual_norm),
    )  # fmt: skip
    source = dense(g), dense(y), _table(coef)
    depthwise = CG == 1 and groups > 1
    rolls = (stride, dilation, groups, bias) == ((1, 1), (1, 1), 1, None)
    rolls = rolls and kernels.conv2d_dgrad_rolls(C, K, (R, S), g.itemsize)
    constants = {
        "C": C, "K": K, "R": R, "S": S, "PAD_H": padding[0], "PAD_W": padding[1],
        "ACT": p.act, "SLOPE": p.slope if p.act == "leaky_relu" else 0.0,
    }  # fmt: skip
    if rolls:
        kernel, phases = kernels.conv2d_dgrad_rows_kernel, 1
        rows = kernels.conv2d_dgrad_rows(N, H, W)
        strips = kernels.conv2d_dgrad_rows_strips(N, H, W, rows)
        grid = kernels.conv2d_dgrad_rows_grid(C, strips)
        sizes = H, W, P, Q, rows
    else:
        kernel, phases = kernels.conv2d_dgrad_kernel, stride[0] * stride[1]
        rows, columns = kernels.phase_size(H, W, stride, padding)
        strips = kernels.conv2d_dgrad_strips(N * rows * columns, phases)
        grid = kernels.conv2d_dgrad_grid(C, S, stride, dilation, groups, strips)
        sizes = N, H, W, P, Q, strips
        images = (_table(bias), *images)
        constants |= {
            "STRIDE_H": stride[0], "STRIDE_W": stride[1], "DIL_H": dilation[0],
            "DIL_W": dilation[1], "TILE_Q": kernels.tile_width(rows, columns),
        }  # fmt: skip
    if depthwise:
        kernel, weight = kernels.conv2d_dgrad_depthwise_kernel, _taps(weight)
    else:
        weight = _windows(weight, stride[1], dilation[1], groups)
        tf32 = g.dtype == torch.float32 and tf32_allowed()
        constants |= {"PRECISION": "tf32" if tf32 else "ieee", "WIDEN": interpreting()}
        constants |= {} if rolls else {"GROUPS": groups}
    result = empty_image(g, p.x.shape)
    parts = g.new_empty((strips * phases, 3, C), dtype=torch.float32) if sums else None
    with torch.cuda.device_of(g):  # triton launches on the current device
        kernel[grid](*source, weight, result, *images, parts, *sizes, **constants)
    return result, merge_sums_triton(parts) if sums else g.new_empty(0, dtype=torch.float32)


def _windows(weight: torch.Tensor, stride: int, dilation: int, groups: int) -> torch.Tensor:
    """Return [K, CG, R, S] as the kernel reads it: [R, STEP, groups, CG, taps of a phase * KG]."""
    from ..kernels.dgrad import step_of

    K, CG, R, S = weight.shape
    step = step_of(stride, dilation)
    taps = -(-S // step)
    if S % step:
        weight = F.pad(weight, (0, taps * step - S))
    weight = weight.reshape(groups, K // groups, CG, R, taps, step)
    return weight.permute(3, 5, 0, 2, 4, 1).contiguous()


def _taps(weight: torch.Tensor) -> torch.Tensor:
    """Return a depthwise weight [K, 1, R, S] as its kernel reads it: [R, S, K]."""
    return weight[:, 0].permute(1, 2, 0).contiguous()


def _table(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


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
