"""Which programs may go through a batch a few images at a time, and what the parts are.

They are those in which each image is computed by itself: no norm is of the batch, no call mixes
images or draws random numbers, which a part would draw in another order. Then outputs and inputs'
gradients are the parts' put together. A parameter's gradient is the sum of the parts', taken part
by part: in float32 its last bits may be others than those of all images at once.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .program import Call, Program


def part_size(program: Program, batch: Sequence[bool], inputs: Sequence[Sequence[int]]) -> int:
    """Return how many images to run at a time; 0 for all of them.

    Args:
        program: any; its calls are not looked at but for what is known without their images.
        batch: whether each norm is of the batch.
        inputs: the sizes of its inputs.
    """
    if not program.images:
        return 0
    count = inputs[0][0] if len(inputs[0]) else 0
    alike = all(len(size) > 0 and size[0] == count for size in inputs)
    calls = [step for step in program.steps if isinstance(step, Call)]
    apart = all(call.apart and not call.random for call in calls)
    return program.images if program.images < count and alike and apart and not any(batch) else 0


def apart(program: Program, sizes: Mapping[int, Sequence[int]], count: int) -> bool:
    """Whether a program's calls compute each of `count` images by itself, at these sizes of slots.

    What is checked is what only sizes tell: their ranks, and that the first dimension is the batch.
    """
    calls = [step for step in program.steps if isinstance(step, Call)]
    alike = all(size and size[0] == count for size in sizes.values())
    return alike and not any(call.random for call in calls) and all(keeps(c, sizes) for c in calls)


def keeps(call: Call, sizes: Mapping[int, Sequence[int]]) -> bool:
    """Whether a call on images of these sizes computes each row of dimension 0 by itself."""
    ranks = {len(sizes[slot]) for slot in call.slots}
    return call.apart > 0 and len(ranks) == 1 and min(ranks) >= call.apart


def parts(count: int, size: int, fake: bool = False) -> Iterator[tuple[int, int]]:
    """Yield the first image of each part and the one after its last.

    fake: whether nothing is computed; then the parts that take what the second one does are left
        out, so that a step of a thousand images is metered as fast as one of three.
    """
    firsts = [*range(0, count, size)]
    if fake and len(firsts) > 4:
        firsts = firsts[:2] + firsts[-2:]
    for first in firsts:
        yield first, min(first + size, count)


def whole(part: Tensor, count: int) -> Tensor:
    """Return an empty tensor for `count` images, laid out as a part of them is."""
    size = (count, *part.shape[1:])
    pixels = part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if pixels else torch.contiguous_format
    return torch.empty(size, dtype=part.dtype, device=part.device, memory_format=layout)
