"""Device code for both gradients of a convolution of NHWC images in one pass over what is stored.

    dz[n, h, w, c]    = sum over r < R, s < S, k < K of dy[n, h - r + PAD, w - s + PAD, k] *
                                                        w[k, r, s, c]
    dw[k, r, s, c]    = sum over n, h, w of z[n, h, w, c] * dy[n, h - r + PAD, w - s + PAD, k]
    db[k]             = sum over n, h, w of dy[n, h, w, k]
    gradient[n, h, w, c] = act'(pre[n, h, w, c]) * (dz + add)[n, h, w, c]
    sums[:, c]        = sums over n, h, w of gradient, gradient * (x - mean),
                        gradient * (residual - mean_r)

    R = S = 1, PAD = 0 or R = S = 3, PAD = 1; stride and dilation 1, so that dy is of z's size, and
    0 outside its image. dy of (g, y) and z = act(pre) of (x, residual) are made as they are loaded,
    as kernels/fuse.py says, and rounded to x's type before the products; the gradient is rounded
    once, and its sums are of what is stored.

g, y: [N, H, W, K]; x, residual, add, gradient: [N, H, W, C]; w, dw: [K, R, S, C]; all dense and
row-major, so they are torch's [N, C, H, W] and [K, C, R, S] in channels_last. Norms are float32
[4, C], coefficients float32 [4, K].

Both gradients are sums over the same pairs of pixels, (h, w) of z and (p, q) = (h - r + PAD, ...)
of dy, so one load of a pair's pixels serves two products. For 3x3 two neighbours of z, i = 0 and
1, share a *window* of a row of dy: the four pixels u = 0, 1, 2, 3 from the one before them on,
whose 4*K values lie side by side. A tile D[window, (u, k)] is multiplied by the filter, spread out
so that it does for both, w'[(u, k), (i, c)] = w[k, r, 2 - (u - i), c], 0 where u - i is no tap:

    D @ w' -> dz[window, (i, c)]          D^T @ z[window, (i, c)] -> dw'[(u, k), (i, c)]

A tap's gradient is the sum of dw' over i, added up with the other parts. So every dy is made twice
(4 times were a window one pixel's, of 3 taps and a fourth for nothing), and the products have the
64 rows and more that Hopper's tensor cores take at 16 channels.

- conv2d_backward_rows_kernel, for 3x3: a program rolls down a strip. A step loads row p of windows
  and row p + 1 of x. Row p belongs to rows p - 1, p and p + 1 of z: three rows of dz grow in
  registers, the finished one is activated backward and stored; three rows of z meet D, into one
  accumulator a filter row. The two elder rows of z wait in registers; x of the finished row is read
  again, from L1 or L2. conv2d_backward_wide_rows_kernel is the same, tuned over other
  configurations.
- conv2d_backward_pixels_kernel, for 1x1: a program walks consecutive pixels; nothing waits.

Bytes: a pass reads g, y, x (residual, add) and writes the gradient: (2K + 2C) elements a pixel
where dgrad and wgrad apart move (4K + 3C), 4 T for 7 T at K = C. That leaves 6 T for a whole layer
with its forward pass, not 9. What is read twice besides: two rows of dy a strip, from DRAM or L2,
and the windows' overlap, from L1. Partial sums are 2*9*C*K float32 a program, written and read: 2%
at 16 channels and CHAIN pixels, 4% at 32.

Work: 4*R*S*C*K FLOP a pixel. At 2-byte elements and K = C = 16, 32, 64 that is 72, 144 and 288
FLOP a byte. An H200 turns from memory to arithmetic at 184, so at 16 and 32 channels the roof is
the copy's: 30 and 60 ps a pixel at 4.3 TB/s. At 64 it is the arithmetic's, 187 ps, which two passes
(119 + 89 ps by their bytes, 93 each by their work) come near without.

Instructions come next to bytes: in those 30 ps an H200 issues 883 for a pixel of 16 channels, each
lane's counted, and moves 883 bytes in shared memory. With norm, coefficients and sums a step of the
first configuration, 128 pixels, is 750 SASS instructions of four warps on sm_90, so 750 a pixel,
and 980 bytes, 240 of them read by products; at 32 channels 1600 of 1765, and 2860 bytes, which bind
there. 1x1 takes 540 and 1450 instructions. Hence no sum is reduced across lanes before the loop
ends, no address or mask is made anew, and selects for what is beyond an image or a strip stand in
branches that other tiles pass by.

Registers decide where this is possible at all. A thread of 128 holds, for 3x3 at 16 channels and 64
windows, 48 accumulators of dw, 32 of dz, 16 of sums, 16 registers of windows, as many of z, and 56
of norms and coefficients, 8 channels of each: 243 on sm_90. With a residual, and at 32 channels,
where each thread of 256 holds 96 accumulators of dw, there is no room for the last, which are
loaded anew where they are used. At 64 channels dw alone would take 192 and more, so
conv2d_backward_fits ends at 32 channels, at 64 for 1x1, and at half of that for 4-byte elements,
whose IEEE products need their operands there too.

Exactness is kernels/wgrad.py's: no sum is longer than CHAIN pixels, parts are added in a tree, all
in one order. A z that is not finite is multiplied by the zeros around dy: at an image's border the
taps that do not meet it become NaN as well. A dy that is not finite reaches the gradient of the
pixels that see it, and of a neighbour that shares their window.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner

from ._tune import autotune
from .aot import Variant
from .fuse import activate, activate_backward, load_coefficients, load_norm, shared_use
from .strips import MOST_PIXELS, rows_of_strip, strip_area, strip_rows, strips, tile_pixels
from .wgrad import CHAIN, PROGRAMS, conv2d_wgrad_blocks, conv2d_wgrad_splits, fit
from .wgrad import CONFIGS as WGRAD_CONFIGS


def _config(VALUES, num_warps, num_stages=1, **more):
    """Return a configuration; VALUES counts those of the wider image in a tile, of 2 bytes each.

    FOLD says how many rows of a tile a lane has, which loads 16 bytes of each.
    """
    kwargs = {"VALUES": VALUES, "FOLD": max(1, VALUES // (256 * num_warps)), **more}
    return triton.Config(kwargs, num_warps=num_warps, num_stages=num_stages)


def _rows_config(VALUES, PAIRED, num_warps, num_stages=1):
    """Return one of the 3x3 kernel.

    PAIRED says whether a window, of 2-byte values, serves two pixels; AHEAD whether rows are copied
    to shared memory a step ahead, which no loop with a barrier of its own allows.
    """
    return _config(VALUES, num_warps, num_stages, PAIRED=PAIRED, AHEAD=num_stages > 1)


# The first must run on every supported device: tests and the interpreter pin it. Eight warps are
# for NVIDIA: on AMD they are 512 lanes, which leaves each half of the registers it needs at 32
# channels and more. For the 1x1 kernel at 64 channels no such configuration is without spills
# there. Two stages hide the way from memory, but take a fifth more instructions, and go by L1,
# where windows overlap.
ROWS_CONFIGS = [  # up to 16 channels
    _rows_config(2048, True, num_warps=4),
    _rows_config(2048, True, num_warps=4, num_stages=2),
    _rows_config(2048, True, num_warps=8),
    _rows_config(512, False, num_warps=4),
]
WIDE_ROWS_CONFIGS = [  # up to 32 channels, and 4-byte elements
    _rows_config(
        4096, True, num_warps=8
    ),  # for Hopper, whose products leave filters where they are
    _rows_config(4096, True, num_warps=8, num_stages=2),
    _rows_config(2048, True, num_warps=8),
    _rows_config(1024, True, num_warps=4),  # for AMD
    _rows_config(512, False, num_warps=4),
]
ROWS_KEY = ["C", "K", "PRECISION", "ACT"]
PIXELS_CONFIGS = [
    _config(1024, num_warps=4, num_stages=1),
    _config(2048, num_warps=8, num_stages=2),
    _config(4096, num_warps=8, num_stages=2),  # at 64 channels for Hopper
]


def range_pixels(M: int) -> int:
    """Return how many of M pixels a program of the 1x1 kernel takes, a multiple of MOST_PIXELS."""
    return MOST_PIXELS * max(1, min(CHAIN, M // PROGRAMS) // MOST_PIXELS)


@triton.jit
def _wide(x):
    """Return x in float32; of bfloat16 by an instruction each: conversions take three for two."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _preactivation(
    x, residual, mean, scale, shift, mean_r, scale_r,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, RESIDUAL_NORM: tl.constexpr,
):  # fmt: skip
    """Return norm(x) + residual_norm(residual) in float32; shift is the sum of both shifts."""
    pre = _wide(x)
    if NORM:
        pre = (pre - mean) * scale + shift
    elif RESIDUAL_NORM:
        pre += shift
    if RESIDUAL:
        r = _wide(residual)
        if RESIDUAL_NORM:
            r = (r - mean_r) * scale_r
        pre += r
    return pre


@triton.constexpr_function
def window_pixels(PAIRED: bool, bits: int) -> int:
    """Return how many pixels of z share a window of four of dy."""
    return 2 if PAIRED and bits == 16 else 1


@triton.constexpr_function
def tile_columns(VALUES: int, PAIRED: bool, C: int, K: int, bits: int) -> int:
    """Return how many columns a tile of the 3x3 kernel has.

    A quarter as many of 4 bytes: their products have no tensor cores and their operands registers.
    """
    pixels = tile_pixels(VALUES if bits == 16 else VALUES // 4, C, K, bits)
    return max(16 * window_pixels(PAIRED, bits), pixels)


@triton.constexpr_function
def lane_rows(FOLD: int, VALUES: int, pixels: int, channels: int, bits: int) -> int:
    """Return how many rows a lane has of a tile that may have fewer than VALUES of 2 bytes."""
    return max(1, FOLD * pixels * channels * bits // (16 * VALUES))


@triton.jit
def _folded(x, FOLD: tl.constexpr):
    """Return x with 1 / FOLD of its rows, the sums of FOLD of them that a lane should have."""
    if FOLD > 1 and len(x.shape) == 2:
        x = tl.sum(tl.reshape(x, (FOLD, x.shape[0] // FOLD, x.shape[1])), 0)
    elif FOLD > 1:
        x = tl.sum(tl.reshape(x, (FOLD, x.shape[0] // FOLD, x.shape[1], x.shape[2])), 0)
    return x


@triton.jit
def _sum_rows(turned, db, counts):
    """Return db, [channels, 16], with the sums over a tile's rows in every column, if it counts.

    By a product, that no lane has to ask another. The select keeps triton from adding to db within
    the product, in float32 a pixel after the other.
    """
    ones = tl.full((turned.shape[1], 16), 1.0, turned.dtype)
    return db + tl.where(counts, tl.dot(turned, ones, input_precision="ieee"), 0.0)


@triton.jit
def _load_norms(norm_ptr, residual_norm_ptr, offs_c, mask_c, C):
    """Return mean and scale of x, both shifts' sum, mean and scale of the residual; or zeros."""
    mean, scale, shift = 0.0, 0.0, 0.0
    mean_r, scale_r = 0.0, 0.0
    if norm_ptr is not None:
        mean, scale, shift = load_norm(norm_ptr, offs_c, mask_c, C)
    if residual_norm_ptr is not None:
        mean_r, scale_r, shift_r = load_norm(residual_norm_ptr, offs_c, mask_c, C)
        shift += shift_r
    return mean, scale, shift, mean_r, scale_r


@triton.jit
def _load_coefficients(coef_ptr, offs_u, offs_k, mask_k, K, PAIR: tl.constexpr):
    """Return mean, a, b and d of a window's channels."""
    if PAIR == 1:
        # Of the fourth u all are 0: what they make of masked values may be no number of this type.
        offs_k += 0 * offs_u
        mask_k = mask_k & (offs_u < 3)
    return load_coefficients(coef_ptr, offs_k, mask_k, K)


@autotune(ROWS_CONFIGS, ROWS_KEY)
@triton.jit
def conv2d_backward_rows_kernel(
    g_ptr, y_ptr, coef_ptr,  # [N, H, W, K], as g or None, [4, K] or None
    w_ptr,  # [K, 3, 3, C]
    x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,  # [N, H, W, C], [4, C] or None, both or None
    add_ptr, gradient_ptr,  # [N, H, W, C] or None, [N, H, W, C]
    sums_ptr, dw_ptr, db_ptr,  # parts: [T, 3, C] or None, [T, K, 3, 3, C], [T, K] or None, float32
    H, W, area,  # of a strip, in pixels
    C: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    WIDEN: tl.constexpr,  # multiply in float32: for the interpreter, whose bfloat16 dot is wrong
    VALUES: tl.constexpr, PAIRED: tl.constexpr, FOLD: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write a [rows, columns, C] strip of the gradient, and its part of every sum."""
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    PAIR: tl.constexpr = window_pixels(PAIRED, TYPE.primitive_bitwidth)
    COLUMNS: tl.constexpr = tile_columns(VALUES, PAIRED, C, K, TYPE.primitive_bitwidth)
    WINDOWS: tl.constexpr = COLUMNS // PAIR
    BLOCK_K: tl.constexpr = fit(64, K, 16 // PAIR)
    BLOCK_C: tl.constexpr = fit(64, C, 16 // PAIR)
    ROWS: tl.constexpr = 4 * BLOCK_K
    BITS: tl.constexpr = tl.int16 if TYPE.primitive_bitwidth == 16 else tl.int32
    BLOCK_J: tl.constexpr = PAIR * BLOCK_C
    FOLDED: tl.constexpr = lane_rows(FOLD, VALUES, COLUMNS, BLOCK_C, TYPE.primitive_bitwidth)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL: tl.constexpr = residual_ptr is not None
    RESIDUAL_NORM: tl.constexpr = residual_norm_ptr is not None
    RELOAD: tl.constexpr = RESIDUAL or BLOCK_C * BLOCK_K > 256  # no registers for tables
    COEF: tl.constexpr = coef_ptr is not None
    PLAIN: tl.constexpr = not NORM and not RESIDUAL and ACT == "none"

    pid = tl.program_id(0)
    tiles_q = (W + COLUMNS - 1) // COLUMNS
    rows = rows_of_strip(H, area, COLUMNS)
    tiles_h = (H + rows - 1) // rows
    q0 = pid % tiles_q * COLUMNS
    h0 = pid // tiles_q % tiles_h * rows
    n = (pid // tiles_q // tiles_h).to(tl.int64)  # N*H*W*C may pass 2**31
    last = tl.minimum(h0 + rows, H)  # the first row that is another strip's

    # As [window, u, k] and [window, i, c], so that a mask is one bit for all channels.
    offs_m = tl.arange(0, WINDOWS)[:, None, None] * PAIR
    offs_u = tl.arange(0, 4)[None, :, None]
    offs_i = tl.arange(0, PAIR)[None, :, None]
    offs_k = tl.arange(0, BLOCK_K)[None, None, :]
    offs_c = tl.arange(0, BLOCK_C)[None, None, :]
    mask_k = offs_k < K
    mask_c = offs_c < C

    if not RELOAD:
        mean, scale, shift, mean_r, scale_r = _load_norms(
            norm_ptr, residual_norm_ptr, offs_c, mask_c, C
        )
    if COEF and not RELOAD:
        mean_y, a, b, d = _load_coefficients(coef_ptr, offs_u, offs_k, mask_k, K, PAIR)
    # The filter, and where its gradient goes: as [u, k, i, c], where t = u - i is a tap.
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_J)[None, :]
    t = row // BLOCK_K - column // BLOCK_C
    offs_w = (row % BLOCK_K * 9 + 2 - t) * C + column % BLOCK_C
    mask_w = (t >= 0) & (t < 3) & (row % BLOCK_K < K) & (column % BLOCK_C < C)
    w0 = tl.load(w_ptr + offs_w, mask=mask_w, other=0.0)
    w1 = tl.load(w_ptr + 3 * C + offs_w, mask=mask_w, other=0.0)
    w2 = tl.load(w_ptr + 6 * C + offs_w, mask=mask_w, other=0.0)
    if WIDEN:
        w0 = w0.to(tl.float32)
        w1 = w1.to(tl.float32)
        w2 = w2.to(tl.float32)

    # Row h of z meets row h - 1 of dy and finishes row h - 2. Pointers stay inside of the image.
    base = (n * H + h0) * W + q0
    base_dy = (base - tl.where(h0 > 0, W, 0)) * K
    g_ptr += base_dy
    if COEF:
        y_ptr += base_dy
    x_ptr += base * C
    x_done_ptr = x_ptr
    if RESIDUAL:
        residual_ptr += base * C
        r_done_ptr = residual_ptr
    if add_ptr is not None:
        add_ptr += base * C
    gradient_ptr += base * C

    w = q0 - 1 + offs_m + offs_u
    # A window whose pixels are beyond the image may not see dy: their z is 0, and Inf * 0 is NaN.
    mask_dy = (w >= 0) & (w < W) & (offs_u < PAIR + 2) & (q0 + offs_m < W)
    if BLOCK_K != K:
        mask_dy = mask_dy & mask_k
    mask_x = (q0 + offs_m + offs_i < W) & mask_c
    edge = (q0 == 0) | (q0 + COLUMNS >= W)
    offs_dy = (offs_m + offs_u - 1) * K + offs_k
    offs_x = (offs_m + offs_i) * C + offs_c

    acc1 = tl.zeros((WINDOWS, BLOCK_J), dtype=tl.float32)  # a row of dz that has met r = 2
    acc2 = tl.zeros((WINDOWS, BLOCK_J), dtype=tl.float32)  # the row above it, also r = 1
    dw0 = tl.zeros((ROWS, BLOCK_J), dtype=tl.float32)
    dw1 = tl.zeros((ROWS, BLOCK_J), dtype=tl.float32)
    dw2 = tl.zeros((ROWS, BLOCK_J), dtype=tl.float32)
    db = tl.zeros((ROWS, 16), dtype=tl.float32)
    sum_g = tl.zeros((WINDOWS // FOLDED, PAIR, BLOCK_C), dtype=tl.float32)
    sum_x = tl.zeros((WINDOWS // FOLDED, PAIR, BLOCK_C), dtype=tl.float32)
    sum_r = tl.zeros((WINDOWS // FOLDED, PAIR, BLOCK_C), dtype=tl.float32)
    z1 = tl.zeros((WINDOWS, BLOCK_J), dtype=TYPE)
    z2 = tl.zeros((WINDOWS, BLOCK_J), dtype=TYPE)
    for h in range(h0, h0 + rows + 2):  # the row of x; the last two are another strip's
        p = h - 1
        dy = tl.load(g_ptr + offs_dy, mask=mask_dy, other=0.0)
        if COEF:
            if RELOAD:
                mean_y, a, b, d = _load_coefficients(coef_ptr, offs_u, offs_k, mask_k, K, PAIR)
            y = _wide(tl.load(y_ptr + offs_dy, mask=mask_dy, other=0.0))
            dy = (a * _wide(dy) + (b * (y - mean_y) + d)).to(TYPE)
        # A select for each value, which inner tiles save. What keeps ptxas from selecting always
        # instead of branching is the barrier.
        if edge | (p < 0) | (p >= H):
            if not AHEAD:
                tl.debug_barrier()
            dy = tl.where(mask_dy & (p >= 0) & (p < H), dy, 0.0)
        dy = tl.reshape(dy, (WINDOWS, ROWS))
        if RELOAD:
            mean, scale, shift, mean_r, scale_r = _load_norms(
                norm_ptr, residual_norm_ptr, offs_c, mask_c, C
            )
        x0 = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)
        r0 = x0
        if RESIDUAL:
            r0 = tl.load(residual_ptr + offs_x, mask=mask_x, other=0.0)
        z0 = x0
        if not PLAIN:
            z0 = _preactivation(
                x0, r0, mean, scale, shift, mean_r, scale_r,
                NORM, RESIDUAL, RESIDUAL_NORM,
            )  # fmt: skip
            z0 = activate(z0, ACT, SLOPE).to(TYPE)
        if edge | (h >= last):
            if not AHEAD:
                tl.debug_barrier()
            z0 = tl.where(mask_x & (h < last), z0, 0.0)
        z0 = tl.reshape(z0, (WINDOWS, BLOCK_J))

        if WIDEN:
            dy = dy.to(tl.float32)
        turned = tl.trans(dy)
        if db_ptr is not None:
            db = _sum_rows(turned, db, (p >= h0) & (p < last))
        dw2 = tl.dot(turned, z0.to(dy.dtype), dw2, input_precision=PRECISION)
        dw1 = tl.dot(turned, z1.to(dy.dtype), dw1, input_precision=PRECISION)
        dw0 = tl.dot(turned, z2.to(dy.dtype), dw0, input_precision=PRECISION)
        dz = tl.dot(dy, w0, acc2, input_precision=PRECISION)
        acc2 = tl.dot(dy, w1, acc1, input_precision=PRECISION)
        acc1 = tl.dot(dy, w2, input_precision=PRECISION)

        # Row h - 2 is finished; in the first two steps it is the strip's above.
        finished = (h >= h0 + 2) & (h - 2 < last)
        mask = mask_x & finished
        dz = tl.reshape(dz, (WINDOWS, PAIR, BLOCK_C))
        if add_ptr is not None:
            dz += tl.load(add_ptr + offs_x, mask=mask_x, other=0.0).to(tl.float32)
        if RELOAD:
            mean, scale, shift, mean_r, scale_r = _load_norms(
                norm_ptr, residual_norm_ptr, offs_c, mask_c, C
            )
        x2 = tl.load(x_done_ptr + offs_x, mask=mask_x, other=0.0)
        r2 = x2
        if RESIDUAL:
            r2 = tl.load(r_done_ptr + offs_x, mask=mask_x, other=0.0)
        if ACT != "none":
            pre = _preactivation(
                x2, r2, mean, scale, shift, mean_r, scale_r,
                NORM, RESIDUAL, RESIDUAL_NORM,
            )  # fmt: skip
            dz = activate_backward(dz, pre, ACT, SLOPE)
        gradient = dz.to(TYPE)
        tl.store(gradient_ptr + offs_x, gradient, mask=mask)
        if sums_ptr is not None:
            stored = _wide(gradient)
            if edge | (not finished):
                if not AHEAD:
                    tl.debug_barrier()
                stored = tl.where(mask, stored, 0.0)
            sum_g += _folded(stored, FOLDED)
            sum_x += _folded(stored * (_wide(x2) - mean), FOLDED)
            if RESIDUAL:
                sum_r += _folded(stored * (_wide(r2) - mean_r), FOLDED)

        z2 = z1.to(BITS, bitcast=True).to(TYPE, bitcast=True)
        z1 = z0
        # These change nothing, but use the products. Else Hopper would go on with them in the next
        # step, where the registers that they trade are none to wait for: ptxas would serialise
        # every product.
        acc1 = acc1.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
        acc2 = acc2.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
        step_dy = tl.where((p >= 0) & (p < H - 1), W * K, 0)
        g_ptr += step_dy
        if COEF:
            y_ptr += step_dy
        step = tl.where(h < last - 1, W * C, 0)
        x_ptr += step
        if RESIDUAL:
            residual_ptr += step
        step = tl.where((h >= h0 + 2) & (h - 2 < last - 1), W * C, 0)
        x_done_ptr += step
        if RESIDUAL:
            r_done_ptr += step
        if add_ptr is not None:
            add_ptr += step
        gradient_ptr += step

    # A tap has as many parts as windows have pixels.
    part = pid.to(tl.int64) * PAIR
    dw_ptr += part * (K * 9 * C)
    offs_w += column // BLOCK_C * (K * 9 * C)
    tl.store(dw_ptr + offs_w, dw0, mask=mask_w)
    tl.store(dw_ptr + 3 * C + offs_w, dw1, mask=mask_w)
    tl.store(dw_ptr + 6 * C + offs_w, dw2, mask=mask_w)
    if db_ptr is not None:
        offs_j = tl.arange(0, ROWS)
        u = offs_j // BLOCK_K
        k = offs_j % BLOCK_K
        mask_own = (u > 0) & (u <= PAIR) & (k < K)  # a window's own pixels
        tl.store(db_ptr + (part + u - 1) * K + k, tl.max(db, 1), mask=mask_own)
    if sums_ptr is not None:
        offs_c = tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        sums_ptr += pid.to(tl.int64) * (3 * C) + offs_c
        tl.store(sums_ptr, tl.sum(tl.sum(sum_g, 0), 0), mask=mask_c)
        tl.store(sums_ptr + C, tl.sum(tl.sum(sum_x, 0), 0), mask=mask_c)
        tl.store(sums_ptr + 2 * C, tl.sum(tl.sum(sum_r, 0), 0), mask=mask_c)


conv2d_backward_wide_rows_kernel = autotune(WIDE_ROWS_CONFIGS, ROWS_KEY)(
    conv2d_backward_rows_kernel.fn
)


@autotune(PIXELS_CONFIGS, key=["C", "K", "PRECISION", "ACT"])
@triton.jit
def conv2d_backward_pixels_kernel(
    g_ptr, y_ptr, coef_ptr,  # [M, K], as g or None, [4, K] or None
    w_ptr,  # [K, C]
    x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,  # [M, C], [4, C] or None, both or None
    add_ptr, gradient_ptr,  # [M, C] or None, [M, C]
    sums_ptr, dw_ptr, db_ptr,  # parts: [T, 3, C] or None, [T, K, C], [T, K] or None, float32
    M, pixels,  # M = N*H*W, and a program's, a multiple of 128
    C: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,  # as above
    VALUES: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Write the gradient of consecutive pixels, and their part of every sum."""
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    TILE: tl.constexpr = tile_pixels(VALUES, C, K, TYPE.primitive_bitwidth)
    BLOCK_K: tl.constexpr = fit(64, K)
    BLOCK_C: tl.constexpr = fit(64, C)
    FOLDED: tl.constexpr = lane_rows(FOLD, VALUES, TILE, BLOCK_C, TYPE.primitive_bitwidth)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL: tl.constexpr = residual_ptr is not None
    RESIDUAL_NORM: tl.constexpr = residual_norm_ptr is not None
    COEF: tl.constexpr = coef_ptr is not None
    PLAIN: tl.constexpr = not NORM and not RESIDUAL and ACT == "none"

    pid = tl.program_id(0).to(tl.int64)  # M*C may pass 2**31
    first = pid * pixels
    count = tl.minimum(M - first, pixels).to(tl.int32)
    g_ptr += first * K
    if COEF:
        y_ptr += first * K
    x_ptr += first * C
    if RESIDUAL:
        residual_ptr += first * C
    if add_ptr is not None:
        add_ptr += first * C
    gradient_ptr += first * C

    offs_m = tl.arange(0, TILE)[:, None]
    offs_k = tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C)
    mask_k = offs_k < K
    mask_c = offs_c < C

    mean, scale, shift, mean_r, scale_r = _load_norms(
        norm_ptr, residual_norm_ptr, offs_c, mask_c, C
    )
    if COEF:
        mean_y, a, b, d = load_coefficients(coef_ptr, offs_k, mask_k, K)

    offs_w = offs_k[:, None] * C + offs_c
    mask_w = mask_k[:, None] & mask_c
    w = tl.load(w_ptr + offs_w, mask=mask_w, other=0.0)
    if WIDEN:
        w = w.to(tl.float32)

    dw = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    db = tl.zeros((BLOCK_K, 16), dtype=tl.float32)
    sum_g = tl.zeros((TILE // FOLDED, BLOCK_C), dtype=tl.float32)
    sum_x = tl.zeros((TILE // FOLDED, BLOCK_C), dtype=tl.float32)
    sum_r = tl.zeros((TILE // FOLDED, BLOCK_C), dtype=tl.float32)
    for m0 in range(0, count, TILE):
        m = m0 + offs_m
        offs_dy = m * K + offs_k
        offs_x = m * C + offs_c
        mask_dy = (m < count) & mask_k
        mask_x = (m < count) & mask_c
        g = tl.load(g_ptr + offs_dy, mask=mask_dy, other=0.0)
        if COEF:
            y = _wide(tl.load(y_ptr + offs_dy, mask=mask_dy, other=0.0))
            # Without the select, which seems to be for the last tile alone, triton makes z and dy
            # in the layout of the products, where warps repeat each other's work.
            dy = tl.where(mask_dy, a * _wide(g) + (b * (y - mean_y) + d), 0.0).to(TYPE)
        else:
            dy = shared_use(g)
        x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)
        residual = x
        if RESIDUAL:
            residual = tl.load(residual_ptr + offs_x, mask=mask_x, other=0.0)
        pre = _preactivation(
            x, residual, mean, scale, shift, mean_r, scale_r,
            NORM, RESIDUAL, RESIDUAL_NORM,
        )  # fmt: skip
        z = shared_use(x) if PLAIN else tl.where(mask_x, activate(pre, ACT, SLOPE), 0.0).to(TYPE)

        if WIDEN:
            dy = dy.to(tl.float32)
        turned = tl.trans(dy)
        if db_ptr is not None:
            db = _sum_rows(turned, db, count > 0)
        dw = tl.dot(turned, z.to(dy.dtype), dw, input_precision=PRECISION)
        dz = tl.dot(dy, w, input_precision=PRECISION)

        if add_ptr is not None:
            dz += _wide(tl.load(add_ptr + offs_x, mask=mask_x, other=0.0))
        gradient = activate_backward(dz, pre, ACT, SLOPE).to(TYPE)
        tl.store(gradient_ptr + offs_x, gradient, mask=mask_x)
        if sums_ptr is not None:
            stored = tl.where(mask_x, _wide(gradient), 0.0)
            sum_g += _folded(stored, FOLDED)
            sum_x += _folded(stored * (_wide(x) - mean), FOLDED)
            if RESIDUAL:
                sum_r += _folded(stored * (_wide(residual) - mean_r), FOLDED)

    dw_ptr += pid * (K * C)
    tl.store(dw_ptr + offs_w, dw, mask=mask_w)
    if db_ptr is not None:
        tl.store(db_ptr + pid * K + offs_k, tl.max(db, 1), mask=mask_k)
    if sums_ptr is not None:
        sums_ptr += pid * (3 * C) + offs_c
        tl.store(sums_ptr, tl.sum(sum_g, 0), mask=mask_c)
        tl.store(sums_ptr + C, tl.sum(sum_x, 0), mask=mask_c)
        tl.store(sums_ptr + 2 * C, tl.sum(sum_r, 0), mask=mask_c)


def conv2d_backward_fits(C: int, K: int, R: int, S: int, itemsize: int) -> bool:
    """Return whether a program's registers hold the sums of these channels and taps."""
    most = {(1, 1): 64, (3, 3): 32}.get((R, S), 0)
    return max(C, K) * itemsize <= 2 * most


def conv2d_backward_kernel(C: int, K: int, R: int, itemsize: int) -> Autotuner:
    """Return the kernel of an R x R filter, R = 1 or 3, tuned over configurations for these."""
    if R == 1:
        return conv2d_backward_pixels_kernel
    narrow = max(C, K) * itemsize <= 32
    return conv2d_backward_rows_kernel if narrow else conv2d_backward_wide_rows_kernel


def conv2d_backward_programs(
    N: int, H: int, W: int, C: int, K: int, R: int, itemsize: int, config: Mapping
) -> int:
    """Return how many programs share N x H x W pixels in a configuration, its constants."""
    if R == 1:
        return triton.cdiv(N * H * W, range_pixels(N * H * W))
    return strips(N, H, W, strip_area(N, H, W), _columns(C, K, R, itemsize, config))


def conv2d_backward_parts(R: int, itemsize: int, config: Mapping) -> int:
    """Return how many parts of dw and db a program leaves."""
    return 1 if R == 1 else window_pixels(config["PAIRED"], 8 * itemsize)


def _columns(C: int, K: int, R: int, itemsize: int, config: Mapping) -> int:
    """Return how many pixels a tile has, side by side if R is 3."""
    if R == 1:
        return tile_pixels(config["VALUES"], C, K, 8 * itemsize)
    return tile_columns(config["VALUES"], config["PAIRED"], C, K, 8 * itemsize)


def conv2d_backward_bytes(
    N: int, H: int, W: int, C: int, K: int, R: int, itemsize: int, dy: int, z: int, others: int
) -> int:
    """Return what one pass moves, in bytes.

    dy is 1 where dy is g, 2 where y takes part; z is 1, and 2 with a residual; others counts the
    gradient and what is added to it.
    """
    config = conv2d_backward_kernel(C, K, R, itemsize).every_config[0].kwargs
    parts = conv2d_backward_programs(N, H, W, C, K, R, itemsize, config)
    parts *= conv2d_backward_parts(R, itemsize, config)
    # Two rows of a strip's neighbours.
    columns = _columns(C, K, R, itemsize, config)
    twice = 1 if R == 1 else 1 + 2 / strip_rows(H, strip_area(N, H, W), columns)
    images = N * H * W * itemsize * (dy * K * twice + (z + others) * C)
    return int(images) + 8 * parts * R * R * C * K  # a part is written and read


def two_pass_bytes(
    N: int, H: int, W: int, C: int, K: int, R: int, itemsize: int, dy: int, z: int, others: int,
    unread: bool,
) -> int:  # fmt: skip
    """Return what dgrad and wgrad one after the other move at least, in bytes; as above.

    unread says that dgrad has no use for z.
    """
    config = WGRAD_CONFIGS[0].kwargs
    blocks = conv2d_wgrad_blocks(C, K, R, R, 1, config["MAX_J"], config["MAX_K"])
    images = N * H * W * itemsize * (2 * dy * K + ((1 if unread else 2) * z + others) * C)
    return images + 8 * conv2d_wgrad_splits(N * H * W, blocks) * R * R * C * K


def conv2d_backward_variant(
    dtype: str,
    C: int,
    K: int,
    R: int,
    *,
    norm: bool = False,
    residual: bool = False,
    coef: bool = False,
    act: str = "none",
    add: bool = False,
    sums: bool = False,
    bias: bool = False,
    precision: str = "ieee",
    config: triton.Config | None = None,
) -> Variant:
    """Return both gradients of an R x R convolution, R = 1 or 3, to compile ahead of time.

    dtype is "fp32", "fp16" or "bf16"; norm, residual (with a norm of its own), coef and add say
    what takes part. The configuration is the kernel's first, unless another is given.
    """
    kernel = conv2d_backward_kernel(C, K, R, 4 if dtype == "fp32" else 2)
    present = {
        "g_ptr": dtype,
        "y_ptr": dtype if coef else None,
        "coef_ptr": "fp32" if coef else None,
        "w_ptr": dtype,
        "x_ptr": dtype,
        "norm_ptr": "fp32" if norm else None,
        "residual_ptr": dtype if residual else None,
        "residual_norm_ptr": "fp32" if residual else None,
        "add_ptr": dtype if add else None,
        "gradient_ptr": dtype,
        "sums_ptr": "fp32" if sums else None,
        "dw_ptr": "fp32",
        "db_ptr": "fp32" if bias else None,
    }
    signature = {name: f"*{type_}" for name, type_ in present.items() if type_}
    signature |= {name: "i32" for name in (("H", "W", "area") if R == 3 else ("M", "pixels"))}
    constexprs = {name: None for name, type_ in present.items() if not type_}
    constexprs |= {"C": C, "K": K, "ACT": act, "SLOPE": 0.01}
    constexprs |= {"PRECISION": precision, "WIDEN": False}
    return Variant(kernel, signature, constexprs, config or kernel.every_config[0])
