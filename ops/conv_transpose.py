"""Two-dimensional transposed convolution of channels_last images: torch's arguments and meaning.

It is the gradient of a convolution's input, so that is the kernel that computes it; its own
gradients are a convolution and a convolution's weight gradient with the images' parts exchanged.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .autograd import first_order
from .conv import _autocast, _pair
from .conv_dgrad import launch
from .conv_fwd import conv2d_fwd
from .conv_wgrad import conv2d_wgrad
from .cudnn import as_ours
from .dispatch import Shape, implementation
from .fuse import Prologue
from .geometry import (
    Geometry,
    as_image,
    check_geometry,
    check_like,
    check_prologue,
    dense,
    empty_image,
    want,
)


def conv_transpose2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> torch.Tensor:
    """Return x convolved, transposed, with weight, as torch.nn.functional.conv_transpose2d does.

    Sums over taps and channels, and in backward over pixels, are taken in float32 and rounded once.
    TF32 and autocast are as for `conv2d`. Nothing is fused with it but the bias: where a layer's
    input is to be normalised or activated first, `ops.pointwise.prologue` makes it, and
    `ops.pointwise.moments` takes the statistics of the result.

    Saved for backward: x, if weight asks for a gradient, and weight, if x does; nothing else, and
    nothing copied. There are no second derivatives: backward raises under create_graph=True.

    Args:
        x: [N, K, P, Q], any N, also 0, or [K, P, Q]; float32, float16 or bfloat16, on the CPU also
            float64. Kept in channels_last; another layout is accepted and costs a copy in each
            pass.
        weight: [K, C / groups, R, S], of x's dtype and device.
        bias: [C], of x's dtype and device, or None.
        stride: of rows and columns of the result, one number or two.
        padding: rows and columns that each side of the result loses, one number or two.
        output_padding: rows and columns that the result has more below and right, one number or
            two; less than stride or less than dilation.
        groups: a divisor of K.
        dilation: of rows and columns, one number or two.

    Returns:
        [N, C, H, W] in channels_last, or [C, H, W]; of x's dtype.
        H = (P - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1, W likewise.

    Raises:
        ValueError: for any other shape, dtype, device or number.
        RuntimeError: in backward under create_graph=True.
    """
    want(x.dim() in (3, 4), "x", "[N, K, P, Q] or [K, P, Q]", list(x.shape))
    x, weight, bias = _autocast(x, weight, bias)
    y = _conv_transpose2d(
        x if x.dim() == 4 else x.unsqueeze(0), weight, bias, _pair(stride, "stride"),
        _pair(padding, "padding"), _pair(output_padding, "output_padding"), groups,
        _pair(dilation, "dilation"),
    )  # fmt: skip
    return y if x.dim() == 4 else y.squeeze(0)


@torch.library.custom_op("fullres::conv_transpose2d", mutates_args=(), device_types="cpu")
def _conv_transpose2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> torch.Tensor:
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    y = empty_image(x, _check(x, weight, bias, output_padding, geometry))
    wide = torch.promote_types(x.dtype, torch.float32)
    b = None if bias is None else bias.to(wide)
    with torch.autocast(x.device.type, enabled=False):  # the arguments' dtype decides
        return y.copy_(
            F.conv_transpose2d(
                x.to(wide), weight.to(wide), b, stride, padding, output_padding, groups, dilation
            )
        )


@_conv_transpose2d.register_kernel("cuda")
def conv_transpose2d_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> torch.Tensor:
    """Return conv_transpose2d as on a GPU: there, or on the CPU while kernels are interpreted.

    Arguments as for `conv_transpose2d`, numbers in pairs; nothing is recorded for backward. Where
    `dispatch` says that cuDNN is faster at the gradient of a convolution of C to K channels, torch
    computes it.
    """
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    size = _check(x, weight, bias, output_padding, geometry)
    if not size[0]:
        return empty_image(x, size)
    shape = Shape(
        "dgrad", x.dtype, size[1], weight.shape[0], tuple(weight.shape[2:]), tuple(stride),
        tuple(dilation), groups,
    )  # fmt: skip
    if implementation(shape, x.device) == "cudnn":
        with torch.autocast(x.device.type, enabled=False), as_ours():
            y = F.conv_transpose2d(
                dense(x), dense(weight), bias, stride, padding, output_padding, groups, dilation
            )
        return as_image(y)
    like = Prologue(x.new_empty(()).expand(size))
    return launch(x, None, None, weight, like, True, None, geometry, False, bias)[0]


@_conv_transpose2d.register_fake
def _(x, weight, bias, stride, padding, output_padding, groups, dilation):
    geometry = Geometry(weight.shape, stride, padding, dilation, groups)
    return empty_image(x, _check(x, weight, bias, output_padding, geometry))


def _setup_context(ctx, inputs, output):
    x, weight, _, stride, padding, _, groups, dilation = inputs
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    # dx needs weight alone, dw needs x alone: a frozen weight keeps no activation alive.
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
    ctx.geometry = stride, padding, dilation, groups
    ctx.size, ctx.weight_shape = x.shape[2:], list(weight.shape)


@first_order
def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dy = dense(dy)  # once for all; and the order of dbias' sum is then always the same
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    plain = None, None, None, "none", 0.0, "none"
    (P, Q), dx, dweight, dbias = ctx.size, None, None, None
    if needs_x:
        second = None, None, "none", 0.0, "none"
        dx, *_ = conv2d_fwd(dy, *plain, *second, weight, None, *ctx.geometry, False, False)
        # Larger than x where output_padding reaches a stride: there the taps of a pixel beyond x.
        dx = dx[:, :, :P, :Q]
    if needs_weight:
        H, W = Geometry(ctx.weight_shape, *ctx.geometry).output_size(*dy.shape[2:])
        if (H, W) != (P, Q):
            x = F.pad(x, (0, W - Q, 0, H - P))
        dweight, _ = conv2d_wgrad(dy, *plain, x, None, None, ctx.weight_shape, *ctx.geometry, False)
        dweight = dweight.to(dy.dtype)
    if needs_bias:
        dbias = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32))
    return dx, dweight, dbias.to(dy.dtype) if needs_bias else None, *[None] * 5


_conv_transpose2d.register_autograd(_backward, setup_context=_setup_context)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output_padding: Sequence[int],
    g: Geometry,
) -> list[int]:
    """Return [N, C, H, W]; raise ValueError, naming the argument, for what no path computes."""
    check_prologue(Prologue(x))
    want(weight.dim() == 4, "weight", "[K, C / groups, R, S]", list(weight.shape))
    check_like(x, weight.shape, weight=weight)
    N, K, P, Q = x.shape
    given = f"{weight.shape[0]} in {list(weight.shape)}"
    want(weight.shape[0] == K, "weight", f"K = {K}, x's channels", given)
    want(g.groups > 0 and K % g.groups == 0, "groups", f"a divisor of K = {K}", g.groups)
    C = weight.shape[1] * g.groups
    check_like(x, [C], bias=bias)
    for name, pair in ("stride", g.stride), ("padding", g.padding), ("dilation", g.dilation):
        want(len(pair) == 2, name, "two numbers", list(pair))
    fits = len(output_padding) == 2 and all(
        0 <= more < max(step, dil)
        for more, step, dil in zip(output_padding, g.stride, g.dilation, strict=True)
    )
    want(fits, "output_padding", "two numbers, each below stride or dilation", list(output_padding))
    axes = (P, Q), g.stride, g.padding, g.dilation, weight.shape[2:], output_padding
    H, W = (
        (size - 1) * step - 2 * pad + dil * (taps - 1) + more + 1
        for size, step, pad, dil, taps, more in zip(*axes, strict=True)
    )
    holds = min(P, Q) > 0 and min(H, W) > 0
    want(holds, "x", "an image of which the padding leaves a pixel", f"{P} x {Q} made {H} x {W}")
    check_geometry(g, C, (H, W))
    return [N, C, H, W]
