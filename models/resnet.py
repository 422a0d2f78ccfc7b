"""Residual networks that classify images of any size.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016, with the parameter names that
published checkpoints use. A bottleneck's stride sits in its 3x3 convolution.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

INPLACE_RELU = partial(nn.ReLU, inplace=True)  # its output alone is stored


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: [N, C, H, W] to [N, width, H/stride, W/stride]."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        conv: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
        activation: Callable[[], nn.Module],
    ):
        """Project the shortcut only where its shape changes."""
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.relu = activation()
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.downsample = _projection(in_channels, width, stride, conv, norm)

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation right before the addition."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + the convolutions of x)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu(y + x)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1: [N, C, H, W] to [N, 4 * width, H/stride, W/stride]."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        conv: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
        activation: Callable[[], nn.Module],
    ):
        """Project the shortcut only where its shape changes."""
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = conv(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = conv(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.relu = activation()
        self.downsample = _projection(in_channels, out_channels, stride, conv, norm)

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation right before the addition."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + the convolutions of x)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu(y + x)


class ResNet(nn.Module):
    """A residual network: images [N, in_channels, H, W] to logits [N, num_classes], any H and W.

    With e the block's expansion, sizes rounded up:

        conv1, bn1   [N, 64, H/2, W/2]      7x7
        maxpool      [N, 64, H/4, W/4]
        layer1       [N, 64e, H/4, W/4]
        layer2       [N, 128e, H/8, W/8]
        layer3       [N, 256e, H/16, W/16]
        layer4       [N, 512e, H/32, W/32]
        avgpool, fc  [N, num_classes]

    Convolution weights start from He's normal distribution over the fan out, normalisations from
    weight 1 and bias 0.

    Args:
        block: BasicBlock or Bottleneck.
        depths: the number of blocks in each of the four layers.
        in_channels: channels of the image.
        num_classes: logits per image.
        zero_init_residual: start every block as its shortcut alone, by zeroing the weight of the
            normalisation before the addition (Goyal et al. 2017, section 5.1).
        conv: called as nn.Conv2d with (in_channels, out_channels, kernel_size, stride=, padding=,
            bias=False), the defaults left out.
        norm: called with the number of channels.
        activation: called without arguments; one serves a whole block, so it may hold no state.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        in_channels: int = 3,
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        conv: Callable[..., nn.Module] = nn.Conv2d,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = INPLACE_RELU,
    ):
        """Build the network with fresh weights."""
        super().__init__()
        for name, value in {"in_channels": in_channels, "num_classes": num_classes}.items():
            if value < 1:
                raise ValueError(f"{name}: want at least 1, got {value}")
        self.in_channels = in_channels
        self.conv1 = conv(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = activation()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        channels = 64
        stages = []
        for i, depth in enumerate(depths):
            width, stride = 64 * 2**i, 1 if i == 0 else 2
            blocks = []
            for j in range(depth):
                blocks.append(
                    block(channels, width, stride if j == 0 else 1, conv, norm, activation)
                )
                channels = block.expansion * width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

        for parameter in self.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for stage in stages:
                for each in stage:
                    nn.init.zeros_(each.last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes]; raises ValueError unless x is [N, in_channels, H, W]."""
        x = _checked(x, self.in_channels)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(**options: Any) -> ResNet:
    """Return ResNet-18: 11,689,512 parameters with 3 channels and 1000 classes.

    The options are ResNet's: in_channels, num_classes, zero_init_residual, conv, norm, activation.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Any) -> ResNet:
    """Return ResNet-34 (21,797,672 parameters), with resnet18's options."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Any) -> ResNet:
    """Return ResNet-50 (25,557,032 parameters), with resnet18's options."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Any) -> ResNet:
    """Return ResNet-101 (44,549,160 parameters), with resnet18's options."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options: Any) -> ResNet:
    """Return ResNet-152 (60,192,808 parameters), with resnet18's options."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


@torch.fx.wrap  # one opaque step to the tracer, which cannot follow decisions about sizes
def _checked(x: Tensor, channels: int) -> Tensor:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: want [N, {channels}, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: want a floating-point dtype, got {x.dtype}")
    return x


def _projection(
    in_channels: int,
    out_channels: int,
    stride: int,
    conv: Callable[..., nn.Module],
    norm: Callable[[int], nn.Module],
) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        conv(in_channels, out_channels, 1, stride=stride, bias=False), norm(out_channels)
    )
