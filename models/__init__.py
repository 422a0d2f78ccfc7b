"""ResNet and U-ResNet."""
