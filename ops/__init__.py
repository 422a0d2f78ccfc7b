"""What an operation means: checks, launch, registration, autograd, modules and references."""

from .conv import conv2d

__all__ = ["conv2d"]
