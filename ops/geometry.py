"""The shape of a convolution, and the checks that all its passes share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .fuse import Prologue

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")
RESAMPLES = ("none", "pool2", "up2")
TILE_ROWS = 17  # more rows of pixels than any kernel configuration's tile has


def want(holds: bool, argument: str, wanted: str, given: object) -> None:
    """Raise ValueError, naming argument, wanted and given, unless it holds."""
    if not holds:
        raise ValueError(f"{argument}: want {wanted}, got {given}")


@dataclass(frozen=True)
class Geometry:
    """A filter [K, C / groups, R, S] and how it moves; pairs are of rows and of columns."""

    weight_shape: Sequence[int]
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    def output_size(self, H: int, W: int) -> list[int]:
        """Return [P, Q] of an image of H x W."""
        axes = (H, W), self.padding, self.dilation, self.weight_shape[2:], self.stride
        return [
            (size + 2 * pad - dil * (taps - 1) - 1) // step + 1
            for size, pad, dil, taps, step in zip(*axes, strict=True)
        ]


def check_geometry(
    geometry: Geometry, C: int, height_width: Sequence[int], weight: str = "weight"
) -> list[int]:
    """Return [P, Q] for images of C channels and this size; raise ValueError for what has none.

    `weight` is what the caller's argument is called.
    """
    axes = {"stride": 1, "padding": 0, "dilation": 1}
    for name, least in axes.items():
        pair = getattr(geometry, name)
        holds = len(pair) == 2 and all(value >= least for value in pair)
        want(holds, name, f"two numbers of at least {least}", list(pair))
    groups, shape = geometry.groups, list(geometry.weight_shape)
    want(groups > 0 and C % groups == 0, "groups", f"a divisor of C = {C}", groups)
    positive = len(shape) == 4 and all(size > 0 for size in shape)
    want(positive, weight, "[K, C / groups, R, S], none of them 0", shape)
    K, CG, R, S = shape
    want(CG * groups == C, weight, f"C / groups = {C // groups} input channels", CG)
    want(K % groups == 0, weight, f"K a multiple of groups = {groups}", K)
    want(K * CG * R * S < 2**31, weight, "below 2**31 elements", shape)
    H, W = height_width
    P, Q = geometry.output_size(H, W)
    want(
        min(P, Q) > 0 and min(H, W) > 0,
        "x", f"an image that holds {R} x {S} taps at padding {list(geometry.padding)}",
        f"{H} x {W} after resampling",
    )  # fmt: skip
    # A tile's offsets are int32; W counts twice because pooling reads two rows for one.
    rows = TILE_ROWS * max(
        2 * W * C * geometry.stride[0], (Q + S * geometry.dilation[1]) * max(K, C)
    )
    want(rows < 2**31, "x", f"{TILE_ROWS} rows of x and of y below 2**31 elements", rows)
    return [P, Q]


def check_prologue(p: Prologue, x: str = "x") -> None:
    """Raise ValueError for a prologue that no path computes; `x` is what its image is called."""
    cpu = p.x.device.type == "cpu"
    dtypes = (*DTYPES, torch.float64) if cpu else DTYPES
    want(p.x.dim() == 4 and p.x.shape[1] > 0, x, "[N, C, H, W], C > 0", list(p.x.shape))
    want(p.x.dtype in dtypes, x, f"a dtype in {dtypes} on {p.x.device.type}", p.x.dtype)
    want(p.act in ACTIVATIONS, "act", f"one of {ACTIVATIONS}", repr(p.act))
    want(p.resample in RESAMPLES, "resample", f"one of {RESAMPLES}", repr(p.resample))
    alone = p.residual is None and p.residual_norm is not None
    want(not alone, "residual_norm", "None without a residual", "a tensor")
    check_like(p.x, residual=p.residual)
    check_tables(p.x, p.x.shape[1], norm=p.norm, residual_norm=p.residual_norm)


def check_like(
    x: torch.Tensor, shape: Sequence[int] | None = None, **images: torch.Tensor | None
) -> None:
    """Raise ValueError for an image, where there is one, unlike x but for this shape."""
    shape = list(x.shape if shape is None else shape)
    for name, t in images.items():
        if t is not None:
            want(list(t.shape) == shape, name, str(shape), list(t.shape))
            want(t.dtype == x.dtype, name, f"x's dtype {x.dtype}", t.dtype)
            want(t.device == x.device, name, f"x's device {x.device}", t.device)


def check_tables(x: torch.Tensor, C: int, **tables: torch.Tensor | None) -> None:
    """Raise ValueError for a norm or coefficients, where given, not [4, C] beside images like x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, t in tables.items():
        if t is not None:
            want(list(t.shape) == [4, C], name, f"[4, {C}]", list(t.shape))
            want(t.dtype == wide, name, str(wide), t.dtype)
            want(t.device == x.device, name, f"x's device {x.device}", t.device)


def dense(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return x as the kernels read it, [N, H, W, C] row by row: itself, or a copy."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def empty_image(like: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """Return a fresh image in channels_last, of the dtype and device of another."""
    # Not empty_like: where C or H*W is 1 that may keep other strides.
    return torch.empty(
        list(like.shape if shape is None else shape),
        dtype=like.dtype, device=like.device, memory_format=torch.channels_last,
    )  # fmt: skip


def as_image(x: torch.Tensor) -> torch.Tensor:
    """Return x laid out as `empty_image`, also along axes of size 1: itself, or a copy."""
    _, C, H, W = x.shape
    return x if x.stride() == (H * W * C, 1, W * C, C) else empty_image(x).copy_(x)
