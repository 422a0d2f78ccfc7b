"""Layers that take the place of torch.nn's: the same arguments, attributes, state and errors.

Each but `SyncBatchNorm` and `ConvNormAct` is a subclass of torch's that computes by our operators
and holds nothing more. So they load its checkpoints, start from the same random numbers, and
`fullres.convert` can put one in the other's place.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from . import functional
from .batch_norm import SyncBatchNorm
from .losses import LinearFocalLoss, SigmoidFocalLoss, SoftmaxFocalLoss
from .program import Conv, Norm, Program, Source, Term, Write
from .segment import run

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "ConvNormAct",
    "ConvTranspose2d",
    "LinearFocalLoss",
    "MaxPool2d",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "SyncBatchNorm",
    "Upsample",
]


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` by `fullres.functional.conv2d`, in channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of input [N, C, H, W] or [C, H, W]."""
        padding = self.padding
        if self.padding_mode != "zeros":
            margins = self._reversed_padding_repeated_twice
            input, padding = F.pad(input, margins, mode=self.padding_mode), 0
        return functional.conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` by `fullres.functional.conv_transpose2d`, in channels_last."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution of input [N, C, H, W] or [C, H, W]."""
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode: want 'zeros', got {self.padding_mode!r}")
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return functional.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups,
            self.dilation,
        )  # fmt: skip


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, in channels_last; statistics are float32, free of cancellation.

    Saves for backward: its input, and four numbers a channel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return input [N, C, H, W] normalised."""
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(f"input: want [N, {self.num_features}, H, W], got {list(input.shape)}")
        steps = (Write(Source(Term(0, 0)), 1),)
        return run(Program(1, 4, steps, (_norm_of(0, self, 0),), (1,)), [input], [], [self])[0]


def _norm_of(slot: int, norm: nn.Module, first: int) -> Norm:
    """Return the normalisation of a slot, its parameters numbered from `first` on."""
    parts = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return Norm(slot, *[None if part is None else first + i for i, part in enumerate(parts)])


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that keeps a byte a result for backward, and not its input."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the largest value of each window of input [N, C, H, W] or [C, H, W]."""
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode,
            self.return_indices,
        )  # fmt: skip


class AvgPool2d(nn.AvgPool2d):
    """`torch.nn.AvgPool2d` that keeps nothing for backward."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the mean of each window of input [N, C, H, W] or [C, H, W]."""
        return functional.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode,
            self.count_include_pad, self.divisor_override,
        )  # fmt: skip


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` that keeps nothing for backward."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the mean of each of output_size windows of input [N, C, H, W] or [C, H, W]."""
        return functional.adaptive_avg_pool2d(input, self.output_size)


class Upsample(nn.Upsample):
    """`torch.nn.Upsample` of images, nearest and bilinear; other modes are torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        """Return input [N, C, H, W] enlarged."""
        if input.dim() != 4 or self.mode not in ("nearest", "bilinear"):
            return super().forward(input)
        return functional.interpolate(
            input, self.size, self.scale_factor, self.mode, self.align_corners,
            self.recompute_scale_factor,
        )  # fmt: skip


class ConvNormAct(nn.Module):
    """act(norm(conv(x)) + residual) in one node of the autograd graph.

    Saves for backward: x, the convolution's output and the residual, each once; with act "none" and
    no normalisation not even the output.

    Its `state_dict` is that of `conv` and, where there is one, `norm`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool | None = None,
        *,
        norm: Callable[[int], nn.Module] | None = BatchNorm2d,
        act: str = "relu",
        slope: float = 0.01,
    ):
        """Make the layers.

        Args:
            in_channels: C of x.
            out_channels: C of the result.
            kernel_size: rows and columns of taps; one number for both, and so the rest.
            stride: as torch.nn.Conv2d has it.
            padding: as torch.nn.Conv2d has it; None keeps the size of x at stride 1, for an odd
                kernel_size.
            dilation: as torch.nn.Conv2d has it.
            groups: as torch.nn.Conv2d has it.
            bias: whether the convolution has one; None for where no normalisation follows.
            norm: makes the normalisation, of a number of channels; like BatchNorm2d. Or None.
            act: "none", "relu", "leaky_relu" or "silu".
            slope: of "leaky_relu".

        Raises:
            ValueError: another act, or an even kernel_size without padding.
        """
        super().__init__()
        if act not in ("none", "relu", "leaky_relu", "silu"):
            raise ValueError(f"act: want none, relu, leaky_relu or silu, got {act!r}")
        taps, spread = (v if isinstance(v, tuple) else (v, v) for v in (kernel_size, dilation))
        if padding == "valid":
            padding = 0
        if padding in (None, "same"):
            if any(d * (t - 1) % 2 for t, d in zip(taps, spread, strict=True)):
                raise ValueError(
                    f"padding: want a number for an even kernel_size {taps}, got {padding!r}"
                )
            padding = tuple(d * (t - 1) // 2 for t, d in zip(taps, spread, strict=True))
        bias = norm is None if bias is None else bias
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.norm = None if norm is None else norm(out_channels)
        self.act, self.slope = act, slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return [N, K, P, Q] of x [N, C, H, W]; residual, if given, has the result's shape."""
        inputs = [x] if residual is None else [x, residual]
        norms = [] if self.norm is None else [self.norm]
        return run(self._program(len(inputs)), inputs, [self.conv], norms)[0]

    def _program(self, inputs: int) -> Program:
        conv, out = self.conv, inputs
        steps = (
            Conv(
                (Source(Term(0)),), 0, None if conv.bias is None else 1, conv.stride, conv.padding,
                conv.dilation, conv.groups, out,
            ),
            Write(
                Source(
                    Term(out, None if self.norm is None else 0),
                    Term(1) if inputs == 2 else None, self.act, self.slope,
                ),
                out + 1,
            ),
        )  # fmt: skip
        norms = () if self.norm is None else (_norm_of(out, self.norm, 2),)
        return Program(inputs, 2 + 4 * len(norms), steps, norms, (out + 1,))

    def extra_repr(self) -> str:
        """Return what the layers inside do not show."""
        return f"act={self.act!r}" + (f", slope={self.slope}" if self.act == "leaky_relu" else "")


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Conv2d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2d,
    nn.Upsample: Upsample,
}
