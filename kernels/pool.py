"""Device code for pooling NHWC images, where no convolution pools them as it loads.

    max_pool_kernel            y[n, p, q, c] = the largest x[n, h, w, c] of window (p, q); its tap
    max_pool_backward_kernel   dx = the sum of dy over the windows whose tap it was
    avg_pool_kernel            y[n, p, q, c] = the window's sum / divisor
    avg_pool_backward_kernel   dx = the sum of dy / divisor over the windows that it lies in
    window_sums_kernel, avg_parts_kernel: y of avg_pool_kernel in two steps, for large windows

Window p has rows p * STRIDE_H - PAD_H + r * DIL_H for r < R, or if ADAPTIVE those from
floor(p H / P) to ceil((p + 1) H / P), R at most; columns are alike. Only what lies inside the image
counts. The tap is r * S + s of the largest: of the first where several are, of the last NaN where
there is one, as in torch. It takes one byte where a window has at most 256, not torch's eight.

All images are dense; x, dx: [N, H, W, C]; y, dy, taps: [N, P, Q, C]. A program writes a tile of its
result and reads what that needs: backward gathers, so there are no atomics and one order of sums.

Bytes that must move: each image once, and the taps. That is the roof, for windows that overlap and
values that several programs read come from the caches. 2x2 at 16 channels of 2 bytes, 1280 x 2048:
0.115 GB an image for the maximum, each way, 0.105 GB for the mean; 27 and 24 us at 4.3 TB/s.
A maximum over a large window is a chain of loads, a window a lane: right, not fast.
"""

import triton
import triton.language as tl

from ._tune import autotune
from .pointwise import block_c, block_m, pixels

CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    triton.Config({"ELEMENTS": 1024}, num_warps=4),  # 16 bytes a lane of 2-byte elements
    triton.Config({"ELEMENTS": 2048}, num_warps=8),
    triton.Config({"ELEMENTS": 2048}, num_warps=4),  # the same on AMD, of 64 lanes a warp
]
PARTS = 512  # of a large window, at most: their sum is a chain
ACCUMULATED = 4096  # elements of a tile in window_sums_kernel
JOINED = 1024  # elements of a tile in avg_parts_kernel
SMALL = 64  # taps of a window whose sum one lane takes


def grid(M: int, C: int):
    """Return the launch grid of kernels that write M pixels of C channels."""
    return lambda meta: (triton.cdiv(M, block_m(C, meta["ELEMENTS"])) * triton.cdiv(C, block_c(C)),)


def sums_grid(M: int, C: int, T: int) -> tuple[int]:
    """Return the launch grid of window_sums_kernel."""
    return (M * T * triton.cdiv(C, block_c(C)),)


def window_parts(M: int, C: int, taps: int) -> int:
    """Return into how many parts to cut windows of `taps`, M of them, so that a device fills."""
    programs = M * triton.cdiv(C, block_c(C))
    return max(1, min(triton.cdiv(2048, programs), taps // (4 * block_m(C, ACCUMULATED)), PARTS))


@triton.jit
def _span(
    p, H, P,
    R: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """Return where window p begins, and past its last row, along an axis; not yet cut."""
    if ADAPTIVE:
        p = p.to(tl.int64)  # P*H may pass 2**31
        h0 = (p * H // P).to(tl.int32)
        h1 = ((p * H + H + P - 1) // P).to(tl.int32)
    else:
        h0 = p * STRIDE - PAD
        h1 = h0 + (R - 1) * DIL + 1
    return h0, h1


@triton.jit
def _meets(
    h, j, H, P,
    R: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """Return the j-th window p that row h may lie in, its tap r there, and whether it does."""
    if ADAPTIVE:
        p = (h.to(tl.int64) * P // H).to(tl.int32) + j
        h0, h1 = _span(p, H, P, R, STRIDE, PAD, DIL, ADAPTIVE)
        r = h - h0
        holds = (p < P) & (r >= 0) & (h < h1)
    else:
        p = (h + PAD) // STRIDE - j
        apart = h + PAD - p * STRIDE
        r = apart // DIL
        holds = (p >= 0) & (p < P) & (r < R) & (r * DIL == apart)
    return p, r, holds


@triton.jit
def _divisor(
    h0, h1, w0, w1, H, W,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """Return what a window's sum is divided by, in float32."""
    if DIVISOR is None:
        if COUNT_PAD:
            rows = tl.minimum(h1, H + PAD_H) - h0
            columns = tl.minimum(w1, W + PAD_W) - w0
        else:
            rows = tl.minimum(h1, H) - tl.maximum(h0, 0)
            columns = tl.minimum(w1, W) - tl.maximum(w0, 0)
        # Past the last pixel of a tile there may be nothing to divide by.
        divisor = tl.maximum(rows, 1).to(tl.float32) * tl.maximum(columns, 1).to(tl.float32)
    else:
        divisor = tl.zeros_like(h0).to(tl.float32) + DIVISOR
    return divisor


@autotune(CONFIGS, key=["C", "R", "S", "STRIDE_W"])
@triton.jit
def max_pool_kernel(
    x_ptr, y_ptr, taps_ptr,  # [N, H, W, C], [N, P, Q, C], as y: integers, or None
    M, H, W, P, Q,  # M = N P Q
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, ADAPTIVE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write a tile of y and of the taps."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    m0 = (pid // TILES_C).to(tl.int64) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    n, p, q = pixels(m0, P, Q, BLOCK_M)
    h0, h1 = _span(p, H, P, R, STRIDE_H, PAD_H, DIL_H, ADAPTIVE)
    w0, w1 = _span(q, W, Q, S, STRIDE_W, PAD_W, DIL_W, ADAPTIVE)
    h1 = tl.minimum(h1, H)
    w1 = tl.minimum(w1, W)

    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), dtype=tl.float32)
    taken = tl.full((BLOCK_M, BLOCK_C), -1, dtype=tl.int32)
    for tap in range(R * S):
        h = h0 + tap // S * DIL_H
        w = w0 + tap % S * DIL_W
        inside = (h >= 0) & (h < h1) & (w >= 0) & (w < w1) & (offs_m < M)
        mask = inside[:, None] & mask_c[None, :]
        offs = ((n * H + h) * W + w)[:, None] * C + offs_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        wins = mask & ((x > best) | (x != x) | (taken < 0))
        best = tl.where(wins, x, best)
        taken = tl.where(wins, tap, taken)

    offs = offs_m[:, None] * C + offs_c[None, :]
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    tl.store(y_ptr + offs, best.to(y_ptr.dtype.element_ty), mask=mask)
    if taps_ptr is not None:
        tl.store(taps_ptr + offs, taken.to(taps_ptr.dtype.element_ty), mask=mask)


@autotune(CONFIGS, key=["C", "R", "S", "STRIDE_W"])
@triton.jit
def max_pool_backward_kernel(
    dy_ptr, taps_ptr, dx_ptr,  # [N, P, Q, C], as dy: integers, [N, H, W, C]
    M, H, W, P, Q,  # M = N H W
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, ADAPTIVE: tl.constexpr,
    MEET_H: tl.constexpr, MEET_W: tl.constexpr,  # windows that a pixel may lie in, an axis
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write a tile of dx."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    m0 = (pid // TILES_C).to(tl.int64) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    n, h, w = pixels(m0, H, W, BLOCK_M)

    dx = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for j in range(MEET_H * MEET_W):
        p, r, holds_h = _meets(h, j // MEET_W, H, P, R, STRIDE_H, PAD_H, DIL_H, ADAPTIVE)
        q, s, holds_w = _meets(w, j % MEET_W, W, Q, S, STRIDE_W, PAD_W, DIL_W, ADAPTIVE)
        mask = (holds_h & holds_w & (offs_m < M))[:, None] & mask_c[None, :]
        offs = ((n * P + p) * Q + q)[:, None] * C + offs_c[None, :]
        taken = tl.load(taps_ptr + offs, mask=mask, other=0).to(tl.int32)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dx += tl.where(mask & (taken == (r * S + s)[:, None]), dy, 0.0)

    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@autotune(CONFIGS, key=["C", "R", "S", "STRIDE_W"])
@triton.jit
def avg_pool_kernel(
    x_ptr, y_ptr,  # [N, H, W, C], [N, P, Q, C]
    M, H, W, P, Q,  # M = N P Q
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ADAPTIVE: tl.constexpr, COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write a tile of y."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    m0 = (pid // TILES_C).to(tl.int64) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    n, p, q = pixels(m0, P, Q, BLOCK_M)
    h0, h1 = _span(p, H, P, R, STRIDE_H, PAD_H, 1, ADAPTIVE)
    w0, w1 = _span(q, W, Q, S, STRIDE_W, PAD_W, 1, ADAPTIVE)

    y = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for tap in range(R * S):
        h = h0 + tap // S
        w = w0 + tap % S
        inside = (h >= 0) & (h < tl.minimum(h1, H)) & (w >= 0) & (w < tl.minimum(w1, W))
        mask = (inside & (offs_m < M))[:, None] & mask_c[None, :]
        offs = ((n * H + h) * W + w)[:, None] * C + offs_c[None, :]
        y += tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = y / _divisor(h0, h1, w0, w1, H, W, PAD_H, PAD_W, COUNT_PAD, DIVISOR)[:, None]

    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@autotune(CONFIGS, key=["C", "R", "S", "STRIDE_W"])
@triton.jit
def avg_pool_backward_kernel(
    dy_ptr, dx_ptr,  # [N, P, Q, C], [N, H, W, C]
    M, H, W, P, Q,  # M = N H W
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ADAPTIVE: tl.constexpr, COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    MEET_H: tl.constexpr, MEET_W: tl.constexpr,  # windows that a pixel may lie in, an axis
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write a tile of dx."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    m0 = (pid // TILES_C).to(tl.int64) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    n, h, w = pixels(m0, H, W, BLOCK_M)

    dx = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for j in range(MEET_H * MEET_W):
        p, _, holds_h = _meets(h, j // MEET_W, H, P, R, STRIDE_H, PAD_H, 1, ADAPTIVE)
        q, _, holds_w = _meets(w, j % MEET_W, W, Q, S, STRIDE_W, PAD_W, 1, ADAPTIVE)
        h0, h1 = _span(p, H, P, R, STRIDE_H, PAD_H, 1, ADAPTIVE)
        w0, w1 = _span(q, W, Q, S, STRIDE_W, PAD_W, 1, ADAPTIVE)
        divisor = _divisor(h0, h1, w0, w1, H, W, PAD_H, PAD_W, COUNT_PAD, DIVISOR)
        mask = (holds_h & holds_w & (offs_m < M))[:, None] & mask_c[None, :]
        offs = ((n * P + p) * Q + q)[:, None] * C + offs_c[None, :]
        dx += tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32) / divisor[:, None]

    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def window_sums_kernel(
    x_ptr, parts_ptr,  # [N, H, W, C], [T, M, C] in float32
    M, H, W, P, Q, T,  # M = N P Q; T parts of each window
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ADAPTIVE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write the sum over one part of one window, a lane for each of a tile of its pixels."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_L: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    t = pid // TILES_C % T
    m = (pid // TILES_C // T).to(tl.int64)
    p = (m // Q % P).to(tl.int32)
    q = (m % Q).to(tl.int32)
    h0, h1 = _span(p, H, P, R, STRIDE_H, PAD_H, 1, ADAPTIVE)
    w0, w1 = _span(q, W, Q, S, STRIDE_W, PAD_W, 1, ADAPTIVE)
    h0 = tl.maximum(h0, 0)
    w0 = tl.maximum(w0, 0)
    height = tl.minimum(h1, H) - h0
    width = tl.minimum(w1, W) - w0
    first = (m // Q // P * H + h0) * W + w0

    steps = (height.to(tl.int64) * width + T * BLOCK_L - 1) // (T * BLOCK_L)
    acc = tl.zeros((BLOCK_L, BLOCK_C), dtype=tl.float32)
    for step in range(steps.to(tl.int32)):
        _, h, w = pixels((t.to(tl.int64) * steps + step) * BLOCK_L, height, width, BLOCK_L)
        offs_l = (t.to(tl.int64) * steps + step) * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (offs_l < height.to(tl.int64) * width)[:, None] & mask_c[None, :]
        offs = (first + h.to(tl.int64) * W + w)[:, None] * C + offs_c[None, :]
        acc += tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    offs = (t.to(tl.int64) * M + m) * C + offs_c
    tl.store(parts_ptr + offs, tl.sum(acc, 0), mask=mask_c)


@triton.jit
def avg_parts_kernel(
    parts_ptr, y_ptr,  # [T, M, C] in float32, [N, P, Q, C]
    M, H, W, P, Q, T,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ADAPTIVE: tl.constexpr, COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write a tile of y from its windows' parts, added in their order."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m0 = (pid // TILES_C).to(tl.int64) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    row = tl.zeros((), dtype=tl.int64)  # T*M*C may pass 2**31
    for _ in range(T):
        y += tl.load(parts_ptr + row * C + offs, mask=mask, other=0.0)
        row += M
    _, p, q = pixels(m0, P, Q, BLOCK_M)
    h0, h1 = _span(p, H, P, R, STRIDE_H, PAD_H, 1, ADAPTIVE)
    w0, w1 = _span(q, W, Q, S, STRIDE_W, PAD_W, 1, ADAPTIVE)
    y = y / _divisor(h0, h1, w0, w1, H, W, PAD_H, PAD_W, COUNT_PAD, DIVISOR)[:, None]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
