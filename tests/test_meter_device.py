"""The meter on a card: its count beside the allocator's own."""

import pytest
import torch
from torch import nn

from fullres.bench.memory import cross_entropy
from fullres.engine import convert, meter
from fullres.models import UResNetConfig, uresnet

pytestmark = pytest.mark.gpu
SHAPE = (2, 3, 256, 384)
OPTIONS = {
    "criterion": cross_entropy,
    "optimizer": lambda p: torch.optim.AdamW(p, foreach=False),
    "autocast": torch.bfloat16,
}


def network() -> nn.Module:
    return convert(uresnet(UResNetConfig(16, 3, deepest_channels=32)), policy="series")


def test_a_card_counts_what_fake_tensors_do():
    """Counters of the optimizer, 4 bytes a parameter, lie on the host."""
    model = network()
    fake, real = meter(model, SHAPE, **OPTIONS), meter(model, SHAPE, device="cuda", **OPTIONS)
    assert real.device == f"cuda:{torch.cuda.current_device()}"
    counters = 4 * sum(1 for _ in model.parameters())
    assert real.stored == fake.stored
    assert real.optimizer == fake.optimizer - counters
    assert real.peak == fake.peak - counters
    assert real.host_peak >= counters


def test_the_allocators_peaks_are_near_the_counted_one():
    report = meter(network(), SHAPE, device="cuda", **OPTIONS)
    assert report.peak <= report.allocated <= 1.1 * report.peak + 32 * 2**20  # and a workspace
    assert report.allocated <= report.reserved


def test_what_was_allocated_before_does_not_count():
    model = network()
    first = meter(model, SHAPE, device="cuda", **OPTIONS)
    before = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    second = meter(model.cuda(), SHAPE, device="cuda", **OPTIONS)
    assert second.peak == first.peak
    assert abs(second.allocated - first.allocated) <= 0.01 * first.allocated
    assert before.is_cuda and all(p.grad is None for p in model.parameters())


def test_nothing_stays_on_the_card():
    meter(network(), SHAPE, device="cuda", **OPTIONS)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        meter(network(), SHAPE, device="cuda", **OPTIONS)
    assert torch.cuda.memory_allocated() == before


def test_workspaces_come_nearer_to_the_allocator():
    model = network()
    plain, inside = (meter(model, SHAPE, device="cuda", workspaces=w, **OPTIONS)
                     for w in (False, True))  # fmt: skip
    assert plain.peak <= inside.peak <= inside.allocated
    assert inside.stored == plain.stored


def test_operators_have_their_modules_names_though_backward_has_a_thread_of_its_own():
    model = network()
    fake, real = meter(model, SHAPE, **OPTIONS), meter(model, SHAPE, device="cuda", **OPTIONS)
    names = [{(s.phase, s.module) for s in r.timeline if s.operator.startswith("fullres.")}
             for r in (fake, real)]  # fmt: skip
    assert names[0] == names[1]
