"""Device code for the softmax focal loss of pixels, and what its fused forms share.

Of a pixel with logits x_c, 0 <= c < C, and label y, with alpha_c and w_c factors a class:

    p = softmax(x)      q = sum of p_c over c != y      f = q^gamma
    cross  = (1 - eps) w_y (-log p_y) + eps / C sum_c w_c (-log p_c)
    loss   = alpha_y f cross
    forward    sums of loss, of alpha_y w_y f and of w_y, of all pixels or of those of each label;
               loss of each pixel; counts of label and prediction
    backward   dx = (a dloss/dx + b d(alpha_y w_y f)/dx) / divisor,  a and b scalars, one a label,
               or (a alone) one a pixel

x: pixels [N, H, P] of C logits, any strides: planar, channels_last or [M, C], as it stands; labels
uint8, int32 or int64 of the same pixels, any strides; alpha, w float32 [C].

A pixel is one that counts unless its label is ignore_index. A label outside [0, C) makes NaN of its
loss and of its gradient: nobody waits for the device to find it.

Each pass reads the logits and labels once; forward writes 24 bytes a program, backward the
gradient. At 3 classes of 2 bytes and a label of 1 that is 7 bytes a pixel forward and 13 backward:
0.29 ms for 8 images of 3 planes of 1280 x 2048 at 4.3 TB/s.

A program owns a range of tiles of BLOCK_M pixels, never more than CHAIN pixels, and leaves a row of
float64 parts; a tree of one order adds them. No atomics.
"""

import triton
import triton.language as tl

from ._tune import autotune
from .aot import Variant

CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    triton.Config({"ELEMENTS": 2048}, num_warps=4),
    triton.Config({"ELEMENTS": 4096}, num_warps=4),
    triton.Config({"ELEMENTS": 8192}, num_warps=8),
]
CHAIN = 1 << 14  # pixels of a program, so that no sum is long
PROGRAMS = 2048  # at most, unless CHAIN asks for more: several waves of any device
SHORTEST = 1024  # pixels of a program, at least


def programs(pixels: int) -> int:
    """Return how many programs share the pixels."""
    fill = min(PROGRAMS, triton.cdiv(pixels, SHORTEST))
    return max(1, fill, triton.cdiv(pixels, CHAIN))


@triton.constexpr_function
def power_of_two(needed: int) -> int:
    """Return the least power of two that covers needed."""
    return 1 << (needed - 1).bit_length()


@triton.constexpr_function
def block_m(C: int, tile: int, elements: int) -> int:
    """Return the pixels of a tile: `elements` in all, 16 at least (a sector), `tile` at most."""
    return min(tile, max(16, elements // power_of_two(C)))


def tile_size(P: int) -> int:
    """Return the most pixels that a tile of rows of P pixels should have."""
    return min(4096, max(16, triton.next_power_of_2(P)))


def layout(C: int, dense: bool) -> str:
    """Return how logits are loaded; dense: whether a pixel's lie side by side, without a gap.

    "rows" of C that divide into vectors, constant C telling the compiler; "packed" ones that don't:
    loaded as one run of numbers and dealt to their pixels in shared memory; else by "strides".
    """
    if dense and (C in (1, 2, 4) or C % 8 == 0):
        return "rows"
    return "packed" if dense and C <= 128 else "strides"


@triton.jit
def tiles_of(P, BLOCK_M: tl.constexpr):
    """Return the tiles of a row of P pixels; P may be a constant, or beyond int32."""
    return ((tl.zeros((), dtype=tl.int64) + P + BLOCK_M - 1) // BLOCK_M).to(tl.int32)


@triton.jit
def tile_at(index, tiles_p, H, P, BLOCK_M: tl.constexpr):
    """Return image, row, first pixel (all int64) and the number of pixels left of a tile."""
    row = index // tiles_p
    p0 = (index % tiles_p).to(tl.int64) * BLOCK_M
    n = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    return n, h, p0, tl.minimum(P - p0, BLOCK_M).to(tl.int32)


@triton.jit
def load_labels(labels_ptr, offs, mask, ignore_index, C: tl.constexpr):
    """Return labels in int32, -1 for one that is none of C, and where a pixel counts."""
    y = tl.load(labels_ptr + offs, mask=mask, other=0).to(tl.int64)
    counts = mask & (y != ignore_index)
    known = (y >= 0) & (y < C)
    return tl.where(known, y, -1).to(tl.int32), counts


@triton.jit
def load_factor(factor_ptr, y, counts):
    """Return a factor a class of each pixel's label, 1 without factors."""
    if factor_ptr is None:
        factor = tl.where(counts, 1.0, 0.0)
    else:
        factor = tl.load(factor_ptr + y, mask=counts & (y >= 0), other=0.0)
    return factor


@triton.jit
def load_tile(
    x_ptr, x_p, x_c, left, mask_c,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return logits [BLOCK_M, BLOCK_C] in float32, -inf beyond C, any number beyond left."""
    if LAYOUT == "packed":
        flat = tl.arange(0, BLOCK_M * BLOCK_C)
        x = tl.load(x_ptr + flat, mask=flat < left * C, other=0.0).to(tl.float32)
        offs = flat // BLOCK_C * C + flat % BLOCK_C  # beyond the tile only where masked below
        x = tl.gather(x, tl.minimum(offs, BLOCK_M * BLOCK_C - 1), 0)
        x = tl.reshape(x, [BLOCK_M, BLOCK_C])
    else:
        offs_c = tl.arange(0, BLOCK_C).to(tl.int64)  # a plane may pass 2**31
        offs_m = tl.arange(0, BLOCK_M)
        offs = offs_m[:, None] * x_p + (offs_c * x_c)[None, :]
        if LAYOUT == "rows":
            offs = offs_m[:, None] * C + tl.arange(0, BLOCK_C)[None, :]
        x = tl.load(x_ptr + offs, mask=(offs_m < left)[:, None] & mask_c[None, :], other=0.0)
        x = x.to(tl.float32)
    return tl.where(mask_c[None, :], x, float("-inf"))


@triton.jit
def store_tile(
    dx_ptr, g, dx_p, dx_c, left, mask_c,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Store g [BLOCK_M, BLOCK_C] where load_tile would load it."""
    if LAYOUT == "packed":
        flat = tl.arange(0, BLOCK_M * BLOCK_C)
        g = tl.reshape(g, [BLOCK_M * BLOCK_C])
        offs = flat // C * BLOCK_C + flat % C
        g = tl.gather(g, tl.minimum(offs, BLOCK_M * BLOCK_C - 1), 0)
        tl.store(dx_ptr + flat, g.to(dx_ptr.dtype.element_ty), mask=flat < left * C)
    else:
        offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
        offs_m = tl.arange(0, BLOCK_M)
        offs = offs_m[:, None] * dx_p + (offs_c * dx_c)[None, :]
        if LAYOUT == "rows":
            offs = offs_m[:, None] * C + tl.arange(0, BLOCK_C)[None, :]
        mask = (offs_m < left)[:, None] & mask_c[None, :]
        tl.store(dx_ptr + offs, g.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_terms(x, y, offs_c):
    """Return hit, e, s, total, q and ce of logits x [BLOCK_M, BLOCK_C], -inf beyond C.

    hit marks the label; e = exp(x - max); s is its sum without the label's, total with it;
    q = s / total; ce = -log p_y. NaN where y is -1.
    """
    hit = offs_c[None, :] == y[:, None]
    top = tl.max(x, 1)
    e = tl.exp(x - top[:, None])
    s = tl.sum(tl.where(hit, 0.0, e), 1)
    own = tl.sum(tl.where(hit, x, 0.0), 1) - top
    total = tl.where(y < 0, float("nan"), s + tl.exp(own))
    q = s / total
    # -log(1 - q) has all digits where q is small, as Kahan takes it: log(w) (w - 1)' / (w - 1).
    rest = 1.0 - q
    step = rest - 1.0
    small = tl.where(step == 0, q, tl.log(rest) * (q / tl.where(step == 0, 1.0, step)))
    return hit, e, s, total, q, tl.where(q < 0.5, small, tl.log(total) - own)


@triton.jit
def smooth_terms(x, total, weight_ptr, offs_c, C: tl.constexpr):
    """Return sum_c w_c (-log p_c) of each pixel, w_c and their sum."""
    w = tl.where(offs_c < C, 1.0, 0.0)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0)
    below = tl.where((offs_c < C)[None, :], tl.max(x, 1)[:, None] - x, 0.0)
    return tl.sum(w[None, :] * (tl.log(total)[:, None] + below), 1), w, tl.sum(w, 0)


@triton.jit
def power(q, gamma, POWER: tl.constexpr):
    """Return q^gamma; POWER is gamma where that is 0, 1 or 2, else -1."""
    if POWER == 0:
        f = tl.where(q == q, 1.0, q)
    elif POWER == 1:
        f = q
    elif POWER == 2:
        f = q * q
    else:
        f = tl.where(q > 0, tl.exp2(gamma * tl.log2(tl.where(q > 0, q, 1.0))), q)
    return f


@triton.jit
def values(
    x, y, counts, offs_c, alpha_ptr, weight_ptr, gamma, smoothing,
    C: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Return loss, alpha_y w_y f and w_y of each pixel that counts, 0 of others; and hit."""
    hit, e, s, total, q, ce = softmax_terms(x, y, offs_c)
    alpha = load_factor(alpha_ptr, y, counts)
    w = load_factor(weight_ptr, y, counts)
    cross = w * ce
    if SMOOTH:
        smooth, w_c, w_all = smooth_terms(x, total, weight_ptr, offs_c, C)
        cross = (1.0 - smoothing) * cross + smoothing / C * smooth
    f = alpha * power(q, gamma, POWER)
    loss = tl.where(counts, f * cross, 0.0)
    return loss, tl.where(counts, f * w, 0.0), w, hit


@triton.jit
def gradient(
    x, y, counts, offs_c, alpha_ptr, weight_ptr, a, b, divisor, gamma, smoothing,
    C: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr, DETACH: tl.constexpr,
):  # fmt: skip
    """Return (a dloss/dx + b d(alpha_y w_y f)/dx) / divisor, 0 at pixels that don't count."""
    hit, e, s, total, q, ce = softmax_terms(x, y, offs_c)
    w = load_factor(weight_ptr, y, counts)
    cross = w * ce
    if SMOOTH:
        smooth, w_c, w_all = smooth_terms(x, total, weight_ptr, offs_c, C)
        cross = (1.0 - smoothing) * cross + smoothing / C * smooth
    # Divided first: where all f are tiny so is their sum, whose inverse may be out of range.
    share = power(q, gamma, POWER) / divisor * load_factor(alpha_ptr, y, counts)
    plain = a * share * w
    if SMOOTH:
        plain *= 1.0 - smoothing
    inner = plain / total  # what multiplies e
    own = -plain * q  # the label's
    if not DETACH and POWER != 0:
        slope = gamma * share * (1.0 - q) * (a * cross + b * w)
        inner += tl.where(s > 0, slope / tl.where(s > 0, s, 1.0), 0.0)
        own -= slope
    if SMOOTH:
        spread = a * share * (smoothing / C)
        tilt = spread * w_all
        inner += tilt / total
        own += tilt * (1.0 - q)
        g = tl.where(hit, own[:, None], e * inner[:, None]) - spread[:, None] * w_c[None, :]
    else:
        g = tl.where(hit, own[:, None], e * inner[:, None])
    return tl.where(counts[:, None], g, 0.0)  # chosen: an ignored pixel may hold NaN


@triton.jit
def by_label(values, hit, BY_CLASS: tl.constexpr, LANES: tl.constexpr):
    """Return values a pixel [BLOCK_M] to add up: as they are, or under their labels.

    Under labels they are [BLOCK_M / LANES, BLOCK_C], the sums of LANES neighbours, which one thread
    holds: so accumulators take an eighth of the registers.
    """
    if BY_CLASS:
        spread = tl.where(hit, values[:, None], 0.0)
        M: tl.constexpr = spread.shape[0] // LANES
        values = tl.sum(tl.reshape(spread, [M, LANES, spread.shape[1]]), 1)
    return values


@triton.jit
def cells(x, y, counts, offs_c, C: tl.constexpr):
    """Return y C + the first of the largest logits, NaN being below all; C C where none counts."""
    x = tl.where(x == x, x, float("-inf"))
    first = tl.where(x == tl.max(x, 1)[:, None], offs_c[None, :], C)
    return tl.where(counts & (y >= 0), y * C + tl.min(first, 1), C * C)


@triton.jit
def store_sums(
    parts_ptr, sum_loss, sum_factor, sum_weight, offs_c, pid,
    C: tl.constexpr, BY_CLASS: tl.constexpr,
):  # fmt: skip
    """Write a program's row of parts: [C, 3] by label, or [3]."""
    if BY_CLASS:
        parts_ptr += pid.to(tl.int64) * (3 * C) + offs_c * 3
        mask = offs_c < C
        tl.store(parts_ptr, tl.sum(sum_loss.to(tl.float64), 0), mask=mask)
        tl.store(parts_ptr + 1, tl.sum(sum_factor.to(tl.float64), 0), mask=mask)
        tl.store(parts_ptr + 2, tl.sum(sum_weight.to(tl.float64), 0), mask=mask)
    else:
        parts_ptr += pid.to(tl.int64) * 3
        tl.store(parts_ptr, tl.sum(sum_loss.to(tl.float64), 0))
        tl.store(parts_ptr + 1, tl.sum(sum_factor.to(tl.float64), 0))
        tl.store(parts_ptr + 2, tl.sum(sum_weight.to(tl.float64), 0))


@triton.jit
def load_scales(
    scale_ptr, y, counts, C: tl.constexpr, BY_CLASS: tl.constexpr
):  # [3, C] by label, or [3]
    """Return a, b and divisor of each pixel."""
    if BY_CLASS:
        mask = counts & (y >= 0)
        a = tl.load(scale_ptr + y, mask=mask, other=0.0)
        b = tl.load(scale_ptr + C + y, mask=mask, other=0.0)
        divisor = tl.load(scale_ptr + 2 * C + y, mask=mask, other=1.0)
    else:
        a = tl.load(scale_ptr)
        b = tl.load(scale_ptr + 1)
        divisor = tl.load(scale_ptr + 2)
    return a, b, divisor


@autotune(CONFIGS, key=["C", "LAYOUT", "TILE", "POWER", "SMOOTH", "BY_CLASS", "BINS"])
@triton.jit
def softmax_focal_loss_kernel(
    x_ptr, labels_ptr, alpha_ptr, weight_ptr,  # [N, H, P, C], [N, H, P], [C] or None, [C] or None
    loss_ptr, parts_ptr, counts_ptr,  # [N, H, P] or None, [programs, C or 1, 3], [programs, BINS]
    N, H, P,
    x_n, x_h, x_p, x_c, labels_n, labels_h, labels_p,  # strides
    gamma, smoothing, ignore_index,
    C: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, POWER: tl.constexpr,
    SMOOTH: tl.constexpr, BY_CLASS: tl.constexpr, BINS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write the loss of a range of pixels, and their sums and counts."""
    BLOCK_C: tl.constexpr = power_of_two(C)
    BLOCK_M: tl.constexpr = block_m(C, TILE, ELEMENTS)
    LANES: tl.constexpr = 8
    pid = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
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
        mask = offs_m < left
        base = labels_ptr + (n * labels_n + h * labels_h + p0 * labels_p)
        y, counts = load_labels(base, offs_m * labels_p, mask, ignore_index, C)
        base = x_ptr + (n * x_n + h * x_h + p0 * x_p)
        x = load_tile(base, x_p, x_c, left, mask_c, C, BLOCK_M, BLOCK_C, LAYOUT)
        loss, factor, w, hit = values(
            x, y, counts, offs_c, alpha_ptr, weight_ptr, gamma, smoothing, C, POWER, SMOOTH
        )
        sum_loss += by_label(loss, hit, BY_CLASS, LANES)
        sum_factor += by_label(factor, hit, BY_CLASS, LANES)
        sum_weight += by_label(w, hit, BY_CLASS, LANES)
        if loss_ptr is not None:
            tl.store(loss_ptr + ((n * H + h) * P + p0) + offs_m, loss, mask=mask)
        if BINS:
            counted += tl.histogram(cells(x, y, counts, offs_c, C), BINS)
    store_sums(parts_ptr, sum_loss, sum_factor, sum_weight, offs_c, pid, C, BY_CLASS)
    if BINS:
        tl.store(counts_ptr + pid.to(tl.int64) * BINS + tl.arange(0, BINS), counted)


@autotune(CONFIGS, key=["C", "LAYOUT", "TILE", "POWER", "SMOOTH", "BY_CLASS", "DETACH"])
@triton.jit
def softmax_focal_loss_backward_kernel(
    x_ptr, labels_ptr, alpha_ptr, weight_ptr,  # as above
    scale_ptr, dloss_ptr, dx_ptr,  # float32 [3, C or 1] or None, [N, H, P] or None, as x
    N, H, P,
    x_n, x_h, x_p, x_c, labels_n, labels_h, labels_p,  # strides
    dx_n, dx_h, dx_p, dx_c, dloss_n, dloss_h, dloss_p,
    gamma, smoothing, ignore_index,
    C: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, POWER: tl.constexpr,
    SMOOTH: tl.constexpr, BY_CLASS: tl.constexpr, DETACH: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a range of pixels: of sums by scale, or of losses by dloss."""
    BLOCK_C: tl.constexpr = power_of_two(C)
    BLOCK_M: tl.constexpr = block_m(C, TILE, ELEMENTS)
    pid = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    tiles_p = tiles_of(P, BLOCK_M)
    tiles = N * H * tiles_p
    per = (tiles + tl.num_programs(0) - 1) // tl.num_programs(0)
    for index in range(pid * per, tl.minimum(pid * per + per, tiles)):
        n, h, p0, left = tile_at(index, tiles_p, H, P, BLOCK_M)
        mask = offs_m < left
        base = labels_ptr + (n * labels_n + h * labels_h + p0 * labels_p)
        y, counts = load_labels(base, offs_m * labels_p, mask, ignore_index, C)
        base = x_ptr + (n * x_n + h * x_h + p0 * x_p)
        x = load_tile(base, x_p, x_c, left, mask_c, C, BLOCK_M, BLOCK_C, LAYOUT)
        b, divisor = 0.0, 1.0
        if dloss_ptr is not None:
            base = dloss_ptr + (n * dloss_n + h * dloss_h + p0 * dloss_p)
            a = tl.load(base + offs_m * dloss_p, mask=mask, other=0.0)
        else:
            a, b, divisor = load_scales(scale_ptr, y, counts, C, BY_CLASS)
        g = gradient(
            x, y, counts, offs_c, alpha_ptr, weight_ptr, a, b, divisor, gamma, smoothing,
            C, POWER, SMOOTH, DETACH,
        )  # fmt: skip
        base = dx_ptr + (n * dx_n + h * dx_h + p0 * dx_p)
        store_tile(base, g, dx_p, dx_c, left, mask_c, C, BLOCK_M, BLOCK_C, LAYOUT)


def softmax_focal_loss_variant(
    dtype: str,
    C: int,
    *,
    backward: bool = False,
    channels_last: bool = False,
    labels: str = "u8",
    alpha: bool = False,
    weight: bool = False,
    power: int = 2,
    smooth: bool = False,
    by_class: bool = False,
    bins: int = 0,
    detach: bool = False,
    pixels: bool = False,
    config: triton.Config = CONFIGS[0],
) -> Variant:
    """Return a pass over large images, to compile ahead of time; dtype "fp32", "fp16" or "bf16".

    `pixels` is for reduction="none"; `bins` for counts, a power of two above C * C, or 0.
    """
    present = {
        "x_ptr": dtype,
        "labels_ptr": labels,
        "alpha_ptr": "fp32" if alpha else None,
        "weight_ptr": "fp32" if weight else None,
    }
    strides = ["x_n", "x_h", "x_p", "x_c", "labels_n", "labels_h", "labels_p"]
    constexprs = {"C": C, "TILE": 4096, "POWER": power, "SMOOTH": smooth, "BY_CLASS": by_class}
    constexprs["LAYOUT"] = layout(C, channels_last)
    if backward:
        kernel = softmax_focal_loss_backward_kernel
        present |= {"scale_ptr": None if pixels else "fp32", "dloss_ptr": None, "dx_ptr": dtype}
        if pixels:
            present["dloss_ptr"] = "fp32"
        strides += [f"d{name}" for name in strides[:4]] + ["dloss_n", "dloss_h", "dloss_p"]
        constexprs["DETACH"] = detach
    else:
        kernel = softmax_focal_loss_kernel
        present |= {"loss_ptr": "fp32" if pixels else None, "parts_ptr": "fp64"}
        present["counts_ptr"] = "i32" if bins else None
        constexprs["BINS"] = bins
    signature = {name: f"*{type_}" for name, type_ in present.items() if type_}
    constexprs |= {name: None for name, type_ in present.items() if not type_}
    ones = {f"{t}_{'c' if channels_last else 'p'}" for t in ("x", "dx")} | {"labels_p", "dloss_p"}
    constexprs |= {name: 1 for name in strides if name in ones}  # as triton finds them at launch
    whole = [name for name in ("N", "H", "P", *strides) if name not in ones]
    signature |= {name: "i32" for name in whole}
    signature |= {"gamma": "fp32", "smoothing": "fp32", "ignore_index": "i32"}
    divisible = [name for name in whole if name not in ("N", "H")]
    if channels_last and C % 16:
        divisible = [name for name in divisible if name not in ("x_p", "dx_p")]
    return Variant(kernel, signature, constexprs, config, tuple(divisible))
