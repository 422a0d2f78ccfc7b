"""Device code for a final 1x1 convolution and the softmax focal loss of its logits, in one pass.

    z[m, f] = act((x[m, f] - mean[f]) scale[f] + shift[f])          rounded to x's type
    logits[m, c] = sum_f z[m, f] w[c, f] + bias[c]                  float32, in registers alone
    sums and counts of the loss of logits[m, :] with label y[m], as focal_loss.py has them

    d[m, c] = gradient of logits[m, c], as there                    float32, in registers alone
    dz = d w        g = act'(pre) dz        dw = d^T z        db = sum_m d

    0 <= f < F, 0 <= c < C, m a pixel of [N, H, P]

Without a norm act alone applies. Backward writes g, the preactivation's gradient, rounded, or
g scale, the gradient of x where the norm is a constant; and each program a row of float32 parts:
dw [C, F], db [C], and the sums over its pixels of g and of g (x - mean), [F] each, which a batch
normalisation's backward asks for.

x: [N, H, P, F], any strides, vectors where F is densest (channels_last); w [C, F] and bias [C] of
x's type, row-major; norm float32 [4, F] (see fuse.py).

d has a long range and few digits are lost in it: its products are taken in TF32 for 16-bit x, which
hold x and w exactly, and in IEEE or TF32 as asked for float32.

At 2-byte features and a label of 1 byte a pixel costs 2 F + 1 bytes forward and 4 F + 1 backward.
Apart, convolution and loss move 6 F + 12 C + 2 bytes: 134 against 98 at F = 16, C = 3, or 1.96 ms
against 1.43 for 24 planes of 1280 x 2048 at 4.3 TB/s; and 4 C bytes a pixel are never allocated.

C x F <= 4,096 as padded to powers of two, 16 at least: dw stays in registers. Larger heads are
products of matrices rather than passes over memory, and go another way (ops/linear_focal_loss.py).
"""

import triton
import triton.language as tl

from ._tune import autotune
from .aot import Variant
from .focal_loss import (
    by_label,
    cells,
    gradient,
    load_labels,
    load_scales,
    power_of_two,
    store_sums,
    tile_at,
    tiles_of,
    values,
)
from .fuse import activate, activate_backward, load_norm, nearest_tf32

CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    triton.Config({"ELEMENTS": 1024}, num_warps=4),
    triton.Config({"ELEMENTS": 2048}, num_warps=4),
    triton.Config({"ELEMENTS": 2048}, num_warps=8),
]
LARGEST = 4096  # of BLOCK_C * BLOCK_F


@triton.constexpr_function
def block(channels: int) -> int:
    """Return the block that covers channels or classes; tl.dot takes 16 or more."""
    return max(16, power_of_two(channels))


@triton.constexpr_function
def block_m(F: int, C: int, tile: int, elements: int) -> int:
    """Return the pixels of a tile: 16 at least, `tile` at most."""
    return max(16, min(tile, 256, elements // max(block(F), block(C))))


def fits(F: int, C: int) -> bool:
    """Return whether the kernels take a head of F features and C classes."""
    return block(F) * block(C) <= LARGEST


@triton.jit
def load_features(
    x_ptr, x_p, x_f, left, mask_f,
    F: tl.constexpr, DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Return x [BLOCK_M, BLOCK_F] of its type, 0 beyond left and F; and where it is."""
    offs_f = tl.arange(0, BLOCK_F)
    offs_m = tl.arange(0, BLOCK_M)
    if DENSE:
        offs = offs_m[:, None] * F + offs_f[None, :]
    else:
        offs = offs_m[:, None] * x_p + (offs_f.to(tl.int64) * x_f)[None, :]
    mask = (offs_m < left)[:, None] & mask_f[None, :]
    return tl.load(x_ptr + offs, mask=mask, other=0.0), mask


@triton.jit
def logits_of(
    z, w_t, bias, mask_c, PRECISION: tl.constexpr, WIDEN: tl.constexpr
):  # [M, F], [F, C], [C]
    """Return z w^T + bias in float32, -inf beyond C."""
    if WIDEN:
        z = z.to(tl.float32)
        w_t = w_t.to(tl.float32)
    x = tl.dot(z, w_t, input_precision=PRECISION) + bias[None, :]
    return tl.where(mask_c[None, :], x, float("-inf"))


@autotune(CONFIGS, key=["F", "C", "DENSE", "TILE", "ACT", "POWER", "SMOOTH", "BY_CLASS", "BINS"])
@triton.jit
def linear_focal_loss_kernel(
    x_ptr, norm_ptr, labels_ptr,  # [N, H, P, F], [4, F] or None, [N, H, P]
    w_ptr, bias_ptr, alpha_ptr, weight_ptr,  # [C, F], [C] or None, [C] or None, [C] or None
    parts_ptr, counts_ptr,  # [programs, C or 1, 3], [programs, BINS] or None
    N, H, P, x_n, x_h, x_p, x_f, labels_n, labels_h, labels_p,  # strides
    gamma, smoothing, ignore_index,
    F: tl.constexpr, C: tl.constexpr, DENSE: tl.constexpr, TILE: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr,
    BY_CLASS: tl.constexpr, BINS: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    WIDEN: tl.constexpr,  # multiply in float32: for the interpreter, whose bfloat16 dot is wrong
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write sums and counts of a range of pixels."""
    BLOCK_F: tl.constexpr = block(F)
    BLOCK_C: tl.constexpr = block(C)
    BLOCK_M: tl.constexpr = block_m(F, C, TILE, ELEMENTS)
    LANES: tl.constexpr = 8
    pid = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_f = tl.arange(0, BLOCK_F)
    offs_c = tl.arange(0, BLOCK_C)
    mask_f = offs_f < F
    mask_c = offs_c < C
    mean, scale, shift = 0.0, 1.0, 0.0
    if norm_ptr is not None:
        mean, scale, shift = load_norm(norm_ptr, offs_f[None, :], mask_f[None, :], F)
    offs_w = offs_c[None, :] * F + offs_f[:, None]
    w_t = tl.load(w_ptr + offs_w, mask=mask_f[:, None] & mask_c[None, :], other=0.0)
    bias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)

    tiles_p = tiles_of(P, BLOCK_M)
    tiles = N * H * tiles_p
    per = (tiles + tl.num_programs(0) - 1) // tl.num_programs(0)
    if BY_CLASS:
        sum_loss = tl.zeros((BLOCK_M // LANES, BLOCK_C), dtype=tl.float32)
    else:
        sum_loss = tl.zeros((BLOCK_M,), dtype=tl.float32)
    sum_factor = tl.zeros_like(sum_loss)
    sum_weight = tl.zeros_like(sum_loss)
    counted = tl.zeros((max(BINS, 1),), dtype=tl.int32)
    for index in range(pid * per, tl.minimum(pid * per + per, tiles)):
        n, h, p0, left = tile_at(index, tiles_p, H, P, BLOCK_M)
        base = labels_ptr + (n * labels_n + h * labels_h + p0 * labels_p)
        y, counts = load_labels(base, offs_m * labels_p, offs_m < left, ignore_index, C)
        base = x_ptr + (n * x_n + h * x_h + p0 * x_p)
        z, mask = load_features(base, x_p, x_f, left, mask_f, F, DENSE, BLOCK_M, BLOCK_F)
        if norm_ptr is not None or ACT != "none":
            pre = (z.to(tl.float32) - mean) * scale + shift
            z = activate(pre, ACT, SLOPE).to(x_ptr.dtype.element_ty)
        logits = logits_of(z, w_t, bias, mask_c, PRECISION, WIDEN)
        loss, factor, w, hit = values(
            logits, y, counts, offs_c, alpha_ptr, weight_ptr, gamma, smoothing, C, POWER, SMOOTH
        )
        sum_loss += by_label(loss, hit, BY_CLASS, LANES)
        sum_factor += by_label(factor, hit, BY_CLASS, LANES)
        sum_weight += by_label(w, hit, BY_CLASS, LANES)
        if BINS:
            counted += tl.histogram(cells(logits, y, counts, offs_c, C), BINS)
    store_sums(parts_ptr, sum_loss, sum_factor, sum_weight, offs_c, pid, C, BY_CLASS)
    if BINS:
        tl.store(counts_ptr + pid.to(tl.int64) * BINS + tl.arange(0, BINS), counted)


@autotune(
    CONFIGS,
    key=["F", "C", "DENSE", "TILE", "ACT", "POWER", "SMOOTH", "BY_CLASS", "DETACH", "PRODUCTS"],
)
@triton.jit
def linear_focal_loss_backward_kernel(
    x_ptr, norm_ptr, labels_ptr, w_ptr, bias_ptr, alpha_ptr, weight_ptr,  # as above
    scale_ptr, g_ptr, parts_ptr,  # [3, C or 1], as x or None, [programs, WIDTH]
    N, H, P, x_n, x_h, x_p, x_f, labels_n, labels_h, labels_p, g_n, g_h, g_p, g_f,  # strides
    gamma, smoothing, ignore_index,
    F: tl.constexpr, C: tl.constexpr, DENSE: tl.constexpr, TILE: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr,
    BY_CLASS: tl.constexpr, DETACH: tl.constexpr,
    THROUGH_NORM: tl.constexpr,  # write g scale in place of g
    WEIGHT: tl.constexpr, SUMS: tl.constexpr,  # whether dw and db, and the sums, are asked for
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,  # as above
    PRODUCTS: tl.constexpr,  # of the gradient's products: "ieee" or "tf32"
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write g of a range of pixels; and a row of parts: dw, db, sums of g and of g (x - mean)."""
    BLOCK_F: tl.constexpr = block(F)
    BLOCK_C: tl.constexpr = block(C)
    BLOCK_M: tl.constexpr = block_m(F, C, TILE, ELEMENTS)
    pid = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_f = tl.arange(0, BLOCK_F)
    offs_c = tl.arange(0, BLOCK_C)
    mask_f = offs_f < F
    mask_c = offs_c < C
    mean, scale, shift = 0.0, 1.0, 0.0
    if norm_ptr is not None:
        mean, scale, shift = load_norm(norm_ptr, offs_f[None, :], mask_f[None, :], F)
    mask_w = mask_c[:, None] & mask_f[None, :]
    offs_w = offs_c[:, None] * F + offs_f[None, :]
    w = tl.load(w_ptr + offs_w, mask=mask_w, other=0.0)
    bias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)

    tiles_p = tiles_of(P, BLOCK_M)
    tiles = N * H * tiles_p
    per = (tiles + tl.num_programs(0) - 1) // tl.num_programs(0)
    dw = tl.zeros((BLOCK_C, BLOCK_F), dtype=tl.float32)
    db = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_g = tl.zeros((BLOCK_M, BLOCK_F), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_M, BLOCK_F), dtype=tl.float32)
    for index in range(pid * per, tl.minimum(pid * per + per, tiles)):
        n, h, p0, left = tile_at(index, tiles_p, H, P, BLOCK_M)
        base = labels_ptr + (n * labels_n + h * labels_h + p0 * labels_p)
        y, counts = load_labels(base, offs_m * labels_p, offs_m < left, ignore_index, C)
        base = x_ptr + (n * x_n + h * x_h + p0 * x_p)
        x, mask = load_features(base, x_p, x_f, left, mask_f, F, DENSE, BLOCK_M, BLOCK_F)
        pre = (x.to(tl.float32) - mean) * scale + shift
        z = activate(pre, ACT, SLOPE).to(x_ptr.dtype.element_ty)
        logits = logits_of(z, tl.trans(w), bias, mask_c, PRECISION, WIDEN)
        a, b, divisor = load_scales(scale_ptr, y, counts, C, BY_CLASS)
        d = gradient(
            logits, y, counts, offs_c, alpha_ptr, weight_ptr, a, b, divisor, gamma, smoothing,
            C, POWER, SMOOTH, DETACH,
        )  # fmt: skip
        if WEIGHT:
            db += tl.sum(d, 0)
        if PRODUCTS == "tf32":
            d = nearest_tf32(d)
        if WEIGHT:
            z = tl.where(counts[:, None], z.to(tl.float32), 0.0)  # an ignored pixel may hold NaN
            dw = tl.dot(tl.trans(d), z, dw, input_precision=PRODUCTS)
        if g_ptr is not None:
            dz = tl.dot(d, w.to(tl.float32), input_precision=PRODUCTS)
            g = tl.where(counts[:, None], activate_backward(dz, pre, ACT, SLOPE), 0.0)
            if not THROUGH_NORM:
                g = g.to(g_ptr.dtype.element_ty).to(tl.float32)  # the sums are of what is stored
            if SUMS:
                sum_g += g
                sum_gx += tl.where(counts[:, None], g * (x.to(tl.float32) - mean), 0.0)
            if THROUGH_NORM:
                g *= scale
            if DENSE:
                offs = offs_m[:, None] * F + offs_f[None, :]
            else:
                offs = offs_m[:, None] * g_p + (offs_f.to(tl.int64) * g_f)[None, :]
            base = g_ptr + (n * g_n + h * g_h + p0 * g_p)
            tl.store(base + offs, g.to(g_ptr.dtype.element_ty), mask=mask)

    WIDTH: tl.constexpr = WEIGHT * (C * F + C) + SUMS * 2 * F
    parts_ptr += pid.to(tl.int64) * WIDTH
    if WEIGHT:
        tl.store(parts_ptr + offs_w, dw, mask=mask_w)
        tl.store(parts_ptr + C * F + offs_c, db, mask=mask_c)
        parts_ptr += C * F + C
    if SUMS:
        tl.store(parts_ptr + offs_f, tl.sum(sum_g, 0), mask=mask_f)
        tl.store(parts_ptr + F + offs_f, tl.sum(sum_gx, 0), mask=mask_f)


def linear_focal_loss_variant(
    dtype: str,
    F: int,
    C: int,
    *,
    backward: bool = False,
    norm: bool = False,
    act: str = "none",
    by_class: bool = False,
    bins: int = 0,
    products: str = "tf32",
    config: triton.Config = CONFIGS[0],
) -> Variant:
    """Return a pass over large channels_last images with a bias, to compile ahead of time."""
    pointers = {
        "x_ptr": dtype,
        "norm_ptr": "fp32" if norm else None,
        "labels_ptr": "u8",
        "w_ptr": dtype,
        "bias_ptr": dtype,
        "alpha_ptr": None,
        "weight_ptr": None,
    }
    strides = ["x_n", "x_h", "x_p", "x_f", "labels_n", "labels_h", "labels_p"]
    constexprs = {"F": F, "C": C, "DENSE": True, "TILE": 4096, "ACT": act, "SLOPE": 0.01}
    constexprs |= {"POWER": 2, "SMOOTH": False, "BY_CLASS": by_class}
    constexprs |= {"PRECISION": "ieee", "WIDEN": False}
    if backward:
        kernel = linear_focal_loss_backward_kernel
        pointers |= {"scale_ptr": "fp32", "g_ptr": dtype, "parts_ptr": "fp32"}
        strides += ["g_n", "g_h", "g_p", "g_f"]
        constexprs |= {"DETACH": False, "THROUGH_NORM": False, "WEIGHT": True, "SUMS": norm}
        constexprs["PRODUCTS"] = products
    else:
        kernel = linear_focal_loss_kernel
        pointers |= {"parts_ptr": "fp64", "counts_ptr": "i32" if bins else None}
        constexprs["BINS"] = bins
    signature = {name: f"*{type_}" for name, type_ in pointers.items() if type_}
    constexprs |= {name: None for name, type_ in pointers.items() if not type_}
    constexprs |= {name: 1 for name in ("x_f", "labels_p", *(["g_f"] if backward else []))}
    runtime = {name: "i32" for name in ("N", "H", "P", *strides) if name not in constexprs}
    signature |= runtime | {"gamma": "fp32", "smoothing": "fp32", "ignore_index": "i32"}
    divisible = [name for name in runtime if name not in ("N", "H")]
    return Variant(kernel, signature, constexprs, config, tuple(divisible))
