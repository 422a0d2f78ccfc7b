"""A convolution of what a prologue makes of stored images, with its output's batch statistics."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .cudnn import as_ours
from .dispatch import Shape, implementation, tf32_allowed
from .fuse import Prologue, prologue_reference, resampled_size
from .geometry import (
    Geometry,
    as_image,
    check_geometry,
    check_like,
    check_prologue,
    dense,
    empty_image,
    want,
)
from .norm import merge_moments_triton
from .pointwise import moments as moments_of
from .pointwise import moments_triton, prologue_triton

# Four images at once, with their residuals, and a product of more channels than these take more
# registers than a device has: then a pass of its own pools, which writes a quarter of the pixels.
POOLED_CHANNELS = 32


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
    _, stats, kept = _empty_results(sources, geometry, moments, keep)
    dtype, wide = first.x.dtype, torch.promote_types(first.x.dtype, torch.float32)
    with torch.autocast(first.x.device.type, enabled=False):  # the arguments' dtype decides
        parts = [prologue_reference(p).to(dtype).to(wide) for p in sources]
        z = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        b = None if bias is None else bias.to(wide)
        g = geometry
        y = F.conv2d(z, weight.to(wide), b, g.stride, g.padding, g.dilation, g.groups)
        y = as_image(y.to(dtype))
        if moments:
            stats.copy_(moments_of(y))
        if keep:
            kept.copy_(parts[0])
    return y, stats, kept


@conv2d_fwd.register_kernel("cuda")
def conv2d_fwd_triton(
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
    """Return conv2d_fwd by Triton: on a GPU, or on the CPU while kernels are interpreted.

    Where dispatch.py says so, torch's convolution takes the product, between passes of ours.
    """
    sources = _sources(
        x, norm, residual, residual_norm, act, slope, resample, x2, norm2, act2, slope2, resample2
    )
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    size = _check(sources, weight, bias, geometry, keep)
    if not x.shape[0]:
        y, stats, z = _empty_results(sources, geometry, moments, keep)
        return y, stats.zero_(), z
    if _takes_cudnn(sources, geometry, size):
        return conv2d_fwd_cudnn(sources, weight, bias, geometry, moments, keep)
    if resample == "pool2" and x.shape[1] > POOLED_CHANNELS:
        pooled = prologue_triton(x, norm, residual, residual_norm, act, slope, resample)
        sources[0] = Prologue(pooled)
    z = None
    if keep and list(x.shape[2:]) != size:  # programs share out y, which does not cover x
        z = prologue_triton(x, norm, residual, residual_norm, act, slope, "none")
        sources[0], keep = Prologue(z), False
    elif keep:
        z = empty_image(x)
    y, stats = _launch(sources, weight, bias, geometry, size, moments, z if keep else None)
    return y, stats, x.new_empty(0) if z is None else z


def conv2d_fwd_cudnn(
    sources: Sequence[Prologue],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    moments: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return conv2d_fwd by torch's convolution between our passes.

    Each reads and writes whole images: z, and of two sources both z and their concatenation, exist
    while this runs. In 16 bits torch rounds y once more where there is a bias.
    """
    images = [
        dense(p.x) if _is_plain(p) and not (keep and p is sources[0]) else
        prologue_triton(p.x, p.norm, p.residual, p.residual_norm, p.act, p.slope, p.resample)
        for p in sources
    ]  # fmt: skip
    z = images[0] if len(images) == 1 else torch.cat(images, 1)
    g = geometry
    with torch.autocast(z.device.type, enabled=False), as_ours():
        y = dense(F.conv2d(z, dense(weight), bias, g.stride, g.padding, g.dilation, g.groups))
    _, K, P, Q = y.shape
    y = y.as_strided(y.shape, (P * Q * K, 1, Q * K, K))  # torch has other words for sizes of one
    nothing = z.new_empty(0)
    stats = moments_triton(y) if moments else nothing.float()
    return y, stats, images[0] if keep else nothing


def _is_plain(p: Prologue) -> bool:
    """Return whether z is x itself."""
    return p.norm is None and p.residual is None and p.act == p.resample == "none"


def _takes_cudnn(sources: Sequence[Prologue], geometry: Geometry, size: Sequence[int]) -> bool:
    """Return whether torch's convolution is asked for and up to it."""
    (x, *_), g = (p.x for p in sources), geometry
    K, CG, R, S = g.weight_shape
    C = CG * g.groups
    shape = Shape("forward", x.dtype, C, K, (R, S), tuple(g.stride), tuple(g.dilation), g.groups)
    height, width = resampled_size(*x.shape[2:], sources[0].resample)
    largest = x.shape[0] * max(C * height * width, K * size[0] * size[1])
    # From 2**31 elements on it may crash (pytorch#117736).
    return largest < 2**31 and implementation(shape, x.device) == "cudnn"


def _launch(
    sources: Sequence[Prologue],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    size: Sequence[int],
    moments: bool,
    keep: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and its moments by a kernel of kernels/conv.py, which fills keep as well."""
    from ..kernels import conv as kernels  # here: importing ops must not need triton
    from ..kernels._tune import interpreting

    first, g = sources[0], geometry
    second = sources[1] if len(sources) == 2 else None
    (N, C, H, W), (K, CG, R, S), (P, Q) = first.x.shape, g.weight_shape, size
    y = empty_image(first.x, [N, K, P, Q])
    H2, W2 = (H, W) if second is None else second.x.shape[2:]
    unstrided = (*g.stride, *g.dilation, g.groups) == (1, 1, 1, 1, 1)
    by_pixel = all(p.resample == "none" for p in sources)
    if unstrided and by_pixel and (R, S, *g.padding) == (1, 1, 0, 0) and H * W < 2**30:
        H, W, P, Q = 1, H * W, 1, P * Q  # a pixel has no neighbours: one long row leaves no rest
        H2, W2 = H, W

    depthwise = CG == 1 and g.groups > 1
    kernel = kernels.conv2d_fwd_depthwise_kernel
    if not depthwise:
        simple = unstrided and by_pixel and second is None
        kernel = kernels.conv2d_fwd_kernel_for(C, K, R, S, first.x.itemsize, simple)
    rolls = kernel is kernels.conv2d_fwd_rows_kernel
    constants = {
        "C": C, "K": K, "R": R, "S": S, "PAD_H": g.padding[0], "PAD_W": g.padding[1],
        **_activation("", first),
    }  # fmt: skip
    if rolls:
        rows = kernels.conv2d_fwd_strip(N, P, Q)
        parts = kernels.conv2d_fwd_strips(N, P, Q, rows)
        grid, sizes = kernels.conv2d_fwd_rows_grid(N, P, Q, K, rows), (H, W, P, Q, rows)
    else:
        MAX_K = kernel.every_config[0].kwargs["MAX_K"]  # roughly: the tuner may take another
        blocks = kernels.conv2d_fwd_blocks(K, g.groups, depthwise, MAX_K)
        parts = kernels.conv2d_fwd_splits(N, P, Q, blocks)
        grid = kernels.conv2d_fwd_grid(K, g.groups, depthwise, parts)
        sizes = (N, H, W, P, Q, parts) if depthwise else (N, H, W, H2, W2, P, Q, parts)
        constants |= {
            "STRIDE_H": g.stride[0], "STRIDE_W": g.stride[1],
            "DIL_H": g.dilation[0], "DIL_W": g.dilation[1],
            "RESAMPLE": first.resample, "TILE_Q": kernels.tile_width(P, Q),
        }  # fmt: skip
    images = [
        dense(first.x),
        _table(first.norm),
        dense(first.residual),
        _table(first.residual_norm),
    ]
    if not depthwise:
        tf32 = first.x.dtype == torch.float32 and tf32_allowed()
        constants |= {"PRECISION": "tf32" if tf32 else "ieee", "WIDEN": interpreting()}
    if not depthwise and not rolls:
        given = second is not None
        images += [dense(second.x), _table(second.norm)] if given else [None, None]
        constants |= _activation("2", second if given else Prologue(first.x))
        constants |= {"C2": second.x.shape[1] if given else 0, "GROUPS": g.groups}
        constants |= {"RESAMPLE2": second.resample if given else "none"}
    stats = y.new_empty((parts, 3, K) if moments else 0, dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(y):  # triton launches on the current device
        kernel[grid](
            *images, dense(weight), bias, y, stats if moments else None, keep, *sizes, **constants
        )
    if moments and rolls:  # wider strips than the narrowest are fewer
        columns = kernel.best_config.kwargs["BLOCK_Q"]
        stats = stats[: kernels.conv2d_fwd_strips(N, P, Q, rows, columns)]
    return y, merge_moments_triton(stats) if moments else stats


def _activation(number: str, p: Prologue) -> dict[str, str | float]:
    slope = p.slope if p.act == "leaky_relu" else 0.0  # one kernel, whatever the slope of others
    return {f"ACT{number}": p.act, f"SLOPE{number}": slope}


def _table(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


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
) -> list[int]:
    """Return [P, Q]; raise ValueError, naming argument, wanted and given, for what has none."""
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
    size = check_geometry(geometry, sum(p.x.shape[1] for p in sources), sizes[0])
    check_like(first.x, weight.shape, weight=weight)
    check_like(first.x, weight.shape[:1], bias=bias)
    want(not keep or first.resample == "none", "keep", "False where x is resampled", keep)
    return size
