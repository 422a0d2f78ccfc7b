"""Device code for the focal loss of independent binary labels, one pass each way.

Of each value x with target t (0, 1, or between), p = sigmoid(x):

    ce   = max(x, 0) - x t + log(1 + exp(-|x|))        q = p (1 - t) + (1 - p) t
    loss = alpha_t q^gamma ce                          alpha_t = alpha t + (1 - alpha) (1 - t)
    dx   = alpha_t q^gamma ((p - t) + gamma ce (1 - 2 t) p (1 - p) / q)

x, t: [N, H, P], any strides; x float16, bfloat16 or float32, t any number. Forward reads x and t,
and writes a loss a value or 8 bytes a program; backward reads both and writes dx. For 64 images of
200,000 anchors and 80 classes of 2 bytes, t the same: 4.1 GB forward, 6.1 GB backward, 2.4 ms at
4.3 TB/s.

Programs and parts are those of focal_loss.py, whose pixels are values here.
"""

import triton
import triton.language as tl

from ._tune import autotune
from .aot import Variant
from .focal_loss import power, tile_at, tiles_of

CONFIGS = [  # the first must fit every supported device: tests and the interpreter pin it
    triton.Config({"BLOCK": 2048}, num_warps=4),
    triton.Config({"BLOCK": 4096}, num_warps=4),
    triton.Config({"BLOCK": 1024}, num_warps=4),
]


@triton.jit
def binary_terms(x, t):
    """Return p, 1 - p, q and ce, each with all its digits."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e / (1.0 + e)
    p = tl.where(x < 0, small, large)
    r = tl.where(x < 0, large, small)
    # log(1 + e) as Kahan takes it.
    more = 1.0 + e
    step = more - 1.0
    log = tl.where(step == 0, e, tl.log(more) * (e / tl.where(step == 0, 1.0, step)))
    return p, r, p * (1.0 - t) + r * t, tl.where(x < 0, 0.0, x) - x * t + log


@triton.jit
def balance(t, alpha, ALPHA: tl.constexpr):
    """Return alpha_t, 1 without ALPHA."""
    factor = tl.zeros_like(t) + 1.0
    if ALPHA:
        factor = alpha * t + (1.0 - alpha) * (1.0 - t)
    return factor


@autotune(CONFIGS, key=["POWER", "ALPHA", "x_p", "t_p"])
@triton.jit
def sigmoid_focal_loss_kernel(
    x_ptr, t_ptr, loss_ptr, parts_ptr,  # [N, H, P], [N, H, P], [N, H, P] or None, [programs]
    N, H, P, x_n, x_h, x_p, t_n, t_h, t_p, loss_n, loss_h, loss_p, alpha, gamma,
    POWER: tl.constexpr, ALPHA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the losses of a range of values, and their sum."""
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    tiles_p = tiles_of(P, BLOCK)
    tiles = N * H * tiles_p
    per = (tiles + tl.num_programs(0) - 1) // tl.num_programs(0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in range(pid * per, tl.minimum(pid * per + per, tiles)):
        n, h, p0, left = tile_at(index, tiles_p, H, P, BLOCK)
        mask = offs < left
        base = x_ptr + (n * x_n + h * x_h + p0 * x_p)
        x = tl.load(base + offs * x_p, mask=mask, other=0.0).to(tl.float32)
        base = t_ptr + (n * t_n + h * t_h + p0 * t_p)
        t = tl.load(base + offs * t_p, mask=mask, other=0).to(tl.float32)
        p, r, q, ce = binary_terms(x, t)
        loss = balance(t, alpha, ALPHA) * power(q, gamma, POWER) * ce
        total += tl.where(mask, loss, 0.0)
        if loss_ptr is not None:
            base = loss_ptr + (n * loss_n + h * loss_h + p0 * loss_p)
            tl.store(base + offs * loss_p, loss, mask=mask)
    tl.store(parts_ptr + pid, tl.sum(total.to(tl.float64), 0))


@autotune(CONFIGS, key=["POWER", "ALPHA", "x_p", "t_p"])
@triton.jit
def sigmoid_focal_loss_backward_kernel(
    x_ptr, t_ptr, dloss_ptr, dx_ptr,  # [N, H, P], [N, H, P], [N, H, P] or [1] with SCALAR, as x
    N, H, P, x_n, x_h, x_p, t_n, t_h, t_p, dx_n, dx_h, dx_p, dloss_n, dloss_h, dloss_p,
    alpha, gamma,
    POWER: tl.constexpr, ALPHA: tl.constexpr, SCALAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a range of values."""
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    tiles_p = tiles_of(P, BLOCK)
    tiles = N * H * tiles_p
    per = (tiles + tl.num_programs(0) - 1) // tl.num_programs(0)
    for index in range(pid * per, tl.minimum(pid * per + per, tiles)):
        n, h, p0, left = tile_at(index, tiles_p, H, P, BLOCK)
        mask = offs < left
        base = x_ptr + (n * x_n + h * x_h + p0 * x_p)
        x = tl.load(base + offs * x_p, mask=mask, other=0.0).to(tl.float32)
        base = t_ptr + (n * t_n + h * t_h + p0 * t_p)
        t = tl.load(base + offs * t_p, mask=mask, other=0).to(tl.float32)
        if SCALAR:
            dloss = tl.load(dloss_ptr)
        else:
            base = dloss_ptr + (n * dloss_n + h * dloss_h + p0 * dloss_p)
            dloss = tl.load(base + offs * dloss_p, mask=mask, other=0.0)
        p, r, q, ce = binary_terms(x, t)
        slope = p * (1.0 - t) - r * t
        if POWER != 0:  # where q is 0, so is q^gamma
            ratio = tl.where(q > 0, p * r / tl.where(q > 0, q, 1.0), 0.0)
            slope += gamma * ce * (1.0 - 2.0 * t) * ratio
        g = dloss * balance(t, alpha, ALPHA) * power(q, gamma, POWER) * slope
        base = dx_ptr + (n * dx_n + h * dx_h + p0 * dx_p)
        tl.store(base + offs * dx_p, g.to(dx_ptr.dtype.element_ty), mask=mask)


def sigmoid_focal_loss_variant(
    dtype: str,
    *,
    backward: bool = False,
    targets: str | None = None,
    pixels: bool = False,
    power: int = 2,
    config: triton.Config = CONFIGS[0],
) -> Variant:
    """Return a pass over dense tensors, to compile ahead of time; targets: their type, or dtype.

    `pixels` is for reduction="none".
    """
    pointers = {"x_ptr": dtype, "t_ptr": targets or dtype}
    strides = ["x_n", "x_h", "x_p", "t_n", "t_h", "t_p"]
    constexprs = {"POWER": power, "ALPHA": True}
    if backward:
        kernel = sigmoid_focal_loss_backward_kernel
        pointers |= {"dloss_ptr": "fp32", "dx_ptr": dtype}
        strides += ["dx_n", "dx_h", "dx_p", "dloss_n", "dloss_h", "dloss_p"]
        constexprs["SCALAR"] = not pixels
    else:
        kernel = sigmoid_focal_loss_kernel
        pointers |= {"loss_ptr": "fp32" if pixels else None, "parts_ptr": "fp64"}
        strides += ["loss_n", "loss_h", "loss_p"]
    signature = {name: f"*{type_}" for name, type_ in pointers.items() if type_}
    constexprs |= {name: None for name, type_ in pointers.items() if not type_}
    constexprs |= {name: 1 for name in strides if name.endswith("_p")}  # as triton finds them
    constexprs |= {"N": 1, "H": 1}
    runtime = {name: "i32" for name in ("P", *strides) if name not in constexprs}
    signature |= runtime | {"alpha": "fp32", "gamma": "fp32"}
    return Variant(kernel, signature, constexprs, config, tuple(runtime))
