"""Device code for what a batch normalisation does with a few numbers a channel.

A convolution leaves parts: [T, 3, C], a row for each tile of its output. `merge_moments_kernel`
joins FAN_IN rows (count n, mean m, M2 s) into one by the update of Chan, Golub and LeVeque
("Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979):

    N = sum n_i        m = sum n_i m_i / N        s = sum (s_i + n_i (m_i - m)^2)

and is launched again on the rows that it made until one is left; `merge_sums_kernel` adds rows in
the same tree. The order is that of the tree alone: the same parts give the same bits. Errors grow
with the tree's depth, log T / log FAN_IN. The parts are thousands of times smaller than the images
they come from, so these launches cost their latency.

`batch_norm_kernel` makes a norm [4, C] (see fuse.py) of moments and updates the running statistics
in the same launch; `batch_norm_backward_kernel` makes coefficients of the gradient's sums.
"""

import triton
import triton.language as tl

FAN_IN = 64  # rows that a program of the tree joins
BLOCK_C = 64  # columns of a program


@triton.jit
def merge_moments_kernel(
    parts_ptr, merged_ptr,  # [T, 3, C], [cdiv(T, FAN_IN), 3, C]
    T, C,
    FAN_IN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Join FAN_IN rows; one whose count is 0 is left out, whatever else it holds."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1).to(tl.int64)  # T*C may pass 2**31
    offs_t = row * FAN_IN + tl.arange(0, FAN_IN)
    mask_c = offs_c < C
    mask = (offs_t < T)[:, None] & mask_c[None, :]
    parts_ptr += offs_t[:, None] * 3 * C + offs_c[None, :]
    n = tl.load(parts_ptr, mask=mask, other=0.0)
    mean = tl.load(parts_ptr + C, mask=mask & (n > 0), other=0.0)
    m2 = tl.load(parts_ptr + 2 * C, mask=mask & (n > 0), other=0.0)

    count = tl.sum(n, 0)
    # About one of the means, so that where all are far from zero their sum loses no digit.
    filled = tl.cumsum(tl.where(n > 0, 1, 0), 0)
    first = tl.sum(tl.where((n > 0) & (filled == 1), mean, 0.0), 0)
    share = n / tl.maximum(count, 1.0)[None, :]
    joined = first + tl.sum(tl.where(n > 0, (mean - first[None, :]) * share, 0.0), 0)
    apart = mean - joined[None, :]
    merged_ptr += row * 3 * C + offs_c
    tl.store(merged_ptr, count, mask=mask_c)
    tl.store(merged_ptr + C, joined, mask=mask_c)
    squares = tl.sum(tl.where(n > 0, m2 + n * apart * apart, 0.0), 0)
    tl.store(merged_ptr + 2 * C, squares, mask=mask_c)


@triton.jit
def merge_sums_kernel(
    parts_ptr, merged_ptr,  # [T, L], [cdiv(T, FAN_IN), L]
    T, L,
    FAN_IN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add FAN_IN rows."""
    offs_l = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1).to(tl.int64)  # T*L may pass 2**31
    offs_t = row * FAN_IN + tl.arange(0, FAN_IN)
    mask = (offs_t < T)[:, None] & (offs_l < L)[None, :]
    parts = tl.load(parts_ptr + offs_t[:, None] * L + offs_l[None, :], mask=mask, other=0.0)
    tl.store(merged_ptr + row * L + offs_l, tl.sum(parts, 0), mask=offs_l < L)


@triton.jit
def batch_norm_kernel(
    moments_ptr, weight_ptr, bias_ptr, norm_ptr,  # [3, C], [C] or None, [C] or None, [4, C]
    running_mean_ptr, running_var_ptr, batches_ptr,  # [C] or None, [C] or None, [] or None: before
    C, momentum, eps,
    CUMULATIVE: tl.constexpr,  # running statistics are the mean over all batches
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write mean, scale, shift and inverse deviation; move the running statistics."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    count = tl.load(moments_ptr + offs_c, mask=mask, other=2.0)
    mean = tl.load(moments_ptr + C + offs_c, mask=mask, other=0.0)
    m2 = tl.load(moments_ptr + 2 * C + offs_c, mask=mask, other=0.0)
    rstd = 1.0 / tl.sqrt_rn(m2 / tl.maximum(count, 1.0) + eps)
    scale = rstd
    shift = tl.zeros_like(mean)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    tl.store(norm_ptr + offs_c, mean, mask=mask)
    tl.store(norm_ptr + C + offs_c, scale, mask=mask)
    tl.store(norm_ptr + 2 * C + offs_c, shift, mask=mask)
    tl.store(norm_ptr + 3 * C + offs_c, rstd, mask=mask)

    if running_mean_ptr is not None:
        part = tl.zeros_like(mean) + momentum
        if CUMULATIVE:
            part = tl.zeros_like(mean) + 1.0 / (tl.load(batches_ptr) + 1).to(tl.float32)
        moves = mask & (count > 0)  # a batch without pixels has nothing to add
        before = tl.load(running_mean_ptr + offs_c, mask=moves, other=0.0).to(tl.float32)
        after = before * (1.0 - part) + mean * part
        tl.store(running_mean_ptr + offs_c, after.to(running_mean_ptr.dtype.element_ty), mask=moves)
        before = tl.load(running_var_ptr + offs_c, mask=moves, other=0.0).to(tl.float32)
        unbiased = m2 / (count - 1.0)  # of one pixel NaN, as torch's is
        after = before * (1.0 - part) + unbiased * part
        tl.store(running_var_ptr + offs_c, after.to(running_var_ptr.dtype.element_ty), mask=moves)


@triton.jit
def batch_norm_backward_kernel(
    sums_ptr, norm_ptr, coef_ptr, dweight_ptr, dbias_ptr,  # [3, C], [4, C], [4, C], [C], [C]
    C, count,
    TRAINING: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write mean, a, b and d, and the gradients of weight and bias."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    g = tl.load(sums_ptr + offs_c, mask=mask, other=0.0)
    gy = tl.load(sums_ptr + C + offs_c, mask=mask, other=0.0)
    mean = tl.load(norm_ptr + offs_c, mask=mask, other=0.0)
    scale = tl.load(norm_ptr + C + offs_c, mask=mask, other=0.0)
    rstd = tl.load(norm_ptr + 3 * C + offs_c, mask=mask, other=0.0)
    b = tl.zeros_like(g)
    d = tl.zeros_like(g)
    if TRAINING:
        b = -scale * rstd * rstd * (gy / count)
        d = -scale * (g / count)
    tl.store(coef_ptr + offs_c, mean, mask=mask)
    tl.store(coef_ptr + C + offs_c, scale, mask=mask)
    tl.store(coef_ptr + 2 * C + offs_c, b, mask=mask)
    tl.store(coef_ptr + 3 * C + offs_c, d, mask=mask)
    tl.store(dweight_ptr + offs_c, gy * rstd, mask=mask)
    tl.store(dbias_ptr + offs_c, g, mask=mask)
