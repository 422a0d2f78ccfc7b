"""Both gradients of a convolution from what is stored, in one pass where that moves less."""

from collections.abc import Sequence

import torch

from .conv_dgrad import conv2d_dgrad_triton
from .conv_wgrad import conv2d_wgrad_triton, sum_parts
from .dispatch import Shape, implementation, tf32_allowed
from .fuse import (
    Prologue,
    activated,
    gradient_reference,
    gradient_sums_reference,
    preactivation,
    prologue_backward_reference,
    resampled,
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

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("fullres::conv2d_backward", mutates_args=(), device_types="cpu")
def conv2d_backward(
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    x: torch.Tensor,
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
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradient of what act is applied to, its sums, dw and db.

    They are what `conv2d_dgrad` returns of these arguments, and `conv2d_wgrad`, whose documentation
    says what each argument is. On a GPU one kernel computes all four where its registers suffice
    and it moves fewer bytes than those two would; a table of ops/dispatch.py that measured
    otherwise, of the pass "backward", prevails. There is no autograd.

    Returns:
        The gradient, [N, C, H, W] of g's dtype, in channels_last; its sums [3, C], or [0] if not
        asked for; dw [K, C / groups, R, S] in channels_last; db [K], or [0] without bias. All but
        the first are float32, or float64 for float64 images. The same arguments give the same bits.

    Raises:
        ValueError: for any other shape, dtype, device or name.
    """
    prologue = Prologue(x, norm, residual, residual_norm, act, slope, resample)
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    _check(g, y, coef, weight, prologue, add, geometry)
    return conv2d_backward_reference(g, y, coef, weight, prologue, add, geometry, sums, bias)


def conv2d_backward_reference(
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    prologue: Prologue,
    add: torch.Tensor | None,
    geometry: Geometry,
    sums: bool,
    bias: bool,
) -> Results:
    """Return what conv2d_backward means, in plain torch; any device."""
    # As conv2d_dgrad and conv2d_wgrad mean it, z and dy made once for both.
    p, dtype = prologue, g.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(g.device.type, enabled=False):
        pre = preactivation(p)
        z = resampled(activated(pre, p.act, p.slope), p.resample).to(dtype).to(wide)
        dy = gradient_reference(g, y, coef).to(dtype).to(wide)
        dz, dw, _ = torch.ops.aten.convolution_backward(
            dy, z, weight.to(wide), None, geometry.stride, geometry.padding, geometry.dilation,
            False, [0, 0], geometry.groups, [True, True, False],
        )  # fmt: skip
        del z
        db = dy.sum((0, 2, 3)) if bias else dy.new_empty(0)
        del dy
        if p.act == "none" and p.resample == "none":
            gradient = dz if add is None else dz.add_(add.to(wide))
        else:
            gradient = prologue_backward_reference(p, dz, add, pre)
        gradient = as_image(gradient.to(dtype))
        found = gradient_sums_reference(p, gradient) if sums else gradient.new_empty(0, dtype=wide)
    return gradient, found, as_image(dw), db


@conv2d_backward.register_kernel("cuda")
def conv2d_backward_triton(
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    x: torch.Tensor,
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
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return conv2d_backward by Triton: on a GPU, or on the CPU while kernels are interpreted."""
    prologue = Prologue(x, norm, residual, residual_norm, act, slope, resample)
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    _check(g, y, coef, weight, prologue, add, geometry)
    if x.shape[0] and takes_one_pass(g, y, weight, prologue, add, geometry, sums):
        return _launch(g, y, coef, weight, prologue, add, sums, bias)
    return (
        *conv2d_dgrad_triton(
            g, y, coef, weight, x.shape, x, norm, residual, residual_norm, act, slope, resample,
            add, stride, padding, dilation, groups, sums,
        ),
        *conv2d_wgrad_triton(
            x, norm, residual, residual_norm, act, slope, resample, g, y, coef,
            weight.shape, stride, padding, dilation, groups, bias,
        ),
    )  # fmt: skip


def takes_one_pass(
    g: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    p: Prologue,
    add: torch.Tensor | None,
    geometry: Geometry,
    sums: bool,
) -> bool:
    """Return whether one kernel computes all: it can, moves fewer bytes, and no table objects."""
    from ..kernels import backward as kernels  # here: importing ops must not need triton

    (N, C, H, W), (K, _, R, S) = p.x.shape, weight.shape
    pairs = geometry.stride, geometry.padding, geometry.dilation
    same = tuple(map(tuple, pairs)) == ((1, 1), (R // 2, S // 2), (1, 1))
    if not same or geometry.groups != 1 or p.resample != "none":
        return False
    if not kernels.conv2d_backward_fits(C, K, R, S, g.itemsize):
        return False
    moved = {
        "itemsize": g.itemsize, "dy": 1 + (y is not None), "z": 1 + (p.residual is not None),
        "others": 1 + (add is not None),
    }  # fmt: skip
    one = kernels.conv2d_backward_bytes(N, H, W, C, K, R, **moved)
    unread = p.act == "none" and not sums
    if one >= kernels.two_pass_bytes(N, H, W, C, K, R, **moved, unread=unread):
        return False
    shape = Shape("backward", g.dtype, C, K, (R, S))
    return implementation(shape, g.device) == "triton"


def _launch(
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    p: Prologue,
    add: torch.Tensor | None,
    sums: bool,
    bias: bool,
) -> Results:
    """Return all by the one kernel, for a convolution that `takes_one_pass`."""
    from ..kernels import backward as kernels
    from ..kernels._tune import interpreting

    (N, C, H, W), (K, _, R, S) = p.x.shape, weight.shape
    kernel = kernels.conv2d_backward_kernel(C, K, R, g.itemsize)

    def programs(config: dict) -> int:
        return kernels.conv2d_backward_programs(N, H, W, C, K, R, g.itemsize, config)

    def parts(config: dict) -> int:  # of dw and db
        return programs(config) * kernels.conv2d_backward_parts(R, g.itemsize, config)

    def table(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.contiguous()

    # How many programs there are, the configuration says that the launch takes.
    configs = [config.kwargs for config in kernel.every_config]
    gradient = empty_image(p.x)
    most = max(map(programs, configs))
    total = g.new_empty((most, 3, C), dtype=torch.float32) if sums else None
    most = max(map(parts, configs))
    dw = g.new_empty((most, K, R, S, C), dtype=torch.float32)
    db = g.new_empty((most, K), dtype=torch.float32) if bias else None
    M = N * H * W
    sizes = (M, kernels.range_pixels(M)) if R == 1 else (H, W, kernels.strip_area(N, H, W))
    tf32 = g.dtype == torch.float32 and tf32_allowed()
    with torch.cuda.device_of(g):  # triton launches on the current device
        kernel[lambda meta: (programs(meta),)](
            dense(g), dense(y), table(coef), dense(weight), dense(p.x), table(p.norm),
            dense(p.residual), table(p.residual_norm), dense(add), gradient, total, dw, db, *sizes,
            C=C, K=K, ACT=p.act, SLOPE=p.slope if p.act == "leaky_relu" else 0.0,
            PRECISION="tf32" if tf32 else "ieee", WIDEN=interpreting(),
        )  # fmt: skip
        best = kernel.best_config.kwargs
        T = parts(best)
        dw = sum_parts(dw[:T]).permute(0, 3, 1, 2)
        db = sum_parts(db[:T]) if bias else g.new_empty(0, dtype=torch.float32)
        if sums:
            total = merge_sums_triton(total[: programs(best)])
        else:
            total = g.new_empty(0, dtype=torch.float32)
    return gradient, total, dw, db


@conv2d_backward.register_fake
def _(
    g, y, coef, weight, x, norm, residual, residual_norm, act, slope, resample, add,
    stride, padding, dilation, groups, sums, bias,
):  # fmt: skip
    prologue = Prologue(x, norm, residual, residual_norm, act, slope, resample)
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    _check(g, y, coef, weight, prologue, add, geometry)
    wide = torch.promote_types(g.dtype, torch.float32)
    dw = torch.empty(weight.shape, dtype=wide, device=g.device, memory_format=torch.channels_last)
    return (
        empty_image(x), g.new_empty((3, x.shape[1]) if sums else (0,), dtype=wide),
        dw, g.new_empty(weight.shape[0] if bias else 0, dtype=wide),
    )  # fmt: skip


def _check(
    g: torch.Tensor,
    y: torch.Tensor | None,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    p: Prologue,
    add: torch.Tensor | None,
    geometry: Geometry,
) -> None:
    """Raise ValueError, naming argument, wanted and given, for what no path computes."""
    check_prologue(p)
    want(weight.dim() == 4, "weight", "[K, C / groups, R, S]", list(weight.shape))
    N, C, H, W = p.x.shape
    size = check_geometry(geometry, C, resampled_size(H, W, p.resample))
    K = weight.shape[0]
    want((y is None) == (coef is None), "y", "it and coef or neither", "one of them")
    check_like(p.x, [N, K, *size], g=g, y=y)
    check_like(p.x, weight.shape, weight=weight)
    check_like(p.x, add=add)
    check_tables(p.x, K, coef=coef)
