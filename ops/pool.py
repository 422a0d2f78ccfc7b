"""Pooling of channels_last images, for what no convolution's prologue pools: torch's arguments.

A maximum keeps one byte an output element for backward, the place inside its window; a mean keeps
nothing. Both are plain gathers in backward: the same arguments give the same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .autograd import first_order
from .fuse import Prologue
from .geometry import check_like, check_prologue, dense, empty_image, want


def max_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the largest value of each window, as torch.nn.functional.max_pool2d does.

    Of equal values the first is taken, of NaN the last. Saved for backward, if input asks for a
    gradient: the place of each result inside its window, in one byte (two or four where a window
    has more than 256 or 32,768 pixels), and not input. First derivatives only.

    Args:
        input: [N, C, H, W], any N, also 0, or [C, H, W]; float32, float16 or bfloat16, on the CPU
            also float64. Best in channels_last, else a copy is made.
        kernel_size: rows and columns of a window; one number for both, and so the rest.
        stride: from window to window; kernel_size if None.
        padding: rows and columns on each side that never win; at most half of kernel_size.
        dilation: from row to row inside a window.
        ceil_mode: whether a last window may reach beyond the padding.
        return_indices: whether to return torch's indices, h * W + w, as well.

    Returns:
        [N, C, P, Q] (or [C, P, Q]) of input's dtype in channels_last; with return_indices also the
        int64 indices.

    Raises:
        ValueError: for anything else, or a window without a pixel.
    """
    kernel, stride, padding, dilation = _arguments(kernel_size, stride, padding, dilation)
    return _max_pool(input, kernel, stride, padding, dilation, ceil_mode, None, return_indices)


def adaptive_max_pool2d(
    input: torch.Tensor,
    output_size: int | None | Sequence[int | None],
    return_indices: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the largest value of each of P x Q windows that cover the image, as torch does.

    Window p has the rows from floor(p H / P) to ceil((p + 1) H / P). A P or Q of None is that of
    input. The rest is as for `max_pool2d`. On a GPU large windows are slow.
    """
    size = _output_size(input, output_size)
    return _max_pool(input, [], [], [], [], False, size, return_indices)


def avg_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """Return the mean of each window, as torch.nn.functional.avg_pool2d does.

    Sums are float32 (float64 for float64), rounded once. Nothing is saved for backward. First
    derivatives only.

    Args:
        input: as for `max_pool2d`, and so the window.
        kernel_size: as for `max_pool2d`.
        stride: as for `max_pool2d`.
        padding: rows and columns of zeros on each side; at most half of kernel_size.
        ceil_mode: as for `max_pool2d`.
        count_include_pad: whether zeros of the padding count in the divisor.
        divisor_override: what to divide each sum by instead of the number of pixels; not 0.

    Returns:
        [N, C, P, Q] (or [C, P, Q]) of input's dtype in channels_last.

    Raises:
        ValueError: for anything else.
    """
    kernel, stride, padding, _ = _arguments(kernel_size, stride, padding, 1)
    return _avg_pool(
        input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, None
    )


def adaptive_avg_pool2d(
    input: torch.Tensor, output_size: int | None | Sequence[int | None]
) -> torch.Tensor:
    """Return the mean of each of P x Q windows that cover the image, as torch does.

    Windows are as for `adaptive_max_pool2d`, the rest as for `avg_pool2d`.
    """
    size = _output_size(input, output_size)
    return _avg_pool(input, [], [], [], False, False, None, size)


@dataclass(frozen=True)
class Windows:
    """P x Q windows of an image of H x W; pairs are of rows and of columns.

    Those without a kernel adapt to the image.
    """

    image: Sequence[int]
    count: Sequence[int]
    kernel: Sequence[int] = ()
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)

    @property
    def adaptive(self) -> bool:
        """Return whether windows lie as in adaptive pooling."""
        return not self.kernel

    @property
    def shape(self) -> list[int]:
        """Return the most rows and columns that a window has."""
        if self.kernel:
            return list(self.kernel)
        return [_most(*sizes) for sizes in zip(self.image, self.count, strict=True)]

    @property
    def taps(self) -> int:
        """Return the most pixels that a window has."""
        R, S = self.shape
        return R * S

    @property
    def taps_dtype(self) -> torch.dtype:
        """Return the smallest integers that tell a window's pixels apart."""
        if self.taps <= 256:
            return torch.uint8
        return torch.int16 if self.taps <= 2**15 else torch.int32

    @property
    def meet(self) -> list[int]:
        """Return in how many windows a row and a column may lie, at most."""
        if self.adaptive:
            return [_most(*sizes) for sizes in zip(self.count, self.image, strict=True)]
        axes = zip(self.kernel, self.stride, self.dilation, strict=True)
        return [-(-((taps - 1) * dil + 1) // step) for taps, step, dil in axes]

    def begin(self, axis: int, device: torch.device) -> torch.Tensor:
        """Return where the windows begin along an axis, in int64; before 0 where it is padding."""
        p = torch.arange(self.count[axis], device=device)
        if self.adaptive:
            return p * self.image[axis] // self.count[axis]
        return p * self.stride[axis] - self.padding[axis]

    def taps_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the taps r * S + s of torch's indices h * W + w, [..., P, Q]."""
        (_, W), (dil_h, dil_w) = self.image, self.dilation
        r = (indices // W - self.begin(0, indices.device)[:, None]) // dil_h
        s = (indices % W - self.begin(1, indices.device)) // dil_w
        return (r * self.shape[1] + s).to(self.taps_dtype)

    def indices_of(self, taps: torch.Tensor) -> torch.Tensor:
        """Return torch's indices h * W + w, in int64, of taps [..., P, Q]."""
        (_, W), (dil_h, dil_w) = self.image, self.dilation
        taps, S = taps.to(torch.int64), self.shape[1]
        h = self.begin(0, taps.device)[:, None] + taps // S * dil_h
        w = self.begin(1, taps.device) + taps % S * dil_w
        return h * W + w


def windows(
    input: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    output_size: Sequence[int] | None,
) -> Windows:
    """Return the windows of an image [N, C, H, W], adaptive if an output size is given.

    Raises ValueError, naming argument, wanted and given, for what no path computes.
    """
    check_prologue(Prologue(input), "input")
    image = list(input.shape[2:])
    want(min(image) > 0, "input", "an image of at least one pixel", list(input.shape))
    want(max(image) < 2**30, "input", "sides below 2**30", list(input.shape))
    if output_size is not None:
        count = list(output_size)
        holds = len(count) == 2 and all(0 < size < 2**30 for size in count)
        want(holds, "output_size", "two numbers of at least 1, or None", count)
        return Windows(image, count)

    least = {"kernel_size": (kernel, 1), "stride": (stride, 1), "padding": (padding, 0)}
    least["dilation"] = (dilation, 1)
    for name, (pair, value) in least.items():
        holds = len(pair) == 2 and all(value <= number < 2**30 for number in pair)
        want(holds, name, f"one or two numbers of at least {value}", list(pair))
    axes = list(zip(image, kernel, stride, padding, dilation, strict=True))
    holds = all(pad <= taps // 2 for _, taps, _, pad, _ in axes)
    want(holds, "padding", f"at most half of kernel_size {list(kernel)}", list(padding))
    count = []
    for size, taps, step, pad, dil in axes:
        spare = size + 2 * pad - dil * (taps - 1) - 1
        p = (spare + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (p - 1) * step >= size + pad:  # that window would be padding alone
            p -= 1
        count.append(p)
    full = f"an image that holds {list(kernel)} pixels at dilation {list(dilation)}"
    want(min(count) > 0, "input", full, f"{image} with padding {list(padding)}")
    # In a window that begins before the image, the first tap inside is below the dilation.
    for (size, _, step, pad, dil), p in zip(axes, count, strict=True):
        if size < dil:
            starts = (i * step - pad for i in range(min(p, -(-pad // step))))
            holds = all(start % dil < size for start in starts)
            want(holds, "input", "a pixel in each window", image)
    return Windows(image, count, kernel, stride, padding, dilation)


def _most(image: int, count: int) -> int:
    """Return the most pixels that any of `count` adaptive windows over `image` has."""
    # Window p begins a fraction of (p image mod count) / count into a pixel, at most:
    fraction = count - math.gcd(int(image), int(count))
    return -(-(fraction + image) // count)


def _max_pool(
    input, kernel, stride, padding, dilation, ceil_mode, output_size, return_indices
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    x = _batched(input)
    keep = return_indices or (torch.is_grad_enabled() and input.requires_grad)
    shape = kernel, stride, padding, dilation, ceil_mode, output_size
    y, taps = _MaxPool2d.apply(x, *shape, keep)
    y = y if input.dim() == 4 else y[0]
    if not return_indices:
        return y
    indices = windows(x, *shape).indices_of(taps)
    return y, indices if input.dim() == 4 else indices[0]


def _avg_pool(input, *arguments) -> torch.Tensor:
    y = _AvgPool2d.apply(_batched(input), *arguments)
    return y if input.dim() == 4 else y[0]


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, stride, padding, dilation, ceil_mode, output_size, keep):
        ctx.size = x.shape
        ctx.arguments = kernel, stride, padding, dilation, ceil_mode, output_size
        y, taps = max_pool(x, *ctx.arguments, keep)
        ctx.save_for_backward(taps)  # the place tells where the gradient goes; x may be freed
        ctx.mark_non_differentiable(taps)
        return y, taps

    @staticmethod
    @first_order
    def backward(ctx, dy, _):
        dx = max_pool_backward(dy, *ctx.saved_tensors, list(ctx.size), *ctx.arguments)
        return dx, *[None] * 7


class _AvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *arguments):
        ctx.size, ctx.arguments = x.shape, arguments
        return avg_pool(x, *arguments)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        dx = avg_pool_backward(dy, list(ctx.size), *ctx.arguments)
        return dx, *[None] * len(ctx.arguments)


@torch.library.custom_op("fullres::max_pool2d", mutates_args=(), device_types="cpu")
def max_pool(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    output_size: Sequence[int] | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maxima [N, C, P, Q] and, if they are to be kept, their taps, else [0].

    Arguments are `windows`'; with an output size it adapts, and the others are not read.
    """
    w = windows(x, kernel, stride, padding, dilation, ceil_mode, output_size)
    y, taps = _empty_maxima(x, w, keep)
    if x.numel():
        if w.adaptive:
            values, indices = torch.ops.aten.adaptive_max_pool2d(x, w.count)
        else:
            values, indices = torch.ops.aten.max_pool2d_with_indices(
                x, kernel, stride, padding, dilation, ceil_mode
            )
        y.copy_(values)
        if keep:
            taps.copy_(w.taps_of(indices))
    return y, taps


@max_pool.register_kernel("cuda")
def max_pool_triton(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    output_size: Sequence[int] | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max_pool's results by Triton: on a GPU, or in the interpreter."""
    from ..kernels.pool import max_pool_kernel

    w = windows(x, kernel, stride, padding, dilation, ceil_mode, output_size)
    y, taps = _empty_maxima(x, w, keep)
    if x.numel():
        _launch(max_pool_kernel, y, (dense(x), y, taps if keep else None), w, **_dilation(w))
    return y, taps


@max_pool.register_fake
def _(x, kernel, stride, padding, dilation, ceil_mode, output_size, keep):
    w = windows(x, kernel, stride, padding, dilation, ceil_mode, output_size)
    return _empty_maxima(x, w, keep)


@torch.library.custom_op("fullres::max_pool2d_backward", mutates_args=(), device_types="cpu")
def max_pool_backward(
    dy: torch.Tensor,
    taps: torch.Tensor,
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    output_size: Sequence[int] | None,
) -> torch.Tensor:
    """Return the gradient of max_pool's x, [N, C, H, W] = input_size, from that of its result."""
    x = dy.new_empty(()).expand(list(input_size))  # its shape alone
    w = windows(x, kernel, stride, padding, dilation, ceil_mode, output_size)
    dx = _empty_gradient(dy, x, w, taps)
    if dx.numel():
        wide = torch.promote_types(dy.dtype, torch.float32)  # sums over windows that overlap
        dy, x, indices, aten = dy.to(wide), x.to(wide), w.indices_of(taps), torch.ops.aten
        if w.adaptive:
            dx.copy_(aten.adaptive_max_pool2d_backward(dy, x, indices))
        else:
            dx.copy_(
                aten.max_pool2d_with_indices_backward(
                    dy, x, kernel, stride, padding, dilation, ceil_mode, indices
                )
            )
    return dx


@max_pool_backward.register_kernel("cuda")
def max_pool_backward_triton(
    dy: torch.Tensor,
    taps: torch.Tensor,
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    output_size: Sequence[int] | None,
) -> torch.Tensor:
    """Return max_pool_backward's result by Triton."""
    from ..kernels.pool import max_pool_backward_kernel

    x = dy.new_empty(()).expand(list(input_size))
    w = windows(x, kernel, stride, padding, dilation, ceil_mode, output_size)
    dx = _empty_gradient(dy, x, w, taps)
    if dx.numel():
        arguments = dense(dy), dense(taps), dx
        _launch(max_pool_backward_kernel, dx, arguments, w, **_dilation(w), **_meet(w))
    return dx


@max_pool_backward.register_fake
def _(dy, taps, input_size, kernel, stride, padding, dilation, ceil_mode, output_size):
    x = dy.new_empty(()).expand(list(input_size))
    w = windows(x, kernel, stride, padding, dilation, ceil_mode, output_size)
    return _empty_gradient(dy, x, w, taps)


@torch.library.custom_op("fullres::avg_pool2d", mutates_args=(), device_types="cpu")
def avg_pool(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    output_size: Sequence[int] | None,
) -> torch.Tensor:
    """Return the means [N, C, P, Q]; arguments are `windows`' and `avg_pool2d`'s.

    With an output size it adapts, and the others are not read.
    """
    w = _means(x, kernel, stride, padding, ceil_mode, divisor_override, output_size)
    y = empty_image(x, [*x.shape[:2], *w.count])
    if x.numel():
        wide, aten = x.to(torch.promote_types(x.dtype, torch.float32)), torch.ops.aten
        if w.adaptive:
            y.copy_(aten._adaptive_avg_pool2d(wide, w.count))
        else:
            rest = ceil_mode, count_include_pad, divisor_override
            y.copy_(aten.avg_pool2d(wide, kernel, stride, padding, *rest))
    return y


@avg_pool.register_kernel("cuda")
def avg_pool_triton(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    output_size: Sequence[int] | None,
) -> torch.Tensor:
    """Return avg_pool's result by Triton."""
    from ..kernels import pool as kernels

    w = _means(x, kernel, stride, padding, ceil_mode, divisor_override, output_size)
    y = empty_image(x, [*x.shape[:2], *w.count])
    if not x.numel():
        return y
    divisor = {"COUNT_PAD": count_include_pad, "DIVISOR": divisor_override}
    if w.taps <= kernels.SMALL:
        _launch(kernels.avg_pool_kernel, y, (dense(x), y), w, **divisor)
        return y
    N, C, P, Q = y.shape
    T = kernels.window_parts(N * P * Q, C, w.taps)
    parts = torch.empty((T, N * P * Q, C), dtype=torch.float32, device=x.device)
    constants = _constants(C, w)
    sizes = N * P * Q, *w.image, P, Q, T
    with torch.cuda.device_of(x):  # triton launches on the current device
        kernels.window_sums_kernel[kernels.sums_grid(N * P * Q, C, T)](
            dense(x), parts, *sizes, **constants, ELEMENTS=kernels.ACCUMULATED
        )
        kernels.avg_parts_kernel[kernels.grid(N * P * Q, C)({"ELEMENTS": kernels.JOINED})](
            parts, y, *sizes, **constants, **divisor, ELEMENTS=kernels.JOINED
        )
    return y


@avg_pool.register_fake
def _(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, output_size):
    w = _means(x, kernel, stride, padding, ceil_mode, divisor_override, output_size)
    return empty_image(x, [*x.shape[:2], *w.count])


@torch.library.custom_op("fullres::avg_pool2d_backward", mutates_args=(), device_types="cpu")
def avg_pool_backward(
    dy: torch.Tensor,
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    output_size: Sequence[int] | None,
) -> torch.Tensor:
    """Return the gradient of avg_pool's x, [N, C, H, W] = input_size, from that of its result."""
    x = dy.new_empty(()).expand(list(input_size))  # its shape alone
    w = _means(x, kernel, stride, padding, ceil_mode, divisor_override, output_size)
    dx = _empty_gradient(dy, x, w)
    if dx.numel():
        wide, aten = torch.promote_types(dy.dtype, torch.float32), torch.ops.aten
        dy, x = dy.to(wide), x.to(wide)
        if w.adaptive:
            dx.copy_(aten._adaptive_avg_pool2d_backward(dy, x))
        else:
            rest = ceil_mode, count_include_pad, divisor_override
            dx.copy_(aten.avg_pool2d_backward(dy, x, kernel, stride, padding, *rest))
    return dx


@avg_pool_backward.register_kernel("cuda")
def avg_pool_backward_triton(
    dy: torch.Tensor,
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    output_size: Sequence[int] | None,
) -> torch.Tensor:
    """Return avg_pool_backward's result by Triton."""
    from ..kernels.pool import avg_pool_backward_kernel

    x = dy.new_empty(()).expand(list(input_size))
    w = _means(x, kernel, stride, padding, ceil_mode, divisor_override, output_size)
    dx = _empty_gradient(dy, x, w)
    if dx.numel():
        divisor = {"COUNT_PAD": count_include_pad, "DIVISOR": divisor_override}
        _launch(avg_pool_backward_kernel, dx, (dense(dy), dx), w, **divisor, **_meet(w))
    return dx


@avg_pool_backward.register_fake
def _(
    dy, input_size, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override,
    output_size,
):  # fmt: skip
    x = dy.new_empty(()).expand(list(input_size))
    w = _means(x, kernel, stride, padding, ceil_mode, divisor_override, output_size)
    return _empty_gradient(dy, x, w)


def _means(x, kernel, stride, padding, ceil_mode, divisor_override, output_size) -> Windows:
    want(divisor_override != 0, "divisor_override", "a number other than 0, or None", 0)
    return windows(x, kernel, stride, padding, [1, 1], ceil_mode, output_size)


def _launch(
    kernel, result: torch.Tensor, arguments: tuple, w: Windows, **constants: object
) -> None:
    """Launch a kernel of kernels/pool.py over a result's pixels."""
    from ..kernels.pool import grid

    N, C, *size = result.shape
    M = N * size[0] * size[1]
    constants |= _constants(C, w)
    with torch.cuda.device_of(result):  # triton launches on the current device
        kernel[grid(M, C)](*arguments, M, *w.image, *w.count, **constants)


def _constants(C: int, w: Windows) -> dict[str, object]:
    return {
        "C": C, "R": w.shape[0], "S": w.shape[1], "STRIDE_H": w.stride[0],
        "STRIDE_W": w.stride[1], "PAD_H": w.padding[0], "PAD_W": w.padding[1],
        "ADAPTIVE": w.adaptive,
    }  # fmt: skip


def _dilation(w: Windows) -> dict[str, int]:
    return {"DIL_H": w.dilation[0], "DIL_W": w.dilation[1]}


def _meet(w: Windows) -> dict[str, int]:
    meet_h, meet_w = w.meet
    return {"MEET_H": meet_h, "MEET_W": meet_w}


def _empty_maxima(x: torch.Tensor, w: Windows, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    y = empty_image(x, [*x.shape[:2], *w.count])
    if not keep:
        return y, x.new_empty(0, dtype=w.taps_dtype)
    return y, torch.empty_like(y, dtype=w.taps_dtype)


def _empty_gradient(
    dy: torch.Tensor, x: torch.Tensor, w: Windows, taps: torch.Tensor | None = None
) -> torch.Tensor:
    """Return memory for x's gradient; raise ValueError for a dy that is none of x's windows."""
    shape = [*x.shape[:2], *w.count]
    check_like(x, shape, dy=dy)
    if taps is not None:
        want(list(taps.shape) == shape, "taps", str(shape), list(taps.shape))
        want(taps.dtype == w.taps_dtype, "taps", str(w.taps_dtype), taps.dtype)
    return empty_image(dy, x.shape)


def _batched(input: torch.Tensor) -> torch.Tensor:
    want(input.dim() in (3, 4), "input", "[N, C, H, W] or [C, H, W]", list(input.shape))
    return input if input.dim() == 4 else input[None]


def _arguments(kernel_size, stride, padding, dilation) -> list[list[int]]:
    """Return kernel, stride, padding and dilation, each as rows and columns."""
    if stride is None or stride == [] or stride == ():
        stride = kernel_size
    named = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    return [_pair(name, value) for name, value in (named | {"dilation": dilation}).items()]


def _pair(name: str, value: int | Sequence[int]) -> list[int]:
    pair = list(value) if isinstance(value, list | tuple) else [value]
    numbers = all(isinstance(v, int | torch.SymInt) and not isinstance(v, bool) for v in pair)
    wanted = "an int, or one for rows and one for columns"
    want(len(pair) in (1, 2) and numbers, name, wanted, value)
    return pair * 2 if len(pair) == 1 else pair


def _output_size(input: torch.Tensor, size: int | None | Sequence[int | None]) -> list[int]:
    image = list(_batched(input).shape[2:])
    pair = list(size) if isinstance(size, list | tuple) else [size] * 2
    given = [own if v is None else v for v, own in zip(pair, image, strict=False)]
    return _pair("output_size", given if len(pair) == 2 else size)
