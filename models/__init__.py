"""ResNet and U-ResNet."""

from .uresnet import PRESETS, UResNet, UResNetConfig, uresnet

__all__ = ["PRESETS", "UResNet", "UResNetConfig", "uresnet"]
