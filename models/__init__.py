"""ResNet and U-ResNet."""

from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from .uresnet import PRESETS, UResNet, UResNetConfig, uresnet

__all__ = [
    "PRESETS",
    "ResNet",
    "UResNet",
    "UResNetConfig",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "uresnet",
]
