"""Device code for what stands beside a convolution that is not ours: passes over whole images.

Where another library's convolution is faster, normalisation, activation and statistics still never
cost more than these: each reads its inputs once and writes its result once.

    prologue_kernel            z = resample(act(pre)), pre = norm(x) + residual_norm(residual)
    moments_kernel             parts of (count, mean, M2) of each channel of y
    prologue_backward_kernel   g = act'(pre) * (da + add), and parts of the sums of g,
                               g * (x - mean) and g * (residual - mean_r); da is dz, or of "up2"
                               dz taken back through the enlarging
    pooled_backward_kernel     the same where z was pooled: da is dz at the maximum of each 2 x 2
    gradient_kernel            dy = a * g + b * (y - mean) + d

Images are [M, C], the M = N*H*W pixels of an NHWC tensor; norms and coefficients are float32 [4, C]
as in fuse.py, parts float32 [T, 3, C], a row a program. Bytes moved are those of the tensors named;
the roof is a copy of them (at 2 bytes and 16 channels 0.08 GB an image of 1280 x 2048, each way).
That a z of "up2" or its gradient is four times as large as x, and one of "pool2" a quarter, is all
that resampling adds: the 4 values a pixel of z, or the 16 values of dz a pixel of x, that a stencil
reads again come from the caches. A maximum is found anew in backward: nothing tells which it was.

A program owns a range of `steps` tiles of BLOCK_M pixels. It keeps a mean and an M2 of every
element of its tile over the range, each updated by one step of Welford, and joins them once at the
end: no variance is the difference of two large moments, and no thread waits for another in between.
"""

import triton
import triton.language as tl

from ._tune import autotune
from .fuse import activate, activate_backward, load_coefficients, load_da, load_norm, load_z

CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    triton.Config({"ELEMENTS": 2048}, num_warps=4),
    triton.Config({"ELEMENTS": 4096}, num_warps=4),
    triton.Config({"ELEMENTS": 8192}, num_warps=8),
]
BACKWARD_CONFIGS = [  # few elements a lane, for which the three sums stay in registers
    triton.Config({"ELEMENTS": 1024}, num_warps=4),
    triton.Config({"ELEMENTS": 2048}, num_warps=8),
    # For AMD's 64 lanes, and whole images. Enlarging 3 channels of float32 it spills 88 bytes on
    # NVIDIA, where the tuner has the others.
    triton.Config({"ELEMENTS": 2048}, num_warps=4),
]
POOLED_CONFIGS = [  # elements of windows, of four pixels each
    triton.Config({"ELEMENTS": 1024}, num_warps=4),
    triton.Config({"ELEMENTS": 2048}, num_warps=8),
]
RANGES = tl.constexpr(2048)  # of pixels, at most: several waves of any device, few parts to merge


@triton.constexpr_function
def block_c(C: int) -> int:
    """Return the channels of a tile: a power of two, all of them up to 128."""
    return min(128, 1 << (C - 1).bit_length())


@triton.constexpr_function
def block_m(C: int, elements: int) -> int:
    """Return the pixels of a tile of that many elements."""
    return max(1, elements // block_c(C))


def ranges(M: int, C: int, elements: int) -> int:
    """Return how many ranges, of a part each, M pixels are cut into by tiles of `elements`."""
    tiles = triton.cdiv(M, block_m(C, elements))
    return triton.cdiv(tiles, triton.cdiv(tiles, RANGES.value))


def grid(M: int, C: int):
    """Return the launch grid of every kernel here."""
    return lambda meta: (ranges(M, C, meta["ELEMENTS"]) * triton.cdiv(C, block_c(C)),)


@triton.jit
def _steps(M, BLOCK_M: tl.constexpr):
    """Return the tiles in each range."""
    return ((M + BLOCK_M - 1) // BLOCK_M + RANGES - 1) // RANGES


@triton.jit
def _load_preactivation(
    x_ptr, r_ptr, offs, mask, mean, scale, shift, r_mean, r_scale, r_shift,  # norms [C] or numbers
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, R_NORM: tl.constexpr,
):  # fmt: skip
    """Return x, the residual (or x again) and norm(x) + residual_norm(residual) at offs."""
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    r = x
    pre = x.to(tl.float32)
    if NORM:
        pre = (pre - mean[None, :]) * scale[None, :] + shift[None, :]
    if RESIDUAL:
        r = tl.load(r_ptr + offs, mask=mask, other=0.0)
        wide = r.to(tl.float32)
        if R_NORM:
            wide = (wide - r_mean[None, :]) * r_scale[None, :] + r_shift[None, :]
        pre += wide
    return x, r, pre


@triton.jit
def pixels(m0, P, Q, BLOCK: tl.constexpr):
    """Return image (int64), row and column (int32) of pixels m0 + [0, BLOCK) of [N, P, Q].

    Two divisions of int32 a pixel: those of the int64 m0 are once a tile.
    """
    q = (m0 % Q).to(tl.int32) + tl.arange(0, BLOCK)
    row = m0 // Q
    p = (row % P).to(tl.int32) + q // Q
    return row // P + p // P, p % P, q % Q


@autotune(CONFIGS, key=["C", "RESAMPLE"])
@triton.jit
def prologue_kernel(
    x_ptr, norm_ptr, r_ptr, r_norm_ptr, z_ptr,  # [N*H*W, C], [4, C]?, as x?, [4, C]?, [M, C]
    M, H, W,
    C: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, RESAMPLE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write z of a range of its pixels."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL: tl.constexpr = r_ptr is not None
    R_NORM: tl.constexpr = r_norm_ptr is not None
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean, scale, shift = 0.0, 1.0, 0.0
    r_mean, r_scale, r_shift = 0.0, 1.0, 0.0
    if NORM:
        mean, scale, shift = load_norm(norm_ptr, offs_c, mask_c, C)
    if R_NORM:
        r_mean, r_scale, r_shift = load_norm(r_norm_ptr, offs_c, mask_c, C)
    steps = _steps(M, BLOCK_M)
    m0 = (pid // TILES_C).to(tl.int64) * steps * BLOCK_M  # M*C may pass 2**31
    for step in range(steps):
        offs_m = m0 + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_c[None, :]
        offs = offs_m[:, None] * C + offs_c[None, :]
        if RESAMPLE == "none":
            _, _, pre = _load_preactivation(
                x_ptr, r_ptr, offs, mask, mean, scale, shift, r_mean, r_scale, r_shift,
                NORM, RESIDUAL, R_NORM,
            )  # fmt: skip
            z = activate(pre, ACT, SLOPE)
        else:
            P = 2 * H
            Q = 2 * W
            if RESAMPLE == "pool2":
                P = H // 2
                Q = W // 2
            n, h, w = pixels(m0 + step * BLOCK_M, P, Q, BLOCK_M)
            h = h[:, None]
            z = load_z(
                x_ptr, r_ptr, n[:, None], h, h, w[:, None], offs_c[None, :], mask,
                mean, scale, shift, r_mean, r_scale, r_shift,
                H, W, C, NORM, R_NORM, ACT, SLOPE, RESAMPLE,
            )  # fmt: skip
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)


@autotune(CONFIGS, key=["C"])
@triton.jit
def moments_kernel(
    y_ptr, parts_ptr,  # [M, C], [T, 3, C]
    M,
    C: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write count, mean and M2 of a range of pixels."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    t = pid // TILES_C
    steps = _steps(M, BLOCK_M)
    m0 = t.to(tl.int64) * steps * BLOCK_M  # M*C may pass 2**31
    count = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for step in range(steps):
        offs_m = m0 + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = offs_m < M
        mask = inside[:, None] & mask_c[None, :]
        y = tl.load(y_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        y = y.to(tl.float32)
        count += tl.where(inside, 1.0, 0.0)
        delta = tl.where(mask, y - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)[:, None]
        m2 += delta * (y - mean)  # where mask is false delta is 0, and y and mean are finite

    total = tl.sum(count, 0)
    # Means about the first pixel's: where all are far from zero their weighted sum loses no digit.
    first = tl.sum(tl.where(tl.arange(0, BLOCK_M)[:, None] == 0, mean, 0.0), 0)
    joined = first + tl.sum((mean - first[None, :]) * count[:, None], 0) / tl.maximum(total, 1.0)
    apart = mean - joined[None, :]
    m2_all = tl.sum(m2 + tl.where(count[:, None] > 0, apart * apart * count[:, None], 0.0), 0)
    parts_ptr += t.to(tl.int64) * 3 * C
    tl.store(parts_ptr + offs_c, tl.zeros_like(joined) + total, mask=mask_c)
    tl.store(parts_ptr + C + offs_c, joined, mask=mask_c)
    tl.store(parts_ptr + 2 * C + offs_c, m2_all, mask=mask_c)


@autotune(BACKWARD_CONFIGS, key=["C", "RESAMPLE"])
@triton.jit
def prologue_backward_kernel(
    dz_ptr, add_ptr, x_ptr, norm_ptr, r_ptr, r_norm_ptr,  # [M, C]; add, residual, norms or None
    g_ptr, parts_ptr,  # [M, C], [T, 3, C] or None
    M, H, W,
    C: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    RESAMPLE: tl.constexpr,  # "none", or "up2" and dz is [4 M, C]
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write g of a range of pixels, and its sums. x may be None where neither act nor sums ask."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL: tl.constexpr = r_ptr is not None
    R_NORM: tl.constexpr = r_norm_ptr is not None
    SUMS: tl.constexpr = parts_ptr is not None
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean, scale, shift = tl.zeros((BLOCK_C,), dtype=tl.float32), 1.0, 0.0
    r_mean, r_scale, r_shift = tl.zeros((BLOCK_C,), dtype=tl.float32), 1.0, 0.0
    if NORM:
        mean, scale, shift = load_norm(norm_ptr, offs_c, mask_c, C)
    if R_NORM:
        r_mean, r_scale, r_shift = load_norm(r_norm_ptr, offs_c, mask_c, C)
    t = pid // TILES_C
    steps = _steps(M, BLOCK_M)
    m0 = t.to(tl.int64) * steps * BLOCK_M  # M*C may pass 2**31
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    sum_gr = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for step in range(steps):
        offs_m = m0 + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_c[None, :]
        offs = offs_m[:, None] * C + offs_c[None, :]
        if RESAMPLE == "none":
            g = tl.load(dz_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        else:
            tl.static_assert(RESAMPLE == "up2")
            n, h, w = pixels(m0 + step * BLOCK_M, H, W, BLOCK_M)
            g = load_da(dz_ptr, n[:, None], h[:, None], w[:, None], offs_c[None, :], mask, H, W, C)
        if add_ptr is not None:
            g += tl.load(add_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if ACT != "none" or SUMS:
            x, r, pre = _load_preactivation(
                x_ptr, r_ptr, offs, mask, mean, scale, shift, r_mean, r_scale, r_shift,
                NORM, RESIDUAL, R_NORM,
            )  # fmt: skip
            g = activate_backward(g, pre, ACT, SLOPE)
        g = g.to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + offs, g, mask=mask)
        if SUMS:
            g = tl.where(mask, g.to(tl.float32), 0.0)
            sum_g += g
            sum_gx += g * (x.to(tl.float32) - mean[None, :])
            if RESIDUAL:
                sum_gr += g * (r.to(tl.float32) - r_mean[None, :])
    if SUMS:
        _store_parts(parts_ptr, t, offs_c, mask_c, sum_g, sum_gx, sum_gr, C)


@triton.jit
def _store_parts(parts_ptr, t, offs_c, mask_c, sum_g, sum_gx, sum_gr, C: tl.constexpr):
    """Write a range's sums, [BLOCK_M, BLOCK_C] each, to its row of parts [T, 3, C]."""
    parts_ptr += t.to(tl.int64) * 3 * C
    tl.store(parts_ptr + offs_c, tl.sum(sum_g, 0), mask=mask_c)
    tl.store(parts_ptr + C + offs_c, tl.sum(sum_gx, 0), mask=mask_c)
    tl.store(parts_ptr + 2 * C + offs_c, tl.sum(sum_gr, 0), mask=mask_c)


@triton.jit
def _larger(best, taken, z, k):
    """Return the larger of best and z, and which: the first of equals; NaN is larger than all."""
    wins = (z > best) | (z != z)
    return tl.where(wins, z, best), tl.where(wins, k, taken)


@autotune(POOLED_CONFIGS, key=["C"])
@triton.jit
def pooled_backward_kernel(
    dz_ptr, add_ptr, x_ptr, norm_ptr, r_ptr, r_norm_ptr,  # [N, H//2, W//2, C]; the rest as below
    g_ptr, parts_ptr,  # [N, H, W, C], [T, 3, C] or None
    M, H, W,  # M of windows of 2 x 2, those that an odd last row or column cuts among them
    C: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write g of a range of windows, and its sums."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL: tl.constexpr = r_ptr is not None
    R_NORM: tl.constexpr = r_norm_ptr is not None
    SUMS: tl.constexpr = parts_ptr is not None
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean, scale, shift = tl.zeros((BLOCK_C,), dtype=tl.float32), 1.0, 0.0
    r_mean, r_scale, r_shift = tl.zeros((BLOCK_C,), dtype=tl.float32), 1.0, 0.0
    if NORM:
        mean, scale, shift = load_norm(norm_ptr, offs_c, mask_c, C)
    if R_NORM:
        r_mean, r_scale, r_shift = load_norm(r_norm_ptr, offs_c, mask_c, C)
    t = pid // TILES_C
    steps = _steps(M, BLOCK_M)
    m0 = t.to(tl.int64) * steps * BLOCK_M  # M*C may pass 2**31
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    sum_gr = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for step in range(steps):
        n, p, q = pixels(m0 + step * BLOCK_M, (H + 1) // 2, (W + 1) // 2, BLOCK_M)
        inside = m0 + step * BLOCK_M + tl.arange(0, BLOCK_M) < M
        right = inside & (2 * q + 1 < W)
        below = 2 * p + 1 < H
        mask_00 = inside[:, None] & mask_c[None, :]
        mask_01 = right[:, None] & mask_c[None, :]
        mask_10 = (inside & below)[:, None] & mask_c[None, :]
        mask_11 = (right & below)[:, None] & mask_c[None, :]
        offs_00 = ((n * H + 2 * p) * W + 2 * q)[:, None] * C + offs_c[None, :]
        offs_10 = ((n * H + 2 * p + 1) * W + 2 * q)[:, None] * C + offs_c[None, :]

        x_00, r_00, pre_00 = _load_preactivation(
            x_ptr, r_ptr, offs_00, mask_00, mean, scale, shift, r_mean, r_scale, r_shift,
            NORM, RESIDUAL, R_NORM,
        )  # fmt: skip
        x_01, r_01, pre_01 = _load_preactivation(
            x_ptr, r_ptr, offs_00 + C, mask_01, mean, scale, shift, r_mean, r_scale, r_shift,
            NORM, RESIDUAL, R_NORM,
        )  # fmt: skip
        x_10, r_10, pre_10 = _load_preactivation(
            x_ptr, r_ptr, offs_10, mask_10, mean, scale, shift, r_mean, r_scale, r_shift,
            NORM, RESIDUAL, R_NORM,
        )  # fmt: skip
        x_11, r_11, pre_11 = _load_preactivation(
            x_ptr, r_ptr, offs_10 + C, mask_11, mean, scale, shift, r_mean, r_scale, r_shift,
            NORM, RESIDUAL, R_NORM,
        )  # fmt: skip
        best = activate(pre_00, ACT, SLOPE)
        taken = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
        best, taken = _larger(best, taken, activate(pre_01, ACT, SLOPE), 1)
        best, taken = _larger(best, taken, activate(pre_10, ACT, SLOPE), 2)
        best, taken = _larger(best, taken, activate(pre_11, ACT, SLOPE), 3)

        # A window that is cut was dropped: mask_11 is false there, and dz is 0.
        offs_dz = ((n * (H // 2) + p) * (W // 2) + q)[:, None] * C + offs_c[None, :]
        dz = tl.load(dz_ptr + offs_dz, mask=mask_11, other=0.0).to(tl.float32)
        for k in tl.static_range(4):
            if k == 0:
                x, r, pre, offs, mask = x_00, r_00, pre_00, offs_00, mask_00
            elif k == 1:
                x, r, pre, offs, mask = x_01, r_01, pre_01, offs_00 + C, mask_01
            elif k == 2:
                x, r, pre, offs, mask = x_10, r_10, pre_10, offs_10, mask_10
            else:
                x, r, pre, offs, mask = x_11, r_11, pre_11, offs_10 + C, mask_11
            g = tl.where(taken == k, dz, 0.0)
            if add_ptr is not None:
                g += tl.load(add_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            g = activate_backward(g, pre, ACT, SLOPE).to(g_ptr.dtype.element_ty)
            tl.store(g_ptr + offs, g, mask=mask)
            if SUMS:
                g = tl.where(mask, g.to(tl.float32), 0.0)
                sum_g += g
                sum_gx += g * (x.to(tl.float32) - mean[None, :])
                if RESIDUAL:
                    sum_gr += g * (r.to(tl.float32) - r_mean[None, :])
    if SUMS:
        _store_parts(parts_ptr, t, offs_c, mask_c, sum_g, sum_gx, sum_gr, C)


@autotune(CONFIGS, key=["C"])
@triton.jit
def gradient_kernel(
    g_ptr, y_ptr, coef_ptr, dy_ptr,  # [M, C], [M, C], [4, C], [M, C]
    M,
    C: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write dy of a range of pixels."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean, a, b, d = load_coefficients(coef_ptr, offs_c, mask_c, C)
    steps = _steps(M, BLOCK_M)
    m0 = (pid // TILES_C).to(tl.int64) * steps * BLOCK_M  # M*C may pass 2**31
    for step in range(steps):
        offs_m = m0 + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_c[None, :]
        offs = offs_m[:, None] * C + offs_c[None, :]
        g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dy = a[None, :] * g + b[None, :] * (y - mean[None, :]) + d[None, :]
        tl.store(dy_ptr + offs, dy.to(dy_ptr.dtype.element_ty), mask=mask)
