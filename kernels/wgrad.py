"""Device code for the gradient of the weight of a two-dimensional convolution of NHWC images.

    dw[k, r, s, c] = sum over n < N, p < P, q < Q of dy[n, p, q, k] *
                     z[n, p STRIDE_H - PAD_H + r DIL_H, q STRIDE_W - PAD_W + s DIL_W, c0 + c]
    db[k]          = sum over n, p, q of dy[n, p, q, k]

    0 <= c < CG = C / GROUPS,   c0 = CG * (the group of k),   z = 0 outside its image.

z and dy are made of what is stored while they are loaded, as kernels/fuse.py says: z of x, which
may be normalised, joined by a residual, activated, pooled or enlarged; dy of g and y by the
coefficients of batch normalisation's backward. Both are rounded to x's type before the product.

x, residual: [N, H, W, C]; g, y: [N, P, Q, K]; dw: [K, R, S, CG]; all dense and row-major, so they
are torch's [N, C, H, W] and [K, CG, R, S] in channels_last. Norms are float32 [4, C], coefficients
float32 [4, K].

Few channels fill a product: the taps s and channels c of a filter row meet S*C consecutive values
of x, the *window* of a pixel, indexed by j = s*CG + c. A tile is dw[r, j, k] = z[pixel, j]^T times
dy[pixel, k]: j takes the rows of the product, which tensor cores want in 64s, and k its columns,
which they take in 8s. So 3x3 at 16 -> 16 channels is 48 x 16 in 64 x 16, not nine of 16 x 16.

How sums stay exact. N*P*Q may be 2e7; a plain float32 sum of that length has lost half its digits,
and tensor cores truncate as they add, so that their errors don't even cancel. Therefore no sum is
longer than CHAIN pixels. They are cut into that many ranges, or into more where that fills the
device; each range writes its sum to a row of its own, and sum_parts_kernel adds the rows, FAN_IN at
a time, level by level. The error is that of CHAIN terms and of log(rows) / log(FAN_IN) levels, of
which one more comes with 32 times the pixels. A program owns what it writes and each level has one
order: the same bits every time, without atomics.

- conv2d_wgrad_kernel, for every shape: a program owns a range of pixels, one r, BLOCK_J values of
  the window and BLOCK_K channels, and walks tiles of BLOCK_P x BLOCK_Q pixels. A filter of up to 64
  values is taken whole: its rows follow each other in j, and x and dy are fetched once. Programs of
  one range are neighbours, so that what they read up to R*S*C/BLOCK_J times comes from L2.
- conv2d_wgrad_depthwise_kernel, for groups of one input channel, whose products would be empty:
  no tensor cores, a multiplication and an addition for each value and tap.
- sum_parts_kernel, one level of the tree.

3x3 filters of few channels are wgrad_rows.py's, which fetches x and dy for all taps at once.

Work at 2-byte elements: 2*N*P*Q*K*R*S*CG FLOP over 2*(N*H*W*C + N*P*Q*K) bytes, and those of y and
of the residual where they take part: 72 FLOP a byte for 3x3 at 16 -> 16 channels, 144 at 32, 288 at
64; with coefficients a third less, for y is read too.
"""

import triton
import triton.language as tl

from ._tune import autotune
from .aot import Variant
from .conv import filter_rows
from .fuse import load_activated, load_coefficients, load_dy, load_norm, load_z, shared_use

CHAIN = 1 << 14  # pixels that one sum adds up; 1,024 additions of a tensor core's 16 products
FAN_IN = 32  # rows that one program of the tree adds
BLOCK_L = 128  # columns it adds
PROGRAMS = 512  # a few for each of a device's 100 to 300 processors, so that the last wave is short
SHORTEST = 512  # pixels: below, a range costs less than writing and adding its row of parts


def _config(BLOCK_M, MAX_J, MAX_K, **options):
    """Return a configuration; blocks count 2-byte elements, for wider ones BLOCK_M halves."""
    return triton.Config({"BLOCK_M": BLOCK_M, "MAX_J": MAX_J, "MAX_K": MAX_K}, **options)


CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    _config(64, MAX_J=64, MAX_K=64, num_warps=4, num_stages=2),
    _config(64, MAX_J=64, MAX_K=64, num_warps=4, num_stages=3),
    _config(64, MAX_J=128, MAX_K=64, num_warps=4, num_stages=3),
    _config(64, MAX_J=128, MAX_K=128, num_warps=8, num_stages=3),
    # One stage: no asynchronous copies, which pass L1 by and fetch each window anew from L2.
    _config(128, MAX_J=64, MAX_K=64, num_warps=4, num_stages=1),
]
DEPTHWISE_CONFIGS = [
    triton.Config({"BLOCK_M": 32, "MAX_K": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_M": 64, "MAX_K": 64}, num_warps=4, num_stages=3),
]


@triton.constexpr_function
def fit(most: int, needed: int, least: int = 16) -> int:
    """Return the power of two, least to most, that covers needed; tl.dot takes 16 or more."""
    return max(least, min(most, 1 << (needed - 1).bit_length()))


def tile_width(P: int, Q: int, pixels: int = 64) -> int:
    """Return how many columns a tile should have for few tiles to cover P x Q."""
    covered = {
        width: triton.cdiv(Q, width) * triton.cdiv(P, pixels // width) for width in (64, 32, 16, 8)
    }
    return min(covered, key=lambda width: (covered[width], -width))


def conv2d_wgrad_splits(pixels: int, blocks: int) -> int:
    """Return into how many ranges to cut the pixels, where each range takes `blocks` programs."""
    fill = min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(pixels, SHORTEST))
    return max(1, fill, triton.cdiv(pixels, CHAIN))


def conv2d_wgrad_blocks(
    C: int, K: int, R: int, S: int, groups: int, MAX_J: int | None, MAX_K: int
) -> int:
    """Return how many programs a range of pixels takes; MAX_J is None for the depthwise kernel."""
    if MAX_J is None:
        return triton.cdiv(K, fit(MAX_K, K)) * R * S
    rows = filter_rows(C, R, S, groups)
    window = rows * S * (C // groups)
    tiles_j = triton.cdiv(window, fit(MAX_J, window))
    return tiles_j * triton.cdiv(K // groups, fit(MAX_K, K // groups)) * (R // rows) * groups


def conv2d_wgrad_grid(C: int, K: int, R: int, S: int, groups: int, splits: int):
    """Return any kernel's launch grid; one axis, for the others stop at 65,535."""

    def grid(meta):
        sizes = meta.get("MAX_J"), meta["MAX_K"]
        return (splits * conv2d_wgrad_blocks(C, K, R, S, groups, *sizes),)

    return grid


@autotune(
    CONFIGS,
    key=["C", "K", "R", "S", "STRIDE_W", "GROUPS", "TILE_Q", "PRECISION", "ACT", "RESAMPLE"],
)
@triton.jit
def conv2d_wgrad_kernel(
    x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,  # [N, H, W, C], [4, C] or None, both or None
    g_ptr, y_ptr, coef_ptr,  # [N, P, Q, K], as g or None, [4, K] or None
    dw_ptr, db_ptr,  # parts: [splits, K, R, S, CG], [splits, K] or None, float32
    N, H, W, P, Q, splits,  # H, W: of x as it is stored
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, GROUPS: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, RESAMPLE: tl.constexpr,
    TILE_Q: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    WIDEN: tl.constexpr,  # multiply in float32: for the interpreter, whose bfloat16 dot is wrong
    BLOCK_M: tl.constexpr, MAX_J: tl.constexpr, MAX_K: tl.constexpr,
):  # fmt: skip
    """Write dw[k, r, j] and db[k] of one range of pixels, ROWS of r, BLOCK_J of j, BLOCK_K of k."""
    BITS: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
    BLOCK_N: tl.constexpr = BLOCK_M * 16 // BITS  # pixels of a tile
    BLOCK_Q: tl.constexpr = fit(BLOCK_N, TILE_Q, 1)
    BLOCK_P: tl.constexpr = BLOCK_N // BLOCK_Q
    CG: tl.constexpr = C // GROUPS
    KG: tl.constexpr = K // GROUPS
    ROWS: tl.constexpr = filter_rows(C, R, S, GROUPS)
    WIDTH: tl.constexpr = ROWS * S * CG  # of j
    BLOCK_J: tl.constexpr = fit(MAX_J, WIDTH)
    BLOCK_K: tl.constexpr = fit(MAX_K, KG)
    TILES_J: tl.constexpr = triton.cdiv(WIDTH, BLOCK_J)
    TILES_K: tl.constexpr = triton.cdiv(KG, BLOCK_K)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL_NORM: tl.constexpr = residual_norm_ptr is not None
    COEF: tl.constexpr = coef_ptr is not None
    PLAIN: tl.constexpr = not NORM and residual_ptr is None and ACT == "none"

    # k fastest, the range slowest: programs that read the same pixels run at about the same time.
    pid = tl.program_id(0)
    tile_k = pid % TILES_K
    tile_j = pid // TILES_K % TILES_J
    r = pid // (TILES_K * TILES_J) % (R // ROWS)
    group = pid // (TILES_K * TILES_J * (R // ROWS)) % GROUPS
    split = pid // (TILES_K * TILES_J * (R // ROWS) * GROUPS)

    offs_m = tl.arange(0, BLOCK_N)
    offs_p = offs_m // BLOCK_Q
    offs_q = offs_m % BLOCK_Q
    offs_j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_j = offs_j < WIDTH
    mask_k = offs_k < KG
    k = group * KG + offs_k
    row = offs_j // (S * CG)  # from r on
    s = offs_j // CG % S
    c = group * CG + offs_j % CG
    shift_j = row * (DIL_H * W * C) + s * (DIL_W * C) + c  # of j from the window's first value
    if DIL_W == 1 and GROUPS == 1 and ROWS == 1:
        shift_j = offs_j  # the same, said so that loads are seen to be contiguous

    mean, scale, shift = 0.0, 0.0, 0.0
    mean_r, scale_r, shift_r = 0.0, 0.0, 0.0
    mean_y, a, b, d = 0.0, 0.0, 0.0, 0.0
    if NORM:
        mean, scale, shift = load_norm(norm_ptr, c, mask_j, C)
    if RESIDUAL_NORM:
        mean_r, scale_r, shift_r = load_norm(residual_norm_ptr, c, mask_j, C)
    if COEF:
        mean_y, a, b, d = load_coefficients(coef_ptr, k, mask_k, K)

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

    # Offsets inside a tile are int32: the op refuses images in which they might pass 2**31.
    offs_x = (offs_p * (STRIDE_H * W) + offs_q * STRIDE_W)[:, None] * C + shift_j[None, :]
    offs_dy = (offs_p * Q + offs_q)[:, None] * K + k[None, :]

    acc = tl.zeros((BLOCK_J, BLOCK_K), dtype=tl.float32)
    acc_b = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for tile in range(split * per, tl.minimum(split * per + per, tiles)):
        q0 = tile % tiles_q * BLOCK_Q
        p0 = tile // tiles_q % tiles_p * BLOCK_P
        n = (tile // tiles_q // tiles_p).to(tl.int64)  # N*H*W*C may pass 2**31

        mask_m = (p0 + offs_p < P) & (q0 + offs_q < Q)
        mask_dy = mask_m[:, None] & mask_k[None, :]
        base_dy = ((n * P + p0) * Q + q0) * K
        dy = load_dy(
            g_ptr + base_dy, y_ptr + base_dy if COEF else y_ptr, offs_dy, mask_dy,
            mean_y, a, b, d, COEF,
        )  # fmt: skip

        h0 = p0 * STRIDE_H - PAD_H + r * DIL_H
        w0 = q0 * STRIDE_W - PAD_W
        h = h0 + (offs_p * STRIDE_H)[:, None] + (row * DIL_H)[None, :]
        if ROWS == 1:
            h = h0 + (offs_p * STRIDE_H)[:, None]
        w = w0 + (offs_q * STRIDE_W)[:, None] + (s * DIL_W)[None, :]
        # Beyond the tile z is 0 as well as dy: Inf * 0 would be NaN.
        mask_h = (h >= 0) & (h < height) & mask_m[:, None]
        mask_x = mask_h & (w >= 0) & (w < width) & mask_j[None, :]
        if RESAMPLE == "none":
            base_x = ((n * H + h0) * W + w0) * C
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

        if db_ptr is not None:
            if not COEF:
                dy = shared_use(dy)
            acc_b += tl.sum(dy.to(tl.float32), 0)
        if WIDEN:
            z = z.to(tl.float32)
            dy = dy.to(tl.float32)
        acc = tl.dot(tl.trans(z), dy, acc, input_precision=PRECISION)

    part = split.to(tl.int64)
    offs_dw = (k * R + r)[None, :] * (S * CG) + offs_j[:, None]
    dw_ptr += part * (K * R * S * CG)
    tl.store(dw_ptr + offs_dw, acc, mask=mask_j[:, None] & mask_k[None, :])
    if db_ptr is not None:
        first = (r == 0) & (tile_j == 0)  # the others found the same sums
        tl.store(db_ptr + part * K + k, acc_b, mask=mask_k & first)


@autotune(DEPTHWISE_CONFIGS, key=["C", "K", "R", "S", "STRIDE_W", "TILE_Q", "ACT", "RESAMPLE"])
@triton.jit
def conv2d_wgrad_depthwise_kernel(
    x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,  # as above; GROUPS = C
    g_ptr, y_ptr, coef_ptr,
    dw_ptr, db_ptr,  # parts: [splits, K, R, S], [splits, K] or None, float32
    N, H, W, P, Q, splits,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, RESAMPLE: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, MAX_K: tl.constexpr,
):  # fmt: skip
    """Write dw[k, r, s] and db[k] of one range of pixels, one tap and BLOCK_K of k."""
    BLOCK_Q: tl.constexpr = fit(BLOCK_M, TILE_Q, 1)
    BLOCK_P: tl.constexpr = BLOCK_M // BLOCK_Q
    BLOCK_K: tl.constexpr = fit(MAX_K, K)
    TILES_K: tl.constexpr = triton.cdiv(K, BLOCK_K)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL_NORM: tl.constexpr = residual_norm_ptr is not None
    COEF: tl.constexpr = coef_ptr is not None

    pid = tl.program_id(0)
    tile_k = pid % TILES_K
    s = pid // TILES_K % S
    r = pid // (TILES_K * S) % R
    split = pid // (TILES_K * S * R)

    offs_m = tl.arange(0, BLOCK_M)
    offs_p = offs_m // BLOCK_Q
    offs_q = offs_m % BLOCK_Q
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    c = k // (K // C)

    mean, scale, shift = 0.0, 0.0, 0.0
    mean_r, scale_r, shift_r = 0.0, 0.0, 0.0
    mean_y, a, b, d = 0.0, 0.0, 0.0, 0.0
    if NORM:
        mean, scale, shift = load_norm(norm_ptr, c, mask_k, C)
    if RESIDUAL_NORM:
        mean_r, scale_r, shift_r = load_norm(residual_norm_ptr, c, mask_k, C)
    if COEF:
        mean_y, a, b, d = load_coefficients(coef_ptr, k, mask_k, K)

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

    offs_x = (offs_p * (STRIDE_H * W) + offs_q * STRIDE_W)[:, None] * C + c[None, :]
    offs_dy = (offs_p * Q + offs_q)[:, None] * K + k[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)  # a sum a lane; they meet at the end
    acc_b = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for tile in range(split * per, tl.minimum(split * per + per, tiles)):
        q0 = tile % tiles_q * BLOCK_Q
        p0 = tile // tiles_q % tiles_p * BLOCK_P
        n = (tile // tiles_q // tiles_p).to(tl.int64)

        mask_m = (p0 + offs_p < P) & (q0 + offs_q < Q)
        mask_dy = mask_m[:, None] & mask_k[None, :]
        base_dy = ((n * P + p0) * Q + q0) * K
        dy = load_dy(
            g_ptr + base_dy, y_ptr + base_dy if COEF else y_ptr, offs_dy, mask_dy,
            mean_y, a, b, d, COEF,
        )  # fmt: skip

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

        dy = dy.to(tl.float32)
        acc += z * dy
        if db_ptr is not None:
            acc_b += dy

    row = split.to(tl.int64)
    dw_ptr += row * (K * R * S)
    tl.store(dw_ptr + k * (R * S) + r * S + s, tl.sum(acc, 0), mask=mask_k)
    if db_ptr is not None:
        first = (r == 0) & (s == 0)
        tl.store(db_ptr + row * K + k, tl.sum(acc_b, 0), mask=mask_k & first)


@triton.jit
def sum_parts_kernel(
    parts_ptr, sums_ptr,  # [T, L], [cdiv(T, FAN_IN), L], float32
    T, L,
    FAN_IN: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Write the sums of FAN_IN consecutive rows, in one order."""
    offs_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    row = tl.program_id(1)
    offs_t = row.to(tl.int64) * FAN_IN + tl.arange(0, FAN_IN)  # T*L may pass 2**31
    mask_l = offs_l < L
    mask = (offs_t < T)[:, None] & mask_l[None, :]
    parts = tl.load(parts_ptr + offs_t[:, None] * L + offs_l[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + row.to(tl.int64) * L + offs_l, tl.sum(parts, 0), mask=mask_l)


def conv2d_wgrad_variant(
    dtype: str,
    C: int,
    K: int,
    R: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    norm: bool = False,
    residual: bool = False,
    coef: bool = False,
    act: str = "none",
    resample: str = "none",
    bias: bool = False,
    precision: str = "ieee",
    tile_q: int = 64,
    config: triton.Config = CONFIGS[0],
) -> Variant:
    """Return the weight gradient of an R x R convolution, to compile ahead of time.

    dtype is "fp32", "fp16" or "bf16"; norm, residual (with a norm of its own) and coef say what
    takes part. A configuration of DEPTHWISE_CONFIGS asks for the depthwise kernel.
    """
    depthwise = config in DEPTHWISE_CONFIGS
    kernel = conv2d_wgrad_depthwise_kernel if depthwise else conv2d_wgrad_kernel
    present = {
        "x_ptr": dtype,
        "norm_ptr": "fp32" if norm else None,
        "residual_ptr": dtype if residual else None,
        "residual_norm_ptr": "fp32" if residual else None,
        "g_ptr": dtype,
        "y_ptr": dtype if coef else None,
        "coef_ptr": "fp32" if coef else None,
        "dw_ptr": "fp32",
        "db_ptr": "fp32" if bias else None,
    }
    signature = {name: f"*{type_}" for name, type_ in present.items() if type_}
    signature |= {name: "i32" for name in ("N", "H", "W", "P", "Q", "splits")}
    padding = R // 2 if padding is None else padding
    constexprs = {name: None for name, type_ in present.items() if not type_}
    constexprs |= {"C": C, "K": K, "R": R, "S": R, "STRIDE_H": stride, "STRIDE_W": stride}
    constexprs |= {"PAD_H": padding, "PAD_W": padding, "DIL_H": 1, "DIL_W": 1}
    constexprs |= {"ACT": act, "SLOPE": 0.01, "RESAMPLE": resample, "TILE_Q": tile_q}
    if not depthwise:
        constexprs |= {"GROUPS": groups, "PRECISION": precision, "WIDEN": False}
    return Variant(kernel, signature, constexprs, config)
