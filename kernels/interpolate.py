"""Device code for images of another size: bilinear between pixels, or the nearest pixel.

    interpolate_kernel            z[n, p, q, c] = x[n, :, :, c] at the point of (p, q)
    interpolate_backward_kernel   dx = the sum of dz times the weight that the pixel had

Along an axis the point of output o is o * scale + offset, at least 0, in units of 2^-40 pixels:
int64, exact where the scale is a power of two and else off by 2^-40 o at most. (float32, in which
torch computes it, keeps 8 bits behind the point at 50,000 pixels.) The pixels h0 at or before it
and h0 + 1, cut to the image, weigh 1 - weight and weight. If NEAREST, o * scale is rounded down in
float32, because so torch chooses its pixel.

x, dx: [N, H, W, C]; z, dz: [N, P, Q, C]; dense. A program writes a tile of its result and reads
what that needs: backward gathers, so there are no atomics and one order of sums; which outputs to
look at float32 tells, with one to spare, and what weight they had is computed as it was forward.

Bytes that must move: x once and z once, each way; that is the roof, for what several pixels read
comes from the caches. Twice the size without aligned corners has weights of 1/4 and 3/4, which
kernels/pointwise.py knows without computing them.
"""

import triton
import triton.language as tl

from ._tune import autotune
from .pointwise import block_c, block_m, pixels
from .pool import CONFIGS

ONE = tl.constexpr(1 << 40)  # pixel, in fixed point: 2**22 of them leave the sign alone
FRACTION = tl.constexpr(40)
UNIT = tl.constexpr(2.0**-40)


@triton.jit
def _source(o, scale, offset, H, NEAREST: tl.constexpr):
    """Return the pixel at or before the point of o, the one after it, and that one's weight."""
    if NEAREST:
        h0 = tl.minimum((o.to(tl.float32) * scale).to(tl.int32), H - 1)
        h1 = h0
        weight = tl.zeros_like(h0).to(tl.float32)
    else:
        point = tl.maximum(o.to(tl.int64) * scale + offset, 0)
        h0 = tl.minimum((point >> FRACTION).to(tl.int32), H - 1)
        h1 = tl.minimum(h0 + 1, H - 1)
        weight = (point & (ONE - 1)).to(tl.float32) * UNIT
    return h0, h1, weight


@autotune(CONFIGS, key=["C", "NEAREST"])
@triton.jit
def interpolate_kernel(
    x_ptr, z_ptr,  # [N, H, W, C], [N, P, Q, C]
    M, H, W, P, Q,  # M = N P Q
    scale_h, offset_h, scale_w, offset_w,  # int64, in 2^-40 pixels; if NEAREST float32, in pixels
    C: tl.constexpr, NEAREST: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write a tile of z."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m0 = (pid // TILES_C).to(tl.int64) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]
    n, p, q = pixels(m0, P, Q, BLOCK_M)
    h0, h1, below = _source(p, scale_h, offset_h, H, NEAREST)
    w0, w1, right = _source(q, scale_w, offset_w, W, NEAREST)
    upper = (n * H + h0) * W
    z = tl.load(x_ptr + (upper + w0)[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
    if not NEAREST:
        below = below[:, None]
        right = right[:, None]
        lower = (n * H + h1) * W
        z00 = z.to(tl.float32)
        z01 = tl.load(x_ptr + (upper + w1)[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        z10 = tl.load(x_ptr + (lower + w0)[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        z11 = tl.load(x_ptr + (lower + w1)[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        upper_z = (1.0 - right) * z00 + right * z01.to(tl.float32)
        lower_z = (1.0 - right) * z10.to(tl.float32) + right * z11.to(tl.float32)
        z = (1.0 - below) * upper_z + below * lower_z
    offs = offs_m[:, None] * C + offs_c[None, :]
    tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _first(h, inverse, offset, NEAREST: tl.constexpr):
    """Return an output no later than the first that row h has weight in, and at most one before.

    float32 decides: it may be off by one there, which is why the weights are computed exactly.
    """
    if NEAREST:
        first = tl.floor(h.to(tl.float32) * inverse) - 1
    else:
        begin = h.to(tl.float32) - 1.0 - offset * UNIT
        first = tl.floor(begin * inverse)
    return tl.maximum(first.to(tl.int32), 0)


@triton.jit
def _weight(o, h, P, scale, offset, H, NEAREST: tl.constexpr):
    """Return the weight that row h has in output o, and whether it is read there at all."""
    h0, h1, weight = _source(o, scale, offset, H, NEAREST)
    reads = (o >= 0) & (o < P) & ((h0 == h) | (h1 == h))
    weight = tl.where(h0 == h, 1.0 - weight, 0.0) + tl.where(h1 == h, weight, 0.0)
    return weight, reads


@autotune(CONFIGS, key=["C", "NEAREST", "MEET_H", "MEET_W"])
@triton.jit
def interpolate_backward_kernel(
    dz_ptr, dx_ptr,  # [N, P, Q, C], [N, H, W, C]
    M, H, W, P, Q,  # M = N H W
    scale_h, offset_h, scale_w, offset_w,  # as above
    inverse_h, inverse_w,  # outputs a pixel
    C: tl.constexpr, NEAREST: tl.constexpr,
    MEET_H: tl.constexpr, MEET_W: tl.constexpr,  # outputs that a pixel may have weight in, an axis
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write a tile of dx."""
    BLOCK_C: tl.constexpr = block_c(C)
    BLOCK_M: tl.constexpr = block_m(C, ELEMENTS)
    TILES_C: tl.constexpr = triton.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m0 = (pid // TILES_C).to(tl.int64) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    mask_dx = (offs_m < M)[:, None] & (offs_c < C)[None, :]
    n, h, w = pixels(m0, H, W, BLOCK_M)
    p0 = _first(h, inverse_h, offset_h, NEAREST)
    q0 = _first(w, inverse_w, offset_w, NEAREST)
    dx = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for j in range(MEET_H):
        p = p0 + j
        weight_h, reads_h = _weight(p, h, P, scale_h, offset_h, H, NEAREST)
        for k in range(MEET_W):
            q = q0 + k
            weight_w, reads_w = _weight(q, w, Q, scale_w, offset_w, W, NEAREST)
            mask = (reads_h & reads_w)[:, None] & mask_dx
            offs = ((n * P + p) * Q + q)[:, None] * C + offs_c[None, :]
            dz = tl.load(dz_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dx += (weight_h * weight_w)[:, None] * dz
    offs = offs_m[:, None] * C + offs_c[None, :]
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask_dx)
