"""What an operation means: checks, launch, registration, autograd, modules and references."""

from .batch_norm import SyncBatchNorm
from .conv import conv2d
from .focal_loss import softmax_focal_loss

__all__ = ["SyncBatchNorm", "conv2d", "softmax_focal_loss"]
