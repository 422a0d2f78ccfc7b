"""Device code for the gradient of a 3x3 weight with few channels: all nine taps in one program.

    dw[k, r, s, c] = sum over n < N, p < P, q < Q of dy[n, p, q, k] *
                     z[n, p + r - PAD_H, q + s - PAD_W, c]
    db[k]          = sum over n, p, q of dy[n, p, q, k]

What kernels/wgrad.py computes, with its tensors and its precision, at stride and dilation 1, one
group and no resampling. There a program has one r, so that three of them fetch the same x and dy,
and more where the windows or the channels take several blocks. At 16 to 64 channels those fetches,
from L2, and what turns them into z and dy take longer than the bytes' way from DRAM.

Here a program rolls down a strip of output pixels. A step makes a row of windows of z, as [pixel,
s, c], and a row of dy; row h of z meets rows h + PAD_H - r of dy, the new one and two that wait in
registers: three products, one accumulator a filter row. So z is loaded S times, from L1 (L2 where
loads are asynchronous), and dy once; K may be cut into blocks, each of which loads z anew.

Registers: 3 * 4*C * BLOCK_K accumulators, C padded to a power of two and BLOCK_K at most 32: 12 KB
at 16 -> 16 channels, 96 KB at 64, where that is 96 a thread of 256. Beyond 64 channels two blocks
of windows would fetch dy twice, and the arithmetic is the longer by far: kernels/wgrad.py's.

Work: 18*C*K FLOP a pixel over 2*(C + K) bytes, and those of y and of the residual: 72 FLOP a byte
at 16 channels, 144 at 32 and 288 at 64; with y a third less. An H200 turns at 184 from memory to
arithmetic. From L2 come 3*C + K elements a pixel and block of K where copies are asynchronous.

A z that is not finite meets zeros beside a strip's rows of dy: taps of its channel that it does not
meet, at an image's upper and lower border, become NaN as well.
"""

import triton
import triton.language as tl

from ._tune import autotune
from .aot import Variant
from .fuse import activate, load_coefficients, load_dy, load_norm
from .strips import rows_of_strip, strip_area, strip_rows, strips, tile_pixels
from .wgrad import CONFIGS as WGRAD_CONFIGS
from .wgrad import conv2d_wgrad_splits, fit

MAX_K = 32  # outputs of a program: with 64 channels twice as many would spill


def _config(VALUES, **options):
    """Return a configuration; VALUES counts those of the wider image in a tile, of 2 bytes each."""
    return triton.Config({"VALUES": VALUES}, **options)


CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    _config(1024, num_warps=8, num_stages=2),
    _config(1024, num_warps=8, num_stages=3),
    _config(2048, num_warps=8, num_stages=2),  # for NVIDIA: 512 lanes leave too few registers
    # One stage: no asynchronous copies, which pass L1 by and fetch each window anew from L2.
    _config(1024, num_warps=8, num_stages=1),
]


@triton.constexpr_function
def outputs(K: int) -> int:
    """Return how many of K outputs a program takes."""
    return fit(MAX_K, K)


@autotune(CONFIGS, key=["C", "K", "PRECISION", "ACT"])
@triton.jit
def conv2d_wgrad_rows_kernel(
    x_ptr, norm_ptr, residual_ptr, residual_norm_ptr,  # [N, H, W, C], [4, C] or None, both or None
    g_ptr, y_ptr, coef_ptr,  # [N, P, Q, K], as g or None, [4, K] or None
    dw_ptr, db_ptr,  # parts: [strips, K, 3, 3, C], [strips, K] or None, float32
    H, W, P, Q, area,  # of a strip, in pixels
    C: tl.constexpr, K: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    WIDEN: tl.constexpr,  # multiply in float32: for the interpreter, whose bfloat16 dot is wrong
    VALUES: tl.constexpr,
):  # fmt: skip
    """Write dw[k, :, :, :] and db[k] of one strip of output pixels and BLOCK_K of k."""
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = tile_pixels(VALUES, C, K, TYPE.primitive_bitwidth)
    BLOCK_C: tl.constexpr = fit(64, C, 4)
    BLOCK_J: tl.constexpr = 4 * BLOCK_C  # s < 3 of four
    BLOCK_K: tl.constexpr = outputs(K)
    TILES_K: tl.constexpr = triton.cdiv(K, BLOCK_K)
    NORM: tl.constexpr = norm_ptr is not None
    RESIDUAL: tl.constexpr = residual_ptr is not None
    RESIDUAL_NORM: tl.constexpr = residual_norm_ptr is not None
    COEF: tl.constexpr = coef_ptr is not None
    PLAIN: tl.constexpr = not NORM and not RESIDUAL and ACT == "none"

    # k fastest: programs that read the same pixels run at about the same time.
    pid = tl.program_id(0)
    tile_k = pid % TILES_K
    strip = pid // TILES_K
    tiles_q = (Q + COLUMNS - 1) // COLUMNS
    rows = rows_of_strip(P, area, COLUMNS)
    tiles_p = (P + rows - 1) // rows
    q0 = strip % tiles_q * COLUMNS
    p0 = strip // tiles_q % tiles_p * rows
    n = (strip // tiles_q // tiles_p).to(tl.int64)  # N*H*W*C may pass 2**31
    last = tl.minimum(p0 + rows, P)  # the first row that is another strip's

    offs_q = tl.arange(0, COLUMNS)
    offs_s = tl.arange(0, 4)[None, :, None]
    offs_c = tl.arange(0, BLOCK_C)[None, None, :]
    offs_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_c = offs_c < C
    mask_k = offs_k < K

    mean, scale, shift = 0.0, 0.0, 0.0
    mean_r, scale_r, shift_r = 0.0, 0.0, 0.0
    mean_y, a, b, d = 0.0, 0.0, 0.0, 0.0
    if NORM:
        mean, scale, shift = load_norm(norm_ptr, offs_c, mask_c, C)
    if RESIDUAL_NORM:
        mean_r, scale_r, shift_r = load_norm(residual_norm_ptr, offs_c, mask_c, C)
        shift += shift_r
    if COEF:
        mean_y, a, b, d = load_coefficients(coef_ptr, offs_k, mask_k, K)

    base_x = ((n * H + p0 - PAD_H) * W + q0 - PAD_W) * C
    x_ptr += base_x
    if RESIDUAL:
        residual_ptr += base_x
    base_dy = ((n * P + p0) * Q + q0) * K
    g_ptr += base_dy
    if COEF:
        y_ptr += base_dy

    # Windows are loaded as [pixel, s, c], so that a mask is one bit for all c.
    mask_q = q0 + offs_q < Q
    w = q0 - PAD_W + offs_q[:, None, None] + offs_s
    # A column beyond the output too: its dy is 0, and Inf * 0 would be NaN.
    mask_window = (w >= 0) & (w < W) & (offs_s < 3) & mask_q[:, None, None]
    if BLOCK_C != C:
        mask_window = mask_window & mask_c
    offs_x = (offs_q[:, None, None] + offs_s) * C + offs_c
    mask_tile = mask_q[:, None] & mask_k[None, :]
    offs_dy = offs_q[:, None] * K + offs_k[None, :]

    dw0 = tl.zeros((BLOCK_J, BLOCK_K), dtype=tl.float32)
    dw1 = tl.zeros((BLOCK_J, BLOCK_K), dtype=tl.float32)
    dw2 = tl.zeros((BLOCK_J, BLOCK_K), dtype=tl.float32)
    db = tl.zeros((BLOCK_K,), dtype=tl.float32)
    dy1 = tl.zeros((COLUMNS, BLOCK_K), dtype=TYPE)  # the row before
    dy2 = tl.zeros((COLUMNS, BLOCK_K), dtype=TYPE)  # and the one before that
    for p in range(p0, p0 + rows + 2):  # the last two rows of dy are another strip's
        h = p - PAD_H
        mask_x = mask_window & (h >= 0) & (h < H)
        z = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)
        if not PLAIN:
            wide = z.to(tl.float32)
            if NORM:
                wide = (wide - mean) * scale
            if RESIDUAL:
                residual = tl.load(residual_ptr + offs_x, mask=mask_x, other=0.0).to(tl.float32)
                if RESIDUAL_NORM:
                    residual = (residual - mean_r) * scale_r
                wide += residual
            if NORM or RESIDUAL_NORM:
                wide += shift
            z = tl.where(mask_x, activate(wide, ACT, SLOPE), 0.0).to(TYPE)
        z = tl.reshape(z, (COLUMNS, BLOCK_J))
        mask_dy = mask_tile & (p < last)
        dy0 = load_dy(g_ptr, y_ptr, offs_dy, mask_dy, mean_y, a, b, d, COEF)

        if db_ptr is not None:
            db += tl.sum(dy0.to(tl.float32), 0)
        if WIDEN:
            z = z.to(tl.float32)
        turned = tl.trans(z)
        dw0 = tl.dot(turned, dy0.to(z.dtype), dw0, input_precision=PRECISION)
        dw1 = tl.dot(turned, dy1.to(z.dtype), dw1, input_precision=PRECISION)
        dw2 = tl.dot(turned, dy2.to(z.dtype), dw2, input_precision=PRECISION)

        # The select changes nothing, for dy is 0 off the tile already. But triton pipelines no
        # loop that hands a value on from step to step untouched.
        dy2 = tl.where(mask_tile, dy1, 0.0)
        dy1 = dy0
        x_ptr += W * C
        if RESIDUAL:
            residual_ptr += W * C
        g_ptr += Q * K
        if COEF:
            y_ptr += Q * K

    part = strip.to(tl.int64)
    offs_j = tl.arange(0, BLOCK_J)
    s = offs_j // BLOCK_C
    c = offs_j % BLOCK_C
    mask_dw = ((s < 3) & (c < C))[:, None] & mask_k[None, :]
    offs_dw = offs_k[None, :] * (9 * C) + (s * C + c)[:, None]
    dw_ptr += part * (K * 9 * C)
    tl.store(dw_ptr + offs_dw, dw0, mask=mask_dw)
    tl.store(dw_ptr + 3 * C + offs_dw, dw1, mask=mask_dw)
    tl.store(dw_ptr + 6 * C + offs_dw, dw2, mask=mask_dw)
    if db_ptr is not None:
        tl.store(db_ptr + part * K + offs_k, db, mask=mask_k)


def conv2d_wgrad_rows_strips(
    N: int, P: int, Q: int, C: int, K: int, itemsize: int, VALUES: int
) -> int:
    """Return how many strips the output has in the configuration of these VALUES."""
    return strips(N, P, Q, strip_area(N, P, Q), tile_pixels(VALUES, C, K, 8 * itemsize))


def conv2d_wgrad_rows_blocks(K: int) -> int:
    """Return how many programs a strip takes."""
    return triton.cdiv(K, outputs(K))


def takes_rows(N: int, P: int, Q: int, C: int, K: int, itemsize: int, y: bool, r: bool) -> bool:
    """Return whether a 3x3 filter that moves by single pixels should have this kernel.

    Its registers must suffice, and what it fetches, from L2 and beyond, be less than what the
    general kernel does; y and r say whether y and a residual take part.
    """
    if max(C, K) * itemsize > 128 or (itemsize == 4 and max(C, K) > 16):
        return False
    # By either kernel's first configuration; the general one's windows and dy are fetched by each
    # of three r, by each block of the other.
    rows, most = CONFIGS[0].kwargs, WGRAD_CONFIGS[0].kwargs
    tiles_k = triton.cdiv(K, fit(most["MAX_K"], K))
    tiles_j = triton.cdiv(3 * C, fit(most["MAX_J"], 3 * C))
    z, dy = (1 + r) * 3 * C, (1 + y) * K
    columns = tile_pixels(**rows, C=C, K=K, bits=8 * itemsize)
    twice = 1 + 2 / strip_rows(P, strip_area(N, P, Q), columns)  # rows of a strip's neighbours
    one = z * conv2d_wgrad_rows_blocks(K) * twice + dy
    general = 3 * (z * tiles_k + dy * tiles_j)
    # Parts are float32, written and read.
    parts = conv2d_wgrad_rows_strips(N, P, Q, C, K, itemsize, rows["VALUES"])
    ranges = conv2d_wgrad_splits(N * P * Q, 3 * tiles_k * tiles_j)
    saved = N * P * Q * itemsize * (general - one)
    return saved > 8 * 9 * C * K * (parts - ranges)


def conv2d_wgrad_rows_variant(
    dtype: str,
    C: int,
    K: int,
    *,
    norm: bool = False,
    residual: bool = False,
    coef: bool = False,
    act: str = "none",
    bias: bool = False,
    precision: str = "ieee",
    config: triton.Config = CONFIGS[0],
) -> Variant:
    """Return the weight gradient of a 3x3 convolution by this kernel, to compile ahead of time.

    dtype is "fp32", "fp16" or "bf16"; norm, residual (with a norm of its own) and coef say what
    takes part.
    """
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
    signature |= {name: "i32" for name in ("H", "W", "P", "Q", "area")}
    constexprs = {name: None for name, type_ in present.items() if not type_}
    constexprs |= {"C": C, "K": K, "PAD_H": 1, "PAD_W": 1, "ACT": act, "SLOPE": 0.01}
    constexprs |= {"PRECISION": precision, "WIDEN": False}
    return Variant(conv2d_wgrad_rows_kernel, signature, constexprs, config)
