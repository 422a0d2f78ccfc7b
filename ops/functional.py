"""The functional forms: torch.nn.functional's signatures, computed by our operators."""

from collections.abc import Sequence

from torch import Tensor

from . import conv, conv_transpose
from .focal_loss import softmax_focal_loss
from .interpolate import interpolate
from .linear_focal_loss import linear_focal_loss
from .pool import adaptive_avg_pool2d, adaptive_max_pool2d, avg_pool2d, max_pool2d
from .sigmoid_focal_loss import sigmoid_focal_loss

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "conv2d",
    "conv_transpose2d",
    "interpolate",
    "linear_focal_loss",
    "max_pool2d",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return `fullres.ops.conv2d`'s result; the arguments have torch's names."""
    return conv.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Return `ops.conv_transpose.conv_transpose2d`'s result; the arguments have torch's names."""
    return conv_transpose.conv_transpose2d(
        input, weight, bias, stride, padding, output_padding, groups, dilation
    )
