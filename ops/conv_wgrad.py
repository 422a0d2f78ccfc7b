"""The gradient of a convolution's weight and bias, from what is stored for backward."""

from collections.abc import Sequence

import torch

from .cudnn import as_ours
from .dispatch import Shape, implementation, tf32_allowed
from .fuse import Prologue, gradient_reference, prologue_reference, resampled_size
from .geometry import (
    Geometry,
    check_geometry,
    check_like,
    check_prologue,
    check_tables,
    dense,
    want,
)
from .pointwise import normalised_gradient_triton, prologue_triton


@torch.library.custom_op("fullres::conv2d_wgrad", mutates_args=(), device_types="cpu")
def conv2d_wgrad(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    slope: float,
    resample: str,
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients (dw, db) of the weight and the bias of a convolution of z.

    z is what a `Prologue` of the first seven arguments makes, dy = coef applied to (g, y), or g
    without coef. Both are rounded to x's dtype before they are multiplied; the sums over pixels are
    float32, in an order that is fixed: the same arguments give the same bits. There is no autograd.

    Args:
        x: [N, C, H, W], any N, also 0; float32, float16 or bfloat16, on the CPU also float64.
        norm: [4, C], float32 (float64 for float64 images), or None.
        residual: as x, or None.
        residual_norm: as norm.
        act: "none", "relu", "leaky_relu" with slope, or "silu".
        slope: of "leaky_relu".
        resample: "none", "pool2" or "up2".
        g: [N, K, P, Q], of x's dtype, the convolution's output size.
        y: as g, or None.
        coef: [4, K], float32 (float64 for float64 images); None where y is.
        weight_shape: [K, C / groups, R, S].
        stride: of rows and of columns.
        padding: rows and columns of zeros on each side of z.
        dilation: of rows and of columns.
        groups: a divisor of C and of K.
        bias: whether db is asked for.

    Images are best in channels_last, else copies of them are made.

    Returns:
        dw [K, C / groups, R, S] in channels_last and db [K], or [0] without bias: float32, or
        float64 for float64 images.

    Raises:
        ValueError: for any other shape, dtype, device or name.
    """
    return conv2d_wgrad_reference(
        Prologue(x, norm, residual, residual_norm, act, slope, resample),
        g, y, coef, weight_shape, stride, padding, dilation, groups, bias,
    )  # fmt: skip


def conv2d_wgrad_reference(
    prologue: Prologue,
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what conv2d_wgrad means, in plain torch; any device."""
    dtype = prologue.x.dtype
    _check(prologue, g, y, coef, weight_shape, stride, padding, dilation, groups)
    dw, db = _empty_results(prologue.x, weight_shape, bias)
    wide = dw.dtype
    with torch.autocast(g.device.type, enabled=False):
        z = prologue_reference(prologue).to(dtype).to(wide)
        dy = gradient_reference(g, y, coef).to(dtype).to(wide)
        weight = dy.new_zeros(()).expand(list(weight_shape))  # its shape alone counts
        gradient = torch.ops.aten.convolution_backward(
            dy, z, weight, None, stride, padding, dilation, False, [0, 0], groups,
            [False, True, False],
        )[1]  # fmt: skip
    dw.copy_(gradient)
    if bias:
        db.copy_(dy.sum((0, 2, 3)))
    return dw, db


@conv2d_wgrad.register_kernel("cuda")
def conv2d_wgrad_triton(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    slope: float,
    resample: str,
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return conv2d_wgrad by Triton: on a GPU, or on the CPU while kernels are interpreted.

    Where `dispatch` says so, torch's convolution takes the product, after passes of ours; its dw
    is rounded to x's dtype on the way, and its sums are as exact as that library makes them.
    """
    prologue = Prologue(x, norm, residual, residual_norm, act, slope, resample)
    _check(prologue, g, y, coef, weight_shape, stride, padding, dilation, groups)
    if not x.shape[0]:
        dw, db = _empty_results(x, weight_shape, bias)
        return dw.zero_(), db.zero_()
    geometry = Geometry(weight_shape, stride, padding, dilation, groups)
    shape = Shape(
        "wgrad", x.dtype, x.shape[1], weight_shape[0], tuple(weight_shape[2:]), tuple(stride),
        tuple(dilation), groups,
    )  # fmt: skip
    if implementation(shape, x.device) == "cudnn":
        return _by_torch(prologue, g, y, coef, geometry, bias)
    launch = _launch_rows if _takes_rows(prologue, g, y, geometry) else _launch
    return launch(prologue, g, y, coef, geometry, bias)


def _by_torch(
    p: Prologue,
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    geometry: Geometry,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return conv2d_wgrad by torch's convolution, of z and dy as passes of ours write them."""
    z = dense(p.x)
    if not (p.norm is None and p.residual is None and p.act == p.resample == "none"):
        z = prologue_triton(p.x, p.norm, p.residual, p.residual_norm, p.act, p.slope, p.resample)
    dy = dense(g) if coef is None else normalised_gradient_triton(g, y, coef)
    weight = dy.new_empty(()).expand(list(geometry.weight_shape))  # its shape alone counts
    dw, db = _empty_results(p.x, geometry.weight_shape, bias)
    with torch.autocast(g.device.type, enabled=False), as_ours():
        gradient = torch.ops.aten.convolution_backward(
            dy, z, weight, None, geometry.stride, geometry.padding, geometry.dilation,
            False, [0, 0], geometry.groups, [False, True, False],
        )[1]  # fmt: skip
    dw.copy_(gradient)
    if bias:
        db.copy_(dy.sum((0, 2, 3), dtype=db.dtype))
    return dw, db


def _takes_rows(p: Prologue, g: torch.Tensor, y: torch.Tensor | None, geometry: Geometry) -> bool:
    """Return whether the kernel for few channels takes it, all taps in one program."""
    from ..kernels.wgrad_rows import takes_rows

    taps = tuple(geometry.weight_shape[2:])
    steps = (*geometry.stride, *geometry.dilation, geometry.groups)
    if taps != (3, 3) or steps != (1, 1, 1, 1, 1) or p.resample != "none":
        return False
    (N, K, P, Q), C = g.shape, p.x.shape[1]
    return takes_rows(N, P, Q, C, K, g.itemsize, y is not None, p.residual is not None)


def _launch_rows(
    p: Prologue,
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    geometry: Geometry,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return conv2d_wgrad by the kernel for few channels."""
    from ..kernels import wgrad_rows as kernels
    from ..kernels._tune import interpreting

    (N, K, P, Q), (_, C, H, W) = g.shape, p.x.shape
    kernel = kernels.conv2d_wgrad_rows_kernel

    def strips(config: dict) -> int:
        return kernels.conv2d_wgrad_rows_strips(N, P, Q, C, K, g.itemsize, config["VALUES"])

    # How many strips there are, the configuration says that the launch takes.
    most = max(strips(config.kwargs) for config in kernel.every_config)
    dw = g.new_empty((most, K, 3, 3, C), dtype=torch.float32)
    db = g.new_empty((most, K), dtype=torch.float32) if bias else None
    tf32 = g.dtype == torch.float32 and tf32_allowed()
    with torch.cuda.device_of(g):  # triton launches on the current device
        kernel[lambda meta: (strips(meta) * kernels.conv2d_wgrad_rows_blocks(K),)](
            dense(p.x), _table(p.norm), dense(p.residual), _table(p.residual_norm),
            dense(g), dense(y), _table(coef), dw, db, H, W, P, Q, kernels.strip_area(N, P, Q),
            C=C, K=K, PAD_H=geometry.padding[0], PAD_W=geometry.padding[1],
            ACT=p.act, SLOPE=p.slope if p.act == "leaky_relu" else 0.0,
            PRECISION="tf32" if tf32 else "ieee", WIDEN=interpreting(),
        )  # fmt: skip
        T = strips(kernel.best_config.kwargs)
        dw = sum_parts(dw[:T]).permute(0, 3, 1, 2)
        db = sum_parts(db[:T]) if bias else g.new_empty(0, dtype=torch.float32)
    return dw, db


def _launch(
    p: Prologue,
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    geometry: Geometry,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return conv2d_wgrad by the kernels for every shape."""
    from ..kernels import wgrad as kernels  # here: importing ops must not need triton
    from ..kernels._tune import interpreting

    (N, C, H, W), (_, K, P, Q), (_, CG, R, S) = p.x.shape, g.shape, geometry.weight_shape
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    x, groups = p.x, geometry.groups

    depthwise = CG == 1 and groups > 1
    config = (kernels.DEPTHWISE_CONFIGS if depthwise else kernels.CONFIGS)[0].kwargs
    blocks = kernels.conv2d_wgrad_blocks(
        C, K, R, S, groups, config.get("MAX_J"), config["MAX_K"]
    )  # roughly: the tuner may take another configuration, which covers the same ranges
    splits = kernels.conv2d_wgrad_splits(N * P * Q, blocks)
    grid = kernels.conv2d_wgrad_grid(C, K, R, S, groups, splits)
    dw = torch.empty((splits, K, R, S, CG), dtype=torch.float32, device=x.device)
    db = torch.empty((splits, K), dtype=torch.float32, device=x.device) if bias else None
    arguments = (
        dense(x), _table(p.norm), dense(p.residual), _table(p.residual_norm),
        dense(g), dense(y), _table(coef), dw, db, N, H, W, P, Q, splits,
    )  # fmt: skip
    constants = {
        "C": C, "K": K, "R": R, "S": S, "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "PAD_H": padding[0], "PAD_W": padding[1], "DIL_H": dilation[0], "DIL_W": dilation[1],
        "ACT": p.act, "SLOPE": p.slope if p.act == "leaky_relu" else 0.0, "RESAMPLE": p.resample,
        "TILE_Q": kernels.tile_width(P, Q),
    }  # fmt: skip
    with torch.cuda.device_of(x):  # triton launches on the current device
        if depthwise:
            kernels.conv2d_wgrad_depthwise_kernel[grid](*arguments, **constants)
        else:
            tf32 = x.dtype == torch.float32 and tf32_allowed()
            kernels.conv2d_wgrad_kernel[grid](
                *arguments, **constants, GROUPS=groups,
                PRECISION="tf32" if tf32 else "ieee", WIDEN=interpreting(),
            )  # fmt: skip
        dw = sum_parts(dw).permute(0, 3, 1, 2)
        db = sum_parts(db) if bias else x.new_empty(0, dtype=torch.float32)
    return dw, db


def _table(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def sum_parts(parts: torch.Tensor) -> torch.Tensor:
    """Return the sum of parts over their first axis, added up in a tree of one order."""
    from ..kernels.wgrad import BLOCK_L, FAN_IN, sum_parts_kernel

    while (T := parts.shape[0]) > 1:
        sums = parts.new_empty((-(-T // FAN_IN), *parts.shape[1:]))
        L = sums[0].numel()
        grid = -(-L // BLOCK_L), sums.shape[0]
        sum_parts_kernel[grid](parts, sums, T, L, FAN_IN=FAN_IN, BLOCK_L=BLOCK_L)
        parts = sums
    return parts[0]


@conv2d_wgrad.register_fake
def _(
    x, norm, residual, residual_norm, act, slope, resample, g, y, coef,
    weight_shape, stride, padding, dilation, groups, bias,
):  # fmt: skip
    prologue = Prologue(x, norm, residual, residual_norm, act, slope, resample)
    _check(prologue, g, y, coef, weight_shape, stride, padding, dilation, groups)
    return _empty_results(x, weight_shape, bias)


def _empty_results(
    x: torch.Tensor, weight_shape: Sequence[int], bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    dw = torch.empty(
        list(weight_shape), dtype=dtype, device=x.device, memory_format=torch.channels_last
    )
    return dw, torch.empty(weight_shape[0] if bias else 0, dtype=dtype, device=x.device)


def _check(
    prologue: Prologue,
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raise ValueError, naming argument, wanted and given, for what no path computes."""
    check_prologue(prologue)
    x = prologue.x
    N, C, H, W = x.shape
    geometry = Geometry(weight_shape, stride, padding, dilation, groups)
    size = check_geometry(geometry, C, resampled_size(H, W, prologue.resample), "weight_shape")
    want((y is None) == (coef is None), "y", "it and coef or neither", "one of them")
    K = weight_shape[0]
    check_like(x, [N, K, *size], g=g, y=y)
    check_tables(x, K, coef=coef)
