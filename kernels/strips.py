"""How kernels that roll down an image, a row a step, cut it into strips.

A strip is as many columns as a tile of the configuration has pixels, and `strip_rows` rows. A
program owns one, so no sum of one program is longer than CHAIN pixels (see wgrad.py).
"""

import triton

from .wgrad import CHAIN, PROGRAMS, fit

MOST_PIXELS = 128  # of a tile, in any configuration
MOST_ROWS = CHAIN // MOST_PIXELS  # of a strip
FEWEST_ROWS = 16  # below, the two rows that a strip reads besides cost more than idle processors


@triton.constexpr_function
def tile_pixels(VALUES: int, C: int, K: int, bits: int) -> int:
    """Return how many pixels a tile has: VALUES of 2 bytes of the image with more channels."""
    return max(16, min(MOST_PIXELS, VALUES * 16 // bits // fit(64, max(C, K))))


def strip_rows(N: int, H: int, W: int) -> int:
    """Return how many rows a strip of N images has, every strip of a column equally many."""
    columns = N * triton.cdiv(W, 64)
    rows = max(FEWEST_ROWS, min(MOST_ROWS, columns * H // PROGRAMS))
    return triton.cdiv(H, triton.cdiv(H, rows))


def strips(N: int, H: int, W: int, rows: int, pixels: int) -> int:
    """Return how many strips of so many rows N images have, where a tile has so many pixels."""
    return N * triton.cdiv(H, rows) * triton.cdiv(W, pixels)
