"""Converted networks on two ranks compute what one does with the whole batch.

Run as a program with a rank and a folder, this file is one of the two ranks.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fullres
from fullres.engine import InfeasibleError
from fullres.models import PRESETS
from fullres.ops import SyncBatchNorm

WAYS = {"plain": {}, "static": {"static_graph": True}, "unused": {"find_unused_parameters": True}}
POLICIES = ["keep", "series", "plan"]


def network() -> nn.Module:
    torch.manual_seed(0)
    numbers = {"filters": 3, "depth": 1, "deepest_blocks": 1, "deepest_channels": 6}
    config = dataclasses.replace(PRESETS["uresnet"], **numbers, final_blocks=1, deepest_kernel=3)
    return SyncBatchNorm.convert_sync_batchnorm(fullres.uresnet(config)).double()


def converted(policy: str) -> nn.Module:
    """Return the network under a policy, or under its plan of least memory."""
    if policy != "plan":
        return fullres.convert(network(), policy=policy)
    model, shape, found = network().float(), (2, 3, 7, 10), None
    try:
        fullres.plan(model, shape, memory=1, dtype=torch.float32)
    except InfeasibleError as error:
        found = fullres.plan(model, shape, memory=error.least, dtype=torch.float32)
    assert any(part.again for part in found.segments)
    return fullres.convert(network(), plan=found)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 7, 10, generator=torch.Generator().manual_seed(1)).double()


def loss(outputs) -> torch.Tensor:
    return sum(o.square().mean() for o in outputs)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return gradients | {n: b.clone() for n, b in model.named_buffers()}


def rank(number: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2
    )
    x = images()[2 * number : 2 * number + 2]
    found = {}
    for policy in POLICIES:
        for way, options in WAYS.items():
            model = converted(policy)
            parallel = DistributedDataParallel(model, **options)
            for _ in range(2):
                model.zero_grad()
                loss(parallel(x)).backward()
            found[policy, way] = state(model)
    calls = []
    for name in ("all_gather", "all_reduce"):
        original = getattr(dist, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        setattr(dist, name, counted)
    for policy in POLICIES:
        model = converted(policy)
        calls.clear()  # a plan is made without talking
        loss(model(x)).backward()
        found["calls", policy] = list(calls)
    sharded = fullres.convert(network())
    fully_shard(sharded)
    loss(sharded(x)).backward()
    found["sharded"] = {n: p.grad.full_tensor() for n, p in sharded.named_parameters()}
    torch.save(found, folder / f"{number}.pt")
    dist.barrier()  # a rank that leaves early can take the other with it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    """One process with the whole batch, in torch's layers."""
    model = network()
    for _ in range(2):
        model.zero_grad()
        loss(model(images())).backward()
    return state(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_two_ranks_are_one_with_the_whole_batch(policy, way, two_ranks, alone):
    for found in two_ranks:
        for name, want in alone.items():
            got = found[policy, way][name]
            assert (got - want).abs().max() <= 1e-10 * max(1, want.abs().max()), name


def test_sharded_parameters_have_the_same_gradients(two_ranks, alone):
    model = network()
    loss(model(images())).backward()
    for found in two_ranks:
        for name, parameter in model.named_parameters():
            gap = found["sharded"][name] - parameter.grad
            assert gap.abs().max() <= 1e-10 * max(1, parameter.grad.abs().max()), name


def test_ranks_communicate_alike_and_once_whatever_is_made_again(two_ranks):
    first, second = two_ranks
    norms = 3 * 2 * 8  # a bound: planes, passes, and more normalisations than a plane meets
    for policy in POLICIES:
        assert first["calls", policy] == second["calls", policy]
        assert first["calls", policy] == first["calls", "keep"]
        gathers = first["calls", policy].count("all_gather")
        assert 0 < gathers == first["calls", policy].count("all_reduce") <= norms


if __name__ == "__main__":
    rank(int(sys.argv[1]), Path(sys.argv[2]))
