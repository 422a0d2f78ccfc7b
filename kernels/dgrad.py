"""Device code for the gradient of the input of a two-dimensional convolution of NHWC images.

    dz[n, h, w, c] = sum over taps r, s and k of dy[n, p, q, k] * weight[k, r, s, c],
                     h = p STRIDE_H - PAD_H + r DIL_H,   w = q STRIDE_W - PAD_W + s DIL_W,
                     k of the group of c,   dy = 0 outside its image;
    g[n, h, w, c]  = act'(pre) * (dz + add)

A transposed convolution is the sum alone, plus a bias for each c. dy is made of the stored gradient
and output while they are loaded, by the coefficients of batch normalisation's backward, and rounded
to its type before the product; pre = norm(x) + residual_norm(residual) is made again in the
epilogue; kernels/fuse.py has both. g is rounded once, and what batch normalisation's backward needs
next, the sums of g, g (x - mean) and g (residual - mean) over pixels, is taken of the rounded g.

y, dy: [N, P, Q, K]; x, residual, add, g: [N, H, W, C]; all dense and row-major, so they are torch's
[N, C, H, W] in channels_last. Norms are float32 [4, C], coefficients float32 [4, K].

Strides by phases. With h' = h + PAD_H = i STRIDE_H + a, the taps that meet a row are those with
r DIL_H = a modulo STRIDE_H: every STEP_H-th from a first one on, STEP_H = STRIDE_H / gcd(STRIDE_H,
DIL_H), and a tap further is DIL_H / gcd rows of dy less. So each of STRIDE_H x STRIDE_W phases
(a, b) is a dense convolution of dy at stride 1, of the pixels (i, j), and no product meets a zero
that a stride has put in. A phase without taps gets zeros, through the epilogue.

Few channels fill a product: a phase's taps s and the channels k of dy meet taps*KG values of a
row of dy, the *window* of a pixel, indexed by j = t*KG + k with s = first + t STEP_W. The
weight is laid out once for that, [R, STEP_W, GROUPS, CG, J]. Where every phase b reads the same
window (the stride divides the filter's width, as 2 x 2 at stride 2), the phases are columns of one
product: dy is read once for them, and what is written is consecutive.

- conv2d_dgrad_kernel, for every shape: a program owns one phase, BLOCK_N columns and every
  `strips`-th tile of BLOCK_P x BLOCK_Q pixels, which it takes one after another; programs that run
  at the same time work side by side, so that they find each other's halo in L2.
- conv2d_dgrad_rows_kernel, for 3 x S at stride 1 whose window fits a step and C up to 32: a program
  rolls down a strip of STRIP_WIDTH columns with the whole filter in shared memory. A row of windows
  is read once for the three rows of dz that it belongs to; two unfinished ones wait in registers,
  as do the sums, one a lane. From 48 channels on filter and window no longer fit beside them.
- conv2d_dgrad_depthwise_kernel, for groups of one input channel, whose products would be empty.

Sums of a program's pixels make one row of parts, which ops/norm.py adds in a tree: no atomics, the
same bits every time, and at most 4,096 rows an image or batch however large.

Work at 2-byte elements: 2*N*P*Q*K*R*S*CG FLOP over 2*(N*P*Q*K + N*H*W*C) bytes, and as much again
as y, x, residual and add hold where they take part: 72 FLOP a byte for 3 x 3 at 16 -> 16 channels
plain, 36 with y and x; 144 and 72 at 32, 288 and 144 at 64. An H200 turns from memory to arithmetic
at 184, so that up to 64 channels the fused gradient should run at the speed of a copy.
"""

import math

import triton
import triton.language as tl

from ._tune import autotune
from .aot import Variant
from .fuse import activate_backward, load_coefficients, load_dy, load_norm
from .wgrad import fit

STRIPS = 4096  # programs, each with a row of parts: a few waves of any device
SHORTEST = 256  # pixels of a strip: below, it costs less than starting it
STRIP_WIDTH = tl.constexpr(64)  # columns of a strip of the rows kernel
FEWEST_ROWS, MOST_ROWS = 16, 256  # of it; it reads two rows of dy more
SIZES = ("N", "H", "W", "P", "Q", "strips", "rows")  # one kernel compiled serves all images


def _config(BLOCK_M, MAX_J, MAX_N, **options):
    """Return a configuration; MAX_J counts 2-byte elements, wider ones take fewer a step."""
    return triton.Config({"BLOCK_M": BLOCK_M, "MAX_J": MAX_J, "MAX_N": MAX_N}, **options)


CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    _config(128, MAX_J=32, MAX_N=64, num_warps=8, num_stages=2),
    _config(64, MAX_J=64, MAX_N=64, num_warps=4, num_stages=3),
    _config(128, MAX_J=64, MAX_N=128, num_warps=8, num_stages=3),
    # One stage: no asynchronous copies, which pass L1 by and fetch each window anew from L2.
    _config(128, MAX_J=64, MAX_N=64, num_warps=8, num_stages=1),
    _config(128, MAX_J=128, MAX_N=64, num_warps=8, num_stages=1),
]
ROWS_CONFIGS = [
    triton.Config({"MAX_N": 16}, num_warps=4, num_stages=2),
    triton.Config({"MAX_N": 16}, num_warps=4, num_stages=1),
    # At 32 channels for Hopper, whose tensor cores read the filter from shared memory: elsewhere it
    # fills registers.
    triton.Config({"MAX_N": 32}, num_warps=8, num_stages=2),
    triton.Config({"MAX_N": 32}, num_warps=8, num_stages=1),
]
DEPTHWISE_CONFIGS = [
    triton.Config({"BLOCK_M": 32, "MAX_N": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_M": 64, "MAX_N": 64}, num_warps=4, num_stages=2),
]


@triton.constexpr_function
def step_of(stride: int, dilation: int) -> int:
    """Return how many taps further the next one of a phase is."""
    return stride // math.gcd(stride, dilation)


@triton.constexpr_function
def merges(S: int, stride: int, dilation: int, groups: int) -> bool:
    """Return whether all phases of a row read the same window, and so are columns of a product."""
    return stride > 1 and dilation == 1 and groups == 1 and S % stride == 0


def tile_width(rows: int, columns: int, pixels: int = 128) -> int:
    """Return how many columns a tile should have for few tiles to cover an image."""
    covered = {
        width: triton.cdiv(columns, width) * triton.cdiv(rows, pixels // width)
        for width in (32, 16, 64, 128, 8)  # the nearer to a square, the smaller the halo
    }
    return min(covered, key=covered.get)


def phase_size(H: int, W: int, stride: tuple, padding: tuple) -> tuple[int, int]:
    """Return how many rows and columns of pixels the largest phase has."""
    axes = zip((H, W), stride, padding, strict=True)
    rows, columns = ((size - 1 + pad) // step - pad // step + 1 for size, step, pad in axes)
    return rows, columns


def conv2d_dgrad_strips(pixels: int, phases: int) -> int:
    """Return how many strips a phase of that many pixels is cut into."""
    return max(1, min(STRIPS // phases, triton.cdiv(pixels, SHORTEST)))


def conv2d_dgrad_grid(C: int, S: int, stride: tuple, dilation: tuple, groups: int, strips: int):
    """Return any kernel's launch grid but that of rows; one axis, for others stop at 65,535."""

    def grid(meta):
        if "MAX_J" not in meta:
            return (strips * triton.cdiv(C, fit(meta["MAX_N"], C)) * stride[0] * stride[1],)
        columns, phases = C // groups, stride[0] * stride[1]
        if merges(S, stride[1], dilation[1], groups):
            columns, phases = C * stride[1], stride[0]
        return (strips * triton.cdiv(columns, fit(meta["MAX_N"], columns)) * groups * phases,)

    return grid


def conv2d_dgrad_rolls(C: int, K: int, taps: tuple, itemsize: int) -> bool:
    """Return whether the rows kernel takes a shape of stride and dilation 1 and one group.

    Its window must fit a step, and its filter shared memory; more blocks of C would reread dy. This
    counts bytes. TODO: decide by times, once `fullres bench kernels` has run both on a card.
    """
    return taps[0] == 3 and taps[1] * K * itemsize <= 256 and C <= 32


def conv2d_dgrad_rows(N: int, H: int, W: int) -> int:
    """Return how many rows a strip of the rows kernel has."""
    rows = triton.cdiv(N * triton.cdiv(W, STRIP_WIDTH.value) * H, STRIPS)
    return max(FEWEST_ROWS, min(MOST_ROWS, rows))


def conv2d_dgrad_rows_strips(N: int, H: int, W: int, rows: int) -> int:
    """Return how many strips, of a row of parts each, the rows kernel makes."""
    return N * triton.cdiv(H, rows) * triton.cdiv(W, STRIP_WIDTH.value)


def conv2d_dgrad_rows_grid(C: int, strips: int):
    """Return the rows kernel's launch grid."""
    return lambda meta: (strips * triton.cdiv(C, fit(meta["MAX_N"], C)),)


@triton.jit
def _first_tap(phase, STRIDE: tl.constexpr, DIL: tl.constexpr, TAPS: tl.constexpr):
    """Return the first tap of a phase, or TAPS where it has none."""
    STEP: tl.constexpr = step_of(STRIDE, DIL)
    if STRIDE == 1:
        return 0
    first = TAPS
    for tap in tl.static_range(min(STEP, TAPS)):
        first = tl.where(tap * DIL % STRIDE == phase, tap, first)
    return first


@triton.jit
def _norms(norm_ptr, residual_norm_ptr, c, mask_c, C):
    """Return mean, scale and shift of both norms at channels c; 0 of one that is None."""
    mean, scale, shift = 0.0, 0.0, 0.0
    mean_r, scale_r, shift_r = 0.0, 0.0, 0.0
    if norm_ptr is not None:
        mean, scale, shift = load_norm(norm_ptr, c, mask_c, C)
    if residual_norm_ptr is not None:
        mean_r, scale_r, shift_r = load_norm(residual_norm_ptr, c, mask_c, C)
    return mean, scale, shift, mean_r, scale_r, shift_r


@triton.jit
def _finish(
    acc, offs, mask, base,  # dz; where it belongs, from base on
    g_ptr, add_ptr, x_ptr, residual_ptr,
    mean, scale, shift, mean_r, scale_r, shift_r,
    NORM: tl.constexpr, RESIDUAL_NORM: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Store act'(pre) * (acc + add), rounded; return what its three sums add up."""
    if add_ptr is not None:
        acc += tl.load(add_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
    if SUMS or ACT != "none":
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
        pre = x
        if NORM:
            x -= mean  # centred, as both the normalisation and the sums take it
            pre = x * scale + shift
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
            if RESIDUAL_NORM:
                residual -= mean_r
                pre += residual * scale_r + shift_r
            else:
                pre += residual
        acc = activate_backward(acc, pre, ACT, SLOPE)
    g = acc.to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + base + offs, g, mask=mask)
    g = tl.where(mask, g.to(tl.float32), 0.0)
    gx = g
    gr = g
    if SUMS:
        gx = tl.where(mask, g * x, 0.0)  # off the mask g is 0, but x is -mean
        if residual_ptr is not None:
            gr = tl.where(mask, g * residual, 0.0)
    return g, gx, gr


@triton.jit
def _store_sums(
    parts_ptr, row, c, mask, sum_g, sum_gx, sum_gr, C: tl.constexpr, RESIDUAL: tl.constexpr
):  # fmt: skip
    """Write sums of channels c into a row of parts [T, 3, C]."""
    parts_ptr += row * 3 * C + c
    tl.store(parts_ptr, sum_g, mask=mask)
    tl.store(parts_ptr + C, sum_gx, mask=mask)
    tl.store(parts_ptr + 2 * C, sum_gr if RESIDUAL else tl.zeros_like(sum_g), mask=mask)


@autotune(
    CONFIGS,
    key=["C", "K", "R", "S", "STRIDE_W", "GROUPS", "TILE_Q", "PRECISION", "ACT"],
)
@triton.jit(do_not_specialize=SIZES[:-1])
def conv2d_dgrad_kernel(
    dy_ptr, y_ptr, coef_ptr,  # [N, P, Q, K], as dy or None, [4, K] or None
    w_ptr,  # [R, STEP_W, GROUPS, CG, J]
    g_ptr, bias_ptr, add_ptr,  # [N, H, W, C], [C] or None, as g or None
    x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,  # as g, [4, C]; each or None
    parts_ptr,  # [strips * STRIDE_H * STRIDE_W, 3, C] float32, or None
    N, H, W, P, Q, strips,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, GROUPS: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    TILE_Q: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    WIDEN: tl.constexpr,  # multiply in float32: for the interpreter, whose bfloat16 dot is wrong
    BLOCK_M: tl.constexpr, MAX_J: tl.constexpr, MAX_N: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_N columns of one phase of g, and a row of parts: every strips-th tile."""
    BITS: tl.constexpr = dy_ptr.dtype.element_ty.primitive_bitwidth
    BLOCK_Q: tl.constexpr = fit(BLOCK_M, TILE_Q, 1)
    BLOCK_P: tl.constexpr = BLOCK_M // BLOCK_Q
    CG: tl.constexpr = C // GROUPS
    KG: tl.constexpr = K // GROUPS
    STEP_H: tl.constexpr = step_of(STRIDE_H, DIL_H)
    STEP_W: tl.constexpr = step_of(STRIDE_W, DIL_W)
    BACK_H: tl.constexpr = DIL_H * STEP_H // STRIDE_H  # rows of dy that a tap further is above
    BACK_W: tl.constexpr = DIL_W * STEP_W // STRIDE_W
    J: tl.constexpr = triton.cdiv(S, STEP_W) * KG
    MERGE: tl.constexpr = merges(S, STRIDE_W, DIL_W, GROUPS)
    COLUMNS: tl.constexpr = C * STRIDE_W if MERGE else CG
    PHASES_W: tl.constexpr = 1 if MERGE else STRIDE_W
    BLOCK_J: tl.constexpr = fit(MAX_J * 16 // BITS, J)
    BLOCK_N: tl.constexpr = fit(MAX_N, COLUMNS)
    TILES_N: tl.constexpr = triton.cdiv(COLUMNS, BLOCK_N)
    RESIDUAL: tl.constexpr = residual_ptr is not None
    COEF: tl.constexpr = coef_ptr is not None
    SUMS: tl.constexpr = parts_ptr is not None

    # The phase fastest, the strip slowest: what shares dy, or lines of g, runs at about one time.
    pid = tl.program_id(0)
    b = pid % PHASES_W
    a = pid // PHASES_W % STRIDE_H
    tile_n = pid // (PHASES_W * STRIDE_H) % TILES_N
    group = pid // (PHASES_W * STRIDE_H * TILES_N) % GROUPS
    strip = pid // (PHASES_W * STRIDE_H * TILES_N * GROUPS)

    # A tap t of the phase is r = first_r + t STEP_H, and meets row i + row - t BACK_H of dy.
    first_r = _first_tap(a, STRIDE_H, DIL_H, R)
    first_s = _first_tap(b, STRIDE_W, DIL_W, S)  # merged: of b = 0, and all others' steps are its
    taps_h = (R - first_r + STEP_H - 1) // STEP_H
    taps_w = (S - first_s + STEP_W - 1) // STEP_W
    row = (a - first_r * DIL_H) // STRIDE_H  # exact, but for a phase without taps
    column = (b - first_s * DIL_W) // STRIDE_W
    steps_j = (taps_w * KG + BLOCK_J - 1) // BLOCK_J
    steps = taps_h * steps_j
    if STRIDE_W > 1:
        w_ptr += tl.minimum(first_s, STEP_W - 1) * (C * J)  # a phase without taps reads nothing

    offs_m = tl.arange(0, BLOCK_M)
    offs_p = offs_m // BLOCK_Q
    offs_q = offs_m % BLOCK_Q
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < COLUMNS
    c = group * CG + offs_n
    phase = b
    if MERGE:
        c = offs_n % C
        phase = offs_n // C

    tiles_p = ((H - 1 + PAD_H) // STRIDE_H - PAD_H // STRIDE_H + BLOCK_P) // BLOCK_P
    tiles_q = ((W - 1 + PAD_W) // STRIDE_W - PAD_W // STRIDE_W + BLOCK_Q) // BLOCK_Q
    tiles = N * tiles_p * tiles_q

    # Offsets inside a tile are int32: the op refuses images in which they might pass 2**31.
    offs_dy = (offs_p * Q + offs_q)[:, None] * K
    offs_w = (group * CG + offs_n)[None, :] * J
    offs_g = (offs_p * (STRIDE_H * W) + offs_q * STRIDE_W)[:, None] * C
    if MERGE:
        offs_g += offs_n[None, :]
    else:
        offs_g += (b * C + c)[None, :]

    sum_g = tl.zeros((BLOCK_N,), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), dtype=tl.float32)
    sum_gr = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for tile in range(strip, tiles, strips):
        j0 = tile % tiles_q * BLOCK_Q + PAD_W // STRIDE_W
        i0 = tile // tiles_q % tiles_p * BLOCK_P + PAD_H // STRIDE_H
        n = (tile // tiles_q // tiles_p).to(tl.int64)  # N*H*W*C may pass 2**31

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            t = step // steps_j
            offs_j = step % steps_j * BLOCK_J + tl.arange(0, BLOCK_J)
            mask_j = offs_j < taps_w * KG
            u = offs_j // KG
            k = group * KG + offs_j % KG
            mean_y, coef_a, coef_b, coef_d = 0.0, 0.0, 0.0, 0.0
            if COEF:
                mean_y, coef_a, coef_b, coef_d = load_coefficients(coef_ptr, k, mask_j, K)

            p0 = i0 + row - t * BACK_H
            p = p0 + offs_p
            q = j0 + column + offs_q[:, None] - (u * BACK_W)[None, :]
            mask_dy = ((p >= 0) & (p < P))[:, None] & (q >= 0) & (q < Q) & mask_j[None, :]
            base_dy = ((n * P + p0) * Q + j0 + column) * K
            dy = load_dy(
                dy_ptr + base_dy, y_ptr + base_dy if COEF else y_ptr,
                offs_dy + (k - u * (BACK_W * K))[None, :], mask_dy,
                mean_y, coef_a, coef_b, coef_d, COEF,
            )  # fmt: skip

            r = first_r + t * STEP_H
            wt = tl.load(
                w_ptr + r * (STEP_W * C * J) + offs_w + offs_j[:, None],
                mask=mask_j[:, None] & mask_n[None, :], other=0.0,
            )  # fmt: skip
            if WIDEN:
                dy = dy.to(tl.float32)
                wt = wt.to(tl.float32)
            acc = tl.dot(dy, wt, acc, input_precision=PRECISION)

        h0 = i0 * STRIDE_H + a - PAD_H
        w0 = j0 * STRIDE_W - PAD_W
        h = h0 + offs_p * STRIDE_H
        w = w0 + offs_q[:, None] * STRIDE_W + phase
        mask_g = ((h >= 0) & (h < H))[:, None] & (w >= 0) & (w < W) & mask_n[None, :]
        base_g = ((n * H + h0) * W + w0) * C
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + c, mask=mask_n, other=0.0).to(tl.float32)
        # Norms are loaded for each tile: to keep them would take registers from the product.
        mean, scale, shift, mean_r, scale_r, shift_r = _norms(
            norm_ptr, residual_norm_ptr, c, mask_n, C
        )
        g, gx, gr = _finish(
            acc, offs_g, mask_g, base_g, g_ptr, add_ptr, x_ptr, residual_ptr,
            mean, scale, shift, mean_r, scale_r, shift_r,
            norm_ptr is not None, residual_norm_ptr is not None, ACT, SLOPE, SUMS,
        )  # fmt: skip
        if SUMS:
            sum_g += tl.sum(g, 0)
            sum_gx += tl.sum(gx, 0)
            if RESIDUAL:
                sum_gr += tl.sum(gr, 0)
    if SUMS:
        part = (strip * STRIDE_H + a).to(tl.int64) * STRIDE_W + phase
        _store_sums(parts_ptr, part, c, mask_n, sum_g, sum_gx, sum_gr, C, RESIDUAL)


@autotune(ROWS_CONFIGS, key=["C", "K", "S", "ACT"])
@triton.jit(do_not_specialize=SIZES)
def conv2d_dgrad_rows_kernel(
    dy_ptr, y_ptr, coef_ptr,  # as above
    w_ptr,  # [R, C, S*K]
    g_ptr, add_ptr, x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,
    parts_ptr,  # [strips, 3, C] float32, or None
    H, W, P, Q, rows,  # rows: of a strip
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    MAX_N: tl.constexpr,
):  # fmt: skip
    """Write a [rows, STRIP_WIDTH, BLOCK_N] strip of g, row by row, and its row of parts."""
    tl.static_assert(R == 3)
    BLOCK_J: tl.constexpr = fit(128, S * K)
    tl.static_assert(BLOCK_J >= S * K)
    BLOCK_N: tl.constexpr = fit(MAX_N, C)
    TILES_N: tl.constexpr = triton.cdiv(C, BLOCK_N)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL: tl.constexpr = residual_ptr is not None
    RESIDUAL_NORM: tl.constexpr = residual_norm_ptr is not None
    COEF: tl.constexpr = coef_ptr is not None
    SUMS: tl.constexpr = parts_ptr is not None
    tiles_h = (H + rows - 1) // rows
    tiles_w = (W + STRIP_WIDTH - 1) // STRIP_WIDTH

    # c fastest, then w, h, n: programs that share pixels or halos run at about the same time.
    pid = tl.program_id(0)
    strip = pid // TILES_N
    w0 = strip % tiles_w * STRIP_WIDTH
    h0 = strip // tiles_w % tiles_h * rows
    n = (strip // tiles_w // tiles_h).to(tl.int64)  # N*H*W*C may pass 2**31
    height = tl.minimum(rows, H - h0)  # of this strip

    offs_q = tl.arange(0, STRIP_WIDTH)
    offs_j = tl.arange(0, BLOCK_J)
    c = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_j = offs_j < S * K
    mask_n = c < C
    s = offs_j // K
    k = offs_j % K

    offs_w = c[None, :] * (S * K) + offs_j[:, None]
    mask_wt = mask_j[:, None] & mask_n[None, :]
    wt0 = tl.load(w_ptr + offs_w, mask=mask_wt, other=0.0)
    wt1 = tl.load(w_ptr + C * S * K + offs_w, mask=mask_wt, other=0.0)
    wt2 = tl.load(w_ptr + 2 * C * S * K + offs_w, mask=mask_wt, other=0.0)
    if WIDEN:
        wt0 = wt0.to(tl.float32)
        wt1 = wt1.to(tl.float32)
        wt2 = wt2.to(tl.float32)
    mean_y, coef_a, coef_b, coef_d = 0.0, 0.0, 0.0, 0.0
    if COEF:
        mean_y, coef_a, coef_b, coef_d = load_coefficients(coef_ptr, k, mask_j, K)
    mean, scale, shift, mean_r, scale_r, shift_r = _norms(norm_ptr, residual_norm_ptr, c, mask_n, C)

    # Both bases advance by a row a step; g's lags by the rows of dy that it still waits for.
    base_dy = ((n * P + h0 + PAD_H - 2) * Q + w0 + PAD_W) * K
    base_g = ((n * H + h0 - 2) * W + w0) * C
    q = w0 + PAD_W + offs_q[:, None] - s[None, :]
    mask_window = (q >= 0) & (q < Q) & mask_j[None, :]
    offs_dy = offs_q[:, None] * K + (k - s * K)[None, :]
    mask_g = (w0 + offs_q < W)[:, None] & mask_n[None, :]
    offs_g = offs_q[:, None] * C + c[None, :]

    sum_g = tl.zeros((STRIP_WIDTH, BLOCK_N), dtype=tl.float32)  # a sum a lane; they meet at the end
    sum_gx = tl.zeros((STRIP_WIDTH, BLOCK_N), dtype=tl.float32)
    sum_gr = tl.zeros((STRIP_WIDTH, BLOCK_N), dtype=tl.float32)
    acc1 = tl.zeros((STRIP_WIDTH, BLOCK_N), dtype=tl.float32)  # a row of dz that has met r = 2
    acc2 = tl.zeros((STRIP_WIDTH, BLOCK_N), dtype=tl.float32)  # the row above it, also r = 1
    for step in range(height + 2):
        p = h0 + PAD_H - 2 + step
        dy = load_dy(
            dy_ptr + base_dy, y_ptr + base_dy if COEF else y_ptr,
            offs_dy, mask_window & (p >= 0) & (p < P), mean_y, coef_a, coef_b, coef_d, COEF,
        )  # fmt: skip
        if WIDEN:
            dy = dy.to(tl.float32)
        acc = tl.dot(dy, wt0, acc2, input_precision=PRECISION)
        acc2 = tl.dot(dy, wt1, acc1, input_precision=PRECISION)
        acc1 = tl.dot(dy, wt2, input_precision=PRECISION)

        # The first two steps finish rows of the strip above, which writes them.
        g, gx, gr = _finish(
            acc, offs_g, mask_g & (step > 1), base_g, g_ptr, add_ptr, x_ptr, residual_ptr,
            mean, scale, shift, mean_r, scale_r, shift_r,
            NORM, RESIDUAL_NORM, ACT, SLOPE, SUMS,
        )  # fmt: skip
        if SUMS:
            sum_g += g
            sum_gx += gx
            if RESIDUAL:
                sum_gr += gr
        base_dy += Q * K
        base_g += W * C
    if SUMS:
        _store_sums(
            parts_ptr, strip.to(tl.int64), c, mask_n,
            tl.sum(sum_g, 0), tl.sum(sum_gx, 0), tl.sum(sum_gr, 0), C, RESIDUAL,
        )  # fmt: skip


@autotune(DEPTHWISE_CONFIGS, key=["C", "K", "R", "S", "STRIDE_W", "TILE_Q", "ACT"])
@triton.jit(do_not_specialize=SIZES[:-1])
def conv2d_dgrad_depthwise_kernel(
    dy_ptr, y_ptr, coef_ptr,  # as above; GROUPS = C
    w_ptr,  # [R, S, K]
    g_ptr, bias_ptr, add_ptr, x_ptr, norm_ptr, residual_ptr, residual_norm_ptr, parts_ptr,
    N, H, W, P, Q, strips,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, MAX_N: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_N channels of one phase of g, and a row of parts: every strips-th tile."""
    BLOCK_Q: tl.constexpr = fit(BLOCK_M, TILE_Q, 1)
    BLOCK_P: tl.constexpr = BLOCK_M // BLOCK_Q
    KG: tl.constexpr = K // C
    STEP_H: tl.constexpr = step_of(STRIDE_H, DIL_H)
    STEP_W: tl.constexpr = step_of(STRIDE_W, DIL_W)
    BACK_H: tl.constexpr = DIL_H * STEP_H // STRIDE_H
    BACK_W: tl.constexpr = DIL_W * STEP_W // STRIDE_W
    BLOCK_N: tl.constexpr = fit(MAX_N, C)
    TILES_N: tl.constexpr = triton.cdiv(C, BLOCK_N)
    RESIDUAL: tl.constexpr = residual_ptr is not None
    COEF: tl.constexpr = coef_ptr is not None
    SUMS: tl.constexpr = parts_ptr is not None

    pid = tl.program_id(0)
    b = pid % STRIDE_W
    a = pid // STRIDE_W % STRIDE_H
    tile_n = pid // (STRIDE_W * STRIDE_H) % TILES_N
    strip = pid // (STRIDE_W * STRIDE_H * TILES_N)

    first_r = _first_tap(a, STRIDE_H, DIL_H, R)
    first_s = _first_tap(b, STRIDE_W, DIL_W, S)
    taps_h = (R - first_r + STEP_H - 1) // STEP_H
    taps_w = (S - first_s + STEP_W - 1) // STEP_W
    row = (a - first_r * DIL_H) // STRIDE_H
    column = (b - first_s * DIL_W) // STRIDE_W
    steps = taps_h * taps_w * KG

    offs_m = tl.arange(0, BLOCK_M)
    offs_p = offs_m // BLOCK_Q
    offs_q = offs_m % BLOCK_Q
    c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = c < C

    tiles_p = ((H - 1 + PAD_H) // STRIDE_H - PAD_H // STRIDE_H + BLOCK_P) // BLOCK_P
    tiles_q = ((W - 1 + PAD_W) // STRIDE_W - PAD_W // STRIDE_W + BLOCK_Q) // BLOCK_Q
    tiles = N * tiles_p * tiles_q
    offs_dy = (offs_p * Q + offs_q)[:, None] * K + (c * KG)[None, :]
    offs_g = (offs_p * (STRIDE_H * W) + offs_q * STRIDE_W)[:, None] * C + (b * C + c)[None, :]

    sum_g = tl.zeros((BLOCK_N,), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), dtype=tl.float32)
    sum_gr = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for tile in range(strip, tiles, strips):
        j0 = tile % tiles_q * BLOCK_Q + PAD_W // STRIDE_W
        i0 = tile // tiles_q % tiles_p * BLOCK_P + PAD_H // STRIDE_H
        n = (tile // tiles_q // tiles_p).to(tl.int64)

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            kk = step % KG
            u = step // KG % taps_w
            t = step // KG // taps_w
            k = c * KG + kk
            mean_y, coef_a, coef_b, coef_d = 0.0, 0.0, 0.0, 0.0
            if COEF:
                mean_y, coef_a, coef_b, coef_d = load_coefficients(coef_ptr, k, mask_n, K)
            p0 = i0 + row - t * BACK_H
            q0 = j0 + column - u * BACK_W
            p = p0 + offs_p
            q = q0 + offs_q
            mask_m = (p >= 0) & (p < P) & (q >= 0) & (q < Q)
            base_dy = ((n * P + p0) * Q + q0) * K + kk
            dy = load_dy(
                dy_ptr + base_dy, y_ptr + base_dy if COEF else y_ptr,
                offs_dy, mask_m[:, None] & mask_n[None, :],
                mean_y, coef_a, coef_b, coef_d, COEF,
            )  # fmt: skip
            tap = (first_r + t * STEP_H) * S + first_s + u * STEP_W
            wt = tl.load(w_ptr + tap * K + k, mask=mask_n, other=0.0).to(tl.float32)
            acc += tl.where(mask_m[:, None], dy.to(tl.float32) * wt[None, :], 0.0)

        h0 = i0 * STRIDE_H + a - PAD_H
        w0 = j0 * STRIDE_W - PAD_W
        h = h0 + offs_p * STRIDE_H
        w = w0 + offs_q * STRIDE_W + b
        mask_g = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & mask_n[None, :]
        base_g = ((n * H + h0) * W + w0) * C
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + c, mask=mask_n, other=0.0).to(tl.float32)
        # Norms are loaded for each tile: to keep them would take registers from the product.
        mean, scale, shift, mean_r, scale_r, shift_r = _norms(
            norm_ptr, residual_norm_ptr, c, mask_n, C
        )
        g, gx, gr = _finish(
            acc, offs_g, mask_g, base_g, g_ptr, add_ptr, x_ptr, residual_ptr,
            mean, scale, shift, mean_r, scale_r, shift_r,
            norm_ptr is not None, residual_norm_ptr is not None, ACT, SLOPE, SUMS,
        )  # fmt: skip
        if SUMS:
            sum_g += tl.sum(g, 0)
            sum_gx += tl.sum(gx, 0)
            if RESIDUAL:
                sum_gr += tl.sum(gr, 0)
    if SUMS:
        part = (strip * STRIDE_H + a).to(tl.int64) * STRIDE_W + b
        _store_sums(parts_ptr, part, c, mask_n, sum_g, sum_gx, sum_gr, C, RESIDUAL)


def conv2d_dgrad_variant(
    dtype: str,
    C: int,
    K: int,
    R: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    coef: bool = False,
    norm: bool = False,
    residual: bool = False,
    bias: bool = False,
    add: bool = False,
    act: str = "none",
    sums: bool = False,
    precision: str = "ieee",
    tile_q: int = 32,
    config: triton.Config = CONFIGS[0],
) -> Variant:
    """Return the input gradient of an R x R convolution, to compile ahead of time.

    dtype is "fp32", "fp16" or "bf16"; coef, norm, residual (with a norm of its own), bias and add
    say what takes part. A configuration of DEPTHWISE_CONFIGS or ROWS_CONFIGS asks for that kernel.
    """
    kernel = conv2d_dgrad_kernel
    if config in DEPTHWISE_CONFIGS:
        kernel = conv2d_dgrad_depthwise_kernel
    elif config in ROWS_CONFIGS:
        kernel = conv2d_dgrad_rows_kernel
    present = {
        "dy_ptr": dtype,
        "y_ptr": dtype if coef else None,
        "coef_ptr": "fp32" if coef else None,
        "w_ptr": dtype,
        "g_ptr": dtype,
        "bias_ptr": dtype if bias else None,
        "add_ptr": dtype if add else None,
        "x_ptr": dtype if sums or act != "none" else None,
        "norm_ptr": "fp32" if norm else None,
        "residual_ptr": dtype if residual else None,
        "residual_norm_ptr": "fp32" if residual else None,
        "parts_ptr": "fp32" if sums else None,
    }
    padding = R // 2 if padding is None else padding
    constexprs = {name: None for name, type_ in present.items() if not type_}
    constexprs |= {"C": C, "K": K, "R": R, "S": R, "STRIDE_H": stride, "STRIDE_W": stride}
    constexprs |= {"PAD_H": padding, "PAD_W": padding, "DIL_H": 1, "DIL_W": 1, "GROUPS": groups}
    constexprs |= {"ACT": act, "SLOPE": 0.01, "TILE_Q": tile_q}
    constexprs |= {"PRECISION": precision, "WIDEN": False}
    names = kernel.fn.arg_names
    signature = {name: f"*{type_}" for name, type_ in present.items() if type_ and name in names}
    signature |= {name: "i32" for name in SIZES if name in names}
    constexprs = {name: value for name, value in constexprs.items() if name in names}
    return Variant(kernel, signature, constexprs, config)
