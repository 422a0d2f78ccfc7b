"""How the pixels of several tensors lie in memory, as few strides as they can be told by.

A kernel that goes over pixels does not care which of [N, H, W] a pixel comes from, only how far
the next one is. Here dimensions that follow each other without a gap, in every tensor alike, become
one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LONGEST_STEP = (1 << 18) - 1  # elements: offsets in a tile of 4,096 pixels stay below 2**30


@dataclass(frozen=True)
class Pixels:
    """Pixels [N, H, P] of tensors, the three made of any number of dimensions.

    A dense channels_last image has N = H = 1, a planar one H = 1; a window of an image all three.
    `strides` holds (n, h, p) of each tensor, in elements.
    """

    N: int
    H: int
    P: int
    strides: tuple[tuple[int, int, int], ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return self.N * self.H * self.P


def pixels_of(*tensors: torch.Tensor, channels: Sequence[int | None]) -> Pixels | None:
    """Return how the pixels of tensors lie, or None where kernels cannot follow them.

    That is where three strides a tensor cannot tell, or where neighbours are `LONGEST_STEP` apart.

    Args:
        *tensors: of one shape, but for the channels; any strides.
        channels: of each tensor the dimension to leave out, or None.
    """
    sizes, strides = None, []
    for t, channel in zip(tensors, channels, strict=True):
        kept = [i for i in range(t.dim()) if i != channel]
        sizes = [t.shape[i] for i in kept]
        strides.append([t.stride(i) for i in kept])
    if not math.prod(sizes):
        return Pixels(0, 1, 1, ((0, 0, 0),) * len(tensors))
    merged: list[tuple[int, list[int]]] = []  # the innermost first
    for size, *steps in reversed(list(zip(sizes, *strides, strict=True))):
        if size == 1:
            continue
        if merged:
            inner, inner_steps = merged[-1]
            if all(a == b * inner for a, b in zip(steps, inner_steps, strict=True)):
                merged[-1] = size * inner, inner_steps
                continue
        merged.append((size, steps))
    if len(merged) > 3:
        return None
    merged += [(1, [0] * len(tensors))] * (3 - len(merged))
    (P, p), (H, h), (N, n) = merged
    if max(p) > LONGEST_STEP:
        return None
    return Pixels(N, H, P, tuple(zip(n, h, p, strict=True)))
