"""Channels_last images made larger or smaller: torch's arguments, bilinear or the nearest pixel.

Nothing is kept for backward, which is the same stencil transposed, a gather: the same arguments
give the same bits.
"""

import ctypes
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import torch

from .autograd import first_order
from .fuse import Prologue
from .geometry import check_like, check_prologue, dense, empty_image, want

MODES = ("nearest", "bilinear")
ONE = 1 << 40  # pixel, in the fixed point of kernels/interpolate.py
LIMIT = 2**22  # of a side: fixed point holds it, and float32 the halves of it


def interpolate(
    input: torch.Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: Literal["nearest", "bilinear"] = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> torch.Tensor:
    """Return input in another size, as torch.nn.functional.interpolate does.

    Points between pixels are exact to 2^-17 of a pixel and better, where torch's float32 is off by
    2^-9 at 50,000; the nearest pixel is the one that torch takes on the CPU, and backward gives the
    gradient to it. Sums are float32 (float64 for float64), rounded once. Nothing is saved for
    backward. First derivatives only.

    Args:
        input: [N, C, H, W], any N, also 0; float32, float16 or bfloat16, on the CPU also float64.
            Best in channels_last, else a copy is made.
        size: rows and columns of the result; one number for both.
        scale_factor: what to multiply rows and columns by, in place of size.
        mode: "nearest" or "bilinear".
        align_corners: of "bilinear", whether centres of corner pixels meet, not their corners.
        recompute_scale_factor: whether the ratio of sizes counts, rounded down, not scale_factor.
        antialias: not supported.

    Returns:
        [N, C, P, Q] of input's dtype in channels_last.

    Raises:
        ValueError: for anything else.
    """
    want(mode in MODES, "mode", f"one of {MODES}", repr(mode))
    want(not antialias, "antialias", "False", antialias)
    linear = mode == "bilinear"
    want(linear or align_corners is None, "align_corners", f"None in mode {mode}", align_corners)
    check_prologue(Prologue(input), "input")
    given = "it or scale_factor, not both"
    want((size is None) != (scale_factor is None), "size", given, (size, scale_factor))
    factors = []
    if size is not None:
        want(
            not recompute_scale_factor, "recompute_scale_factor", "None or False with a size", True
        )
        count = _pair("size", size, int)
    else:
        factors = [float(v) for v in _pair("scale_factor", scale_factor, float)]
        holds = all(0 < v < LIMIT for v in factors)
        want(holds, "scale_factor", "numbers above 0", scale_factor)
        count = [int(v * f) for v, f in zip(input.shape[2:], factors, strict=True)]
        if recompute_scale_factor:
            factors = []
    return _Interpolate.apply(input, count, factors, mode, bool(align_corners))


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *arguments):
        ctx.size, ctx.arguments = x.shape, arguments
        return resize(x, *arguments)

    @staticmethod
    @first_order
    def backward(ctx, dz):
        return resize_backward(dz, list(ctx.size), *ctx.arguments), *[None] * 4


@torch.library.custom_op("fullres::interpolate", mutates_args=(), device_types="cpu")
def resize(
    x: torch.Tensor,
    output_size: Sequence[int],
    factors: Sequence[float],
    mode: str,
    align_corners: bool,
) -> torch.Tensor:
    """Return x in the output size, [N, C, P, Q].

    factors: by which rows and columns are multiplied, or [] for the ratio of the sizes. The rest
    is as for `interpolate`, and so is what raises.
    """
    z = _empty_result(x, output_size)
    wide = torch.promote_types(x.dtype, torch.float32)
    points = _points(x.shape[2:], output_size, factors, mode, align_corners)
    result = x.to(wide)
    for axis in 2, 3:
        first, second, weight = _source(x.shape[axis], output_size[axis - 2], points[axis - 2], x)
        weight = weight.to(wide).reshape([-1, 1] if axis == 2 else [-1])
        near, far = result.index_select(axis, first), result.index_select(axis, second)
        result = near if mode == "nearest" else (1 - weight) * near + weight * far
    return z.copy_(result)


@resize.register_kernel("cuda")
def resize_triton(
    x: torch.Tensor,
    output_size: Sequence[int],
    factors: Sequence[float],
    mode: str,
    align_corners: bool,
) -> torch.Tensor:
    """Return resize's result by Triton: on a GPU, or in the interpreter."""
    from ..kernels.interpolate import interpolate_kernel
    from ..kernels.pool import grid
    from .pointwise import prologue_triton

    z = _empty_result(x, output_size)
    if not x.numel():
        return z
    if _doubles(x.shape, output_size, factors, mode, align_corners):
        return prologue_triton(x, None, None, None, "none", 0.0, "up2")
    (N, C, *image), count = x.shape, list(output_size)
    M = N * count[0] * count[1]
    points = _points(image, count, factors, mode, align_corners)
    with torch.cuda.device_of(x):  # triton launches on the current device
        interpolate_kernel[grid(M, C)](
            dense(x), z, M, *image, *count, *points[0], *points[1], C=C, NEAREST=mode == "nearest"
        )
    return z


@resize.register_fake
def _(x, output_size, factors, mode, align_corners):
    return _empty_result(x, output_size)


@torch.library.custom_op("fullres::interpolate_backward", mutates_args=(), device_types="cpu")
def resize_backward(
    dz: torch.Tensor,
    input_size: Sequence[int],
    output_size: Sequence[int],
    factors: Sequence[float],
    mode: str,
    align_corners: bool,
) -> torch.Tensor:
    """Return the gradient of resize's x, [N, C, H, W] = input_size, from that of its result."""
    dx = _empty_gradient(dz, input_size, output_size)
    wide = torch.promote_types(dz.dtype, torch.float32)
    points = _points(input_size[2:], output_size, factors, mode, align_corners)
    result = dz.to(wide)
    for axis in 3, 2:
        side = input_size[axis]
        first, second, weight = _source(side, output_size[axis - 2], points[axis - 2], dz)
        weight = weight.to(wide).reshape([-1, 1] if axis == 2 else [-1])
        shape = [*result.shape[:axis], side, *result.shape[axis + 1 :]]
        near, far = (1 - weight) * result, weight * result
        result = near.new_zeros(shape).index_add_(axis, first, near)
        if mode == "bilinear":
            result.index_add_(axis, second, far)
    return dx.copy_(result)


@resize_backward.register_kernel("cuda")
def resize_backward_triton(
    dz: torch.Tensor,
    input_size: Sequence[int],
    output_size: Sequence[int],
    factors: Sequence[float],
    mode: str,
    align_corners: bool,
) -> torch.Tensor:
    """Return resize_backward's result by Triton."""
    from ..kernels.interpolate import interpolate_backward_kernel
    from ..kernels.pool import grid
    from .pointwise import enlarged_gradient_triton

    dx = _empty_gradient(dz, input_size, output_size)
    if not dx.numel():
        return dx
    if _doubles(input_size, output_size, factors, mode, align_corners):
        return enlarged_gradient_triton(dz)
    (N, C, *image), count = input_size, list(output_size)
    M = N * image[0] * image[1]
    points = _points(image, count, factors, mode, align_corners)
    inverses, meet = zip(
        *(_inverse(scale, p, mode) for (scale, _), p in zip(points, count, strict=True)),
        strict=True,
    )
    with torch.cuda.device_of(dz):  # triton launches on the current device
        interpolate_backward_kernel[grid(M, C)](
            dense(dz), dx, M, *image, *count, *points[0], *points[1], *inverses,
            C=C, NEAREST=mode == "nearest", MEET_H=meet[0], MEET_W=meet[1],
        )  # fmt: skip
    return dx


@resize_backward.register_fake
def _(dz, input_size, output_size, factors, mode, align_corners):
    return _empty_gradient(dz, input_size, output_size)


def _points(
    image: Sequence[int],
    count: Sequence[int],
    factors: Sequence[float],
    mode: str,
    align_corners: bool,
) -> list[tuple[int | float, int | float]]:
    """Return scale and offset of rows and of columns, as kernels/interpolate.py has them."""
    points = []
    for axis, (size, p) in enumerate(zip(image, count, strict=True)):
        if mode == "nearest":
            # As torch on the CPU: in float32, and whatever the factor if the size is once or twice.
            ratio = 1.0 / factors[axis] if factors else size / p
            ratio = {size: 1.0, 2 * size: 0.5}.get(p, ratio)
            points.append((ctypes.c_float(ratio).value, 0.0))
        elif align_corners:
            points.append((_ceil(Fraction(size - 1, p - 1) * ONE) if p > 1 else 0, 0))
        else:
            # Rounded up: a point that is a pixel's stays at it, and doesn't fall short of it.
            ratio = Fraction(1.0 / factors[axis]) if factors else Fraction(size, p)
            scale = _ceil(ratio * ONE)
            points.append((scale, (scale - ONE) // 2))
    return points


def _source(
    size: int, count: int, point: tuple[int | float, int | float], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the pixel at or before each output's point, the next, and that one's weight."""
    scale, offset = point
    outputs = torch.arange(count, device=like.device)
    if isinstance(scale, float):
        first = (outputs.to(torch.float32) * scale).to(torch.int64).clamp(max=size - 1)
        return first, first, torch.zeros(count, device=like.device)
    places = (outputs * scale + offset).clamp(min=0)
    first = (places // ONE).clamp(max=size - 1)
    return first, (first + 1).clamp(max=size - 1), (places % ONE).to(torch.float64) / ONE


def _ceil(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)


def _inverse(scale: int | float, count: int, mode: str) -> tuple[float, int]:
    """Return outputs a pixel, and how many to look at for those that one has weight in.

    Where all outputs lie at one point, that is all there are.
    """
    if mode == "nearest":
        inverse = 1.0 / scale
        return inverse, min(count, math.ceil(inverse)) + 3
    inverse = ONE / scale if scale else float(count)
    return inverse, min(count, math.ceil(2 * inverse)) + 2


def _doubles(
    input_size: Sequence[int],
    output_size: Sequence[int],
    factors: Sequence[float],
    mode: str,
    align_corners: bool,
) -> bool:
    """Return whether the result is a prologue's "up2"."""
    _, C, *image = input_size
    twice = [2 * side for side in image] == list(output_size) and set(factors) <= {2.0}
    return mode == "bilinear" and not align_corners and twice and 4 * image[1] * C < 2**31


def _empty_result(x: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
    check_prologue(Prologue(x), "input")
    _check_sizes(x.shape[2:], output_size)
    return empty_image(x, [*x.shape[:2], *output_size])


def _empty_gradient(
    dz: torch.Tensor, input_size: Sequence[int], output_size: Sequence[int]
) -> torch.Tensor:
    check_prologue(Prologue(dz), "dz")
    _check_sizes(input_size[2:], output_size)
    check_like(dz, [*input_size[:2], *output_size], dz=dz)
    return empty_image(dz, input_size)


def _check_sizes(image: Sequence[int], count: Sequence[int]) -> None:
    limits = f"sides of 1 to {LIMIT - 1:,} pixels"
    want(all(0 < side < LIMIT for side in image), "input", limits, list(image))
    holds = len(count) == 2 and all(0 < side < LIMIT for side in count)
    want(holds, "size", limits, list(count))


def _pair(name: str, value: object, kind: type) -> list:
    pair = list(value) if isinstance(value, list | tuple) else [value] * 2
    kinds = int | torch.SymInt if kind is int else int | float | torch.SymFloat | torch.SymInt
    holds = len(pair) == 2 and all(isinstance(v, kinds) and not isinstance(v, bool) for v in pair)
    want(holds, name, "a number, or one for rows and one for columns", value)
    return pair
