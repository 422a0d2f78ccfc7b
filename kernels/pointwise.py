"""Device code for what stands beside a convolution that is not ours: passes over whole images.

Where another library's convolution is faster, normalisation, activation and statistics still never
cost more than these: each reads its inputs once and writes its result once.

    prologue_kernel            z = act(norm(x) + residual_norm(residual))
    moments_kernel             parts of (count, mean, M2) of each channel of y
    prologue_backward_kernel   g = act'(pre) * (dz + add), and parts of the sums of g,
                               g * (x - mean) and g * (residual - mean_r)
    gradient_kernel            dy = a * g + b * (y - mean) + d

Images are [M, C], the M = N*H*W pixels of an NHWC tensor; norms and coefficients are float32 [4, C]
as in fuse.py, parts float32 [T, 3, C], a row a program. Bytes moved are those of the tensors named;
the roof is a copy of them (at 2 bytes and 16 channels 0.08 GB an image of 1280 x 2048, each way).

A program owns a range of `steps` tiles of BLOCK_M pixels. It keeps a mean and an M2 of every
element of its tile over the range, each updated by one step of Welford, and joins them once at the
end: no variance is the difference of two large moments, and no thread waits for another in between.
"""

import triton
import triton.language as tl

from ._tune import autotune
from .fuse import activate, activate_backward, load_coefficients, load_norm

CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    triton.Config({"ELEMENTS": 2048}, num_warps=4),
    triton.Config({"ELEMENTS": 4096}, num_warps=4),
    triton.Config({"ELEMENTS": 8192}, num_warps=8),
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
def _preactivation(
    x, mean, scale, shift, r, r_mean, r_scale, r_shift,  # tiles [M, C], norms [C]
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, R_NORM: tl.constexpr,
):  # fmt: skip
    """Return norm(x) + residual_norm(r) in float32."""
    pre = x.to(tl.float32)
    if NORM:
        pre = (pre - mean[None, :]) * scale[None, :] + shift[None, :]
    if RESIDUAL:
        r = r.to(tl.float32)
        if R_NORM:
            r = (r - r_mean[None, :]) * r_scale[None, :] + r_shift[None, :]
        pre += r
    return pre


@autotune(CONFIGS, key=["C"])
@triton.jit
def prologue_kernel(
    x_ptr, norm_ptr, r_ptr, r_norm_ptr, z_ptr,  # [M, C], [4, C]?, [M, C]?, [4, C]?, [M, C]
    M,
    C: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write z of a range of pixels."""
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
        x = tl.load(x_ptr + offs, mask=mask, other=0.0)
        r = x
        if RESIDUAL:
            r = tl.load(r_ptr + offs, mask=mask, other=0.0)
        pre = _preactivation(
            x, mean, scale, shift, r, r_mean, r_scale, r_shift, NORM, RESIDUAL, R_NORM
        )
        z = activate(pre, ACT, SLOPE)
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


@autotune(CONFIGS, key=["C"])
@triton.jit
def prologue_backward_kernel(
    dz_ptr, add_ptr, x_ptr, norm_ptr, r_ptr, r_norm_ptr,  # [M, C], add, residual and norms or None
    g_ptr, parts_ptr,  # [M, C], [T, 3, C] or None
    M,
    C: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write g of a range of pixels, and its sums."""
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
        dz = tl.load(dz_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if add_ptr is not None:
            dz += tl.load(add_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0)
        r = x
        if RESIDUAL:
            r = tl.load(r_ptr + offs, mask=mask, other=0.0)
        pre = _preactivation(
            x, mean, scale, shift, r, r_mean, r_scale, r_shift, NORM, RESIDUAL, R_NORM
        )
        g = activate_backward(dz, pre, ACT, SLOPE).to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + offs, g, mask=mask)
        if SUMS:
            g = tl.where(mask, g.to(tl.float32), 0.0)
            sum_g += g
            sum_gx += g * (x.to(tl.float32) - mean[None, :])
            if RESIDUAL:
                sum_gr += g * (r.to(tl.float32) - r_mean[None, :])
    if SUMS:
        parts_ptr += t.to(tl.int64) * 3 * C
        tl.store(parts_ptr + offs_c, tl.sum(sum_g, 0), mask=mask_c)
        tl.store(parts_ptr + C + offs_c, tl.sum(sum_gx, 0), mask=mask_c)
        tl.store(parts_ptr + 2 * C + offs_c, tl.sum(sum_gr, 0), mask=mask_c)


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
