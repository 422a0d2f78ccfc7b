"""The passes beside a convolution that another library computes: what ours do on the way.

With these, a layer that runs on cuDNN stores and computes the same as one that runs on our kernels:
`prologue` makes its input, `moments` takes its output's statistics; in backward
`normalised_gradient` makes the gradient of its output, and `prologue_backward` turns that of its
input into what the layer before is given.
"""

from collections.abc import Iterable

import torch

from .fuse import (
    Prologue,
    gradient_reference,
    gradient_sums_reference,
    prologue_backward_reference,
    prologue_reference,
    resampled_size,
)
from .geometry import check_like, check_prologue, check_tables, dense, empty_image, want


@torch.library.custom_op("fullres::prologue", mutates_args=(), device_types="cpu")
def prologue(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    slope: float,
    resample: str,
) -> torch.Tensor:
    """Return z = resample(act(norm(x) + residual_norm(residual))), a `Prologue`'s, rounded once.

    Args:
        x: [N, C, H, W] of any N; float32, float16 or bfloat16, on the CPU also float64.
        norm: [4, C], float32 (float64 for float64 images), or None.
        residual: as x, or None.
        residual_norm: as norm; None without a residual.
        act: "none", "relu", "leaky_relu" with slope, or "silu".
        slope: of "leaky_relu".
        resample: "none", "pool2" or "up2".

    Returns:
        z, of x's dtype and the resampled size, in channels_last.

    Raises:
        ValueError: for any other shape, dtype, device or name.
    """
    p = Prologue(x, norm, residual, residual_norm, act, slope, resample)
    z = _empty_z(p)
    return z.copy_(prologue_reference(p)) if z.numel() else z


@prologue.register_kernel("cuda")
def prologue_triton(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    slope: float,
    resample: str,
) -> torch.Tensor:
    """Return prologue's result by the Triton kernel."""
    from ..kernels.pointwise import prologue_kernel

    z = _empty_z(Prologue(x, norm, residual, residual_norm, act, slope, resample))
    if z.numel():
        x, residual = dense(x), dense(residual)
        _launch(
            prologue_kernel, z, (x, norm, residual, residual_norm, z), x.shape[2:],
            ACT=act, SLOPE=slope if act == "leaky_relu" else 0.0, RESAMPLE=resample,
        )  # fmt: skip
    return z


@prologue.register_fake
def _(x, norm, residual, residual_norm, act, slope, resample):
    return _empty_z(Prologue(x, norm, residual, residual_norm, act, slope, resample))


def _empty_z(p: Prologue) -> torch.Tensor:
    """Return z's memory; raise ValueError for a prologue that no path computes."""
    check_prologue(p)
    return empty_image(p.x, _resampled_shape(p))


def _resampled_shape(p: Prologue) -> list[int]:
    N, C, H, W = p.x.shape
    # Both rows that a pixel of z reads lie within int32 of the first.
    holds = p.resample == "none" or 4 * W * C < 2**31
    want(holds, "x", "rows below 2**29 elements where they are resampled", W * C)
    holds = p.resample != "pool2" or min(H, W) > 1
    want(holds, "x", "at least 2 x 2 pixels to pool", f"{H} x {W}")
    return [N, C, *resampled_size(H, W, p.resample)]


@torch.library.custom_op("fullres::moments", mutates_args=(), device_types="cpu")
def moments(y: torch.Tensor) -> torch.Tensor:
    """Return count, mean and M2, the sum of squared deviations, of each channel: [3, C].

    y: [N, C, H, W]; float32, float16 or bfloat16, on the CPU also float64. The result is float32,
    or float64 for float64. Summed in a fixed order: the same y gives the same bits. Without a pixel
    all are 0. Raises ValueError for any other shape or dtype.
    """
    check_prologue(Prologue(y), "y")
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    count = y.numel() // y.shape[1]
    if not count:
        return wide.new_zeros(3, y.shape[1])
    mean = wide.mean((0, 2, 3))
    m2 = (wide - mean[:, None, None]).square_().sum((0, 2, 3))
    return torch.stack([torch.full_like(mean, count), mean, m2])


@moments.register_kernel("cuda")
def moments_triton(y: torch.Tensor) -> torch.Tensor:
    """Return moments by the Triton kernel."""
    from ..kernels.pointwise import moments_kernel
    from .norm import merge_moments_triton

    check_prologue(Prologue(y), "y")
    if not y.numel():
        return y.new_zeros(3, y.shape[1], dtype=torch.float32)
    y = dense(y)
    parts = _parts(y)
    return merge_moments_triton(parts[: _launch(moments_kernel, y, (y, parts))])


@moments.register_fake
def _(y):
    check_prologue(Prologue(y), "y")
    return y.new_empty(3, y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32))


@torch.library.custom_op("fullres::prologue_backward", mutates_args=(), device_types="cpu")
def prologue_backward(
    dz: torch.Tensor,
    add: torch.Tensor | None,
    x: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    slope: float,
    resample: str,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g, the gradient of what act is applied to, and its sums over pixels.

    Args:
        dz: the gradient of z, of x's dtype and the resampled size.
        add: another gradient, of act's result before it is resampled: as x, or None.
        x: as for `prologue`, and so the rest.
        norm: as for `prologue`.
        residual: as for `prologue`.
        residual_norm: as for `prologue`.
        act: as for `prologue`.
        slope: as for `prologue`.
        resample: as for `prologue`; a pooled maximum's place is found again, the first of equals.
        sums: whether the sums are asked for.

    Returns:
        g, of x's shape and dtype, in channels_last; and the sums of g, of g * (x - mean) and of
        g * (residual - residual's mean) over each channel's pixels: float32 [3, C] (float64 for
        float64), a row of 0 without a residual, means 0 without a norm; [0] if not asked for.

    Raises:
        ValueError: for any other shape, dtype, device or name.
    """
    p = Prologue(x, norm, residual, residual_norm, act, slope, resample)
    g, nothing = _empty_gradient(p, dz, add, sums)
    if g.numel():
        g.copy_(prologue_backward_reference(p, dz, add))
    return g, gradient_sums_reference(p, g) if sums else nothing


@prologue_backward.register_kernel("cuda")
def prologue_backward_triton(
    dz: torch.Tensor,
    add: torch.Tensor | None,
    x: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    slope: float,
    resample: str,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prologue_backward's results by the Triton kernel."""
    from ..kernels.pointwise import pooled_backward_kernel, prologue_backward_kernel
    from .norm import merge_sums_triton

    p = Prologue(x, norm, residual, residual_norm, act, slope, resample)
    g, total = _empty_gradient(p, dz, add, sums)
    if not g.numel():
        return g, total.zero_()
    dz, add, x, residual = (dense(t) for t in (dz, add, x, residual))
    parts = _parts(x) if sums else None
    arguments = dz, add, x, norm, residual, residual_norm, g, parts
    constants = {"ACT": act, "SLOPE": slope if act == "leaky_relu" else 0.0}
    if resample == "pool2":
        N, C, H, W = x.shape
        windows = g.new_empty(()).expand(N, C, (H + 1) // 2, (W + 1) // 2)  # its shape alone
        programs = _launch(pooled_backward_kernel, windows, arguments, (H, W), **constants)
    else:
        constants["RESAMPLE"] = resample
        programs = _launch(prologue_backward_kernel, x, arguments, x.shape[2:], **constants)
    return g, merge_sums_triton(parts[:programs]) if sums else total


def enlarged_gradient_triton(dz: torch.Tensor) -> torch.Tensor:
    """Return the gradient [N, C, H, W] of what was enlarged twice, from dz [N, C, 2H, 2W]."""
    from ..kernels.pointwise import prologue_backward_kernel

    N, C, H, W = dz.shape
    dx = empty_image(dz, [N, C, H // 2, W // 2])
    _launch(
        prologue_backward_kernel, dx, (dense(dz), *[None] * 5, dx, None), dx.shape[2:],
        ACT="none", SLOPE=0.0, RESAMPLE="up2",
    )  # fmt: skip
    return dx


@prologue_backward.register_fake
def _(dz, add, x, norm, residual, residual_norm, act, slope, resample, sums):
    p = Prologue(x, norm, residual, residual_norm, act, slope, resample)
    return _empty_gradient(p, dz, add, sums)


def _empty_gradient(
    p: Prologue, dz: torch.Tensor, add: torch.Tensor | None, sums: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for g and for its sums; raise ValueError for what no path computes."""
    check_prologue(p)
    check_like(p.x, _resampled_shape(p), dz=dz)
    check_like(p.x, add=add)
    shape = (3, p.x.shape[1]) if sums else (0,)
    wide = torch.promote_types(p.x.dtype, torch.float32)
    return empty_image(p.x), p.x.new_empty(shape, dtype=wide)


@torch.library.custom_op("fullres::normalised_gradient", mutates_args=(), device_types="cpu")
def normalised_gradient(g: torch.Tensor, y: torch.Tensor, coef: torch.Tensor) -> torch.Tensor:
    """Return dy = a * g + b * (y - mean) + d: through a batch normalisation, of g's dtype.

    g and y: [N, C, H, W]; coef: [4, C], mean, a, b and d, float32 (float64 for float64 images).
    Raises ValueError for any other shape, dtype or device.
    """
    _check_gradient(g, y, coef)
    return empty_image(g).copy_(gradient_reference(g, y, coef))


@normalised_gradient.register_kernel("cuda")
def normalised_gradient_triton(
    g: torch.Tensor, y: torch.Tensor, coef: torch.Tensor
) -> torch.Tensor:
    """Return normalised_gradient's result by the Triton kernel."""
    from ..kernels.pointwise import gradient_kernel

    _check_gradient(g, y, coef)
    dy = empty_image(g)
    if g.numel():
        g, y = dense(g), dense(y)
        _launch(gradient_kernel, g, (g, y, coef, dy))
    return dy


@normalised_gradient.register_fake
def _(g, y, coef):
    _check_gradient(g, y, coef)
    return empty_image(g)


def _check_gradient(g: torch.Tensor, y: torch.Tensor, coef: torch.Tensor) -> None:
    check_prologue(Prologue(g), "g")
    check_like(g, y=y)
    check_tables(g, g.shape[1], coef=coef)


def _launch(
    kernel, image: torch.Tensor, arguments: tuple, sizes: Iterable[int] = (), **constants: object
) -> int:
    """Launch a kernel of kernels/pointwise.py over an image's pixels; return how many ranges.

    Of the image only the shape counts. `sizes` follow the number of pixels.
    """
    from ..kernels.pointwise import grid, ranges

    C = image.shape[1]
    M = image.numel() // C
    arguments = [t.contiguous() if t is not None and t.dim() == 2 else t for t in arguments]
    with torch.cuda.device_of(image):  # triton launches on the current device
        kernel[grid(M, C)](*arguments, M, *sizes, C=C, **constants)
    return ranges(M, C, kernel.best_config.kwargs["ELEMENTS"])


def _parts(image: torch.Tensor) -> torch.Tensor:
    from ..kernels.pointwise import RANGES

    return image.new_empty(RANGES.value, 3, image.shape[1], dtype=torch.float32)
