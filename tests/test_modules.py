"""fullres.nn's layers are torch.nn's: state, first values, words, results, gradients, errors."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fullres

LAYERS = {  # name: arguments, shape of the input
    "Conv2d": [
        ((3, 8, 3), {"padding": 1, "stride": 2}, (2, 3, 7, 9)),
        ((4, 6, (3, 2)), {"padding": "same", "groups": 2, "bias": False}, (2, 4, 5, 6)),
        ((3, 4, 3), {"padding": 2, "padding_mode": "circular"}, (3, 6, 7)),
    ],
    "ConvTranspose2d": [
        ((4, 6, 2), {"stride": 2}, (2, 4, 5, 3)),
        ((4, 4, 3), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, (4, 5, 3)),
    ],
    "BatchNorm2d": [
        ((5,), {}, (3, 5, 4, 6)),
        ((5,), {"affine": False, "momentum": None}, (3, 5, 4, 6)),
        ((5,), {"track_running_stats": False, "eps": 0.1}, (3, 5, 4, 6)),
    ],
    "MaxPool2d": [((3, 2), {"padding": 1, "ceil_mode": True}, (2, 3, 8, 7)), ((2,), {}, (3, 6, 5))],
    "AvgPool2d": [((3, 2), {"count_include_pad": False, "padding": 1}, (2, 3, 8, 7))],
    "AdaptiveAvgPool2d": [((1,), {}, (2, 3, 5, 7)), (((3, None),), {}, (3, 5, 7))],
    "Upsample": [
        ((), {"scale_factor": 2, "mode": "bilinear"}, (2, 3, 4, 5)),
        (((7, 9),), {}, (2, 3, 4, 5)),
        ((), {"scale_factor": 2, "mode": "bicubic"}, (2, 3, 4, 5)),
    ],
}
CASES = [(name, *case) for name, cases in LAYERS.items() for case in cases]
CASE = pytest.mark.parametrize(("name", "args", "options", "shape"), CASES)


def pair(name, args, options):
    """Ours and torch's, from the same seed."""
    made = []
    for module in (fullres.nn, nn):
        torch.manual_seed(5)
        made.append(getattr(module, name)(*args, **options))
    return made


@CASE
def test_state_and_words_are_torchs(name, args, options, shape):
    ours, theirs = pair(name, args, options)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert vars(ours).keys() == vars(theirs).keys()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert repr(pickle.loads(pickle.dumps(ours))) == repr(copy.deepcopy(theirs))


@CASE
def test_results_gradients_and_buffers_are_torchs(name, args, options, shape, rng):
    for training in (True, False):
        models = [m.double().train(training) for m in pair(name, args, options)]
        x = torch.randn(shape, generator=rng, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in models]
        outputs = [model(each) for model, each in zip(models, inputs, strict=True)]
        gradient = torch.randn(outputs[1].shape, generator=rng, dtype=torch.float64)
        for out in outputs:
            out.backward(gradient)
        found = [
            [out, each.grad, *(p.grad for p in model.parameters()), *model.buffers()]
            for out, each, model in zip(outputs, inputs, models, strict=True)
        ]
        for a, b in zip(*found, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())


def test_wrong_channels_are_refused_by_name():
    with pytest.raises(ValueError, match=r"input: want \[N, 5, H, W\], got \[2, 4, 3, 3\]"):
        fullres.nn.BatchNorm2d(5)(torch.ones(2, 4, 3, 3))
    with pytest.raises(ValueError, match="padding_mode|zeros"):
        fullres.nn.ConvTranspose2d(2, 2, 2, padding_mode="reflect")
    with pytest.raises(ValueError, match="act: want none, relu, leaky_relu or silu, got 'gelu'"):
        fullres.nn.ConvNormAct(3, 4, 3, act="gelu")
    with pytest.raises(ValueError, match="padding: want a number for an even kernel_size"):
        fullres.nn.ConvNormAct(3, 4, 4)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_normalisation_keeps_its_inputs_dtype(autocast, rng):
    x = torch.randn(2, 3, 4, 5, generator=rng)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert fullres.nn.BatchNorm2d(3)(x.to(dtype)).dtype == dtype
            assert nn.BatchNorm2d(3)(x.to(dtype)).dtype == dtype


ACTS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "silu": F.silu,
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, fullres.nn.SyncBatchNorm, None])
@pytest.mark.parametrize("act", ACTS)
def test_conv_norm_act_is_its_layers(act, norm, residual, rng):
    layer = fullres.nn.ConvNormAct(3, 4, 3, norm=norm, act=act, slope=0.2).double()
    twin = copy.deepcopy(layer)
    x, r = (torch.randn(2, c, 5, 6, generator=rng, dtype=torch.float64) for c in (3, 4))
    inputs = [[x.clone().requires_grad_(), r.clone().requires_grad_()] for _ in range(2)]
    out = layer(inputs[0][0], inputs[0][1] if residual else None)
    y = F.conv2d(inputs[1][0], twin.conv.weight, twin.conv.bias, padding=1)
    y = y if norm is None else twin.norm(y)
    want = ACTS[act](y + inputs[1][1] if residual else y)
    gradient = torch.randn(want.shape, generator=rng, dtype=torch.float64)
    out.backward(gradient)
    want.backward(gradient)
    pairs = [(out, want), (inputs[0][0].grad, inputs[1][0].grad)]
    pairs += [(inputs[0][1].grad, inputs[1][1].grad)] if residual else []
    pairs += zip(
        (p.grad for p in layer.parameters()), (p.grad for p in twin.parameters()), strict=True
    )
    pairs += zip(layer.buffers(), twin.buffers(), strict=True)
    for a, b in pairs:
        assert (a - b).abs().max() <= 1e-11 * max(1, b.abs().max())


def test_conv_norm_act_stores_its_input_and_its_output_once(rng):
    x = torch.randn(1, 3, 6, 8, generator=rng).contiguous(memory_format=torch.channels_last)
    storages = {}

    def pack(t):
        storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    for norm, y in ((nn.BatchNorm2d, 8 * 48 * 4 + 4 * 8 * 4), (None, 8 * 48 * 4)):
        storages.clear()
        layer = fullres.nn.ConvNormAct(3, 8, 3, norm=norm)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        bias = 0 if layer.conv.bias is None else 8 * 4
        assert sum(storages.values()) == 3 * 48 * 4 + y + layer.conv.weight.numel() * 4 + bias


SIGNATURES = {
    "conv2d": "input weight bias stride padding dilation groups",
    "conv_transpose2d": "input weight bias stride padding output_padding groups dilation",
    "max_pool2d": "input kernel_size stride padding dilation ceil_mode return_indices",
    "avg_pool2d": "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "adaptive_avg_pool2d": "input output_size",
    "interpolate": "input size scale_factor mode align_corners recompute_scale_factor antialias",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_functional_forms_have_torchs_signatures(name):
    ours = inspect.signature(getattr(fullres.functional, name))
    assert [*ours.parameters] == SIGNATURES[name].split()
