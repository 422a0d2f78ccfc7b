"""A training run's plan for a budget of memory: what of the step the budget is for.

The plan describes the step that the trainer runs, and is made before processes meet: each finds the
same one, as long as the budget is a number and not what its own device has free.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Plan, convert, max_batch, plan
from ..engine.plan import InfeasibleError, parse_memory
from .config import AUTO, TrainConfig
from .loss import SegmentationLoss

PLAN = "plan.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = 0.03  # by which a measured peak may differ from the predicted one
FREE_SHARE = {"gpu": 0.97, "cpu": 0.8}  # of the free memory, that a run takes
_NAMED = 5  # of what is alive at the peak, where a prediction fails


def pixel_criterion(
    scheme: str = "focal", labelled: bool = False
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the loss of a U-ResNet's logits, for planning: labels are 0, and take no memory.

    The labels of a batch lie in memory for the whole step; `label_bytes` are to be reserved.

    labelled: whether labels are a tensor of their own, such as kernels are compiled for.
    """

    def criterion(logits: Sequence[Tensor]) -> Tensor:
        n, _, *size = logits[0].shape
        shape = n, len(logits), *size
        own = shape if labelled else ()
        labels = torch.zeros(own, dtype=torch.uint8, device=logits[0].device)
        # Alone: while a step is planned, ranks have nothing to tell each other.
        loss = SegmentationLoss(scheme, synchronize=False)
        return loss(logits, labels.expand(shape))

    return criterion


def label_bytes(batch: int, planes: int, size: Sequence[int]) -> int:
    """Return the bytes of the labels, uint8 [batch, planes, H, W], of images of that size."""
    return batch * planes * math.prod(size)


def plan_step(
    model: nn.Module,
    batch: int | None,
    image: Sequence[int],
    *,
    memory: int | str,
    labels: int = 0,
    reserve: int = 0,
    **options: Any,
) -> Plan:
    """Return the plan of a step on a batch, or on the largest that the budget suffices for.

    Args:
        model: as for `fullres.plan`.
        batch: images; None for the largest number.
        image: [C, H, W].
        memory: the budget.
        labels: bytes of an image's labels, which lie beside the step.
        reserve: bytes of whatever else does.
        options: of `fullres.plan`.

    Raises:
        InfeasibleError: the budget does not suffice, for one image where batch is None.
        ValueError: as `fullres.plan`.
    """
    budget = parse_memory(memory, "memory")

    def planned(n: int) -> Plan:
        beside = reserve + n * labels
        return plan(model, (n, *image), memory=budget, reserve=beside, **options)

    if batch is not None:
        return planned(batch)
    batch = max(1, max_batch(model, image, memory=budget, reserve=reserve, **options))
    while True:  # down, for labels were left out
        try:
            return planned(batch)
        except InfeasibleError as error:
            if batch == 1:
                raise
            # The peak is close to a line over images that begins above 0, so this is not below.
            batch = min(batch - 1, math.ceil(batch * budget / error.least))


def plan_run(
    config: TrainConfig,
    network: Callable[[], nn.Module],
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    *,
    accelerator: str,
    processes: int = 1,
    before: dict[str, Any] | None = None,
) -> tuple[TrainConfig, Plan]:
    """Return the configuration with its batch size as a number, and the plan of its step.

    A run that goes on keeps its batch size, and the plan in its folder if that is one for this
    configuration and its memory still suffices.

    Args:
        config: a run with `memory`.
        network: makes its network, before `fullres.convert`.
        optimizer: makes its optimizer.
        accelerator: "gpu" or "cpu".
        processes: how many train together.
        before: the options that the run began with, if it goes on.

    Raises:
        ValueError: the memory does not suffice, or processes might find different batch sizes.
    """
    if processes > 1 and config.memory == config.batch_size == AUTO:
        raise ValueError(
            "memory: want a number of bytes beside batch_size auto with several processes, which "
            "must come to the same batch; got auto"
        )
    budget = free_memory(accelerator) if config.memory == AUTO else parse_memory(config.memory)
    if before is not None and config.batch_size == AUTO:
        config = replace(config, batch_size=before["batch_size"])
    if before is not None and _same_step(config, before):
        kept = _kept(config, budget, network)
        if kept is not None:
            return config, kept
    # A GPU's parameters are there: which operators autocast and optimizers use depends on it.
    place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if accelerator == "gpu" else "meta"
    with torch.device(place):
        model = network()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    planes = model.config.planes
    found = plan_step(
        model,
        None if config.batch_size == AUTO else config.batch_size,
        (planes, *config.size),
        memory=budget,
        labels=label_bytes(1, planes, config.size),
        # Gradients that outlast a step: buckets of several processes, sums of several passes.
        reserve=gradients if processes > 1 or config.accumulate > 1 else 0,
        criterion=pixel_criterion(config.loss),
        dtype=DTYPES[config.precision],
        optimizer=optimizer,
        host_memory=config.host_memory,
        split_batch=config.split_batch,
    )
    found = replace(found, optimizer=config.optimizer)
    return replace(config, batch_size=found.input_shape[0]), found


def free_memory(accelerator: str) -> int:
    """Return the bytes that a run may take of what this process' device, or the host, has free.

    Raises ValueError where the system does not say.
    """
    if accelerator == "gpu":
        device = int(os.environ.get("LOCAL_RANK", 0))
        return int(FREE_SHARE["gpu"] * torch.cuda.mem_get_info(device)[0])
    try:
        pages, page = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        pages = page = -1
    if min(pages, page) <= 0:
        raise ValueError("memory: want bytes on this system, which tells no free memory; got auto")
    return int(FREE_SHARE["cpu"] * pages * page)


def save_plan(found: Plan, folder: Path) -> None:
    """Write a run's plan, whole or not at all: other processes may be about to read it."""
    partial = folder / f".{PLAN}.partial"
    found.save(partial)
    partial.replace(folder / PLAN)


def summary(found: Plan) -> str:
    """Return a line on what a plan promises."""
    host = f" and {_gib(found.host_bytes)} of the host's" if found.host_bytes else ""
    return (
        f"memory: {_gib(found.peak_bytes)} predicted of {_gib(found.memory)}{host} for "
        f"{found.input_shape[0]} images, {found.time_ratio:.2f} times the time without a limit"
    )


def comparison(found: Plan, measured: int) -> str:
    """Return a line on a measured peak; what was to be alive is named if the two are far apart."""
    share = measured / found.peak_bytes - 1
    line = f"memory: {_gib(found.peak_bytes)} predicted, {_gib(measured)} measured ({share:+.1%})"
    if abs(share) <= TOLERANCE:
        return line
    largest = (
        f"{a.module or a.phase} ({a.operator}) {_gib(a.bytes)}"
        for a in found.report.at_peak[:_NAMED]
    )
    return f"{line}; the largest at the predicted peak: {', '.join(largest)}"


def _same_step(config: TrainConfig, before: dict[str, Any]) -> bool:
    """Whether a run began with all options that a plan depends on."""
    names = (
        "model", "preset", "network", "image_size", "batch_size", "accumulate", "loss",
        "optimizer", "precision", "sync_batch_norm", "channels_last", "memory", "host_memory",
        "split_batch",
    )  # fmt: skip
    return all(before.get(name) == getattr(config, name) for name in names)


def _kept(config: TrainConfig, budget: int, network: Callable[[], nn.Module]) -> Plan | None:
    """Return the plan in a run's folder if it is one for this network, step and budget."""
    path = Path(config.out) / PLAN
    if not path.exists():
        return None
    try:
        found = Plan.load(path)
        with torch.device("meta"):
            convert(network(), plan=found)
    except ValueError:  # damaged, or of other segments: a plan is soon made again
        return None
    n, _, *size = found.input_shape
    same = (n, *size, found.dtype) == (config.batch_size, *config.size, DTYPES[config.precision])
    if config.memory == AUTO:
        return found if same and found.peak_bytes <= budget else None
    return found if same and found.memory == budget else None


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
