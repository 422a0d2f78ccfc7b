"""The functional forms: torch.nn.functional's signatures, computed by our operators."""

from .conv import conv2d
from .conv_transpose import conv_transpose2d
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
