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
        pre = tl.maximum(pre, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "leaky_relu" and 0 < SLOPE and SLOPE <= 1:  # an instruction less than by a select
        pre = tl.maximum(pre, pre * SLOPE, propagate_nan=tl.PropagateNan.ALL)
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
def shared_use(x):
    """Return x, of which a product is not the only user.

    On Hopper a product reads what was copied into shared memory while the loop goes on. Triton
    (3.6 and 3.7) keeps a buffer more for that only where nothing but the product uses the load;
    else the copies of a later step overwrite what the product still reads. A sum, be it with 0, is
    stored to shared memory of its own.
    """
    return (x + 0.0).to(x.dtype)


@triton.jit
def nearest_tf32(x):
    """Return float32 rounded to the 10 bits that tf32 products read, which else cut off the rest.

    Half the error, and no drift towards zero. Ties go away from zero; NaN and Inf stay.
    """
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


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


@triton.jit
def load_activated(
    x_ptr, residual_ptr, offs, mask,
    mean, scale, shift, mean_r, scale_r, shift_r,
    NORM: tl.constexpr, RESIDUAL_NORM: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Return act(norm(x) + residual_norm(residual)) at offs, in float32; garbage off the mask."""
    pre = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        pre = (pre - mean) * scale + shift
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL_NORM:
            residual = (residual - mean_r) * scale_r + shift_r
        pre += residual
    return activate(pre, ACT, SLOPE)


@triton.jit
def load_z(
    x_ptr, residual_ptr,  # [N, H, W, C]
    n, h0, h, w, c, mask,  # image, a first row, rows from it on, columns; of z; channels
    mean, scale, shift, mean_r, scale_r, shift_r,  # of channels c
    H, W, C: tl.constexpr,  # of x
    NORM: tl.constexpr, RESIDUAL_NORM: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    RESAMPLE: tl.constexpr,
):  # fmt: skip
    """Return the pooled or enlarged z[n, h, w, c] in float32; garbage off the mask."""
    if RESAMPLE == "pool2":
        base = (n * H + 2 * h0) * W * C
        upper = 2 * (h - h0) * W
        lower = upper + W
        left = 2 * w
        right = left + 1
    else:
        tl.static_assert(RESAMPLE == "up2")
        first = tl.maximum(h0, 0) // 2
        base = (n * H + first) * W * C
        upper = h // 2  # weighs three quarters; the row beyond it, at the border itself, a quarter
        lower = tl.minimum(tl.maximum(upper + h % 2 * 2 - 1, 0), H - 1)
        upper = (upper - first) * W
        lower = (lower - first) * W
        left = w // 2
        right = tl.minimum(tl.maximum(left + w % 2 * 2 - 1, 0), W - 1)
    x_ptr += base
    if residual_ptr is not None:
        residual_ptr += base
    z00 = load_activated(
        x_ptr, residual_ptr, (upper + left) * C + c, mask,
        mean, scale, shift, mean_r, scale_r, shift_r, NORM, RESIDUAL_NORM, ACT, SLOPE,
    )  # fmt: skip
    z01 = load_activated(
        x_ptr, residual_ptr, (upper + right) * C + c, mask,
        mean, scale, shift, mean_r, scale_r, shift_r, NORM, RESIDUAL_NORM, ACT, SLOPE,
    )  # fmt: skip
    z10 = load_activated(
        x_ptr, residual_ptr, (lower + left) * C + c, mask,
        mean, scale, shift, mean_r, scale_r, shift_r, NORM, RESIDUAL_NORM, ACT, SLOPE,
    )  # fmt: skip
    z11 = load_activated(
        x_ptr, residual_ptr, (lower + right) * C + c, mask,
        mean, scale, shift, mean_r, scale_r, shift_r, NORM, RESIDUAL_NORM, ACT, SLOPE,
    )  # fmt: skip
    if RESAMPLE == "pool2":  # NaN wins, as in torch
        z0 = tl.maximum(z00, z01, propagate_nan=tl.PropagateNan.ALL)
        z1 = tl.maximum(z10, z11, propagate_nan=tl.PropagateNan.ALL)
        z = tl.maximum(z0, z1, propagate_nan=tl.PropagateNan.ALL)
    else:
        z = 0.75 * (0.75 * z00 + 0.25 * z01) + 0.25 * (0.75 * z10 + 0.25 * z11)
    return z


@triton.jit
def load_da(
    dz_ptr,  # [N, 2H, 2W, C]
    n, h, w, c, mask,  # image, rows and columns of what was enlarged, channels
    H, W, C: tl.constexpr,
):  # fmt: skip
    """Return the gradient, in float32, of what "up2" made a z of whose gradient is dz.

    Transposed, a row i of the stencil meets rows 2i - 1 to 2i + 2 of z by 1/4, 3/4, 3/4 and 1/4;
    beyond the border the border's own row counts again, as it did forward.
    """
    top = (n * H + h) * (4 * W)  # pixels before row 2h
    above = top - tl.where(h > 0, 2 * W, 0)
    under = top + 2 * W
    below = under + tl.where(h < H - 1, 2 * W, 0)
    outer = _load_columns(dz_ptr, above, w, c, mask, W, C)
    outer += _load_columns(dz_ptr, below, w, c, mask, W, C)
    inner = _load_columns(dz_ptr, top, w, c, mask, W, C)
    inner += _load_columns(dz_ptr, under, w, c, mask, W, C)
    return 0.25 * outer + 0.75 * inner


@triton.jit
def _load_columns(dz_ptr, row, w, c, mask, W, C: tl.constexpr):
    """Return a row of z's gradient, taken back along columns."""
    left = tl.maximum(2 * w - 1, 0)
    right = tl.minimum(2 * w + 2, 2 * W - 1)
    outer = tl.load(dz_ptr + (row + left) * C + c, mask=mask, other=0.0).to(tl.float32)
    outer += tl.load(dz_ptr + (row + right) * C + c, mask=mask, other=0.0).to(tl.float32)
    inner = tl.load(dz_ptr + (row + 2 * w) * C + c, mask=mask, other=0.0).to(tl.float32)
    inner += tl.load(dz_ptr + (row + 2 * w + 1) * C + c, mask=mask, other=0.0).to(tl.float32)
    return 0.25 * outer + 0.75 * inner


@triton.jit
def load_dy(g_ptr, y_ptr, offs, mask, mean, a, b, d, COEF: tl.constexpr):
    """Return dy = a*g + b*(y - mean) + d at offs in g's type, or g; 0 off the mask."""
    dy = tl.load(g_ptr + offs, mask=mask, other=0.0)
    if COEF:
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        wide = a * dy.to(tl.float32) + b * (y - mean) + d
        dy = tl.where(mask, wide, 0.0).to(dy.dtype)
    return dy
