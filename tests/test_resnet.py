"""ResNet: the published names and shapes, and the function they name."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from fullres import models
from fullres.models import resnet18, resnet50

# name: (blocks a layer, convolutions a block, parameters)
NETWORKS = {
    "resnet18": ((2, 2, 2, 2), 2, 11_689_512),
    "resnet34": ((3, 4, 6, 3), 2, 21_797_672),
    "resnet50": ((3, 4, 6, 3), 3, 25_557_032),
    "resnet101": ((3, 4, 23, 3), 3, 44_549_160),
    "resnet152": ((3, 8, 36, 3), 3, 60_192_808),
}


def enumerated(depths, convolutions, channels=3, classes=1000) -> list[tuple[str, tuple]]:
    """Every key and shape, in order, from the rules of the published checkpoints."""
    keys = []

    def conv_norm(conv, norm, out_channels, in_channels, side):
        keys.append((f"{conv}.weight", (out_channels, in_channels, side, side)))
        keys.extend((f"{norm}.{each}", (out_channels,))
                    for each in ("weight", "bias", "running_mean", "running_var"))  # fmt: skip
        keys.append((f"{norm}.num_batches_tracked", ()))

    conv_norm("conv1", "bn1", 64, channels, 7)
    entering = 64
    for layer, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), 1):
        leaving = width if convolutions == 2 else 4 * width
        for block in range(depth):
            name = f"layer{layer}.{block}"
            sides = (3, 3) if convolutions == 2 else (1, 3, 1)
            c = entering
            for i, side in enumerate(sides, 1):
                k = leaving if i == len(sides) else width
                conv_norm(f"{name}.conv{i}", f"{name}.bn{i}", k, c, side)
                c = k
            if block == 0 and (layer > 1 or convolutions == 3):
                conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", leaving, entering, 1)
            entering = leaving
    return [*keys, ("fc.weight", (classes, entering)), ("fc.bias", (classes,))]


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_shapes_and_counts_are_the_published_ones(name):
    depths, convolutions, parameters = NETWORKS[name]
    with torch.device("meta"):
        model = getattr(models, name)()
    state = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    assert state == enumerated(depths, convolutions)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_other_channels_and_classes():
    with torch.device("meta"):
        model = resnet50(in_channels=1, num_classes=7)
    state = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    assert state == enumerated((3, 4, 6, 3), 3, channels=1, classes=7)


def rewritten(state, depths, convolutions, x):
    """The network in evaluation mode as one function of its state_dict, strides by the rules."""

    def conv_norm(x, conv, norm, stride):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        kinds = ("running_mean", "running_var", "weight", "bias")
        mean, var, gamma, beta = (state[f"{norm}.{kind}"][:, None, None] for kind in kinds)
        return (x - mean) / (var + 1e-5).sqrt() * gamma + beta

    x = F.max_pool2d(conv_norm(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for layer, depth in enumerate(depths, 1):
        for block in range(depth):
            name = f"layer{layer}.{block}"
            stride = 2 if block == 0 and layer > 1 else 1
            strided = 1 if convolutions == 2 else 2  # the first 3x3 convolution carries the stride
            y = x
            for i in range(1, convolutions + 1):
                step = stride if i == strided else 1
                y = conv_norm(y, f"{name}.conv{i}", f"{name}.bn{i}", step)
                y = y.relu() if i < convolutions else y
            if f"{name}.downsample.0.weight" in state:
                x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = (x + y).relu()
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_function_and_gradients_equal_the_rewritten_network(name, rng):
    depths, convolutions, _ = NETWORKS[name]
    model = getattr(models, name)(in_channels=2, num_classes=3).double().eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith(("running_mean", "bias")):
                value.copy_(torch.randn(value.shape, generator=rng) * 0.1)
            if key.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=rng) + 0.5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, _ in model.named_parameters():
        state[key].requires_grad_()
    x = torch.randn(1, 2, 37, 50, dtype=torch.float64, generator=rng)
    mine, theirs = model(x), rewritten(state, depths, convolutions, x)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[key].grad, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_torchvision(name, rng):
    peer = pytest.importorskip("torchvision.models", reason="a peer to compare with, if installed")
    theirs = getattr(peer, name)(weights=None).eval()
    mine = getattr(models, name)().eval()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 65, 70, generator=rng)
    torch.testing.assert_close(mine(x), theirs(x))


def test_whole_detector_images():
    with FakeTensorMode():
        assert resnet50()(torch.empty(1, 3, 1260, 2048)).shape == (1, 1000)


def test_initial_values():
    model = resnet18(zero_init_residual=True)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            fan_out = parameter.shape[0] * parameter[0, 0].numel()
            assert parameter.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
        elif name.endswith("bn2.weight"):
            assert parameter.eq(0).all(), name
        elif "bn" in name:
            assert parameter.eq(float(name.endswith("weight"))).all(), name
    with torch.device("meta"):
        assert all(block.last_norm is block.bn3 for block in resnet50().layer1)


class DoubledConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_can_be_swapped():
    with torch.device("meta"):
        model = resnet18(conv=DoubledConv2d, norm=partial(nn.GroupNorm, 4), activation=nn.SiLU)
    kinds = {type(module) for module in model.modules()}
    assert kinds >= {DoubledConv2d, nn.GroupNorm, nn.SiLU}
    assert not kinds & {nn.Conv2d, nn.BatchNorm2d, nn.ReLU}


def test_compiles_traces_pickles_and_takes_channels_last(rng):
    model = resnet18(num_classes=3).double().eval()
    x = torch.randn(1, 3, 33, 40, dtype=torch.float64, generator=rng)
    want = model(x)
    twins = [
        torch.compile(model, fullgraph=True, backend="eager"),
        torch.fx.symbolic_trace(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).to(memory_format=torch.channels_last),
    ]
    for twin in twins:
        torch.testing.assert_close(twin(x), want)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_classes: want at least 1, got 0"):
        resnet18(num_classes=0)
    with torch.device("meta"):
        model = resnet18()
        with pytest.raises(ValueError, match=r"x: want \[N, 3, H, W\], got \[1, 1, 8, 8\]"):
            model(torch.zeros(1, 1, 8, 8))
        with pytest.raises(ValueError, match="x: want a floating-point dtype, got torch.uint8"):
            model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
