"""Planned networks on a card: the same bits, in the memory that was predicted, step after step."""

import pytest
import torch
from torch import Tensor, nn

from fullres.engine import InfeasibleError, Plan, convert, plan
from fullres.models import UResNetConfig, uresnet

pytestmark = pytest.mark.gpu
SHAPE = (4, 3, 512, 768)
CONFIG = UResNetConfig(16, 3, deepest_channels=32)
STEPS = 50
MIB = 2**20


def network() -> nn.Module:
    torch.manual_seed(0)
    return uresnet(CONFIG)


def loss_of(out: tuple[Tensor, ...]) -> Tensor:
    return sum(logits.float().square().mean() for logits in out)


@pytest.fixture(scope="module")
def least() -> int:
    with torch.device("meta"), pytest.raises(InfeasibleError) as caught:
        plan(uresnet(CONFIG), SHAPE, memory=1, criterion=loss_of)
    return caught.value.least


def planned(memory: int, host: int = 0) -> Plan:
    with torch.device("meta"):
        model = uresnet(CONFIG)
    return plan(model, SHAPE, memory=memory, host_memory=host, criterion=loss_of)


def trained(which: Plan) -> tuple[list[Tensor], list[int], list[int]]:
    """Weights and losses after `STEPS` steps, and each step's allocated and reserved peaks."""
    model = convert(network(), plan=which).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    generator = torch.Generator("cuda").manual_seed(1)
    losses, allocated, reserved = [], [], []
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters())
    for _ in range(STEPS):
        torch.cuda.reset_peak_memory_stats()
        x = torch.randn(SHAPE, device="cuda", generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(model(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        del x, loss
        allocated.append(torch.cuda.max_memory_allocated() - before)
        reserved.append(torch.cuda.max_memory_reserved())
    return [*losses, *(p.detach().clone() for p in model.parameters())], allocated, reserved


@pytest.mark.parametrize("share", [1.0, 2.0, 100.0])
def test_fifty_steps_take_what_was_predicted_and_no_more_each_time(least, share):
    which = planned(int(share * least))
    _, allocated, reserved = trained(which)
    later = allocated[2:]  # the first makes the optimizer's state, and tunes kernels
    assert max(later) - min(later) <= MIB
    assert len({*reserved[5:]}) == 1
    # Above it: workspaces, and what the allocator rounds up. The prediction's counters of the
    # optimizer lie on the host.
    assert 0.97 * which.peak_bytes <= max(later) <= 1.03 * which.peak_bytes + 32 * MIB
    assert reserved[-1] <= 1.1 * (max(later) + 64 * MIB)


def test_every_plan_gives_the_same_bits(least):
    plans = [planned(100 * least), planned(least), planned(int(1.3 * least), host=8 * 2**30)]
    assert plans[2].host_bytes > 0
    want, *others = (trained(each)[0] for each in plans)
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_a_planned_step_runs_where_no_more_memory_can_be_had(least):
    """The allocator refuses what passes the budget, but for workspaces and its own rounding."""
    which = planned(int(1.2 * least))
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + int(1.1 * which.peak_bytes) + 64 * MIB
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        found, _, _ = trained(which)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(bool(torch.isfinite(each).all()) for each in found)
