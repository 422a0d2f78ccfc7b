"""How torch's own convolution is called where it takes the place of our kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .dispatch import tf32_allowed


@contextmanager
def as_ours() -> Iterator[None]:
    """Let torch's convolutions inside give the same bits twice, in TF32 only where ours would."""
    cudnn, conv = torch.backends.cudnn, torch.backends.cudnn.conv
    # Not cudnn.flags(): it raises where somebody has set the precision of convolutions alone.
    deterministic, precision = cudnn.deterministic, conv.fp32_precision
    cudnn.deterministic = True
    conv.fp32_precision = "tf32" if tf32_allowed() else "ieee"
    try:
        yield
    finally:
        cudnn.deterministic, conv.fp32_precision = deterministic, precision
