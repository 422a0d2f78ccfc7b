"""Device code for the two-dimensional convolution of NHWC images, stride 1, by implicit GEMM.

    y[n, p, q, k] = b[k] + sum over r < R, s < S, c < C of
                    x[n, p + r - PAD, q + s - PAD, c] * w[k, r, s, c]

    0 <= p < P = H + 2 PAD - R + 1,   0 <= q < Q = W + 2 PAD - S + 1,   x = 0 outside the image.

x: [N, H, W, C], y: [N, P, Q, K], w: [K, R, S, C], all dense and row-major; b: [K] or None. So x, w
and y are torch's [N, C, H, W] and [K, C, R, S] in channels_last, without a copy.

The taps s and channels c of one filter row r meet S*C consecutive values of x, the *window* of a
pixel, indexed by j = s*C + c here. Few channels thereby fill a product's depth (C = 3, S = 3 takes
16 values, not three times 16), and any C works. Two kernels compute the sum:

- conv2d_fwd_kernel, for every shape: a program owns BLOCK_P x BLOCK_Q pixels and BLOCK_K output
  channels and walks the R rows in steps of BLOCK_J window values, one product [pixels, j] @ [j, k]
  a step. It reads each value of x up to R*S times, from L1 or L2.
- conv2d_fwd_rows_kernel, for 3x3 with windows that fit a step: a program rolls down a strip of
  BLOCK_P rows and BLOCK_Q columns with the whole filter in shared memory. It reads a row of windows
  once, for the three rows of y that it belongs to; two unfinished ones wait in registers. It reads
  each value of x S times, and the copies of the next rows run while this one is multiplied.

Work at 2-byte elements: 2*N*P*Q*K*R*S*C FLOP over 2*(N*H*W*C + N*P*Q*K) bytes, R*S*C*K/(C + K)
FLOP a byte: 72 for 3x3 at 16 -> 16 channels, 144 at 32, 288 at 64; 11 for 1x1 at 16 -> 32. An
H200 turns from memory to arithmetic at 184, so only the layers from 64 channels on use its tensor
cores fully; the others should run at the speed of a copy.
"""

import triton
import triton.language as tl

from ._tune import autotune
from .aot import Variant


def _config(BLOCK_P, BLOCK_Q, MAX_J, MAX_K, **options):
    """Return a configuration; MAX_J counts 2-byte elements, wider ones take fewer a step."""
    blocks = {"BLOCK_P": BLOCK_P, "BLOCK_Q": BLOCK_Q, "MAX_J": MAX_J, "MAX_K": MAX_K}
    return triton.Config(blocks, **options)


CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    _config(4, 32, MAX_J=32, MAX_K=64, num_warps=4, num_stages=2),
    _config(4, 32, MAX_J=64, MAX_K=64, num_warps=4, num_stages=3),
    _config(4, 32, MAX_J=64, MAX_K=128, num_warps=8, num_stages=3),
    _config(8, 32, MAX_J=64, MAX_K=64, num_warps=8, num_stages=2),
    # One stage: no asynchronous copies, which pass L1 by and fetch each window anew from L2.
    _config(4, 32, MAX_J=64, MAX_K=64, num_warps=8, num_stages=1),
    _config(4, 32, MAX_J=128, MAX_K=64, num_warps=8, num_stages=1),
]
ROWS_CONFIGS = [
    triton.Config({"BLOCK_P": 16, "BLOCK_Q": 64, "MAX_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_P": 32, "BLOCK_Q": 64, "MAX_K": 32}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_P": 32, "BLOCK_Q": 128, "MAX_K": 32}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_P": 64, "BLOCK_Q": 64, "MAX_K": 32}, num_warps=4, num_stages=3),
]


@triton.constexpr_function
def fit(most: int, needed: int) -> int:
    """Return the power of two, 16 to most, that covers needed: a block's extent for tl.dot."""
    return max(16, min(most, 1 << (needed - 1).bit_length()))


def conv2d_fwd_grid(N: int, P: int, Q: int, K: int):
    """Return either kernel's launch grid; one axis, for the others stop at 65,535."""

    def grid(meta):
        tiles = triton.cdiv(P, meta["BLOCK_P"]) * triton.cdiv(Q, meta["BLOCK_Q"])
        return (N * tiles * triton.cdiv(K, fit(meta["MAX_K"], K)),)

    return grid


@autotune(CONFIGS, key=["C", "K", "R", "S", "PRECISION"])
@triton.jit
def conv2d_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,  # [N, H, W, C], [K, R, S, C], [K] or None, [N, P, Q, K]
    H, W,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    WIDEN: tl.constexpr,  # multiply in float32: for the interpreter, whose bfloat16 dot is wrong
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, MAX_J: tl.constexpr, MAX_K: tl.constexpr,
):  # fmt: skip
    """Write one [BLOCK_P * BLOCK_Q, BLOCK_K] tile of y; the sum is fp32, rounded once."""
    BITS: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
    BLOCK_J: tl.constexpr = fit(MAX_J * 16 // BITS, S * C)
    BLOCK_K: tl.constexpr = fit(MAX_K, K)
    STEPS_J: tl.constexpr = triton.cdiv(S * C, BLOCK_J)
    TILES_K: tl.constexpr = triton.cdiv(K, BLOCK_K)
    P = H + 2 * PAD - R + 1
    Q = W + 2 * PAD - S + 1
    tiles_p = (P + BLOCK_P - 1) // BLOCK_P
    tiles_q = (Q + BLOCK_Q - 1) // BLOCK_Q

    # k fastest, then q, p, n: programs that share pixels or halos run at about the same time.
    pid = tl.program_id(0)
    k0 = pid % TILES_K * BLOCK_K
    q0 = pid // TILES_K % tiles_q * BLOCK_Q
    p0 = pid // TILES_K // tiles_q % tiles_p * BLOCK_P
    n = (pid // TILES_K // tiles_q // tiles_p).to(tl.int64)  # N*H*W*C may pass 2**31

    # Offsets inside a tile are int32: the op refuses images whose (BLOCK_P + R) rows pass 2**31.
    x_ptr += ((n * H + p0 - PAD) * W + q0 - PAD) * C
    y_ptr += ((n * P + p0) * Q + q0) * K

    offs_m = tl.arange(0, BLOCK_P * BLOCK_Q)
    offs_p = offs_m // BLOCK_Q
    offs_q = offs_m % BLOCK_Q
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K

    acc = tl.zeros((BLOCK_P * BLOCK_Q, BLOCK_K), dtype=tl.float32)
    for step in range(R * STEPS_J):
        r = step // STEPS_J
        offs_j = step % STEPS_J * BLOCK_J + tl.arange(0, BLOCK_J)
        mask_j = offs_j < S * C

        h = p0 - PAD + offs_p + r
        w = q0 - PAD + offs_q[:, None] + (offs_j // C)[None, :]
        mask_x = ((h >= 0) & (h < H))[:, None] & (w >= 0) & (w < W) & mask_j[None, :]
        offs_x = ((offs_p + r) * W + offs_q)[:, None] * C + offs_j[None, :]
        x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)

        offs_w = (offs_k * R + r)[None, :] * (S * C) + offs_j[:, None]
        wt = tl.load(w_ptr + offs_w, mask=mask_j[:, None] & mask_k[None, :], other=0.0)

        if WIDEN:
            x = x.to(tl.float32)
            wt = wt.to(tl.float32)
        acc = tl.dot(x, wt, acc, input_precision=PRECISION)

    if b_ptr is not None:
        b = tl.load(b_ptr + offs_k, mask=mask_k, other=0.0)
        acc += b.to(tl.float32)[None, :]

    mask_m = (p0 + offs_p < P) & (q0 + offs_q < Q)
    offs_y = (offs_p * Q + offs_q)[:, None] * K + offs_k[None, :]
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


@autotune(ROWS_CONFIGS, key=["C", "K"])
@triton.jit
def conv2d_fwd_rows_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,  # as above
    H, W,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,  # as above
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, MAX_K: tl.constexpr,
):  # fmt: skip
    """Write a [BLOCK_P, BLOCK_Q, BLOCK_K] strip of y, row by row; sums are fp32, rounded once."""
    tl.static_assert(R == 3)
    BLOCK_J: tl.constexpr = fit(128, S * C)
    tl.static_assert(BLOCK_J >= S * C)
    BLOCK_K: tl.constexpr = fit(MAX_K, K)
    TILES_K: tl.constexpr = triton.cdiv(K, BLOCK_K)
    P = H + 2 * PAD - R + 1
    Q = W + 2 * PAD - S + 1
    tiles_p = (P + BLOCK_P - 1) // BLOCK_P
    tiles_q = (Q + BLOCK_Q - 1) // BLOCK_Q

    pid = tl.program_id(0)
    k0 = pid % TILES_K * BLOCK_K
    q0 = pid // TILES_K % tiles_q * BLOCK_Q
    p0 = pid // TILES_K // tiles_q % tiles_p * BLOCK_P
    n = (pid // TILES_K // tiles_q // tiles_p).to(tl.int64)  # N*H*W*C may pass 2**31

    # Both advance by a row a step; y's lags by the two rows of x that a row of y still waits for.
    x_ptr += ((n * H + p0 - PAD) * W + q0 - PAD) * C
    y_ptr += ((n * P + p0 - 2) * Q + q0) * K

    offs_q = tl.arange(0, BLOCK_Q)
    offs_j = tl.arange(0, BLOCK_J)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask_j = offs_j < S * C
    mask_k = offs_k < K

    offs_w = offs_k[None, :] * (R * S * C) + offs_j[:, None]
    mask_w = mask_j[:, None] & mask_k[None, :]
    w0 = tl.load(w_ptr + offs_w, mask=mask_w, other=0.0)
    w1 = tl.load(w_ptr + S * C + offs_w, mask=mask_w, other=0.0)
    w2 = tl.load(w_ptr + 2 * S * C + offs_w, mask=mask_w, other=0.0)
    if WIDEN:
        w0 = w0.to(tl.float32)
        w1 = w1.to(tl.float32)
        w2 = w2.to(tl.float32)

    w = q0 - PAD + offs_q[:, None] + (offs_j // C)[None, :]
    mask_window = (w >= 0) & (w < W) & mask_j[None, :]
    offs_x = offs_q[:, None] * C + offs_j[None, :]
    mask_y = (q0 + offs_q < Q)[:, None] & mask_k[None, :]
    offs_y = offs_q[:, None] * K + offs_k[None, :]

    acc1 = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)  # a row of y that has met r = 0
    acc2 = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)  # the row above it, also r = 1
    for step in range(BLOCK_P + 2):
        h = p0 - PAD + step
        x = tl.load(x_ptr + offs_x, mask=mask_window & (h >= 0) & (h < H), other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
        acc = tl.dot(x, w2, acc2, input_precision=PRECISION)
        acc2 = tl.dot(x, w1, acc1, input_precision=PRECISION)
        acc1 = tl.dot(x, w0, input_precision=PRECISION)

        if b_ptr is not None:
            b = tl.load(b_ptr + offs_k, mask=mask_k, other=0.0)
            acc += b.to(tl.float32)[None, :]
        p = p0 + step - 2  # the first two steps finish rows of the strip above, which writes them
        tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_y & (p >= p0) & (p < P))
        x_ptr += W * C
        y_ptr += Q * K


def conv2d_fwd_kernel_for(C: int, K: int, R: int, itemsize: int):
    """Return the kernel for a shape: rows where windows fit a step, and few blocks of K reread x.

    This counts bytes. TODO: decide by times, once bench/conv.py has run both kernels on a card.
    """
    rows = R == 3 and C <= 32 and K <= 64 and itemsize == 2
    return conv2d_fwd_rows_kernel if rows else conv2d_fwd_kernel


def conv2d_fwd_variant(
    dtype: str,
    C: int,
    K: int,
    R: int,
    *,
    padding: int | None = None,
    bias: bool = True,
    precision: str = "ieee",
    config: triton.Config = CONFIGS[0],
) -> Variant:
    """Return an R x R convolution to compile ahead of time; dtype is "fp32", "fp16" or "bf16".

    A configuration of ROWS_CONFIGS asks for the rows kernel.
    """
    kernel = conv2d_fwd_rows_kernel if config in ROWS_CONFIGS else conv2d_fwd_kernel
    signature = {name: f"*{dtype}" for name in ("x_ptr", "w_ptr", "b_ptr", "y_ptr")}
    signature |= {"H": "i32", "W": "i32"}
    constexprs = {"C": C, "K": K, "R": R, "S": R, "PRECISION": precision, "WIDEN": False}
    constexprs["PAD"] = R // 2 if padding is None else padding
    if not bias:
        del signature["b_ptr"]
        constexprs["b_ptr"] = None
    return Variant(kernel, signature, constexprs, config)
