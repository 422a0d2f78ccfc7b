"""A network's training step with every kernel as compiled for a device, run by the emulator.

Here kernels meet as they do on a card: what one writes is what the next one reads, under autocast,
through the segments that conversion makes. A device's other operators run as torch has them.
"""

import pytest
import torch

from fullres.engine import convert
from fullres.engine.fakes import DevicePath
from fullres.models import uresnet
from fullres.training.config import parse_network

pytest.importorskip("triton")
from fullres.kernels.emulator import emulated  # noqa: E402

SMALL = "filters=8,depth=2,level_blocks=1,deepest_blocks=1,deepest_channels=16,deepest_kernel=3"
TILES = {"conv2d_fwd_rows", "prologue", "conv2d_wgrad", "pooled_backward", "merge_moments"}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = uresnet(parse_network("a21", SMALL)).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def gradients(model, x, upstream):
    """The outputs, in one tensor, and each parameter's gradient."""
    out = torch.cat([plane.to(upstream.dtype) for plane in model(x)])
    out.backward(upstream)
    return out.detach().double(), [p.grad.double() for p in model.parameters()]


@pytest.mark.parametrize(
    ("target", "policy"), [("sm_90", "keep"), ("sm_90", "series"), ("sm_80", "closing")]
)
def test_a_step_is_as_exact_as_torchs_own_in_bfloat16(target, policy, rng):
    x = torch.randn(2, 3, 32, 40, generator=rng).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        planes = len(network()(x))
    upstream = torch.randn(2 * planes, 3, 32, 40, generator=rng)
    want, dwant = gradients(network(torch.float64), x.double(), upstream.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager, deager = gradients(network(), x, upstream)
        with emulated(target) as ran, DevicePath():
            got, dgot = gradients(convert(network(), policy=policy), x, upstream)

    assert {f"{name}_kernel" for name in TILES} <= ran.counts.keys()
    assert (got - want).norm() <= 1.25 * (eager - want).norm()
    # A bias before a normalisation has no gradient but rounding: all count by the largest.
    largest = max(d.norm() for d in dwant)
    for (name, _), a, b, w in zip(network().named_parameters(), dgot, deager, dwant, strict=True):
        allowed = 2 * (b - w).norm() + 1e-3 * largest
        assert (a - w).norm() <= allowed, f"{name}: {(a - w).norm() / allowed:.2f}"
