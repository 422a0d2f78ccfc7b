"""The meter: bytes counted on paper, and by other means, are the bytes it reports."""

import gc
import importlib
import json
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fullres.bench.memory import checkpoint_blocks, cross_entropy
from fullres.engine import LiveBytes, convert, meter
from fullres.engine.live_bytes import Span
from fullres.engine.memory_report import Alive, readable
from fullres.models import UResNetConfig, resnet18, uresnet
from fullres.ops import offload

GIB = 2**30
NUMBER = 4  # bytes of the loss, and as many of its gradient


def chain(count: int, channels: int = 4, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
                           for _ in range(count)))  # fmt: skip


def test_a_chain_of_convolutions_counted_on_paper():
    image, weight = 2 * 4 * 30 * 40 * 4, 4 * 4 * 3 * 3 * 4
    report = meter(chain(3), (2, 4, 30, 40))
    assert report.input == image
    assert report.parameters == report.gradients == 3 * weight
    assert report.buffers == report.optimizer == 0
    assert report.stored == 3 * image  # two for their next convolutions, one as output
    assert report.after_forward == 4 * image + 3 * weight
    # The last convolution's backward pass frees its input. The middle one's then holds its own
    # input and both gradients around it, with x, the output and two weights' gradients.
    assert report.peak == 5 * image + (3 + 2) * weight + 2 * NUMBER
    assert report.peak_at.phase == "backward" and report.peak_at.module == "1"


@pytest.mark.parametrize(
    ("layer", "maps"),
    [
        pytest.param(nn.LeakyReLU(0.01), 2, id="out of place"),
        pytest.param(nn.LeakyReLU(0.01, inplace=True), 1, id="in place"),
        pytest.param(nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (30, 40))), 1, id="views"),
        pytest.param(nn.Identity(), 1, id="nothing"),
        pytest.param(nn.MaxPool2d(2), 1.75, id="pool: a quarter, and 8-byte indices"),
    ],
)
def test_what_a_layer_between_convolutions_adds(layer, maps):
    image = 2 * 4 * 30 * 40 * 4
    report = meter(nn.Sequential(*chain(1), layer), (2, 4, 30, 40))
    assert report.stored == maps * image


def test_batch_norm_stores_its_input_and_two_numbers_a_channel():
    image = 2 * 4 * 30 * 40 * 4
    report = meter(nn.Sequential(*chain(1), nn.BatchNorm2d(4), *chain(1)), (2, 4, 30, 40))
    assert report.stored == 3 * image + 2 * 4 * 4
    assert report.buffers == 2 * 4 * 4 + 8


def test_storages_count_once_while_any_view_lives():
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(10, 100)
        assert live.now == 4000
        row = x[3].unsqueeze(0).expand(50, 100)
        del x
        assert live.now == 4000
        y = row + 1
        assert live.now == 4000 + 20_000
        y.mul_(2)
        y.resize_(100, 100)
        assert live.now == 4000 + 40_000
        del row
        assert live.now == 40_000
        del y
        assert live.now == 0
        assert live.peak == 44_000


def test_what_died_between_two_operators_is_in_the_first_sample_alone():
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(10)
        del x
        y = torch.empty(5)
        assert [s.live for s in live.timeline] == [40, 20]
        assert [[s.bytes for s in live.alive_at(n)] for n in (0, 1)] == [[40], [20]]
        del y


def test_tensors_older_than_the_mode_do_not_count():
    x = torch.zeros(100)
    with LiveBytes() as live:
        x.add_(1)
        y = x.view(10, 10)
        assert live.now == 0
        z = y * 2
        assert live.now == z.nbytes


def test_freed_intermediates_count_at_the_peak_alone():
    class Widening(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            with torch.no_grad():
                x = x.repeat(8).view(8, -1).sum(0)
            return x * self.scale

    report = meter(Widening(), (1000,))
    assert report.stored == 2 * 4000  # the sum for the scale's gradient, and the output
    before = report.input + report.parameters
    assert report.peak == before + 32_000 + 4000
    assert report.peak_at.operator == "aten.sum.dim_IntList"


class Scratch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        scratch = torch.empty(1_000_000, dtype=torch.uint8)
        return dy + scratch[0]


def test_tensors_made_inside_the_backward_pass_count():
    class Net(nn.Linear):
        def forward(self, x):
            return Scratch.apply(super().forward(x))

    report = meter(Net(10, 10, bias=False), (5, 10))
    # x, the weight, the output and its gradient beside the scratch
    assert report.peak == 200 + 400 + 200 + 200 + 2 * NUMBER + 1_000_000


def counted_by_hooks(model: nn.Module, x: torch.Tensor) -> int:
    """What autograd is given to keep, from its own hooks, on real tensors: bytes."""
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    given = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
             for t in packed + outputs}  # fmt: skip
    return sum(size for address, size in sizes.items() if address not in given)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(lambda: uresnet(UResNetConfig(2, 2, deepest_channels=4)), (2, 3, 20, 24),
                     id="residual, concat"),
        pytest.param(lambda: uresnet(UResNetConfig(2, 2, residual=False, join="sum",
                                                   deepest_channels=4)), (2, 3, 20, 24),
                     id="plain, sum"),
        pytest.param(lambda: resnet18(num_classes=5), (1, 3, 40, 33), id="resnet18"),
    ],
)  # fmt: skip
def test_stored_bytes_equal_those_that_autograd_is_given(make, shape):
    model = make()
    report = meter(model, shape)
    stored = counted_by_hooks(model, torch.zeros(shape))
    assert report.stored == stored
    assert sum(report.stored_by_module.values()) == report.stored


SMALL = UResNetConfig(2, 2, deepest_channels=4)
PLAIN = UResNetConfig(2, 2, residual=False, deepest_channels=4)


def test_fake_and_real_steps_agree_at_every_operator():
    shape = (2, 3, 16, 24)
    report = meter(uresnet(PLAIN), shape)
    with LiveBytes() as live:
        model = uresnet(PLAIN)
        x = torch.zeros(shape)
        gc.collect()
        start = len(live.timeline)
        out = model(x)
        sum(plane.sum() for plane in out).backward()
    real = live.timeline[start:]
    assert [s.operator for s in report.timeline] == [s.operator for s in real]
    assert [s.live for s in report.timeline] == [s.live for s in real]


@pytest.mark.parametrize(
    ("change", "autocast", "foreach"),
    [
        pytest.param(lambda model: model, None, False, id="torch"),
        pytest.param(checkpoint_blocks, None, True, id="checkpoint"),
        # torch's own normalisation saves float32 statistics where its fake kernel says bfloat16
        pytest.param(lambda model: convert(model, policy="series"), torch.bfloat16, False,
                     id="series"),
    ],
)  # fmt: skip
def test_a_real_step_counts_what_a_fake_one_does(change, autocast, foreach):
    model = change(uresnet(SMALL))
    options = {
        "criterion": cross_entropy,
        "optimizer": lambda p: torch.optim.AdamW(p, foreach=foreach),
        "autocast": autocast,
    }
    fake, real = (meter(model, (1, 3, 16, 24), device=d, **options) for d in (None, "cpu"))
    assert (fake.device, real.device) == ("fake", "cpu")
    for name in ("timeline", "spans", "stored", "optimizer", "gradients", "after_forward", "peak"):
        assert getattr(fake, name) == getattr(real, name), name
    assert real.allocated is real.reserved is None


def test_a_real_step_leaves_the_model_and_the_seed():
    model = nn.Sequential(*chain(1), nn.BatchNorm2d(4), nn.Dropout())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    seed = torch.random.get_rng_state()
    seen = []
    model[0].register_forward_hook(lambda module, x, y: seen.append(module.weight.clone()))
    meter(model, (2, 4, 8, 8), optimizer=torch.optim.AdamW, device="cpu")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), seed)
    # Of its values ran a copy, but for the weight decay of the step that made the state.
    torch.testing.assert_close(seen[0], state["0.weight"], rtol=1e-4, atol=0)
    with torch.device("meta"):
        model = chain(1)
    assert meter(model, (2, 4, 8, 8), device="cpu").peak == meter(model, (2, 4, 8, 8)).peak


@pytest.mark.parametrize("device", ["cuda:99", "mps", "cuda"])
def test_devices_that_are_not_there_are_refused(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=f"device: want .*got '{device}'"):
        meter(chain(1), (2, 4, 8, 8), device=device)


def test_an_allocators_peaks_are_of_the_measured_step_alone(monkeypatch):
    """A card's order of events, with an allocator that tells them; no card is asked."""
    module = importlib.import_module("fullres.engine.meter")
    events = []

    def peaks(device):
        events.append("peaks")
        return 5000, 7000

    monkeypatch.setattr(module, "_has_allocator", lambda device: True)
    monkeypatch.setattr(
        module, "_allocator", lambda device: events.append("before") or (1000, 2500)
    )
    monkeypatch.setattr(module, "_reset_peaks", lambda device: events.append("reset"))
    monkeypatch.setattr(module, "_peaks", peaks)

    class Net(nn.Linear):
        def forward(self, x):
            events.append("forward")
            return super().forward(x)

    options = {"optimizer": torch.optim.AdamW, "device": "cpu"}
    report = meter(Net(10, 10), (5, 10), **options)
    assert events == ["before", "forward", "reset", "forward", "peaks"]
    assert (report.allocated, report.reserved) == (4000, 4500)
    assert "4500 bytes" not in str(report) and readable(4500) in str(report)
    bare = meter(Net(10, 10), (5, 10), device="cpu")  # gradients of the first step are gone
    monkeypatch.undo()
    assert report.timeline == meter(Net(10, 10), (5, 10), **options).timeline
    assert bare.timeline == meter(Net(10, 10), (5, 10), device="cpu").timeline


def test_live_bytes_of_each_step_are_those_of_the_second():
    """Real steps leak nothing: neither tensors nor what the mode keeps of them."""
    with LiveBytes() as live:
        model = convert(uresnet(SMALL), policy="series")
        steps = torch.optim.AdamW(model.parameters())
        ends = []
        for _ in range(5):
            steps.zero_grad()
            loss = cross_entropy(model(torch.zeros(1, 3, 16, 24)))
            loss.backward()
            steps.step()
            gc.collect()
            ends.append((live.now, len(live.alive_at(len(live.timeline) - 1))))
    weights = sum(p.nbytes for p in model.parameters())
    assert ends[0][0] >= 4 * weights  # with gradients and two moments
    assert ends[1:] == ends[1:2] * 4


FEW = nn.Sequential(nn.Linear(3, 5), nn.Dropout(), nn.ReLU(True), nn.LayerNorm(5))


@pytest.mark.parametrize(
    ("model", "shape", "options"),
    [
        pytest.param(uresnet(SMALL), (1, 3, 16, 24), {"autocast": torch.bfloat16}, id="torch"),
        pytest.param(resnet18(num_classes=5), (1, 3, 40, 33), {"dtype": torch.half}, id="half"),
        pytest.param(checkpoint_blocks(uresnet(PLAIN)), (1, 3, 16, 24), {}, id="checkpoint"),
        pytest.param(convert(uresnet(SMALL)), (1, 3, 16, 24),
                     {"autocast": torch.bfloat16, "optimizer": torch.optim.AdamW}, id="keep"),
        pytest.param(FEW, (7, 3), {"optimizer": torch.optim.AdamW}, id="adamw"),
        pytest.param(FEW, (7, 3), {"optimizer": lambda p: torch.optim.AdamW(
            p, foreach=True, amsgrad=True)}, id="foreach"),
        pytest.param(FEW, (7, 3), {"optimizer": lambda p: torch.optim.AdamW(p, fused=True)},
                     id="fused"),
        pytest.param(FEW, (7, 3), {"optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)},
                     id="momentum"),
    ],
)  # fmt: skip
def test_remembered_results_are_those_of_fake_kernels(model, shape, options, monkeypatch):
    module = importlib.import_module("fullres.engine.meter")
    calls = []

    class Asking(module.Remembered):
        def __call__(self, func, args, kwargs):
            calls.append(func)
            return func(*args, **kwargs)

    remembered = meter(model, shape, **options)
    monkeypatch.setattr(module, "Remembered", Asking)
    assert meter(model, shape, **options) == remembered
    assert calls


def test_the_allocator_counts_the_same_peak():
    """A step of a dense network on real tensors, its allocations and frees from the profiler."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(), nn.Linear(128, 256), nn.Sigmoid(),
                          nn.Linear(256, 32), nn.LeakyReLU())  # fmt: skip
    report = meter(model, (512, 64))
    x = torch.zeros(512, 64)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        out = model(x)
        loss = out.sum()
        loss.backward()
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak == report.peak - report.input - report.parameters


def test_the_model_is_left_as_it_was(rng):
    model = nn.Sequential(*chain(1), nn.BatchNorm2d(4), nn.Dropout())
    model[0].weight.grad = torch.randn(model[0].weight.shape, generator=rng)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradient, pointer = model[0].weight.grad.clone(), model[0].weight.data_ptr()
    seed = torch.random.get_rng_state()
    meter(model, (2, 4, 8, 8), optimizer=torch.optim.AdamW, dtype=torch.bfloat16)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, gradient)
    assert model[0].weight.data_ptr() == pointer and model[0].weight.dtype == torch.float32
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_a_model_on_meta_measures_as_a_real_one():
    with torch.device("meta"):
        model = chain(2, bias=True)
    assert meter(model, (2, 4, 8, 9)) == meter(chain(2, bias=True), (2, 4, 8, 9))


def test_tied_frozen_and_plain_tensors():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(10, 10, bias=False) for _ in range(3))
            self.b.weight = self.a.weight
            self.c.weight.requires_grad_(False)
            self.mask = torch.ones(10)
            self.masks = [torch.ones(10)]

        def forward(self, x):
            return self.c(self.b(self.a(x))) * self.mask * self.masks[0]

    report = meter(Net(), (5, 10))
    assert report.parameters == 2 * 400
    assert report.gradients == 400
    assert report.buffers == 40


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}], ids=str)
def test_optimizer_state_is_there_at_the_peak(options):
    model = nn.Linear(100, 100)
    weights = 40_000 + 400
    plain = meter(model, (5, 100))
    adam = meter(model, (5, 100), optimizer=lambda p: torch.optim.AdamW(p, **options))
    assert adam.optimizer == 2 * weights + 2 * 4  # two moments, and a count for each parameter
    assert adam.after_forward == plain.after_forward + adam.optimizer
    assert adam.peak >= adam.parameters + adam.gradients + adam.optimizer
    assert adam.timeline[-1].phase == "optimizer"
    momentum = meter(model, (5, 100), optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    assert momentum.optimizer == weights
    assert meter(model, (5, 100), optimizer=torch.optim.SGD).optimizer == 0


def test_casting_and_mixed_precision():
    full = meter(chain(3), (2, 4, 30, 40))
    half = meter(chain(3), (2, 4, 30, 40), dtype=torch.bfloat16)
    mixed = meter(chain(3), (2, 4, 30, 40), autocast=torch.bfloat16)
    assert 2 * half.stored == full.stored and 2 * half.parameters == full.parameters
    assert mixed.parameters == mixed.gradients == full.parameters
    # Three maps, the weights and the image, once more each in bfloat16
    assert mixed.stored == half.stored + half.parameters + half.input


def test_checkpoints_store_their_inputs_alone():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    image = 2 * 4 * 30 * 40 * 4
    blocks = [nn.Sequential(*chain(2), nn.LeakyReLU()) for _ in range(3)]
    report = meter(Checkpointed(*blocks), (2, 4, 30, 40))
    assert report.stored == 3 * image
    assert meter(nn.Sequential(*blocks), (2, 4, 30, 40)).stored == 3 * 3 * image
    again = [s for s in report.timeline if s.phase == "backward" and s.module == "1.0"]
    assert {"aten.convolution.default", "aten.convolution_backward.default"} <= {
        sample.operator for sample in again
    }


def test_operators_carry_their_modules_in_both_directions():
    model = nn.Sequential(*chain(2), nn.BatchNorm2d(4), nn.LeakyReLU())
    timeline = meter(model, (2, 4, 8, 8)).timeline
    named = {(s.phase, s.operator, s.module) for s in timeline}
    for module in "01":
        assert ("forward", "aten.convolution.default", module) in named
        assert ("backward", "aten.convolution_backward.default", module) in named
    assert ("backward", "aten.leaky_relu_backward.default", "3") in named
    assert ("backward", "aten.native_batch_norm_backward.default", "2") in named
    assert ("criterion", "aten.sum.default", "") in named


def test_inference_keeps_its_output_alone():
    config = UResNetConfig(2, 2, deepest_channels=4)
    shape = (2, 3, 16, 24)
    with torch.no_grad():
        report = meter(uresnet(config).eval(), shape)
    assert report.stored == 3 * 2 * 3 * 16 * 24 * 4
    assert report.gradients == 0
    assert {sample.phase for sample in report.timeline} == {"forward", "criterion"}
    # At the first plane's last join: three skips, two planes still of half a map, this plane's
    # map and the two concatenated, and the convolution's and the normalisation's output.
    before = report.input + report.parameters + report.buffers
    assert report.peak - before == (3 + 2 * 0.5 + 1 + 2 + 1 + 1) * 2 * 2 * 16 * 24 * 4


def test_a_failing_model_leaves_no_mode_behind():
    with pytest.raises(RuntimeError):
        meter(chain(1), (2, 5, 8, 8))
    assert type(torch.zeros(1)) is torch.Tensor
    with pytest.raises(ValueError, match="model: want at least one parameter, got none"):
        meter(nn.ReLU(), (1,))


@pytest.mark.parametrize(
    ("preset", "dtype", "blocks", "stored", "peak"),
    [
        pytest.param("uresnet", torch.float32, "keep", 44.19, 44.43, id="uresnet-fp32"),
        pytest.param("uresnet", torch.bfloat16, "keep", 22.30, 22.49, id="uresnet-bf16"),
        pytest.param("uresnet", torch.bfloat16, "again", 5.61, 6.11, id="uresnet-bf16-checkpoint"),
        pytest.param("a21", torch.float32, "keep", 8.45, 8.63, id="a21-fp32"),
        pytest.param("a21", torch.bfloat16, "keep", 4.33, 4.52, id="a21-bf16"),
        pytest.param("a21", torch.bfloat16, "again", 1.83, 2.02, id="a21-bf16-checkpoint"),
    ],
)
def test_whole_images_equal_the_designs_table(preset, dtype, blocks, stored, peak):
    """The design's table: one 3 x 1280 x 2048 image; input and parameters are not part of it."""
    with torch.device("meta"):
        model = uresnet(preset)
        if blocks == "again":
            checkpoint_blocks(model)
    report = meter(model, (1, 3, 1280, 2048), criterion=cross_entropy, dtype=dtype)
    before = report.after_forward - report.stored
    assert report.stored / GIB == pytest.approx(stored, abs=0.005)
    # The table does not name its loss, which sets a21's peaks: half a map of 3 logits is 0.007.
    assert (report.peak - before) / GIB == pytest.approx(peak, abs=0.01)


def test_checkpointed_blocks_compute_the_same(rng):
    config = UResNetConfig(2, 2, deepest_channels=4)
    model = uresnet(config)
    again = uresnet(config)
    again.load_state_dict(model.state_dict())
    checkpoint_blocks(again)
    assert len(again.state_dict()) == len(model.state_dict())
    x = torch.randn(2, 3, 8, 8, generator=rng)
    for network in (model, again):
        sum(plane.square().sum() for plane in network(x)).backward()
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


# What is alive at the peak


def test_what_is_alive_at_the_peak_adds_up_and_has_names():
    image, weight = 2 * 4 * 30 * 40 * 4, 4 * 4 * 3 * 3 * 4
    report = meter(chain(3), (2, 4, 30, 40))
    # As counted on paper above: x, the output, and around the middle layer its input and both
    # gradients, of which the last one's pass made the first.
    backward = "aten.convolution_backward.default"
    expected = {
        Alive("input", "", "x", image, 1),
        Alive("forward", "0", "aten.convolution.default", image, 1),
        Alive("forward", "2", "aten.convolution.default", image, 1),
        Alive("backward", "2", backward, image + weight, 2),
        Alive("backward", "1", backward, image + weight, 2),
        *(Alive("parameters", name, "weight", weight, 1) for name in "012"),
        Alive("criterion", "", "aten.add.Tensor", NUMBER, 1),
        Alive("backward", "", "aten.ones_like.default", NUMBER, 1),
    }
    assert set(report.at_peak) == expected
    assert sum(alive.bytes for alive in report.at_peak) == report.peak
    assert [a.bytes for a in report.at_peak] == sorted((a.bytes for a in expected), reverse=True)


def test_spans_say_when_each_tensor_lived():
    report = meter(chain(3), (2, 4, 30, 40), optimizer=torch.optim.AdamW)
    last = len(report.timeline) - 1
    spans = {(s.phase, s.module, s.operator): s for s in report.spans}
    assert spans["input", "", "x"][-2:] == (0, last)
    assert spans["state", "0", "weight"].first == 0
    convolution = "aten.convolution.default"
    made = next(n for n, s in enumerate(report.timeline) if s.module == "0")
    freed = next(n for n, s in enumerate(report.timeline)
                 if (s.phase, s.module) == ("backward", "1"))  # fmt: skip
    size = 2 * 4 * 30 * 40 * 4
    assert spans["forward", "0", convolution] == Span(
        "forward", "0", convolution, size, made, freed
    )


def test_every_peak_adds_up():
    for policy in ("keep", "series"):
        model = convert(uresnet(SMALL), policy=policy)
        report = meter(model, (2, 3, 40, 48), optimizer=torch.optim.AdamW)
        assert sum(alive.bytes for alive in report.at_peak) == report.peak
        before = [
            a for a in report.at_peak if a.phase in ("parameters", "buffers", "state", "input")
        ]
        assert sum(a.bytes for a in before) == (
            report.input + report.parameters + report.buffers + report.optimizer
        )
        assert all(span.first <= span.last for span in report.spans)


def test_the_table_names_the_tensor_at_fault():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(*chain(1))

        def forward(self, x):
            return self.inner(x).repeat(8, 1, 1, 1)

    report = meter(Net(), (2, 4, 30, 40), optimizer=torch.optim.AdamW)
    sums, largest = (part.split("\n") for part in str(report).split("\n\n"))
    assert sums[0] == "A training step on fake tensors"
    image = 2 * 4 * 30 * 40 * 4
    found = {line.split("  ")[0]: line for line in sums[1:]}
    assert readable(image) in found["input"] and readable(report.optimizer) in found["optimizer"]
    assert readable(report.peak) in found["peak"] and "in backward, after " in found["peak"]
    # The largest thing is the repeated image, and it says who made it.
    share = f"{100 * 8 * image / report.peak:.1f}%"
    assert largest[1].split()[:4] == [*readable(8 * image).split(), share, "forward"]
    assert "aten.repeat.default" in largest[1]
    assert len(largest) == 1 + min(12, len(report.at_peak)) + (len(report.at_peak) > 12)


@pytest.mark.parametrize(("size", "text"), [
    (0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (3 * 2**19, "1.50 MiB"),
    (2**40, "1024.00 GiB"),
])  # fmt: skip
def test_sizes_are_readable(size, text):
    assert readable(size) == text


def test_the_report_goes_through_json():
    report = meter(chain(2), (2, 4, 8, 9))
    found = json.loads(json.dumps(report.as_dict()))
    assert found["peak"] == report.peak and found["peak_at"]["live"] == report.peak
    assert sum(alive["bytes"] for alive in found["at_peak"]) == report.peak
    assert "timeline" not in found and "spans" not in found
    assert [s["live"] for s in report.as_dict(timeline=True)["timeline"]] == [
        s.live for s in report.timeline
    ]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report = meter(convert(uresnet(SMALL)), (2, 3, 40, 48), optimizer=torch.optim.AdamW)
    file = report.plot(tmp_path / "memory.png")
    assert file.read_bytes().startswith(b"\x89PNG")
    svg = report.plot(tmp_path / "memory.svg").read_text()
    for words in ("live", "optimizer", "backward", report.peak_at.module.split(".")[0]):
        assert f"<!-- {words}" in svg or words in svg


def test_areas_of_a_picture_are_few_and_lose_nothing():
    report = meter(resnet18(num_classes=5), (1, 3, 64, 64), optimizer=torch.optim.AdamW)
    areas = report._areas()
    assert len(areas) <= 10
    assert sum(span.bytes for spans in areas.values() for span in spans) == report.peak


def test_without_matplotlib_the_picture_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match="fullres\\[train\\]"):
        meter(chain(1), (2, 4, 8, 8)).plot(tmp_path / "memory.png")


# Held or dropped, here or on the host, inside operators


def test_an_output_that_is_dropped_is_gone_before_the_backward_pass():
    image = 2 * 4 * 30 * 40 * 4
    held, dropped = (meter(chain(3), (2, 4, 30, 40), hold_output=hold) for hold in (True, False))
    assert dropped.stored == held.stored
    assert dropped.peak == held.peak - image
    ends = {report.timeline[-1].live for report in (held, dropped)}
    assert max(ends) - min(ends) == image
    # What the loss has saved lives on.
    squares = [meter(chain(3), (2, 4, 30, 40), criterion=lambda y: y.square().sum(), hold_output=h)
               for h in (True, False)]  # fmt: skip
    assert squares[0].timeline[-1].live - squares[1].timeline[-1].live == image
    at = next(n for n, s in enumerate(squares[0].timeline) if s.phase == "backward")
    assert squares[0].timeline[at].live == squares[1].timeline[at].live


def test_other_devices_count_apart():
    card = torch.device("cuda:0")
    with FakeTensorMode(), LiveBytes(card) as live:
        x = torch.empty(10, device=card)
        y = torch.empty(20)
        assert (live.now, live.host) == (40, 80)
        z = x.to("cpu")
        assert (live.now, live.host) == (40, 120)
        del y, x
        assert (live.now, live.host) == (0, 40)
        assert live.alive_at(0) == [Span("", "", "aten.empty.memory_format", 40, 0, 2)]
        del z


def test_a_host_copy_counts_apart_from_its_birth():
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(10)
        y = torch.empty(20)
        live.move_to_host(y.untyped_storage())
        live.move_to_host(y.untyped_storage())
        y[:10].copy_(x)
        assert (live.now, live.host, live.peak) == (40, 80, 40)
        assert [(s.live, s.host) for s in live.timeline] == [(40, 0), *3 * [(40, 80)]]
        assert [span.bytes for span in live.alive_at(2)] == [40]
        del y
        assert (live.now, live.host) == (40, 0)


class Square(torch.autograd.Function):
    """x * x, its input kept on the host."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = offload.Offloaded(x)
        y = x * x
        ctx.x.settle()
        return y

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy * ctx.x.wait()


@pytest.mark.parametrize("device", [None, "cpu"])
def test_what_is_offloaded_is_the_hosts(device):
    class Net(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            return Square.apply(x) if self.offloads else x * x

    model = Net(10, 10, bias=False)
    model.offloads = True
    report = meter(model, (5, 10), device=device)
    assert report.host_peak == 200 and report.stored == 200  # its output is here
    assert "peak on the host" in str(report)
    assert sum(alive.bytes for alive in report.at_peak) == report.peak
    assert offload.watchers == []
    model.offloads = False
    here = meter(model, (5, 10), device=device)
    assert here.host_peak == 0 and here.stored == 400


def test_workspaces_of_our_operators_count(monkeypatch):
    pytest.importorskip("triton")
    shape = (2, 3, 40, 48)
    options = {"autocast": torch.bfloat16, "optimizer": torch.optim.AdamW}
    model = convert(uresnet(SMALL), policy="series")
    plain = meter(model, shape, **options)
    inside = meter(model, shape, workspaces=True, **options)
    assert inside.peak > plain.peak
    for name in ("stored", "after_forward", "gradients", "stored_by_module"):
        assert getattr(inside, name) == getattr(plain, name), name
    assert inside.timeline[-1] == plain.timeline[-1]
    assert len(inside.timeline) > len(plain.timeline)
    assert {s.operator for s in inside.timeline} == {s.operator for s in plain.timeline}
    monkeypatch.setattr(importlib.import_module("fullres.engine.meter"), "TARGET", "gfx942")
    assert meter(model, shape, workspaces=True, **options) == inside
    for model in (uresnet(SMALL), chain(2)):  # torch's own operators have none that we see
        shape = shape if model.__class__.__name__ != "Sequential" else (2, 4, 8, 8)
        assert meter(model, shape, workspaces=True) == meter(model, shape)
    with pytest.raises(ValueError, match="workspaces: want False"):
        meter(chain(1), (2, 4, 8, 8), workspaces=True, device="cpu")


def test_workspaces_need_triton(monkeypatch):
    import fullres.kernels

    monkeypatch.delattr(fullres.kernels, "launches", raising=False)
    monkeypatch.setitem(sys.modules, "fullres.kernels.launches", None)
    with pytest.raises(ValueError, match="workspaces: want False without triton"):
        meter(chain(1), (2, 4, 8, 8), workspaces=True)
