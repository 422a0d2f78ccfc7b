"""The U-ResNet: its published names and shapes, and its function against one written anew."""

import copy
import hashlib
import json
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from fullres.models import PRESETS, UResNet, UResNetConfig, uresnet

PARAMETERS = {"uresnet": 18_382_131, "a21": 8_510_547, "polaris": 1_926_403, "scc21": 18_367_891}
LAYOUT = {  # number of keys, and the hash of every "key shape" line in order
    "uresnet": (625, "dacb887525e5dcf4"),
    "a21": (310, "6642ff7bf38a8468"),
    "polaris": (345, "33c4e1c9dee60c4a"),
    "scc21": (180, "3d9995ff88a0eeba"),
}
# Each preset's structure at sizes for which float64 takes a fraction of a second.
SMALL = {name: replace(config, filters=3, depth=2, deepest_blocks=2, deepest_channels=5)
         for name, config in PRESETS.items()}  # fmt: skip


def lines(state: dict) -> list[str]:
    return [f"{key} {list(value.shape)}" for key, value in state.items()]


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_counts_are_the_published_ones(preset):
    with torch.device("meta"):
        model = uresnet(preset)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_and_shapes_never_change(preset):
    with torch.device("meta"):
        layout = lines(uresnet(preset).state_dict())
    digest = hashlib.sha256("\n".join(layout).encode()).hexdigest()
    assert (len(layout), digest[:16]) == LAYOUT[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_published_checkpoints_load_strictly(preset, reference_folder):
    published = json.loads((reference_folder / "uresnet_state_dicts.json").read_text())[preset]
    assert published["parameters"] == PARAMETERS[preset]
    with torch.device("meta"):
        model = uresnet(preset)
        checkpoint = {key: torch.empty(shape) for key, shape in published["state_dict"].items()}
    assert lines(model.state_dict()) == lines(checkpoint)
    model.load_state_dict(checkpoint, strict=True, assign=True)


class Rewritten:
    """The network once more, from the description alone: a function of a state_dict and a config.

    One recursion instead of two loops; plain functions instead of modules. In training mode the
    running statistics in `state` are updated in place.
    """

    def __init__(self, state: dict, config: UResNetConfig, training: bool):
        self.state, self.config, self.training = state, config, training

    def block(self, x, name, activate=True):
        weight = self.state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, self.state[f"{name}.conv.bias"], padding=weight.shape[-1] // 2)
        if f"{name}.norm.weight" in self.state:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            if self.training:
                unbiased = x.detach().var((0, 2, 3), correction=1)
                self.state[f"{name}.norm.running_mean"].lerp_(mean.detach(), 0.1)
                self.state[f"{name}.norm.running_var"].lerp_(unbiased, 0.1)
                self.state[f"{name}.norm.num_batches_tracked"].add_(1)
            else:
                mean = self.state[f"{name}.norm.running_mean"]
                var = self.state[f"{name}.norm.running_var"]
            x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
            gamma, beta = self.state[f"{name}.norm.weight"], self.state[f"{name}.norm.bias"]
            x = x * gamma[:, None, None] + beta[:, None, None]
        return torch.where(x > 0, x, 0.01 * x) if activate else x

    def series(self, x, name):
        i = 0
        while f"{name}.blocks.{i}.conv.weight" in self.state:
            x, i = self.block(x, f"{name}.blocks.{i}"), i + 1
        while f"{name}.blocks.{i}.convolution_1.conv.weight" in self.state:
            inner = self.block(x, f"{name}.blocks.{i}.convolution_1")
            x = x + self.block(inner, f"{name}.blocks.{i}.convolution_2", activate=False)
            x, i = torch.where(x > 0, x, 0.01 * x), i + 1
        return x

    def level(self, planes, name, depth):
        if depth == 0:
            name += ".main_module"
            x = self.block(torch.cat(planes, 1), f"{name}.bottleneck")
            x = self.block(self.series(x, f"{name}.blocks"), f"{name}.unbottleneck")
            return x.chunk(3, 1)
        skips, planes = planes, [self.series(x, f"{name}.down_blocks") for x in planes]
        planes = [F.max_pool2d(x, 2) for x in planes]
        planes = [self.block(x, f"{name}.downsample.bottleneck") for x in planes]
        planes = self.level(planes, f"{name}.main_module", depth - 1)
        joined = []
        for x, skip in zip(planes, skips, strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = self.block(x, f"{name}.upsample.bottleneck")
            if self.config.join == "sum":
                joined.append(x + skip)
            else:
                x = torch.cat([x, skip], 1)
                joined.append(self.block(x, f"{name}.connection.bottleneck"))
        return [self.series(x, f"{name}.up_blocks") for x in joined]

    def __call__(self, x):
        planes = [self.block(plane, "initial_convolution") for plane in x.split(1, 1)]
        planes = self.level(planes, "net_core", self.config.depth)
        weight, bias = self.state["bottleneck.weight"], self.state["bottleneck.bias"]
        return [F.conv2d(self.series(plane, "final_layer"), weight, bias) for plane in planes]


def randomized(config: UResNetConfig, rng: torch.Generator, **layers) -> UResNet:
    """A float64 network in which no parameter or statistic has a value that hides a mistake."""
    model = UResNet(config, **layers).double()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=rng) * 0.3)
            if name.endswith(("norm.weight", "running_var")):
                value.abs_().add_(0.5)
    return model


def rewritten(model: UResNet, config: UResNetConfig) -> tuple[Rewritten, dict]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, _ in model.named_parameters():
        state[key].requires_grad_()
    return Rewritten(state, config, model.training), state


def assert_all_close(mine, other):
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("preset", PRESETS)
def test_logits_gradients_and_statistics_equal_the_rewritten_network(preset, training, rng):
    model = randomized(SMALL[preset], rng).train(training)
    other, state = rewritten(model, SMALL[preset])
    for _ in range(2):  # the second step starts from statistics that the first one moved
        x = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=rng)
        mine = model(x)
        theirs = other(x)
        assert_all_close(mine, theirs)
        weight = torch.randn(mine[0].shape, dtype=torch.float64, generator=rng)
        for logits in (mine, theirs):  # planes weigh differently, so swapping two would show
            sum((i + 1) * (plane * weight).sum() for i, plane in enumerate(logits)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all()
        torch.testing.assert_close(parameter.grad, state[key].grad, rtol=1e-6, atol=1e-9, msg=key)
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, state[key], rtol=1e-9, atol=1e-12, msg=key)


def test_shared_statistics_move_once_a_plane(rng):
    model = uresnet(SMALL["uresnet"])
    model(torch.randn(2, 3, 8, 8, generator=rng))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            together = "main_module.main_module.main_module" in name  # the deepest of two levels
            assert module.num_batches_tracked == (1 if together else 3), name


def test_initial_values(rng):
    model = uresnet(SMALL["uresnet"])
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias.eq(0).all()
            receptive = module.kernel_size[0] * module.kernel_size[1]
            bound = (6 / (receptive * (module.in_channels + module.out_channels))) ** 0.5
            assert module.weight.abs().max() <= bound
            assert module.weight.numel() < 20 or module.weight.abs().max() > 0.7 * bound
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all()
        elif isinstance(module, nn.LeakyReLU):
            assert module.negative_slope == 0.01


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((5, 7), id="odd"),
        pytest.param((20, 33), id="like 1260: divisible by 4 alone"),
        pytest.param((1, 1), id="one pixel"),
        pytest.param((8, 16), id="nothing to pad"),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_any_size_is_padded_with_zeros_below_and_right_then_cropped(size, training, rng):
    config = replace(SMALL["uresnet"], depth=3)
    height, width = size
    model = randomized(config, rng).train(training)
    other, _ = rewritten(model, config)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=rng)
    whole = torch.zeros(2, 3, -(-height // 8) * 8, -(-width // 8) * 8, dtype=torch.float64)
    whole[:, :, :height, :width] = x
    logits = model(x)
    assert all(plane.shape == (2, 3, height, width) for plane in logits)
    # Two values a channel at the deepest level: its variance may be tiny, and rounding shows.
    for mine, theirs in zip(logits, other(whole), strict=True):
        torch.testing.assert_close(mine, theirs[..., :height, :width], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("preset", PRESETS)
def test_whole_detector_images(preset):
    with FakeTensorMode():
        logits = uresnet(preset)(torch.empty(1, 3, 1260, 2048))
    assert [plane.shape for plane in logits] == [(1, 3, 1260, 2048)] * 3


def test_other_numbers_of_planes_classes_and_levels(rng):
    config = UResNetConfig(filters=2, depth=0, deepest_channels=4, planes=2, classes=5)
    logits = uresnet(config)(torch.randn(1, 2, 3, 4, generator=rng))
    assert [plane.shape for plane in logits] == [(1, 5, 3, 4)] * 2


def test_without_normalisation():
    for model in (uresnet(SMALL["scc21"]), uresnet(SMALL["uresnet"], norm=None)):
        assert not any("norm" in key for key in model.state_dict())
        assert not list(model.buffers())


class DoubledConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_can_be_swapped(rng):
    x = torch.randn(1, 3, 9, 8, dtype=torch.float64, generator=rng)
    config = SMALL["uresnet"]
    plain = randomized(config, rng)
    swapped = UResNet(
        config,
        conv=partial(DoubledConv2d, dtype=torch.float64),
        norm=lambda channels: nn.InstanceNorm2d(channels, affine=True, dtype=torch.float64),
        activation=nn.Tanh,
    )
    kinds = {type(module) for module in swapped.modules()}
    assert kinds >= {DoubledConv2d, nn.InstanceNorm2d, nn.Tanh}
    assert not kinds & {nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU}
    swapped(x)

    inplace = UResNet(config, activation=partial(nn.LeakyReLU, 0.01, inplace=True)).double()
    inplace.load_state_dict(plain.state_dict())
    for model in (plain, inplace):
        sum(plane.square().sum() for plane in model(x)).backward()
    for mine, theirs in zip(inplace.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_channels_last(rng):
    model = randomized(SMALL["uresnet"], rng)
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=rng)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert_all_close(last(x.contiguous(memory_format=torch.channels_last)), model(x))


def test_compiles_into_one_graph(rng):
    model = randomized(SMALL["uresnet"], rng).eval()
    x = torch.randn(2, 3, 9, 13, dtype=torch.float64, generator=rng)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_all_close(compiled(x), model(x))


def test_is_traced_symbolically_at_any_size(rng):
    model = randomized(SMALL["a21"], rng).eval()
    traced = torch.fx.symbolic_trace(model)
    for size in [(8, 8), (9, 13)]:
        x = torch.randn(2, 3, *size, dtype=torch.float64, generator=rng)
        assert_all_close(traced(x), model(x))


def test_pickles_and_copies(rng):
    model = randomized(SMALL["uresnet"], rng).eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=rng)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_all_close(twin(x), model(x))


def test_mixed_precision(rng):
    model = uresnet(SMALL["uresnet"])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 3, 8, 8, generator=rng))
    assert all(plane.dtype == torch.bfloat16 for plane in logits)
    sum(plane.float().sum() for plane in logits).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 4, 8, 8), r"x: want \[N, 3, H, W\], got \[1, 4, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"x: want \[N, 3, H, W\], got \[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "x: want a floating.*, got torch.int64"),
    ],
    ids=["four planes", "no batch", "integers"],
)
def test_wrong_inputs_are_refused(x, message):
    model = uresnet(SMALL["a21"])
    with pytest.raises(ValueError, match=message):
        model(x)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="preset: want one of uresnet, .*, got 'unet'"):
        uresnet("unet")
    with pytest.raises(ValueError, match="join: want .*, got 'mean'"):
        UResNetConfig(join="mean")
    with pytest.raises(ValueError, match="deepest_kernel: want an odd number, got 4"):
        UResNetConfig(deepest_kernel=4)
    with pytest.raises(ValueError, match="filters: want at least 1, got 0"):
        UResNetConfig(filters=0)
    with pytest.raises(ValueError, match="depth: want at least 0, got -1"):
        UResNetConfig(depth=-1)
