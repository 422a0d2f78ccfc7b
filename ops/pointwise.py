"""The passes beside a convolution that another library computes: what ours do on the way.

With these, a layer that runs on cuDNN stores and computes the same as one that runs on our kernels:
`prologue` makes its input, `moments` takes its output's statistics; in backward
`normalised_gradient` makes the gradient of its output, and `prologue_backward` turns that of its
input into what the layer before is given.
"""

import torch

from .fuse import (
    Prologue,
    gradient_reference,
    prologue_backward_reference,
    prologue_reference,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")


@torch.library.custom_op("fullres::prologue", mutates_args=(), device_types="cpu")
def prologue(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    slope: float,
) -> torch.Tensor:
    """Return z = act(norm(x) + residual_norm(residual)), as a `Prologue` has it, rounded once.

    Args:
        x: [N, C, H, W] of any N; float32, float16 or bfloat16, on the CPU also float64.
        norm: [4, C], float32 (float64 for float64 images), or None.
        residual: as x, or None.
        residual_norm: as norm; None without a residual.
        act: "none", "relu", "leaky_relu" with slope, or "silu".
        slope: of "leaky_relu".

    Returns:
        z, of x's shape and dtype, in channels_last.

    Raises:
        ValueError: for any other shape, dtype, device or name.
    """
    _check(x, norm, residual, residual_norm, act)
    p = Prologue(x, norm, residual, residual_norm, act, slope)
    return _empty(x).copy_(prologue_reference(p))


@prologue.register_kernel("cuda")
def prologue_triton(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    slope: float,
) -> torch.Tensor:
    """Return prologue's result by the Triton kernel."""
    from ..kernels.pointwise import prologue_kernel

    _check(x, norm, residual, residual_norm, act)
    z = _empty(x)
    if x.numel():
        x, residual = _dense(x), _dense(residual)
        _launch(
            prologue_kernel, x, (x, norm, residual, residual_norm, z),
            ACT=act, SLOPE=slope if act == "leaky_relu" else 0.0,
        )  # fmt: skip
    return z


@prologue.register_fake
def _(x, norm, residual, residual_norm, act, slope):
    _check(x, norm, residual, residual_norm, act)
    return _empty(x)


@torch.library.custom_op("fullres::moments", mutates_args=(), device_types="cpu")
def moments(y: torch.Tensor) -> torch.Tensor:
    """Return count, mean and M2, the sum of squared deviations, of each channel: [3, C].

    y: [N, C, H, W]; float32, float16 or bfloat16, on the CPU also float64. The result is float32,
    or float64 for float64. Summed in a fixed order: the same y gives the same bits. Without a pixel
    all are 0. Raises ValueError for any other shape or dtype.
    """
    _check(y, None, None, None, "none")
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    count = y.numel() // y.shape[1]
    if not count:
        return wide.new_zeros(3, y.shape[1])
    mean = wide.mean((0, 2, 3))
    m2 = (wide - mean[:, None, None]).square().sum((0, 2, 3))
    return torch.stack([torch.full_like(mean, count), mean, m2])


@moments.register_kernel("cuda")
def moments_triton(y: torch.Tensor) -> torch.Tensor:
    """Return moments by the Triton kernel."""
    from ..kernels.pointwise import moments_kernel
    from .norm import merge_moments_triton

    _check(y, None, None, None, "none")
    if not y.numel():
        return y.new_zeros(3, y.shape[1], dtype=torch.float32)
    y = _dense(y)
    parts = _parts(y)
    return merge_moments_triton(parts[: _launch(moments_kernel, y, (y, parts))])


@moments.register_fake
def _(y):
    _check(y, None, None, None, "none")
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
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g, the gradient of what act is applied to, and its sums over pixels.

    Args:
        dz: the gradient of z, of x's shape and dtype.
        add: another gradient of z to add, as dz, or None.
        x: as for `prologue`, and so the rest.
        norm: as for `prologue`.
        residual: as for `prologue`.
        residual_norm: as for `prologue`.
        act: as for `prologue`.
        slope: as for `prologue`.
        sums: whether the sums are asked for.

    Returns:
        g, of x's shape and dtype, in channels_last; and the sums of g, of g * (x - mean) and of
        g * (residual - residual's mean) over each channel's pixels: float32 [3, C] (float64 for
        float64), a row of 0 without a residual, means 0 without a norm; [0] if not asked for.

    Raises:
        ValueError: for any other shape, dtype, device or name.
    """
    _check(x, norm, residual, residual_norm, act, dz=dz, add=add)
    p = Prologue(x, norm, residual, residual_norm, act, slope)
    wide = torch.promote_types(x.dtype, torch.float32)
    dz = dz.to(wide) if add is None else dz.to(wide) + add.to(wide)
    g = _empty(x).copy_(prologue_backward_reference(p, dz))
    if not sums:
        return g, g.new_empty(0, dtype=wide)
    rows = [g.to(wide), g.to(wide) * _centred(x, norm)]
    rows.append(torch.zeros_like(rows[0]))
    if residual is not None:
        rows[2] = rows[0] * _centred(residual, residual_norm)
    return g, torch.stack([row.sum((0, 2, 3)) for row in rows])


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
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prologue_backward's results by the Triton kernel."""
    from ..kernels.pointwise import prologue_backward_kernel
    from .norm import merge_sums_triton

    _check(x, norm, residual, residual_norm, act, dz=dz, add=add)
    g = _empty(x)
    if not x.numel():
        return g, x.new_zeros((3, x.shape[1]) if sums else (0,), dtype=torch.float32)
    dz, add, x, residual = (_dense(t) for t in (dz, add, x, residual))
    parts = _parts(x) if sums else None
    programs = _launch(
        prologue_backward_kernel, x, (dz, add, x, norm, residual, residual_norm, g, parts),
        ACT=act, SLOPE=slope if act == "leaky_relu" else 0.0,
    )  # fmt: skip
    return g, merge_sums_triton(parts[:programs]) if sums else g.new_empty(0, dtype=torch.float32)


@prologue_backward.register_fake
def _(dz, add, x, norm, residual, residual_norm, act, slope, sums):
    _check(x, norm, residual, residual_norm, act, dz=dz, add=add)
    shape = (3, x.shape[1]) if sums else (0,)
    return _empty(x), x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("fullres::normalised_gradient", mutates_args=(), device_types="cpu")
def normalised_gradient(g: torch.Tensor, y: torch.Tensor, coef: torch.Tensor) -> torch.Tensor:
    """Return dy = a * g + b * (y - mean) + d: through a batch normalisation, of g's dtype.

    g and y: [N, C, H, W]; coef: [4, C], mean, a, b and d, float32 (float64 for float64 images).
    Raises ValueError for any other shape, dtype or device.
    """
    _check(g, coef, None, None, "none", y=y)
    return _empty(g).copy_(gradient_reference(g, y, coef))


@normalised_gradient.register_kernel("cuda")
def normalised_gradient_triton(
    g: torch.Tensor, y: torch.Tensor, coef: torch.Tensor
) -> torch.Tensor:
    """Return normalised_gradient's result by the Triton kernel."""
    from ..kernels.pointwise import gradient_kernel

    _check(g, coef, None, None, "none", y=y)
    dy = _empty(g)
    if g.numel():
        g, y = _dense(g), _dense(y)
        _launch(gradient_kernel, g, (g, y, coef, dy))
    return dy


@normalised_gradient.register_fake
def _(g, y, coef):
    _check(g, coef, None, None, "none", y=y)
    return _empty(g)


def _launch(kernel, image: torch.Tensor, arguments: tuple, **constants: object) -> int:
    """Launch a kernel of kernels/pointwise.py over an image; return into how many ranges."""
    from ..kernels.pointwise import grid, ranges

    C = image.shape[1]
    M = image.numel() // C
    arguments = [t.contiguous() if t is not None and t.dim() == 2 else t for t in arguments]
    with torch.cuda.device_of(image):  # triton launches on the current device
        kernel[grid(M, C)](*arguments, M, C=C, **constants)
    return ranges(M, C, kernel.best_config.kwargs["ELEMENTS"])


def _parts(image: torch.Tensor) -> torch.Tensor:
    from ..kernels.pointwise import RANGES

    return image.new_empty(RANGES.value, 3, image.shape[1], dtype=torch.float32)


def _centred(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if norm is None else x - norm[0, :, None, None]


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def _empty(x: torch.Tensor) -> torch.Tensor:
    # Not empty_like: where C or H*W is 1 that may keep other strides.
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _check(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    act: str,
    **others: torch.Tensor | None,
) -> None:
    """Raise ValueError, naming argument, wanted and given, for what no path computes."""

    def want(holds: bool, argument: str, wanted: str, given: object) -> None:
        if not holds:
            raise ValueError(f"{argument}: want {wanted}, got {given}")

    dtypes = (*_DTYPES, torch.float64) if x.device.type == "cpu" else _DTYPES
    want(x.dim() == 4 and x.shape[1] > 0, "x", "[N, C, H, W], C > 0", list(x.shape))
    want(x.dtype in dtypes, "x", f"a dtype in {dtypes} on {x.device.type}", x.dtype)
    want(act in _ACTIVATIONS, "act", f"one of {_ACTIVATIONS}", repr(act))
    alone = residual is None and residual_norm is not None
    want(not alone, "residual_norm", "None without a residual", "a tensor")
    wide = torch.promote_types(x.dtype, torch.float32)
    images = {"residual": (residual, x.shape, x.dtype)}
    images |= {name: (t, x.shape, x.dtype) for name, t in others.items()}
    norms = {"norm": norm, "residual_norm": residual_norm}
    images |= {name: (t, (4, x.shape[1]), wide) for name, t in norms.items()}
    for name, (t, shape, dtype) in images.items():
        if t is not None:
            want(t.shape == shape, name, str(list(shape)), list(t.shape))
            want(t.dtype == dtype, name, str(dtype), t.dtype)
            want(t.device == x.device, name, f"x's device {x.device}", t.device)
