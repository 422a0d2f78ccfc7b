"""Two-dimensional convolution, stride 1, of channels_last images: torch's arguments and meaning."""

from typing import Literal

import torch
import torch.nn.functional as F

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TILE_ROWS = 16  # more rows than any kernel configuration's tile and filter touch at once


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    padding: int | Literal["same", "valid"] = 0,
) -> torch.Tensor:
    """Return x convolved with weight, as torch.nn.functional.conv2d does at stride 1.

    The sum over taps and channels is taken in float32 and rounded once. float32 on a GPU is
    multiplied in IEEE arithmetic, or in TF32 where torch allows it for convolutions *and* for
    matrix products: `torch.backends.cudnn.allow_tf32`, which is on by default, and
    `torch.set_float32_matmul_precision("high")` or "medium", which is not. Under autocast the
    arguments are cast as torch's convolution casts them. On a GPU the Triton kernel runs, on the
    CPU `conv2d_reference`.

    Saved for backward: x, if weight asks for a gradient, and weight, if x does; nothing else, and
    nothing copied. Backward is torch's own convolution backward for now.

    Args:
        x: [N, C, H, W], any N, also 0; float32, float16 or bfloat16, on the CPU also float64.
            Kept in channels_last; another layout is accepted and costs a copy in each pass.
        weight: [K, C, R, S] with R = S in {1, 3}, of x's dtype and device. Best in channels_last
            too (`module.to(memory_format=torch.channels_last)`), else a copy of it is made.
        bias: [K], of x's dtype and device, or None.
        padding: rows and columns of zeros on each side; "same" is R // 2, "valid" is 0.

    Returns:
        [N, K, P, Q] in channels_last, of x's dtype; P = H + 2 * padding - R + 1, and Q likewise.

    Raises:
        ValueError: for any other shape, dtype, device or padding.
    """
    if padding in ("same", "valid"):
        padding = weight.shape[-1] // 2 if padding == "same" else 0
    if not isinstance(padding, int | torch.SymInt) or isinstance(padding, bool):
        raise ValueError(f'padding: want an int, "same" or "valid", got {padding!r}')
    x, weight, bias = _autocast(x, weight, bias)
    return _conv2d(x, weight, bias, padding)


def conv2d_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int
) -> torch.Tensor:
    """Return what conv2d means, in plain torch: sums in at least float32, rounded once.

    Shapes, dtypes and layout of the result are those of `conv2d`; any device.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # the arguments' dtype decides, as on a GPU
        b = None if bias is None else bias.to(wide)
        y = F.conv2d(x.to(wide), weight.to(wide), b, padding=padding)
    return _empty_output(x, weight, padding).copy_(y)


@torch.library.custom_op("fullres::conv2d", mutates_args=(), device_types="cpu")
def _conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int
) -> torch.Tensor:
    _check(x, weight, bias, padding)
    return conv2d_reference(x, weight, bias, padding)


@_conv2d.register_kernel("cuda")
def conv2d_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int
) -> torch.Tensor:
    """Return conv2d by the Triton kernel: on a GPU, or on the CPU while kernels are interpreted.

    x, weight and bias as for `conv2d`; nothing is recorded for backward.
    """
    from ..kernels._tune import interpreting  # here: importing ops must not need triton
    from ..kernels.conv import conv2d_fwd_grid, conv2d_fwd_kernel_for

    _check(x, weight, bias, padding)
    (N, C, H, W), (K, _, R, S) = x.shape, weight.shape
    y = _empty_output(x, weight, padding)
    P, Q = y.shape[2:]
    if N:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
        bias = None if bias is None else bias.contiguous()
        tf32 = x.dtype == torch.float32 and _tf32_allowed()
        with torch.cuda.device_of(x):  # triton launches on the current device
            kernel = conv2d_fwd_kernel_for(C, K, R, x.itemsize)
            kernel[conv2d_fwd_grid(N, P, Q, K)](
                x, weight, bias, y, H, W, C=C, K=K, R=R, S=S, PAD=padding,
                PRECISION="tf32" if tf32 else "ieee", WIDEN=interpreting(),
            )  # fmt: skip
    return y


@_conv2d.register_fake
def _(x, weight, bias, padding):
    _check(x, weight, bias, padding)
    return _empty_output(x, weight, padding)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.padding = inputs
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    # dx needs weight alone, dw needs x alone: a frozen weight keeps no activation alive.
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
    ctx.shapes = x.shape, weight.shape


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    x_shape, weight_shape = ctx.shapes
    needs = [*ctx.needs_input_grad[:3]]
    # What was not saved is not read below: only its shape counts. One argument in channels_last is
    # enough for torch to compute in it.
    x, weight = (
        _unread(dy, shape) if t is None else t.contiguous(memory_format=torch.channels_last)
        for t, shape in ((x, x_shape), (weight, weight_shape))
    )
    padding = [ctx.padding] * 2
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy, x, weight, [weight_shape[0]], [1, 1], padding, [1, 1], False, [0, 0], 1, needs
    )
    return dx, dweight, dbias, None


_conv2d.register_autograd(_backward, setup_context=_setup_context)


def _unread(like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return a tensor of this shape that takes the memory of one element."""
    return like.new_zeros(()).expand(shape)


def _empty_output(x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
    (N, _, H, W), (K, _, R, S) = x.shape, weight.shape
    shape = (N, K, H + 2 * padding - R + 1, W + 2 * padding - S + 1)
    # Not empty_like or contiguous(): where K or P*Q is 1 those may keep other strides.
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _tf32_allowed() -> bool:
    # These two follow allow_tf32 and set_float32_matmul_precision, which can't be read once
    # somebody sets the precision of convolutions alone.
    return (
        torch.backends.cudnn.conv.fp32_precision == "tf32"
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
        and torch.version.hip is None  # Triton multiplies float32 on AMD in IEEE arithmetic only
    )


def _autocast(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Return the tensors as torch's autocast would hand them to its convolution."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, *others)
    )


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int) -> None:
    """Raise ValueError, naming argument, wanted and given, for what no path computes."""

    def want(holds: bool, argument: str, wanted: str, given: object) -> None:
        if not holds:
            raise ValueError(f"{argument}: want {wanted}, got {given}")

    cpu = x.device.type == "cpu"
    dtypes = (*_DTYPES, torch.float64) if cpu else _DTYPES
    want(x.dim() == 4, "x", "[N, C, H, W]", list(x.shape))
    want(x.dtype in dtypes, "x", f"a dtype in {dtypes} on {x.device.type}", x.dtype)
    want(x.shape[1] > 0, "x", "at least one channel", list(x.shape))
    want(weight.dim() == 4, "weight", "[K, C, R, S]", list(weight.shape))
    K, C, R, S = weight.shape
    want(R == S and R in (1, 3), "weight", "R = S in {1, 3}", f"R = {R}, S = {S}")
    want(C == x.shape[1], "weight", f"C = {x.shape[1]}, x's channels", f"C = {C}")
    want(K > 0, "weight", "at least one output channel", list(weight.shape))
    for name, t in ("weight", weight), ("bias", bias):
        if t is not None:
            want(t.dtype == x.dtype, name, f"x's dtype {x.dtype}", t.dtype)
            want(t.device == x.device, name, f"x's device {x.device}", t.device)
    if bias is not None:
        want(bias.dim() == 1 and bias.shape[0] == K, "bias", f"[K] = [{K}]", list(bias.shape))
    want(padding >= 0, "padding", "at least 0", padding)
    H, W = x.shape[2:]
    fits = H + 2 * padding >= R and W + 2 * padding >= S
    want(fits, "x", f"an image that holds {R} x {S} taps at padding {padding}", f"{H} x {W}")
    rows = _TILE_ROWS * (W + 2 * padding) * max(C, K)
    want(rows < 2**31, "x", f"{_TILE_ROWS} rows of x and of y below 2**31 elements", rows)
