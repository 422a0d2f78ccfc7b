"""The memory of one training step on one whole detector image, measured without a GPU.

Eager PyTorch, layer by layer and with every block checkpointed, beside fused segments under each
policy, whose compute dtype is autocast's or the parameters' own.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..engine import convert, fusion, meter
from ..models import PRESETS, resnet50, uresnet
from ..models.resnet import Bottleneck
from ..models.uresnet import Block, ResidualBlock
from .record import save, table

SHAPE = (1, 3, 1260, 2048)
PRECISIONS = {
    "float32": {"dtype": torch.float32},
    "mixed": {"dtype": torch.float32, "autocast": torch.bfloat16},
    "bfloat16": {"dtype": torch.bfloat16},
}


class Checkpointed(nn.Module):
    """A block that keeps its input alone and runs again in the backward pass."""

    def __init__(self, block: nn.Module):
        """Wrap block."""
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Return block(x)."""
        return checkpoint(self.block, x, use_reentrant=False)


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Return model with each of its blocks wrapped in place, the outermost where they nest."""
    for name, child in model.named_children():
        if isinstance(child, (Block, ResidualBlock, Bottleneck)):
            setattr(model, name, Checkpointed(child))
        else:
            checkpoint_blocks(child)
    return model


def cross_entropy(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the float32 softmax cross entropy with labels of zero, summed over the planes."""
    planes = [out] if isinstance(out, Tensor) else out
    return sum(
        F.cross_entropy(logits.float(), logits.new_zeros(logits[:, 0].shape, dtype=torch.int64))
        for logits in planes
    )


POLICIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "eager, checkpoint each block": checkpoint_blocks,
    **{f"fullres, {policy}": partial(convert, policy=policy) for policy in fusion.POLICIES},
}


def run(out: Path) -> list[dict]:
    """Measure every network in every precision; print a table, save it in out, return its rows."""
    builders = {preset: lambda preset=preset: uresnet(preset) for preset in PRESETS}
    builders["resnet50"] = resnet50
    rows = []
    for network, build in builders.items():
        for precision, options in PRECISIONS.items():
            for policy, change in POLICIES.items():
                with torch.device("meta"):
                    model = change(build())
                start = time.perf_counter()
                report = meter(model, SHAPE, criterion=cross_entropy, **options)
                rows.append(
                    {
                        "network": network,
                        "precision": precision,
                        "policy": policy,
                        "image": "x".join(map(str, SHAPE)),
                        "parameters_gib": report.parameters / 2**30,
                        "stored_gib": report.stored / 2**30,
                        "after_forward_gib": report.after_forward / 2**30,
                        "peak_gib": report.peak / 2**30,
                        "peak_in": f"{report.peak_at.phase} {report.peak_at.operator}",
                        "metered_in_s": time.perf_counter() - start,
                    }
                )
    print(table(rows))
    save("memory", rows, out)
    return rows
