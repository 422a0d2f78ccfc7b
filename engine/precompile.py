"""Which kernels a training step launches, found and compiled before there is a device.

The step runs once on fake tensors, with each of our operators taking its device path, where every
launch is recorded in place of being made. So what is compiled is what the step would ask for, and
the same code decides.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from .fakes import DevicePath, stand_in


def record_launches(step: Callable[[], Any], target: str, first: bool = False) -> list:
    """Return the kernel launches (`kernels.launches.Launch`) that step() makes, each once.

    Args:
        step: makes its tensors itself, on the CPU; they are fake, and cost nothing.
        target: "sm_80", "sm_90" or "gfx942".
        first: each kernel in its first configuration alone, and not in all that a device times.
    """
    from ..kernels import launches  # here: importing the engine must not need triton

    with launches.recorded(target, stand_in, first) as made, FakeTensorMode(), DevicePath():
        step()
    return list(made)


def training_step(
    build: Callable[[], nn.Module],
    input_shape: Iterable[int],
    dtype: torch.dtype,
    criterion: Callable[[Any], Tensor] | None = None,
    validation: bool = False,
) -> Callable[[], None]:
    """Return a function that builds a network and takes it forward and backward once.

    Args:
        build: returns the network.
        input_shape: of its one input, such as [N, C, H, W].
        dtype: the compute type; float16 and bfloat16 run under autocast.
        criterion: makes a scalar of the network's output; None adds up what that holds.
        validation: whether to pass forward in evaluation mode, too.
    """

    def total(out: Any) -> Tensor:
        return sum(t.float().sum() for t in tree_flatten(out)[0])

    def step() -> None:
        model = build()
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        x = torch.empty(tuple(input_shape)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = (criterion or total)(model(x))
        loss.backward()
        if validation:
            model.eval()
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                (criterion or total)(model(x))

    return step


def precompile(
    step: Callable[[], Any],
    targets: Iterable[str],
    out: str | Path,
    progress: Callable[[int, int], object] = lambda *_: None,
    first: bool = False,
) -> list[dict[str, Any]]:
    """Compile what step() launches for each target into out/cache; return a row a variant.

    Runs in parallel, and again only for what changed. A process on such a device, of the same
    triton and package versions, that runs with TRITON_CACHE_DIR=out/cache then compiles nothing.

    progress is called with the number of variants compiled so far, and of those to compile. first:
    compile each kernel in its first configuration alone, for a look.

    A row has the figures of `kernels.aot.Report` and

        variant   the constants that tell it from the kernel's others
        excess    the limits of kernels/aot.py that it passes, in words; "" for none
        excuse    why it ships all the same; "" where no reason is known, or none is needed

    Raises:
        ValueError: an unknown target.
        RuntimeError: a variant does not compile.
    """
    from ..kernels.aot import TARGETS
    from ..kernels.launches import build, judged

    targets = list(dict.fromkeys(targets))
    if unknown := sorted({*targets} - {*TARGETS}):
        raise ValueError(f"target: want some of {', '.join(TARGETS)}; got {', '.join(unknown)}")
    made = [launch for target in targets for launch in record_launches(step, target, first)]
    return judged(build(made, Path(out), progress))
