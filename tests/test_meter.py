"""The meter: bytes counted on paper, and by other means, are the bytes it reports."""

import gc

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fullres.bench.memory import checkpoint_blocks, cross_entropy
from fullres.engine import LiveBytes, meter
from fullres.models import UResNetConfig, resnet18, uresnet

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


def test_fake_and_real_steps_agree_at_every_operator():
    config = UResNetConfig(2, 2, residual=False, deepest_channels=4)
    shape = (2, 3, 16, 24)
    report = meter(uresnet(config), shape)
    with LiveBytes() as live:
        model = uresnet(config)
        x = torch.zeros(shape)
        gc.collect()
        start = len(live.timeline)
        out = model(x)
        sum(plane.sum() for plane in out).backward()
    real = live.timeline[start:]
    assert [s.operator for s in report.timeline] == [s.operator for s in real]
    assert [s.live for s in report.timeline] == [s.live for s in real]


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
