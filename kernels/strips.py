"""How kernels that roll down an image, a row a step, cut it into strips.

A program owns a strip: as many columns as a tile of its configuration has pixels, and as many rows
as make `strip_area` pixels of them, at most CHAIN, so that no sum is longer (see wgrad.py). So the
parts of sums that programs leave behind are equally many in every configuration, about.
"""

import triton
import triton.language as tl

from .wgrad import CHAIN, PROGRAMS, fit

MOST_PIXELS = 128  # of a tile, in any configuration
SMALLEST = 1024  # pixels of a strip: the two rows that it reads besides cost more below


@triton.constexpr_function
def tile_pixels(VALUES: int, C: int, K: int, bits: int) -> int:
    """Return how many pixels a tile has: VALUES of 2 bytes of the image with more channels."""
    return max(16, min(MOST_PIXELS, VALUES * 16 // bits // fit(64, max(C, K))))


def strip_area(N: int, H: int, W: int) -> int:
    """Return how many pixels a strip of N images has at most: enough strips to fill a device."""
    return max(SMALLEST, min(CHAIN, N * H * W // PROGRAMS))


def strip_rows(H: int, area: int, columns: int) -> int:
    """Return how many rows a strip has, every strip of a column equally many."""
    return triton.cdiv(H, triton.cdiv(H, max(1, area // columns)))


@triton.jit
def rows_of_strip(H, area, COLUMNS: tl.constexpr):
    """Return strip_rows, on the device."""
    return tl.cdiv(H, tl.cdiv(H, tl.maximum(area // COLUMNS, 1)))


def strips(N: int, H: int, W: int, area: int, columns: int) -> int:
    """Return how many strips N images have."""
    return N * triton.cdiv(H, strip_rows(H, area, columns)) * triton.cdiv(W, columns)
