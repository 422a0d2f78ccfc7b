"""What convolutions do to a value as they load it or store it: normalise, activate, and back.

Forward, per channel c, with norm = (mean, scale, shift) and a residual r that may have its own:

    pre = (x - mean[c]) * scale[c] + shift[c] + (r - mean_r[c]) * scale_r[c] + shift_r[c]
    z   = act(pre)

Backward through batch normalisation, with coefficients (mean, a, b, d) that hold the batch's sums:

    dy  = a[c] * g + b[c] * (y - mean[c]) + d[c],    g the gradient of pre, y what was normalised

The mean is subtracted first, never folded into the shift: with mean 1e4 and deviation 1 the folded
form loses ten bits. All arithmetic is float32. A norm is [4, C]: mean, scale, shift and the inverse
deviation, which only its backward needs; coefficients are [4, C] too.
"""

import triton
import triton.language as tl


@triton.jit
def activate(pre, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """Return act(pre), for ACT in "none", "relu", "leaky_relu", "silu"; NaN stays NaN, as torch."""
    if ACT == "relu":
        pre = tl.where(pre < 0, 0.0, pre)
    elif ACT == "leaky_relu":
        pre = tl.where(pre < 0, pre * SLOPE, pre)
    elif ACT == "silu":
        pre = pre * tl.sigmoid(pre)
    return pre


@triton.jit
def activate_backward(dz, pre, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """Return the gradient of pre from that of act(pre): torch's choices at 0 and at NaN."""
    if ACT == "relu":
        dz = tl.where(pre <= 0, 0.0, dz)
    elif ACT == "leaky_relu":
        dz = tl.where(pre > 0, dz, dz * SLOPE)
    elif ACT == "silu":
        s = tl.sigmoid(pre)
        dz = dz * s * (1.0 + pre * (1.0 - s))
    return dz


@triton.jit
def load_norm(norm_ptr, offs_c, mask_c, C):
    """Return mean, scale and shift of channels offs_c, from norm [4, C] in float32."""
    mean = tl.load(norm_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(norm_ptr + C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(norm_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    return mean, scale, shift


@triton.jit
def load_coefficients(coef_ptr, offs_c, mask_c, C):
    """Return mean, a, b and d of channels offs_c, from coefficients [4, C] in float32."""
    mean = tl.load(coef_ptr + offs_c, mask=mask_c, other=0.0)
    a = tl.load(coef_ptr + C + offs_c, mask=mask_c, other=0.0)
    b = tl.load(coef_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    d = tl.load(coef_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    return mean, a, b, d
