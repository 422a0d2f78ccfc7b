"""Device code for the two-dimensional convolution of NHWC images, by implicit GEMM.

    y[n, p, q, k] = b[k] + sum over r < R, s < S, c < CG of w[k, r, s, c] *
                    z[n, p STRIDE_H - PAD_H + r DIL_H, q STRIDE_W - PAD_W + s DIL_W, c0 + c]

    0 <= p < P,   0 <= q < Q,   CG = C / GROUPS,   c0 = CG * (the group of k),
    z = 0 outside its image.

z is made of what is stored while it is loaded, as kernels/fuse.py says: of x, which may be
normalised, joined by a residual, activated, pooled or enlarged; it is rounded to x's type before
the product. With a second image x2 the channels of z are those made of x, then those made of x2:
two sums into one accumulator, and no concatenated image. On the way out a program may leave `parts`
of y's moments (count, mean and M2 of each channel, of y as it is stored), and `keep`, the activated
input, once.

x, residual, keep: [N, H, W, C]; x2: [N, H2, W2, C2]; y: [N, P, Q, K]; w: [K, R, S, CG], with x2
[K, R, S, C + C2]; b: [K]; all dense and row-major, so they are torch's [N, C, H, W] and
[K, CG, R, S] in channels_last. Norms are float32 [4, C], parts float32 [T, 3, K].

The taps s and channels c of one filter row r meet S*CG values of x, the *window* of a pixel,
indexed by j = s*CG + c here; undilated and in one group they are consecutive. Few channels thereby
fill a product's depth (C = 3, S = 3 takes 16 values, not three times 16), and any C works.

- conv2d_fwd_kernel, for every shape: a program owns BLOCK_K channels of a range of tiles of
  BLOCK_M pixels, and walks for each the R rows in steps of BLOCK_J window values, one product
  [pixels, j] @ [j, k] a step; of a filter of up to 64 values the rows follow each other in j, so
  that a stem takes one step or two. For each block of channels it reads, and activates, a value of
  x up to R*S times, from L1 or L2. The tiles of a range lie below each other, so that the rows of x
  that two of them share come from a cache.
- conv2d_fwd_rows_kernel, for 3x3 with few channels: a program rolls down a strip of rows, BLOCK_Q
  columns wide, with the whole filter in shared memory. It reads a row of windows once, for the
  three rows of y that it belongs to; two unfinished ones wait in registers. A window is of four
  pixels and serves two of y: the products' columns are the channels of both, their filters shifted
  by a pixel against each other among zeros. So each value of x is read and activated twice, where
  windows of one pixel would do it four times (three, and padding to a power of two); and the copies
  of the next rows run meanwhile. Those zeros make NaN of what is not finite: it reaches the pixels
  that see it, and a neighbour that shares their window.
- conv2d_fwd_depthwise_kernel, for groups of one input channel, whose products would be empty: no
  tensor cores, a multiplication and an addition for each value and tap.

Work at 2-byte elements: 2*N*P*Q*K*R*S*CG FLOP over 2*(N*H*W*C + N*P*Q*K) bytes, and those of
the residual and of keep where they take part: R*S*C*K/(C + K) FLOP a byte, 72 for 3x3 at 16 -> 16
channels, 144 at 32, 288 at 64; 11 for 1x1 at 16 -> 32. An H200 turns from memory to arithmetic
at 184, so only the layers from 64 channels on use its tensor cores fully; the others should run at
the speed of a copy. Parts take 12*K bytes a range: of 4,096 pixels in a large image, 0.15% of y;
there are less than 2 PROGRAMS of them where ranges are shorter.

Instructions come next to bytes. An H200 issues 441 a pixel (of a lane) while the bytes of a layer
of 16 channels pass, 883 at 32. The loop of the rows kernel takes, on sm_90, with norm, activation
and moments, 429 and 817 by its text, and 550 and 1,050 in strips that meet the image's border; with
windows of one pixel and selects everywhere these were 1,026 and 1,986.

Moments stay exact because no variance is the difference of two large sums: a tile's M2 is taken
about the tile's own mean, and joined to the range's by Chan's update; the rows kernel instead moves
a mean and an M2 a lane by Welford's, and joins the lanes once.
"""

import triton
import triton.language as tl

from ._tune import autotune
from .aot import Variant
from .fuse import load_activated, load_norm, load_z, shared_use

PROGRAMS = 1024  # a few for each of a device's 100 to 300 processors
TILE = 128  # pixels of a tile, by which ranges are measured; a configuration's may differ
LONGEST = 32  # tiles of a range
STRIP = 64  # rows of a strip; two more of x are read
STRIP_WIDTH = 64  # the least columns of a strip
SIZES = ("N", "H", "W", "H2", "W2", "P", "Q", "splits", "rows")  # one kernel for all of them


def _config(BLOCK_M, MAX_J, MAX_K, **options):
    """Return a configuration; MAX_J counts 2-byte elements, wider ones take fewer a step."""
    return triton.Config({"BLOCK_M": BLOCK_M, "MAX_J": MAX_J, "MAX_K": MAX_K}, **options)


CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    _config(128, MAX_J=32, MAX_K=64, num_warps=4, num_stages=2),
    _config(128, MAX_J=64, MAX_K=64, num_warps=4, num_stages=3),
    _config(128, MAX_J=64, MAX_K=128, num_warps=8, num_stages=3),
    _config(256, MAX_J=64, MAX_K=64, num_warps=8, num_stages=2),
    # One stage: no asynchronous copies, which pass L1 by and fetch each window anew from L2.
    _config(128, MAX_J=64, MAX_K=64, num_warps=8, num_stages=1),
    _config(128, MAX_J=128, MAX_K=64, num_warps=8, num_stages=1),
]
ROWS_CONFIGS = [
    triton.Config({"BLOCK_Q": 128, "MAX_K": 16}, num_warps=4, num_stages=2),
    # All of 32 channels at once; from 17 channels in on, these fill registers.
    triton.Config({"BLOCK_Q": 128, "MAX_K": 32}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_Q": 128, "MAX_K": 32}, num_warps=4, num_stages=3),
]
DEPTHWISE_CONFIGS = [
    triton.Config({"BLOCK_M": 32, "MAX_K": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_M": 64, "MAX_K": 64}, num_warps=4, num_stages=3),
]


@triton.constexpr_function
def fit(most: int, needed: int, least: int = 16) -> int:
    """Return the power of two, least to most, that covers needed; tl.dot takes 16 or more."""
    return max(least, min(most, 1 << (needed - 1).bit_length()))


@triton.constexpr_function
def filter_rows(C: int, R: int, S: int, groups: int) -> int:
    """Return how many rows of a filter are taken together: all of a small one, else one."""
    return R if groups == 1 and R * S * C <= 64 else 1


@triton.constexpr_function
def step_values(most: int, bits: int, needed: int, residual: bool) -> int:
    """Return the window values of a step; of two images half of them, or registers would spill."""
    return fit((min(most, 32) if residual else most) * 16 // bits, needed)


@triton.constexpr_function
def tile_columns(pixels: int, columns: int) -> int:
    """Return the columns of a tile: as many as asked for, but at most 16 rows, and no part of one.

    TILE_ROWS of ops/geometry.py bounds the rows, for offsets inside a tile are int32.
    """
    return max(pixels // 16, min(pixels, columns))


def tile_width(P: int, Q: int) -> int:
    """Return how many columns a tile should have for few tiles to cover P x Q."""
    if P == 1:
        return 1024  # whatever a tile holds
    covered = {
        width: triton.cdiv(Q, width) * triton.cdiv(P, TILE // width)
        for width in (32, 64, 16, 128, 8)  # in order of preference
    }
    return min(covered, key=covered.get)


def conv2d_fwd_blocks(K: int, groups: int, depthwise: bool, MAX_K: int) -> int:
    """Return how many programs a range of tiles takes."""
    KG = K if depthwise else K // groups
    return triton.cdiv(KG, fit(MAX_K, KG)) * (1 if depthwise else groups)


def conv2d_fwd_splits(N: int, P: int, Q: int, blocks: int) -> int:
    """Return into how many ranges to cut the tiles, where each range takes `blocks` programs.

    The ranges do not depend on the configuration, so that an array of parts fits all.
    """
    width = min(tile_width(P, Q), TILE)
    tiles = N * triton.cdiv(Q, width) * triton.cdiv(P, TILE // width)
    return triton.cdiv(tiles, max(1, min(LONGEST, tiles * blocks // PROGRAMS)))


def conv2d_fwd_grid(K: int, groups: int, depthwise: bool, splits: int):
    """Return the launch grid of the kernel for every shape, or of the depthwise one.

    One axis, for the others stop at 65,535.
    """
    return lambda meta: (splits * conv2d_fwd_blocks(K, groups, depthwise, meta["MAX_K"]),)


def conv2d_fwd_strip(N: int, P: int, Q: int) -> int:
    """Return the rows of a strip, few where there are few pixels."""
    columns = N * triton.cdiv(Q, STRIP_WIDTH)
    return max(8, min(STRIP, triton.cdiv(P * columns, PROGRAMS)))


def conv2d_fwd_strips(N: int, P: int, Q: int, rows: int, BLOCK_Q: int = STRIP_WIDTH) -> int:
    """Return how many strips, a row of parts each, cover y."""
    return N * triton.cdiv(P, rows) * triton.cdiv(Q, BLOCK_Q)


def conv2d_fwd_rows_grid(N: int, P: int, Q: int, K: int, rows: int):
    """Return the launch grid of the rows kernel."""

    def grid(meta):
        strips = conv2d_fwd_strips(N, P, Q, rows, meta["BLOCK_Q"])
        return (strips * triton.cdiv(K, fit(meta["MAX_K"], K)),)

    return grid


@triton.jit
def _norm(norm_ptr, c, mask_c, C):
    """Return mean, scale and shift of channels c, or what is not read where norm_ptr is None."""
    if norm_ptr is not None:
        mean, scale, shift = load_norm(norm_ptr, c, mask_c, C)
    else:
        mean, scale, shift = 0.0, 0.0, 0.0
    return mean, scale, shift


@triton.jit
def _products(
    acc,  # [pixels, k]
    x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,  # [N, H, W, C], [4, C] or None, both or None
    w_ptr,  # [K, R, S, ROW], at this image's first channel
    n, p0, q0, offs_p, offs_q, group, k, mask_k,  # where the tile is; its channels
    H, W,  # of x as it is stored
    C: tl.constexpr, ROW: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, GROUPS: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, RESAMPLE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, MAX_J: tl.constexpr,
):  # fmt: skip
    """Return acc and the products of a tile's windows of one image with the filter."""
    BITS: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
    CG: tl.constexpr = C // GROUPS
    ROWS: tl.constexpr = filter_rows(C, R, S, GROUPS)
    WIDTH: tl.constexpr = ROWS * S * CG  # of j
    BLOCK_J: tl.constexpr = step_values(MAX_J, BITS, WIDTH, residual_ptr is not None)
    STEPS_J: tl.constexpr = triton.cdiv(WIDTH, BLOCK_J)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL_NORM: tl.constexpr = residual_norm_ptr is not None
    PLAIN: tl.constexpr = not NORM and residual_ptr is None and ACT == "none"

    height = H  # of z
    width = W
    if RESAMPLE == "pool2":
        height = H // 2
        width = W // 2
    elif RESAMPLE == "up2":
        height = 2 * H
        width = 2 * W
    w0 = q0 * STRIDE_W - PAD_W
    pixels = (offs_p * (STRIDE_H * W) + offs_q * STRIDE_W)[:, None] * C

    for step in range(R // ROWS * STEPS_J):
        r = step // STEPS_J
        offs_j = step % STEPS_J * BLOCK_J + tl.arange(0, BLOCK_J)
        mask_j = offs_j < WIDTH
        row = offs_j // (S * CG)  # from r on
        s = offs_j // CG % S
        c = group * CG + offs_j % CG
        shift_x = row * (DIL_H * W * C) + s * (DIL_W * C) + c  # of j from the window's first value
        if DIL_W == 1 and GROUPS == 1 and ROWS == 1:
            shift_x = offs_j  # the same, said so that loads are seen to be contiguous
        shift_w = offs_j // CG * ROW + offs_j % CG
        if ROW == CG:
            shift_w = offs_j

        mean, scale, shift = _norm(norm_ptr, c, mask_j, C)
        mean_r, scale_r, shift_r = _norm(residual_norm_ptr, c, mask_j, C)

        h0 = p0 * STRIDE_H - PAD_H + r * DIL_H
        h = h0 + (offs_p * STRIDE_H)[:, None] + (row * DIL_H)[None, :]
        if ROWS == 1:
            h = h0 + (offs_p * STRIDE_H)[:, None]
        w = w0 + (offs_q * STRIDE_W)[:, None] + (s * DIL_W)[None, :]
        mask_x = (h >= 0) & (h < height) & (w >= 0) & (w < width) & mask_j[None, :]
        if RESAMPLE == "none":
            base_x = ((n * H + h0) * W + w0) * C
            offs_x = pixels + shift_x[None, :]
            if PLAIN:
                z = tl.load(x_ptr + base_x + offs_x, mask=mask_x, other=0.0)
            else:
                z = load_activated(
                    x_ptr + base_x,
                    residual_ptr + base_x if residual_ptr is not None else None,
                    offs_x, mask_x, mean, scale, shift, mean_r, scale_r, shift_r,
                    NORM, RESIDUAL_NORM, ACT, SLOPE,
                )  # fmt: skip
        else:
            z = load_z(
                x_ptr, residual_ptr, n, h0, h, w, c[None, :], mask_x,
                mean, scale, shift, mean_r, scale_r, shift_r,
                H, W, C, NORM, RESIDUAL_NORM, ACT, SLOPE, RESAMPLE,
            )  # fmt: skip
        if not PLAIN or RESAMPLE != "none":
            z = tl.where(mask_x, z, 0.0).to(x_ptr.dtype.element_ty)

        offs_w = (k * R + r)[None, :] * (S * ROW) + shift_w[:, None]
        wt = tl.load(w_ptr + offs_w, mask=mask_j[:, None] & mask_k[None, :], other=0.0)
        if WIDEN:
            z = z.to(tl.float32)
            wt = wt.to(tl.float32)
        acc = tl.dot(z, wt, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _join_tile(count, mean, m2, y, mask_m, pixels):
    """Return count, mean and M2 joined by those of a tile y [pixels, k], of which mask_m counts."""
    added = pixels.to(tl.float32)
    tile_mean = tl.sum(tl.where(mask_m[:, None], y, 0.0), 0) / added
    apart = tl.where(mask_m[:, None], y - tile_mean[None, :], 0.0)
    total = count + added
    delta = tile_mean - mean
    m2 += tl.sum(apart * apart, 0) + delta * delta * (count * added / total)
    return total, mean + delta * (added / total), m2


@triton.jit
def _store_parts(parts_ptr, row, count, mean, m2, k, mask_k, K):
    """Write count, mean and M2 [k] into a row of parts [T, 3, K]."""
    parts_ptr += row.to(tl.int64) * 3 * K + k  # T*K may pass 2**31
    tl.store(parts_ptr, tl.zeros_like(mean) + count, mask=mask_k)
    tl.store(parts_ptr + K, mean, mask=mask_k)
    tl.store(parts_ptr + 2 * K, m2, mask=mask_k)


@triton.jit
def _keep_tile(
    keep_ptr, x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,
    n, p0, q0, offs_p, offs_q, mask_m, H, W,
    C: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Write the activated input of a tile's pixels, all channels; the caches hold what it reads."""
    BLOCK_C: tl.constexpr = fit(32, C)  # more would spill beside the accumulator
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL_NORM: tl.constexpr = residual_norm_ptr is not None
    base = ((n * H + p0) * W + q0) * C
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask_c = c < C
        mean, scale, shift = _norm(norm_ptr, c, mask_c, C)
        mean_r, scale_r, shift_r = _norm(residual_norm_ptr, c, mask_c, C)
        offs = (offs_p * W + offs_q)[:, None] * C + c[None, :]
        mask = mask_m[:, None] & mask_c[None, :]
        z = load_activated(
            x_ptr + base, residual_ptr + base if residual_ptr is not None else None,
            offs, mask, mean, scale, shift, mean_r, scale_r, shift_r,
            NORM, RESIDUAL_NORM, ACT, SLOPE,
        )  # fmt: skip
        tl.store(keep_ptr + base + offs, z.to(keep_ptr.dtype.element_ty), mask=mask)


@autotune(
    CONFIGS,
    key=[
        "C", "C2", "K", "R", "S", "STRIDE_W", "GROUPS", "TILE_Q", "PRECISION",
        "ACT", "RESAMPLE", "ACT2", "RESAMPLE2",
    ],
)  # fmt: skip
@triton.jit(do_not_specialize=SIZES)
def conv2d_fwd_kernel(
    x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,  # [N, H, W, C], [4, C] or None, both or None
    x2_ptr, norm2_ptr,  # [N, H2, W2, C2] or None, [4, C2] or None
    w_ptr, b_ptr,  # [K, R, S, CG + C2], [K] or None
    y_ptr, parts_ptr, keep_ptr,  # [N, P, Q, K], [splits, 3, K] or None, as x or None
    N, H, W, H2, W2, P, Q, splits,  # H, W: of x as it is stored
    C: tl.constexpr, C2: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, GROUPS: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, RESAMPLE: tl.constexpr,
    ACT2: tl.constexpr, SLOPE2: tl.constexpr, RESAMPLE2: tl.constexpr,
    TILE_Q: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    WIDEN: tl.constexpr,  # multiply in float32: for the interpreter, whose bfloat16 dot is wrong
    BLOCK_M: tl.constexpr, MAX_J: tl.constexpr, MAX_K: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_K channels of a range of tiles of y; sums are fp32, rounded once."""
    BLOCK_Q: tl.constexpr = tile_columns(BLOCK_M, TILE_Q)
    BLOCK_P: tl.constexpr = BLOCK_M // BLOCK_Q
    CG: tl.constexpr = C // GROUPS
    KG: tl.constexpr = K // GROUPS
    BLOCK_K: tl.constexpr = fit(MAX_K, KG)
    TILES_K: tl.constexpr = triton.cdiv(KG, BLOCK_K)

    # k fastest, the range slowest: programs that read the same pixels run at about the same time.
    pid = tl.program_id(0)
    tile_k = pid % TILES_K
    group = pid // TILES_K % GROUPS
    split = pid // (TILES_K * GROUPS)

    offs_m = tl.arange(0, BLOCK_M)
    offs_p = offs_m // BLOCK_Q
    offs_q = offs_m % BLOCK_Q
    offs_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < KG
    k = group * KG + offs_k
    offs_y = (offs_p * Q + offs_q)[:, None] * K + k[None, :]

    b = tl.zeros((BLOCK_K,), dtype=tl.float32)
    if b_ptr is not None:
        b = tl.load(b_ptr + k, mask=mask_k, other=0.0).to(tl.float32)

    tiles_q = (Q + BLOCK_Q - 1) // BLOCK_Q
    tiles_p = (P + BLOCK_P - 1) // BLOCK_P
    tiles = N * tiles_p * tiles_q
    per = (tiles + splits - 1) // splits

    count = 0.0
    mean = tl.zeros((BLOCK_K,), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for tile in range(split * per, tl.minimum(split * per + per, tiles)):
        p0 = tile % tiles_p * BLOCK_P
        q0 = tile // tiles_p % tiles_q * BLOCK_Q
        n = (tile // tiles_p // tiles_q).to(tl.int64)  # N*H*W*C may pass 2**31

        # Offsets inside a tile are int32: the op refuses images in which they might pass 2**31.
        acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        acc = _products(
            acc, x_ptr, norm_ptr, residual_ptr, residual_norm_ptr, w_ptr,
            n, p0, q0, offs_p, offs_q, group, k, mask_k, H, W,
            C, CG + C2, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, GROUPS,
            ACT, SLOPE, RESAMPLE, PRECISION, WIDEN, MAX_J,
        )  # fmt: skip
        if x2_ptr is not None:
            acc = _products(
                acc, x2_ptr, norm2_ptr, None, None, w_ptr + C,
                n, p0, q0, offs_p, offs_q, group, k, mask_k, H2, W2,
                C2, C + C2, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, 1,
                ACT2, SLOPE2, RESAMPLE2, PRECISION, WIDEN, MAX_J,
            )  # fmt: skip

        mask_m = (p0 + offs_p < P) & (q0 + offs_q < Q)
        y = (acc + b[None, :]).to(y_ptr.dtype.element_ty)
        base_y = ((n * P + p0) * Q + q0) * K
        tl.store(y_ptr + base_y + offs_y, y, mask=mask_m[:, None] & mask_k[None, :])
        if parts_ptr is not None:
            pixels = tl.minimum(P - p0, BLOCK_P) * tl.minimum(Q - q0, BLOCK_Q)
            count, mean, m2 = _join_tile(count, mean, m2, y.to(tl.float32), mask_m, pixels)
        if keep_ptr is not None:
            if (tile_k == 0) & (group == 0):
                _keep_tile(
                    keep_ptr, x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,
                    n, p0, q0, offs_p, offs_q, mask_m, H, W, C, ACT, SLOPE,
                )  # fmt: skip

    if parts_ptr is not None:
        _store_parts(parts_ptr, split, count, mean, m2, k, mask_k, K)


@triton.jit
def _join_row(mean, m2, y, mask, done, BORDER: tl.constexpr):
    """Return mean and M2 [windows, K] of `done` rows: those of the rows above joined with y.

    y: [windows, two pixels of K channels]; m2 is half of M2, as of one pixel. Of a window that the
    border cuts, which mask tells, the first pixel stands for the second.
    """
    SHAPE: tl.constexpr = (y.shape[0], 2, y.shape[1] // 2)
    a, b = tl.split(tl.permute(tl.reshape(y, SHAPE), (0, 2, 1)))
    if BORDER:
        _, inside = tl.split(tl.permute(tl.reshape(mask, SHAPE), (0, 2, 1)))
        b = tl.where(inside, b, a)
    share = 1.0 / done.to(tl.float32)
    delta = a + b - 2.0 * mean
    apart = a - b
    moved = mean + delta * (0.5 * share)
    return moved, m2 + 0.25 * (apart * apart + delta * (delta * (1.0 - share)))


@triton.jit
def _filters(
    w_ptr, r, u, c, pixel, k, mask_c, mask_k, C: tl.constexpr, PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Return row r of 3x3 filters for the parts of a window: [u and c, pixel and k].

    A pixel's filter stands as many pixels down the window as the pixel itself, among zeros.
    """
    parts = ()
    for part in tl.static_range(PARTS):
        s = (u + part * (4 // PARTS))[:, None] - pixel[None, :]
        offs = (k[None, :] * 9 + 3 * r + s) * C + c[:, None]
        mask = (s >= 0) & (s < 3) & mask_c[:, None] & mask_k[None, :]
        w = tl.load(w_ptr + offs, mask=mask, other=0.0)
        parts = parts + (w.to(tl.float32) if WIDEN else w,)
    return parts


@triton.jit
def _roll(
    x_ptr, residual_ptr, w0, w1, w2, b, y_ptr, keep_ptr, MOMENTS: tl.constexpr,
    offs_x, column, u, mask_c, offs_y, mask_q, mask_k, p0, q0, height, norm, residual_norm,
    H, W, Q, C: tl.constexpr, K: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, NORM: tl.constexpr, RESIDUAL_NORM: tl.constexpr,
    keeps,
    BORDER: tl.constexpr,  # whether anything lies beyond the image
    FULL_C: tl.constexpr, FULL_K: tl.constexpr,  # whether no channel is padding
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write a strip of y, row by row; return mean and M2 of each window's columns of it."""
    PLAIN: tl.constexpr = not NORM and residual_ptr is None and ACT == "none"
    WINDOWS: tl.constexpr = offs_y.shape[0]
    COLUMNS: tl.constexpr = offs_y.shape[1]
    STEP: tl.constexpr = 4 // PARTS  # pixels of a part
    mean, scale, shift = norm
    mean_r, scale_r, shift_r = residual_norm
    mean_y = tl.zeros((WINDOWS, COLUMNS // 2), dtype=tl.float32)  # of the rows above
    m2_y = tl.zeros((WINDOWS, COLUMNS // 2), dtype=tl.float32)
    acc1 = tl.zeros((WINDOWS, COLUMNS), dtype=tl.float32)  # a row of y that has met r = 0
    acc2 = tl.zeros((WINDOWS, COLUMNS), dtype=tl.float32)  # the row above it, also r = 1
    for step in range(height + 2):
        h = p0 - PAD_H + step
        acc = acc2
        acc2 = acc1
        acc1 = tl.zeros((WINDOWS, COLUMNS), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            offs = offs_x + part * STEP * C
            mask_x = mask_c[None, :]
            if BORDER:
                w = q0 - PAD_W + part * STEP + column
                mask_x = mask_x & (w >= 0) & (w < W) & (h >= 0) & (h < H)
            elif FULL_C:
                mask_x = tl.full((1, 1), True, tl.int1)
            if PLAIN:
                z = tl.load(x_ptr + offs, mask=mask_x, other=0.0)
            else:
                z = load_activated(
                    x_ptr, residual_ptr, offs, mask_x,
                    mean, scale, shift, mean_r, scale_r, shift_r, NORM, RESIDUAL_NORM, ACT, SLOPE,
                )  # fmt: skip
                if BORDER:
                    z = tl.where(mask_x, z, 0.0)
                z = z.to(x_ptr.dtype.element_ty)
            if keep_ptr is not None:  # of a window's pixels those of its own columns
                if PLAIN:
                    z = shared_use(z)
                own = (part * STEP + u >= PAD_W) & (part * STEP + u < PAD_W + 2)
                own = own[None, :] & mask_x & (q0 - PAD_W + part * STEP + column < Q)
                tl.store(keep_ptr + offs, z, mask=own & keeps & (h >= p0) & (h < p0 + height))
            if WIDEN:
                z = z.to(tl.float32)
            acc = tl.dot(z, w2[part], acc, input_precision=PRECISION)
            acc2 = tl.dot(z, w1[part], acc2, input_precision=PRECISION)
            acc1 = tl.dot(z, w0[part], acc1, input_precision=PRECISION)

        # These change nothing, but use the products. Else Hopper would go on with them in the next
        # step, where the registers that they trade are none to wait for: ptxas would serialise
        # every product.
        acc1 = acc1.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
        acc2 = acc2.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
        done = step - 1  # rows finished; the first two steps finish rows of the strip above
        if b is not None:
            acc += b[None, :]
        y = acc.to(y_ptr.dtype.element_ty)
        if done > 0:
            mask_y = mask_k[None, :]
            if BORDER:
                mask_y = mask_y & mask_q
            elif FULL_K:
                mask_y = tl.full((1, 1), True, tl.int1)
            tl.store(y_ptr + offs_y, y, mask=mask_y)
            if MOMENTS:
                mean_y, m2_y = _join_row(mean_y, m2_y, y.to(tl.float32), mask_q, done, BORDER)
        if keep_ptr is not None:
            keep_ptr += W * C
        x_ptr += W * C
        if residual_ptr is not None:
            residual_ptr += W * C
        y_ptr += Q * K
    return mean_y, m2_y


@autotune(ROWS_CONFIGS, key=["C", "K", "ACT"])
@triton.jit(do_not_specialize=SIZES)
def conv2d_fwd_rows_kernel(
    x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,  # as above
    w_ptr, b_ptr,  # [K, R, S, C], [K] or None
    y_ptr, parts_ptr, keep_ptr,  # [N, P, Q, K], [strips, 3, K] or None, as x or None
    H, W, P, Q, rows,  # rows: of a strip
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,  # as above
    BLOCK_Q: tl.constexpr, MAX_K: tl.constexpr,
):  # fmt: skip
    """Write a [rows, BLOCK_Q, BLOCK_K] strip of y, row by row; sums are fp32, rounded once."""
    tl.static_assert(R == 3 and S == 3)
    BLOCK_C: tl.constexpr = fit(32, C, 4)
    tl.static_assert(BLOCK_C >= C)
    PARTS: tl.constexpr = max(1, BLOCK_C // 8)  # of a window, made one after another
    BLOCK_J: tl.constexpr = 4 // PARTS * BLOCK_C
    BLOCK_K: tl.constexpr = fit(MAX_K, K)
    TILES_K: tl.constexpr = triton.cdiv(K, BLOCK_K)
    tiles_p = (P + rows - 1) // rows
    tiles_q = (Q + BLOCK_Q - 1) // BLOCK_Q

    # k fastest, then q, p, n: programs that share pixels or halos run at about the same time.
    pid = tl.program_id(0)
    strip = pid // TILES_K
    k0 = pid % TILES_K * BLOCK_K
    q0 = strip % tiles_q * BLOCK_Q
    p0 = strip // tiles_q % tiles_p * rows
    n = (strip // tiles_q // tiles_p).to(tl.int64)  # N*H*W*C may pass 2**31
    height = tl.minimum(rows, P - p0)  # of this strip

    # All advance by a row a step; y lags by the two rows of x that a row of y still waits for.
    base_x = ((n * H + p0 - PAD_H) * W + q0 - PAD_W) * C
    x_ptr += base_x
    if residual_ptr is not None:
        residual_ptr += base_x
    if keep_ptr is not None:
        keep_ptr += base_x
    y_ptr += ((n * P + p0 - 2) * Q + q0) * K

    # Columns of the products: BLOCK_K channels of a window's first pixel, then of its second.
    first = tl.arange(0, BLOCK_Q // 2) * 2  # of windows: from q0 on
    offs_j = tl.arange(0, BLOCK_J)
    offs_n = tl.arange(0, 2 * BLOCK_K)
    pixel = offs_n // BLOCK_K
    k = k0 + offs_n % BLOCK_K
    mask_k = k < K
    u = offs_j // BLOCK_C  # pixel of a window's part that j belongs to
    c = offs_j % BLOCK_C
    mask_c = c < C

    w0 = _filters(w_ptr, 0, u, c, pixel, k, mask_c, mask_k, C, PARTS, WIDEN)
    w1 = _filters(w_ptr, 1, u, c, pixel, k, mask_c, mask_k, C, PARTS, WIDEN)
    w2 = _filters(w_ptr, 2, u, c, pixel, k, mask_c, mask_k, C, PARTS, WIDEN)
    b = None
    if b_ptr is not None:
        b = tl.load(b_ptr + k, mask=mask_k, other=0.0).to(tl.float32)
    norm = _norm(norm_ptr, c, mask_c, C)
    residual_norm = _norm(residual_norm_ptr, c, mask_c, C)

    q = q0 + first[:, None] + pixel[None, :]
    mask_q = q < Q
    offs_x = first[:, None] * C + u[None, :] * C + c[None, :]
    offs_y = (first[:, None] + pixel[None, :]) * K + k[None, :]
    if BLOCK_C == C:  # the same, said so that loads and stores are wide
        offs_x = first[:, None] * C + offs_j[None, :]
    if BLOCK_K == K:
        offs_y = first[:, None] * K + offs_n[None, :]

    # At the border zeros are selected, a value at a time; a branch inside the loop would become
    # selects, so there are two loops.
    border = (q0 < PAD_W) | (q0 - PAD_W + BLOCK_Q + S - 1 > W)
    border = border | (p0 < PAD_H) | (p0 - PAD_H + height + 2 > H) | (q0 + BLOCK_Q > Q)
    if border:
        mean_y, m2_y = _roll(
            x_ptr, residual_ptr, w0, w1, w2, b, y_ptr, keep_ptr, parts_ptr is not None,
            offs_x, first[:, None] + u[None, :], u, mask_c, offs_y, mask_q, mask_k,
            p0, q0, height, norm, residual_norm, H, W, Q, C, K, PAD_H, PAD_W, ACT, SLOPE,
            norm_ptr is not None, residual_norm_ptr is not None, k0 == 0,
            True, BLOCK_C == C, K % BLOCK_K == 0, PRECISION, WIDEN, PARTS,
        )  # fmt: skip
    else:
        mean_y, m2_y = _roll(
            x_ptr, residual_ptr, w0, w1, w2, b, y_ptr, keep_ptr, parts_ptr is not None,
            offs_x, first[:, None] + u[None, :], u, mask_c, offs_y, mask_q, mask_k,
            p0, q0, height, norm, residual_norm, H, W, Q, C, K, PAD_H, PAD_W, ACT, SLOPE,
            norm_ptr is not None, residual_norm_ptr is not None, k0 == 0,
            False, BLOCK_C == C, K % BLOCK_K == 0, PRECISION, WIDEN, PARTS,
        )  # fmt: skip

    if parts_ptr is not None:
        columns = tl.minimum(Q - q0, BLOCK_Q).to(tl.float32)
        down = height.to(tl.float32)
        pixels = tl.minimum(tl.maximum(Q - q0 - first, 0), 2).to(tl.float32)[:, None]
        joined = tl.sum(mean_y * pixels, 0) / columns
        apart = mean_y - joined[None, :]
        m2 = tl.sum(tl.where(pixels > 0, m2_y + down * apart * apart, 0.0) * pixels, 0)
        k = k0 + tl.arange(0, BLOCK_K)
        _store_parts(parts_ptr, strip, columns * down, joined, m2, k, k < K, K)


@autotune(DEPTHWISE_CONFIGS, key=["C", "K", "R", "S", "STRIDE_W", "TILE_Q", "ACT", "RESAMPLE"])
@triton.jit(do_not_specialize=SIZES)
def conv2d_fwd_depthwise_kernel(
    x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,  # as above; GROUPS = C
    w_ptr, b_ptr,  # [K, R, S], [K] or None
    y_ptr, parts_ptr, keep_ptr,
    N, H, W, P, Q, splits,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, RESAMPLE: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, MAX_K: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_K channels of a range of tiles of y; sums are fp32, rounded once."""
    BLOCK_Q: tl.constexpr = tile_columns(BLOCK_M, TILE_Q)
    BLOCK_P: tl.constexpr = BLOCK_M // BLOCK_Q
    BLOCK_K: tl.constexpr = fit(MAX_K, K)
    TILES_K: tl.constexpr = triton.cdiv(K, BLOCK_K)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL_NORM: tl.constexpr = residual_norm_ptr is not None

    pid = tl.program_id(0)
    tile_k = pid % TILES_K
    split = pid // TILES_K

    offs_m = tl.arange(0, BLOCK_M)
    offs_p = offs_m // BLOCK_Q
    offs_q = offs_m % BLOCK_Q
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    c = k // (K // C)
    offs_x = (offs_p * (STRIDE_H * W) + offs_q * STRIDE_W)[:, None] * C + c[None, :]
    offs_y = (offs_p * Q + offs_q)[:, None] * K + k[None, :]

    b = tl.zeros((BLOCK_K,), dtype=tl.float32)
    if b_ptr is not None:
        b = tl.load(b_ptr + k, mask=mask_k, other=0.0).to(tl.float32)
    mean, scale, shift = _norm(norm_ptr, c, mask_k, C)
    mean_r, scale_r, shift_r = _norm(residual_norm_ptr, c, mask_k, C)

    height = H  # of z
    width = W
    if RESAMPLE == "pool2":
        height = H // 2
        width = W // 2
    elif RESAMPLE == "up2":
        height = 2 * H
        width = 2 * W
    tiles_q = (Q + BLOCK_Q - 1) // BLOCK_Q
    tiles_p = (P + BLOCK_P - 1) // BLOCK_P
    tiles = N * tiles_p * tiles_q
    per = (tiles + splits - 1) // splits

    count = 0.0
    mean_y = tl.zeros((BLOCK_K,), dtype=tl.float32)
    m2_y = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for tile in range(split * per, tl.minimum(split * per + per, tiles)):
        p0 = tile % tiles_p * BLOCK_P
        q0 = tile // tiles_p % tiles_q * BLOCK_Q
        n = (tile // tiles_p // tiles_q).to(tl.int64)  # N*H*W*C may pass 2**31
        mask_m = (p0 + offs_p < P) & (q0 + offs_q < Q)

        acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for tap in range(R * S):
            r = tap // S
            s = tap % S
            h0 = p0 * STRIDE_H - PAD_H + r * DIL_H
            w0 = q0 * STRIDE_W - PAD_W + s * DIL_W
            h = h0 + offs_p * STRIDE_H
            w = w0 + offs_q * STRIDE_W
            mask_w = (h >= 0) & (h < height) & (w >= 0) & (w < width) & mask_m
            mask_x = mask_w[:, None] & mask_k[None, :]
            if RESAMPLE == "none":
                base_x = ((n * H + h0) * W + w0) * C
                z = load_activated(
                    x_ptr + base_x, residual_ptr + base_x if residual_ptr is not None else None,
                    offs_x, mask_x, mean, scale, shift, mean_r, scale_r, shift_r,
                    NORM, RESIDUAL_NORM, ACT, SLOPE,
                )  # fmt: skip
            else:
                z = load_z(
                    x_ptr, residual_ptr, n, h0, h[:, None], w[:, None], c[None, :], mask_x,
                    mean, scale, shift, mean_r, scale_r, shift_r,
                    H, W, C, NORM, RESIDUAL_NORM, ACT, SLOPE, RESAMPLE,
                )  # fmt: skip
            z = tl.where(mask_x, z, 0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
            wt = tl.load(w_ptr + k * (R * S) + tap, mask=mask_k, other=0.0)
            acc += z * wt.to(tl.float32)[None, :]

        y = (acc + b[None, :]).to(y_ptr.dtype.element_ty)
        base_y = ((n * P + p0) * Q + q0) * K
        tl.store(y_ptr + base_y + offs_y, y, mask=mask_m[:, None] & mask_k[None, :])
        if parts_ptr is not None:
            pixels = tl.minimum(P - p0, BLOCK_P) * tl.minimum(Q - q0, BLOCK_Q)
            count, mean_y, m2_y = _join_tile(count, mean_y, m2_y, y.to(tl.float32), mask_m, pixels)
        if keep_ptr is not None:
            if tile_k == 0:
                _keep_tile(
                    keep_ptr, x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,
                    n, p0, q0, offs_p, offs_q, mask_m, H, W, C, ACT, SLOPE,
                )  # fmt: skip

    if parts_ptr is not None:
        _store_parts(parts_ptr, split, count, mean_y, m2_y, k, mask_k, K)


def conv2d_fwd_kernel_for(C: int, K: int, R: int, S: int, itemsize: int, plain_geometry: bool):
    """Return the kernel for a shape that is not depthwise.

    Rows where windows are short and few blocks of K reread x; plain_geometry says that stride and
    dilation are 1, groups too, and that one image is read, pixel by pixel. This counts bytes.
    TODO: decide by times, once the kernel benchmark has run both on a card.
    """
    fits = R == S == 3 and C <= 32 and K <= 64 and itemsize == 2
    return conv2d_fwd_rows_kernel if fits and plain_geometry else conv2d_fwd_kernel


def conv2d_fwd_variant(
    dtype: str,
    C: int,
    K: int,
    R: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    norm: bool = False,
    residual: bool = False,
    act: str = "none",
    resample: str = "none",
    channels2: int = 0,
    resample2: str = "none",
    moments: bool = False,
    keep: bool = False,
    bias: bool = False,
    precision: str = "ieee",
    tile_q: int = 32,
    config: triton.Config = CONFIGS[0],
) -> Variant:
    """Return an R x R convolution to compile ahead of time; dtype is "fp32", "fp16" or "bf16".

    norm, residual (with a norm of its own), moments and keep say what takes part. channels2 are
    those of a second image, which is normalised and activated as the first. A configuration of
    ROWS_CONFIGS or DEPTHWISE_CONFIGS asks for that kernel.
    """
    rows, depthwise = config in ROWS_CONFIGS, config in DEPTHWISE_CONFIGS
    kernel = conv2d_fwd_rows_kernel if rows else conv2d_fwd_kernel
    kernel = conv2d_fwd_depthwise_kernel if depthwise else kernel
    present = {
        "x_ptr": dtype,
        "norm_ptr": "fp32" if norm else None,
        "residual_ptr": dtype if residual else None,
        "residual_norm_ptr": "fp32" if residual else None,
        "w_ptr": dtype,
        "b_ptr": dtype if bias else None,
        "y_ptr": dtype,
        "parts_ptr": "fp32" if moments else None,
        "keep_ptr": dtype if keep else None,
    }
    sizes = ["H", "W", "P", "Q", "rows"] if rows else ["N", "H", "W", "P", "Q", "splits"]
    padding = dilation * (R // 2) if padding is None else padding
    constexprs = {"C": C, "K": K, "R": R, "S": R, "PAD_H": padding, "PAD_W": padding}
    constexprs |= {"ACT": act, "SLOPE": 0.01}
    if not depthwise:
        constexprs |= {"PRECISION": precision, "WIDEN": False}
    if not rows:
        constexprs |= {"STRIDE_H": stride, "STRIDE_W": stride, "DIL_H": dilation, "DIL_W": dilation}
        constexprs |= {"RESAMPLE": resample, "TILE_Q": tile_q}
    if not rows and not depthwise:
        present["x2_ptr"] = dtype if channels2 else None
        present["norm2_ptr"] = "fp32" if channels2 and norm else None
        sizes += ["H2", "W2"]
        constexprs |= {"C2": channels2, "GROUPS": groups}
        constexprs |= {"ACT2": act, "SLOPE2": 0.01, "RESAMPLE2": resample2}
    signature = {name: f"*{type_}" for name, type_ in present.items() if type_}
    signature |= dict.fromkeys(sizes, "i32")
    constexprs |= {name: None for name, type_ in present.items() if not type_}
    return Variant(kernel, signature, constexprs, config)
