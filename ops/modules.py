"""Layers that take the place of torch.nn's: the same arguments, attributes, state and errors."""

import torch
import torch.nn.functional as F

from .conv import conv2d


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` computed by `fullres.ops.conv2d`; on a GPU by our kernels.

    Constructor, attributes, initial values and `state_dict` are torch's. Paddings other than with
    zeros are made first, as torch makes them.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the convolution of input [N, C, H, W], in channels_last."""
        padding = self.padding
        if self.padding_mode != "zeros":
            margins = self._reversed_padding_repeated_twice
            input, padding = F.pad(input, margins, mode=self.padding_mode), 0
        return conv2d(
            input,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )
