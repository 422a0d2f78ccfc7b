"""Networks of other libraries, where these are installed: converted, they compute what they did."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fullres
from fullres.engine.convert import conversions


def torchvision(name, **options):
    models = importlib.import_module("torchvision.models")
    return models.get_model(name, weights=None, **options)


def timm(name):
    return importlib.import_module("timm").create_model(name)


def segmentation():
    return importlib.import_module("segmentation_models_pytorch").Unet(
        "resnet18", encoder_weights=None
    )


def monai():
    nets = importlib.import_module("monai.networks.nets")
    shape = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2, "norm": "batch"}
    return nets.UNet(2, 3, 2, **shape)


NETWORKS = {
    "torchvision resnet18": lambda: torchvision("resnet18"),
    "torchvision regnet": lambda: torchvision("regnet_y_400mf"),
    "torchvision mobilenet_v2": lambda: torchvision("mobilenet_v2"),
    "torchvision deeplabv3": lambda: torchvision("deeplabv3_resnet50", weights_backbone=None),
    "torchvision fcn": lambda: torchvision("fcn_resnet50", weights_backbone=None),
    "timm resnet18": lambda: timm("resnet18"),
    "timm convnext": lambda: timm("convnext_atto"),
    "timm efficientnet": lambda: timm("efficientnet_b0"),
    "segmentation_models unet": segmentation,
    "monai unet": monai,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_it_did(name, rng):
    torch.manual_seed(0)
    try:
        model = NETWORKS[name]().double()
    except (ImportError, RuntimeError) as error:  # a build without its own operators raises that
        pytest.skip(f"a peer to convert, if installed ({type(error).__name__})")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its mask follows the layout in memory, which differs
    ours = fullres.convert(copy.deepcopy(model))
    targets = [
        part.get_submodule(t)
        for _, part, conversion in conversions(ours)
        for t in conversion.became
    ]
    convs = [module for module in ours.modules() if isinstance(module, nn.Conv2d)]
    assert len({id(t) for t in targets if isinstance(t, nn.Conv2d)}) == len(convs)
    for training in (True, False):
        x = torch.randn(2, 3, 64, 64, generator=rng, dtype=torch.float64)
        found = []
        for each in (ours, model):
            each.train(training)
            each.zero_grad()
            outputs = tree_leaves(each(x))
            sum(o.square().mean() for o in outputs).backward()
            gradients = [p.grad for p in each.parameters() if p.grad is not None]
            found.append([*outputs, *gradients, *each.buffers()])
        for a, b in zip(*found, strict=True):
            assert (a - b).abs().max() <= 1e-9 * max(1, b.abs().max())
