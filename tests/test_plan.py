"""Plans: the step takes what they promise, and nothing else depends on them."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from torch import nn

import fullres
from fullres.engine import (
    InfeasibleError,
    LiveBytes,
    Plan,
    convert,
    max_batch,
    max_image,
    meter,
    plan,
)
from fullres.engine.ladder import Ladder
from fullres.engine.plan import parse_memory
from fullres.models import PRESETS, resnet50, uresnet
from fullres.training.loss import SegmentationLoss

GIB = 2**30
SHAPE = (2, 3, 64, 96)


def small(preset: str = "uresnet", **numbers) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"filters": 4, "depth": 1, "level_blocks": 1, "deepest_blocks": 1, "final_blocks": 2}
    sizes |= {"deepest_channels": 8, "deepest_kernel": 3} | numbers
    return uresnet(dataclasses.replace(PRESETS[preset], **sizes))


def least_of(model: nn.Module, shape=SHAPE, **options) -> int:
    with pytest.raises(InfeasibleError) as caught:
        plan(model, shape, memory=1, **options)
    return caught.value.least


@pytest.fixture(scope="module")
def ladder() -> dict[str, Plan]:
    """Plans of one network, float32, from the tightest to one without a limit."""
    model = small()
    least = least_of(model, dtype=torch.float32)
    budgets = {"least": least, "tight": int(1.3 * least), "loose": int(2.5 * least), "all": GIB}
    return {
        name: plan(model, SHAPE, memory=budget, dtype=torch.float32)
        for name, budget in budgets.items()
    }


def focal(planes: int = 3):
    loss = SegmentationLoss("focal")

    def criterion(out):
        n, _, h, w = out[0].shape
        return loss(out, torch.zeros(n, planes, h, w, dtype=torch.uint8))

    return criterion


def test_names_are_at_the_front_door():
    assert fullres.plan is plan and fullres.Plan is Plan
    assert fullres.max_batch is max_batch and fullres.max_image is max_image


# What is promised is kept


@pytest.mark.parametrize("name", ["least", "tight", "loose", "all"])
def test_the_metered_peak_is_the_predicted_one(ladder, name):
    planned = ladder[name]
    report = meter(
        convert(small(), plan=planned), SHAPE, optimizer=torch.optim.AdamW, hold_output=False
    )
    assert report.peak == planned.peak_bytes <= planned.memory
    assert report.stored == planned.report.stored


def test_a_real_step_takes_what_was_predicted(ladder):
    for name in ("least", "loose"):
        report = meter(
            convert(small(), plan=ladder[name]), SHAPE, optimizer=torch.optim.AdamW,
            hold_output=False, device="cpu",
        )  # fmt: skip
        # What plain torch makes on a CPU inside our operators comes on top of it.
        assert report.stored == ladder[name].report.stored


def test_more_memory_is_never_slower(ladder):
    rungs = Ladder(small(level_blocks=2), SHAPE, None, torch.float32, None, torch.optim.AdamW)
    least, times, peaks = rungs.least().peak, [], []
    for share in (1.0, 1.02, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 50.0):
        rung = rungs.within(int(share * least))
        assert rung.peak == rung.report.peak <= share * least
        times.append(rung.seconds)
        peaks.append(rung.peak)
    assert rungs.within(least - 1) is None
    assert times == sorted(times, reverse=True)
    assert len(set(times)) > 4, "the budget should matter"
    assert times[-1] == rungs.fastest
    assert 4 * min(peaks) < max(peaks)
    assert ladder["all"].time_ratio == 1.0


def test_the_same_arguments_give_the_same_plan(ladder):
    again = plan(small(), SHAPE, memory=ladder["tight"].memory, dtype=torch.float32)
    assert again.as_dict() == ladder["tight"].as_dict()


def test_an_impossible_budget_names_one_that_suffices():
    model = small("a21")
    with pytest.raises(ValueError, match=r"memory: want at least .* MiB for 2 x 3 x 64 x 96") as e:
        plan(model, SHAPE, memory="100 KiB")
    again = pickle.loads(pickle.dumps(e.value))
    assert (str(again), again.least) == (str(e.value), e.value.least)
    named = str(e.value).split("at least ")[1].split(" for ")[0]
    planned = plan(model, SHAPE, memory=named)
    assert planned.peak_bytes <= planned.memory
    assert e.value.least <= planned.memory < 1.02 * e.value.least


def test_what_is_named_suffices_where_sums_say_more():
    ladder = Ladder(small("a21"), SHAPE, None, torch.float32, None, torch.optim.AdamW)
    ladder.rungs = [dataclasses.replace(rung, peak=2 * rung.peak) for rung in ladder.rungs]
    assert ladder.within(1) is None
    least = ladder.least().peak
    ladder.rungs = [dataclasses.replace(r, peak=2 * least, report=None) for r in ladder.rungs]
    assert ladder.within(least).peak == least


def test_a_reserve_is_left_free():
    model = small("a21")
    least = least_of(model)
    assert least_of(model, reserve=12_345) == least + 12_345
    planned = plan(model, SHAPE, memory=2 * least, reserve=least // 2)
    assert planned.report.peak + least // 2 == planned.peak_bytes <= 2 * least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_optimizer_the_loss_and_the_dtype_count(dtype):
    model = small("a21")
    plain = plan(model, SHAPE, memory=GIB, dtype=dtype, optimizer=None)
    adam = plan(model, SHAPE, memory=GIB, dtype=dtype, optimizer="adamw")
    own = plan(model, SHAPE, memory=GIB, dtype=dtype, optimizer=torch.optim.AdamW)
    momentum = plan(model, SHAPE, memory=GIB, dtype=dtype, optimizer="momentum")
    size = sum(p.nbytes for p in model.parameters())
    assert plain.report.optimizer == 0 and momentum.report.optimizer == size
    assert 2 * size <= adam.report.optimizer == own.report.optimizer < 2.1 * size
    with_loss = plan(model, SHAPE, memory=GIB, dtype=dtype, criterion=focal())
    assert with_loss.report.peak > 0 and with_loss.segments == adam.segments
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    stored = plan(model, SHAPE, memory=GIB, dtype=other).report.stored
    assert (stored > plain.report.stored) == (other == torch.float32)


# Results do not depend on it


def five_steps(model: nn.Module) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = copy.deepcopy(model)
    steps = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(1)
    losses = []
    for _ in range(5):
        x = torch.randn(SHAPE)
        loss = sum((out.sin() * out).mean() for out in model(x))
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_five_steps_have_the_same_bits_under_every_plan(ladder):
    model = small()
    first, state = five_steps(convert(model, plan=ladder["all"]))
    for name in ("least", "tight", "loose"):
        losses, other = five_steps(convert(model, plan=ladder[name]))
        assert losses == first
        for key, value in state.items():
            assert torch.equal(value, other[key]), (name, key)
    eager, moved = five_steps(model)
    assert first == pytest.approx(eager, rel=0.1)
    for key, value in moved.items():
        if key.endswith("num_batches_tracked"):
            assert torch.equal(value, state[key])


@pytest.mark.parametrize("preset", ["uresnet", "a21", "scc21"])
def test_gradients_are_the_networks_in_float64(preset):
    model = small(preset)
    planned = plan(model, SHAPE, memory=least_of(model, dtype=torch.float32), dtype=torch.float32)
    x = torch.randn(SHAPE, dtype=torch.float64)
    found = []
    for network in (model, convert(model, plan=planned)):
        network = copy.deepcopy(network).double()
        out = network(x.requires_grad_())
        dx, *rest = torch.autograd.grad(
            sum((plane.sin() * plane).sum() for plane in out), [x, *network.parameters()]
        )
        found.append([*out, dx, *rest, *(b.double() for b in network.buffers())])
    for ours, theirs in zip(*found, strict=True):
        error = (ours - theirs).abs().max() / (1 + theirs.abs().max())
        assert error < 1e-10


class Mixed(nn.Module):
    """Normalisation in groups, dropout, pooling, a gate and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.body(x)
        x = torch.relu(x + y * self.gate(y))
        left, right = self.pool(self.drop(x)).chunk(2, dim=1)
        x = torch.cat([right, left * 2], dim=1)
        return self.head(x.mean((2, 3)))


def test_torchs_own_operators_are_planned_too():
    torch.manual_seed(0)
    model = Mixed()
    least = least_of(model, dtype=torch.float32)
    tight = plan(model, SHAPE, memory=least, dtype=torch.float32)
    loose = plan(model, SHAPE, memory=GIB, dtype=torch.float32)
    assert len(tight.segments) == 1 and tight.peak_bytes < 0.8 * loose.peak_bytes
    grads = []
    for network in (convert(model, plan=tight), convert(model, plan=loose)):
        torch.manual_seed(3)
        network.zero_grad()
        network(torch.ones(SHAPE)).sin().sum().backward()
        grads.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    evaluated = [n.eval()(torch.ones(SHAPE)) for n in (convert(model, plan=tight), model)]
    torch.testing.assert_close(*evaluated)


class Untraceable(nn.Module):
    """Parts that are converted each by itself, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (
            nn.Sequential(
                nn.Conv2d(n, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            )
            for n in (3, 8, 8)
        )  # fmt: skip

    def forward(self, x):
        x = self.first(x)
        for _ in range(int(x.shape[1]) // 4):
            x = self.second(x)
        return self.last(x.sin())


def test_a_network_of_several_segments_is_planned_as_one():
    torch.manual_seed(0)
    model = Untraceable()
    ladder = Ladder(model, SHAPE, None, torch.float32, None, torch.optim.AdamW)
    assert len(ladder.costs) == 3
    least, most = ladder.least().peak, ladder.rungs[0].peak
    assert least < 0.8 * most
    found = []
    for budget in (least, (least + most) // 2, 2 * most):
        planned = plan(model, SHAPE, memory=budget, dtype=torch.float32)
        network = convert(model, plan=planned)
        report = meter(network, SHAPE, optimizer=torch.optim.AdamW, hold_output=False)
        assert report.peak == planned.peak_bytes <= budget
        network.zero_grad()
        network(torch.ones(SHAPE)).sin().sum().backward()
        found.append((planned.seconds, [p.grad.clone() for p in network.parameters()]))
    assert found[0][0] > found[1][0] > found[2][0]
    for _, grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0][1], strict=True))


def test_fifty_steps_end_with_the_same_bytes(ladder):
    network = convert(small(), plan=ladder["tight"])
    steps = torch.optim.AdamW(network.parameters(), 1e-3)
    x, ends = torch.randn(2, 3, 16, 24), []
    with LiveBytes() as live:
        for _ in range(50):
            loss = sum((out.sin() * out).mean() for out in network(x))
            steps.zero_grad()
            loss.backward()
            steps.step()
            del loss
            ends.append(live.now)
    assert len(set(ends[1:])) == 1 and ends[1] > 0


def test_a_planned_network_takes_images_of_other_sizes(ladder):
    network = convert(small(), plan=ladder["tight"])
    for shape in ((1, 3, 40, 56), (3, 3, 64, 64)):
        out = network(torch.randn(shape))
        assert out[0].shape == (shape[0], 3, *shape[2:])


def test_backward_runs_twice_and_leaves_nothing_behind(ladder):
    network = convert(small(), plan=ladder["least"])
    loss = sum(out.sum() for out in network(torch.randn(SHAPE)))
    once = torch.autograd.grad(loss, network.parameters(), retain_graph=True)
    twice = torch.autograd.grad(loss, network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    with pytest.raises(RuntimeError, match="second"):
        loss = sum(out.sum() for out in network(torch.randn(SHAPE)))
        torch.autograd.grad(loss, network.parameters(), create_graph=True)


def test_a_planned_network_is_copied_pickled_and_reverted(ladder):
    model = small()
    network = convert(model, plan=ladder["tight"])
    x = torch.randn(SHAPE)
    expected = [out.detach() for out in copy.deepcopy(network)(x)]
    for other in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        assert all(torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))
    assert type(fullres.revert(network)) is type(model)
    assert "series" in str(fullres.report(network)) or "segment_0" in str(fullres.report(network))


def test_torch_compile_leaves_it_as_it_is(ladder):
    network = convert(small(), plan=ladder["tight"])
    x = torch.randn(SHAPE)
    expected = [out.detach() for out in copy.deepcopy(network)(x)]
    compiled = torch.compile(copy.deepcopy(network), backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), expected, strict=True))


# Files, tables, pictures


def test_a_plan_is_read_as_it_was_written(ladder, tmp_path):
    path = ladder["tight"].save(tmp_path / "plan.json")
    read = Plan.load(path)
    assert read == ladder["tight"]
    losses, _ = five_steps(convert(small(), plan=read))
    assert losses == five_steps(convert(small(), plan=ladder["tight"]))[0]
    assert str(read) == str(ladder["tight"])
    assert read.plot(tmp_path / "memory.png").stat().st_size > 10_000


@pytest.mark.parametrize("text", ["", "{}", '{"version": 0}', "[1]", '{"version": 1, "x": 2}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"path: want a file that Plan\.save wrote"):
        Plan.load(tmp_path / "plan.json")


def test_the_table_adds_up(ladder):
    planned = ladder["tight"]
    rows = [row for part in planned.segments for row in part.rows]
    made = sum(row.again for row in rows)
    assert made == pytest.approx(planned.seconds * (1 - 1 / planned.time_ratio), rel=0.5)
    assert sum(row.stored for row in rows) <= planned.report.stored
    assert {row.policy.split(",")[0] for row in rows} <= {"keep", "closing", "series"}
    text = str(planned)
    assert all(row.why in text for row in rows) and "by roofline" in text
    assert rows[0].layers.startswith("initial_convolution.conv") and rows[0].layers in text
    json.dumps(planned.as_dict())


# Bad input


@pytest.mark.parametrize(
    ("text", "size"),
    [("40GiB", 40 * GIB), ("40 GB", 40 * 10**9), ("1.5 KiB", 1536), ("7", 7), (7, 7), ("2m", 2e6)],
)
def test_memory_is_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("wrong", ["", "GiB", "-3", -3, 1.5, True, None, "40 GiBs", "4 0"])
def test_other_memory_is_refused(wrong):
    with pytest.raises(ValueError, match="memory: want bytes, or text such as '40GiB'"):
        plan(small(), SHAPE, memory=wrong)


def test_bad_arguments_are_named(ladder):
    model = small()
    for options, name in (
        ({"dtype": torch.float64}, "dtype"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"hardware": "abacus"}, "hardware|name"),
    ):
        with pytest.raises(ValueError, match=name):
            plan(model, SHAPE, **options)
    with pytest.raises(ValueError, match="input_shape"):
        plan(model, (2, 3, 0, 5))
    with pytest.raises(ValueError, match="model: want a torch"):
        plan("model", SHAPE)
    with pytest.raises(ValueError, match="model: want one not yet converted"):
        plan(convert(model), SHAPE)
    with pytest.raises(ValueError, match="training mode"):
        plan(small().eval(), SHAPE)
    with pytest.raises(ValueError, match="policy: want none beside a plan"):
        convert(model, policy="keep", plan=ladder["all"])
    other = small(filters=5)
    before = type(other)
    with pytest.raises(ValueError, match="plan: want one of this network"):
        convert(small("a21"), plan=ladder["all"], inplace=True)
    assert type(other) is before


# The largest of all


def test_the_largest_batch_fits_and_one_more_does_not():
    model = small("a21")
    budget = 2 * least_of(model, (3, 3, 32, 48))
    n = max_batch(model, (3, 32, 48), memory=budget)
    assert plan(model, (n, 3, 32, 48), memory=budget).peak_bytes <= budget
    with pytest.raises(InfeasibleError):
        plan(model, (n + 1, 3, 32, 48), memory=budget)
    assert max_batch(model, (3, 32, 48), memory=1000) == 0
    assert max_batch(model, (3, 32, 48), memory=budget, limit=2) == 2
    with pytest.raises(ValueError, match="image_shape"):
        max_batch(model, (1, 3, 32, 48))


def test_the_largest_image_fits():
    model = small("a21")
    budget = least_of(model, (1, 3, 96, 192))
    size = max_image(model, memory=budget, aspect=2.0, multiple=32)
    assert size[1] == 2 * size[0] and size[0] >= 96
    assert plan(model, (1, 3, *size), memory=budget).peak_bytes <= budget
    assert max_image(model, memory=1000) == (0, 0)
    with pytest.raises(ValueError, match="aspect"):
        max_image(model, aspect=0)


# At full size


@pytest.mark.parametrize(
    ("network", "batch", "memory", "host", "ratio"),
    [
        ("uresnet", 32, 39, 0, 1.53),
        ("uresnet", 32, 39, 16, 1.45),
        ("a21", 96, 40, 0, 1.8),
        ("resnet50", 64, 40, 0, 1.2),
    ],
)
def test_whole_images_by_the_dozen(network, batch, memory, host, ratio):
    shape = (batch, 3, 1260, 2048)
    with torch.device("meta"):
        model = resnet50() if network == "resnet50" else uresnet(network)
    labels = 0 if network == "resnet50" else batch * 3 * 1260 * 2048
    criterion = None if network == "resnet50" else focal()
    planned = plan(
        model, shape, memory=f"{memory}GiB", criterion=criterion, reserve=labels, hardware="h200",
        host_memory=f"{host}GiB",
    )  # fmt: skip
    assert planned.peak_bytes <= memory * GIB and planned.host_bytes <= host * GIB
    assert planned.time_ratio <= ratio
    report = meter(
        convert(model, plan=planned), shape, criterion=criterion, optimizer=torch.optim.AdamW,
        autocast=torch.bfloat16, hold_output=False,
    )  # fmt: skip
    assert report.peak + labels == planned.peak_bytes
    assert report.host_peak == planned.host_bytes
