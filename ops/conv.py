"""Two-dimensional convolution of channels_last images: torch's arguments and meaning."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from .autograd import first_order
from .conv_dgrad import conv2d_dgrad
from .conv_fwd import conv2d_fwd, conv2d_fwd_triton
from .conv_wgrad import conv2d_wgrad
from .geometry import want

_INTEGERS = (int, torch.SymInt)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Literal["same", "valid"] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Return x convolved with weight, as torch.nn.functional.conv2d does.

    Sums over taps and channels, and in backward over pixels, are taken in float32 and rounded once.
    float32 on a GPU is multiplied in IEEE arithmetic, or in TF32 where torch allows it for
    convolutions *and* for matrix products: `torch.backends.cudnn.allow_tf32`, which is on by
    default, and `torch.set_float32_matmul_precision("high")` or "medium", which is not. Under
    autocast the arguments are cast as torch's convolution casts them.

    Saved for backward: x, if weight asks for a gradient, and weight, if x does; nothing else, and
    nothing copied (but for "same" with an even filter, which pads x first). There are no second
    derivatives: backward raises under create_graph=True.

    Args:
        x: [N, C, H, W], any N, also 0, or [C, H, W]; float32, float16 or bfloat16, on the CPU also
            float64. Kept in channels_last; another layout is accepted and costs a copy in each
            pass.
        weight: [K, C / groups, R, S], of x's dtype and device. Best in channels_last too
            (`module.to(memory_format=torch.channels_last)`), else a copy of it is made.
        bias: [K], of x's dtype and device, or None.
        stride: of rows and columns, one number or two.
        padding: rows and columns of zeros on each side, one number or two; "valid" is none, "same"
            as many as keep the size at stride 1, the odd one of an even filter below and right.
        dilation: of rows and columns, one number or two.
        groups: a divisor of C and of K.

    Returns:
        [N, K, P, Q] in channels_last, or [K, P, Q]; of x's dtype.

    Raises:
        ValueError: for any other shape, dtype, device or number.
        RuntimeError: in backward under create_graph=True.
    """
    want(x.dim() in (3, 4), "x", "[N, C, H, W] or [C, H, W]", list(x.shape))
    want(weight.dim() == 4, "weight", "[K, C / groups, R, S]", list(weight.shape))
    stride, dilation = _pair(stride, "stride"), _pair(dilation, "dilation")
    x, weight, bias = _autocast(x, weight, bias)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    if padding == "same":
        want(stride == [1, 1], "stride", '1 where padding is "same"', stride)
        total = [d * (taps - 1) for d, taps in zip(dilation, weight.shape[2:], strict=True)]
        padding, odd = [t // 2 for t in total], [t % 2 for t in total]
        if any(odd):
            images = F.pad(images, (0, odd[1], 0, odd[0]))
    padding = [0, 0] if padding == "valid" else _pair(padding, "padding")
    y = _conv2d(images, weight, bias, stride, padding, dilation, groups)
    return y if x.dim() == 4 else y.squeeze(0)


@torch.library.custom_op("fullres::conv2d", mutates_args=(), device_types="cpu")
def _conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    return _plain(conv2d_fwd, x, weight, bias, stride, padding, dilation, groups)


@_conv2d.register_kernel("cuda")
def conv2d_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Return conv2d as on a GPU: there, or on the CPU while kernels are interpreted.

    Arguments as for `conv2d`, numbers in pairs; nothing is recorded for backward.
    """
    return _plain(conv2d_fwd_triton, x, weight, bias, stride, padding, dilation, groups)


@_conv2d.register_fake
def _(x, weight, bias, stride, padding, dilation, groups):
    return _plain(conv2d_fwd, x, weight, bias, stride, padding, dilation, groups)


def _plain(forward, x, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
    """Return y of conv2d_fwd, or of its device path, with nothing fused."""
    source = None, None, None, "none", 0.0, "none"
    second = None, None, "none", 0.0, "none"
    geometry = stride, padding, dilation, groups
    return forward(x, *source, *second, weight, bias, *geometry, False, False)[0]


def _setup_context(ctx, inputs, output):
    x, weight, bias, *ctx.geometry = inputs
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    # dx needs weight alone, dw needs x alone: a frozen weight keeps no activation alive.
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
    ctx.shapes = x.shape, weight.shape


@first_order
def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    x_shape, weight_shape = (list(shape) for shape in ctx.shapes)
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dx = dweight = dbias = None
    if needs_x:
        prologue = None, None, None, None, "none", 0.0, "none"
        dx, _ = conv2d_dgrad(dy, None, None, weight, x_shape, *prologue, None, *ctx.geometry, False)
    if needs_weight:
        prologue = None, None, None, "none", 0.0, "none"
        dweight, dbias = conv2d_wgrad(
            x, *prologue, dy, None, None, weight_shape, *ctx.geometry, needs_bias
        )
        dweight = dweight.to(dy.dtype)
    elif needs_bias:
        dbias = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32))
    return dx, dweight, dbias.to(dy.dtype) if needs_bias else None, *[None] * 4


_conv2d.register_autograd(_backward, setup_context=_setup_context)


def _pair(value: int | Sequence[int], name: str) -> list[int]:
    """Return a number for rows and one for columns."""
    pair = [value] if isinstance(value, _INTEGERS) else value
    holds = isinstance(pair, list | tuple) and len(pair) in (1, 2)
    holds = holds and all(isinstance(v, _INTEGERS) and not isinstance(v, bool) for v in pair)
    words = ', "same" or "valid"' if name == "padding" else ""
    want(holds, name, f"an int or two{words}", value)
    return [pair[0], pair[-1]]


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
