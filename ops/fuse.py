"""What fused convolutions compute around the product: prologues and their backward, in plain torch.

Tensors are [N, C, H, W] in channels_last. A *norm* is float32 [4, C] (float64 for float64 images):
mean, scale, shift and inverse deviation of each channel, so that (x - mean) * scale + shift is the
normalised x. *Coefficients* are [4, C] alike: mean, a, b, d of kernels/fuse.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Activation = Literal["none", "relu", "leaky_relu", "silu"]
Resample = Literal["none", "pool2", "up2"]


@dataclass(frozen=True)
class Prologue:
    """How a convolution makes its input z out of what is stored, as it loads it.

        z = resample(act(norm(x) + residual_norm(residual)))

    x: [N, C, H, W], the compute dtype. norm: [4, C] or None, which leaves x as it is. residual: as
    x, or None; residual_norm: its norm, or None. act: what follows the sum; slope: of
    "leaky_relu". resample: "none", "pool2" (the maximum of each 2 x 2 pixels, an odd last row or
    column dropped) or "up2" (bilinear, twice the size, align_corners=False).

    z is rounded once, to x's dtype, before the product. Where the convolution pads, z is 0.
    """

    x: torch.Tensor
    norm: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    residual_norm: torch.Tensor | None = None
    act: Activation = "none"
    slope: float = 0.01
    resample: Resample = "none"


def normalised(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
    """Return x, normalised, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is None:
        return x
    mean, scale, shift = norm[:3, :, None, None]
    return (x - mean).mul_(scale).add_(shift)  # in place: on a CPU fresh memory costs the most


def preactivation(p: Prologue) -> torch.Tensor:
    """Return what p.act is applied to, in at least float32."""
    pre = normalised(p.x, p.norm)
    if p.residual is None:
        return pre
    residual = normalised(p.residual, p.residual_norm)
    return pre + residual if pre is p.x else pre.add_(residual)


def activated(
    pre: torch.Tensor, act: Activation, slope: float, inplace: bool = False
) -> torch.Tensor:
    """Return act(pre), perhaps in pre's memory."""
    if act == "leaky_relu":
        return F.leaky_relu(pre, slope, inplace)
    if act == "relu":
        return F.relu(pre, inplace)
    return F.silu(pre) if act == "silu" else pre


def resampled(z: torch.Tensor, resample: Resample) -> torch.Tensor:
    """Return z pooled or enlarged."""
    if resample == "pool2":
        return F.max_pool2d(z, 2)
    if resample == "up2":
        return F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
    return z


def resampled_size(H: int, W: int, resample: Resample) -> tuple[int, int]:
    """Return the size of an image of H x W, pooled or enlarged."""
    return {"none": (H, W), "pool2": (H // 2, W // 2), "up2": (2 * H, 2 * W)}[resample]


def prologue_reference(p: Prologue) -> torch.Tensor:
    """Return z in at least float32, not yet rounded."""
    return resampled(activation(p), p.resample)


def activation(p: Prologue) -> torch.Tensor:
    """Return z before it is resampled, in at least float32."""
    pre = preactivation(p)
    return activated(pre, p.act, p.slope, inplace=pre is not p.x)


def prologue_backward_reference(
    p: Prologue,
    dz: torch.Tensor,
    add: torch.Tensor | None = None,
    pre: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of the preactivation from that of z, in at least float32.

    `add` is another gradient, of act's result before it is resampled; `pre` the preactivation,
    where it is known.
    """
    # Operators of autograd's own, not autograd: inside a custom op nothing is recorded.
    pre, aten = preactivation(p) if pre is None else pre, torch.ops.aten
    dz = dz.to(pre.dtype)
    if p.resample == "pool2":
        z = activated(pre, p.act, p.slope)
        _, taken = aten.max_pool2d_with_indices(z, [2, 2])
        dz = aten.max_pool2d_with_indices_backward(
            dz, z, [2, 2], [2, 2], [0, 0], [1, 1], False, taken
        )
    elif p.resample == "up2":
        dz = aten.upsample_bilinear2d_backward(dz, dz.shape[2:], pre.shape, False, 2.0, 2.0)
    if add is not None:
        dz = dz + add.to(dz.dtype)
    if p.act == "relu":
        return aten.threshold_backward(dz, pre, 0)
    if p.act == "leaky_relu":
        return aten.leaky_relu_backward(dz, pre, p.slope, False)
    return aten.silu_backward(dz, pre) if p.act == "silu" else dz


def gradient_sums_reference(p: Prologue, g: torch.Tensor) -> torch.Tensor:
    """Return the sums [3, C] of g, of g (x - mean), of g (residual - its mean), in wide."""
    wide = torch.promote_types(g.dtype, torch.float32)
    g = g.to(wide)
    rows = [g.sum((0, 2, 3))]
    for image, norm in (p.x, p.norm), (p.residual, p.residual_norm):
        if image is None:
            rows.append(torch.zeros_like(rows[0]))
            continue
        centred = image.to(wide) if norm is None else image.to(wide) - norm[0, :, None, None]
        rows.append((g * centred).sum((0, 2, 3)))
    return torch.stack(rows)


def gradient_reference(
    g: torch.Tensor, y: torch.Tensor | None, coef: torch.Tensor | None
) -> torch.Tensor:
    """Return dy = a * g + b * (y - mean) + d, or g where coef is None, in at least float32."""
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    if coef is None:
        return g
    mean, a, b, d = coef[:, :, None, None]
    return (y.to(g.dtype) - mean).mul_(b).add_(d).add_(a * g)
