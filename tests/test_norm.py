"""Batch normalisation of a few numbers a channel: against torch's over the whole batch."""

import pytest
import torch

import fullres.ops.pointwise  # noqa: F401 - registers the moments that are merged
from fullres.engine.precompile import precompile
from fullres.kernels import aot
from fullres.kernels._tune import interpreted
from fullres.ops import norm as ops

DEVICES = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = pytest.mark.parametrize("device", DEVICES)
EPS32 = torch.finfo(torch.float32).eps


def call(name, *arguments, device):
    """Run an op: its reference, its kernels interpreted, or its kernels on a device."""
    if device == "reference":
        return getattr(ops, name)(*arguments)
    function = getattr(ops, f"{name}_triton", None) or getattr(ops, name)
    if device == "cpu":
        with interpreted():
            return function(*arguments)
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    out = function(*moved)
    for a, b in zip(arguments, moved, strict=True):  # what was moved in place
        if isinstance(a, torch.Tensor):
            a.copy_(b)
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()


def moments_of(x, dtype=torch.float32):
    """Count, mean and M2 of [M, C], in float64 until the end."""
    x = x.double()
    count = torch.full((x.shape[1],), float(len(x)), dtype=torch.float64)
    mean = x.mean(0) if len(x) else torch.zeros_like(count)
    return torch.stack([count, mean, (x - mean).square().sum(0)]).to(dtype)


@DEVICE
@pytest.mark.parametrize("sizes", [[7], [1, 9], [3] * 65, [5, 0, 2] * 70], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_merged_parts_are_the_moments_of_the_whole(sizes, mean, device, rng):
    x = (torch.randn(sum(sizes), 70, generator=rng) + mean).double()
    parts = torch.stack([moments_of(part) for part in x.split(sizes)])
    parts[parts[:, 0, 0] == 0, 1:] = float("nan")  # whatever else they hold
    got, wanted = call("merge_moments", parts, device=device).double(), moments_of(x, torch.float64)
    assert got[0].tolist() == [sum(sizes)] * 70
    # Parts' means come rounded, by half a unit of the mean each, and M2 moves with them.
    off = EPS32 * (mean + 4)
    assert (got[1] - wanted[1]).abs().max() <= 4 * off
    n = sum(sizes)
    spread = (wanted[2] * n).sqrt()
    assert bool(((got[2] - wanted[2]).abs() <= 16 * EPS32 * wanted[2] + 4 * off * spread).all())


@DEVICE
@pytest.mark.parametrize("T", [1, 2, 64, 65, 5000])
def test_merged_sums_are_sums(T, device, rng):
    parts = torch.randn(T, 3, 21, generator=rng)
    got = call("merge_sums", parts, device=device)
    error = (got.double() - parts.double().sum(0)).abs()
    assert bool((error <= 4 * EPS32 * T**0.5 * parts.double().square().sum(0).sqrt()).all())


@DEVICE
@pytest.mark.parametrize("name", ["merge_moments", "merge_sums"])
def test_merging_repeats_itself_and_leaves_its_input(name, device, rng):
    parts = torch.rand(300, 3, 33, generator=rng)
    before = parts.clone()
    a, b = (call(name, parts, device=device) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(parts, before)
    alone = call(name, parts[:1], device=device)
    alone.zero_()
    assert torch.equal(parts, before)


@DEVICE
def test_merging_nothing_is_zero(device):
    for name in ("merge_moments", "merge_sums"):
        assert call(name, torch.empty(0, 3, 5), device=device).tolist() == [[0.0] * 5] * 3


OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "no affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "eps": {"eps": 0.1, "momentum": 0.9},
}


@DEVICE
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_five_steps_are_torchs(option, mean, device, rng):
    C = 67
    torch_s = torch.nn.BatchNorm2d(C, **option, dtype=torch.float64)
    if torch_s.affine:
        torch_s.weight.data.normal_(generator=rng)[::5] = 0.0
        torch_s.bias.data.normal_(generator=rng)
    ours = {
        name: None if t is None else t.detach().clone().to(torch.float32 if t.dim() else t.dtype)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        for t in [getattr(torch_s, name)]
    }
    tolerance = {"rtol": 1e-5, "atol": 1e-5 + 16 * EPS32 * mean}
    for _ in range(5):
        x = (torch.randn(2, C, 4, 5, generator=rng) + mean).double()
        wanted = torch_s(x)
        moments = moments_of(x.movedim(1, 3).flatten(0, 2))
        arguments = (moments, *ours.values(), torch_s.momentum, torch_s.eps)
        norm = call("batch_norm_forward", *arguments, device=device)
        mean_, scale, shift, rstd = norm.double()[:, :, None, None]
        torch.testing.assert_close((x - mean_) * scale + shift, wanted.detach(), **tolerance)
        for name in ("running_mean", "running_var"):
            if ours[name] is not None:
                given = getattr(torch_s, name)
                torch.testing.assert_close(ours[name].double(), given, **tolerance)
        if ours["num_batches_tracked"] is not None:
            assert ours["num_batches_tracked"] == torch_s.num_batches_tracked


@DEVICE
@pytest.mark.parametrize("training", [True, False])
def test_backward_is_autograds(training, device, rng):
    C, N = 67, 40
    layer = torch.nn.BatchNorm2d(C, dtype=torch.float64).train(training)
    layer.weight.data.normal_(generator=rng)[::5] = 0.0
    layer.running_mean.normal_(generator=rng)
    y = torch.randn(2, C, 4, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    g = torch.randn(y.shape, generator=rng, dtype=torch.float64)
    running = layer.running_mean.clone(), layer.running_var.clone()
    layer(y).backward(g)
    if training:
        moments = moments_of(y.detach().movedim(1, 3).flatten(0, 2))
        affine = (t.detach().float() for t in (layer.weight, layer.bias))
        norm = ops.batch_norm_forward(moments, *affine, None, None, None, 0.1, layer.eps)
    else:
        norm = ops.batch_norm_eval(*running, layer.weight, layer.bias, layer.eps).detach().float()
    centred = y.detach() - norm[0].double()[:, None, None]
    rows = [g.sum((0, 2, 3)), (g * centred).sum((0, 2, 3)), torch.full((C,), float("nan"))]
    sums = torch.stack([row.float() for row in rows])
    coef, dweight, dbias = call("batch_norm_backward", sums, norm, N, training, device=device)
    mean, a, b, d = coef.double()[:, :, None, None]
    dy = a * g + b * (y.detach() - mean) + d
    torch.testing.assert_close(dy, y.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dweight.double(), layer.weight.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dbias.double(), layer.bias.grad, rtol=1e-5, atol=1e-4)


@DEVICE
def test_a_batch_without_pixels_moves_the_counter_alone(device):
    running = torch.full((4,), 3.0), torch.full((4,), 2.0)
    counter = torch.tensor(7)
    arguments = (torch.zeros(3, 4), None, None, *running, counter, 0.1, 1e-5)
    norm = call("batch_norm_forward", *arguments, device=device)
    assert norm.isfinite().all() and counter == 8
    assert running[0].tolist() == [3.0] * 4 and running[1].tolist() == [2.0] * 4


@DEVICE
def test_nan_moments_give_a_nan_norm(device):
    moments = torch.tensor([[9.0, 9.0], [float("nan"), 1.0], [float("nan"), 2.0]])
    norm = call("batch_norm_forward", moments, *[None] * 5, 0.1, 1e-5, device=device)
    assert norm[:, 0].isnan().tolist() == [True, True, False, True]
    assert norm[:, 1].isfinite().all()


def test_opcheck(rng):
    moments = moments_of(torch.randn(9, 4, generator=rng))
    running = torch.zeros(4), torch.ones(4)
    arguments = (moments, torch.ones(4), torch.zeros(4), *running, torch.tensor(0), 0.1, 1e-5)
    forward = torch.ops.fullres.batch_norm_forward.default
    torch.library.opcheck(forward, arguments)
    norm = forward(*arguments)
    torch.library.opcheck(
        torch.ops.fullres.batch_norm_backward.default, (torch.ones(3, 4), norm, 9, True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 4)}, r"moments: want \[3, C\], got \[2, 4\]"),
        ({1: torch.zeros(5)}, r"weight: want \[C\] = \[4\], got \[5\]"),
        ({4: None}, "running_var: want it and running_mean or neither"),
        ({5: torch.zeros(1)}, "num_batches_tracked: want an int64 scalar"),
        ({5: None, 6: None}, "num_batches_tracked: want a counter, since momentum is None"),
    ],
    ids=["moments", "weight", "running", "counter", "cumulative"],
)
def test_wrong_arguments_are_named(change, message):
    arguments = [torch.zeros(3, 4), None, None, torch.zeros(4), torch.ones(4), torch.tensor(0)]
    arguments = dict(enumerate([*arguments, 0.1, 1e-5])) | change
    with pytest.raises(ValueError, match=message):
        ops.batch_norm_forward(*arguments.values())
    with pytest.raises(ValueError, match=r"parts: want \[T, 3, C\]"):
        ops.merge_moments(torch.zeros(4, 2, 4))
    with pytest.raises(ValueError, match="count: want at least one pixel, got 0"):
        ops.batch_norm_backward(torch.zeros(3, 4), torch.zeros(4, 4), 0, True)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile_without_spills(target, tmp_path):
    def step():
        y = torch.empty(2, 16, 640, 1024, dtype=torch.bfloat16)
        moments = torch.ops.fullres.moments(y)
        running = torch.empty(16), torch.empty(16), torch.zeros((), dtype=torch.int64)
        forward = torch.ops.fullres.batch_norm_forward
        norm = forward(moments, torch.empty(16), torch.empty(16), *running, 0.1, 1e-5)
        forward(moments, None, None, *running, None, 1e-5)
        torch.ops.fullres.batch_norm_backward(torch.empty(3, 16), norm, 99, True)

    rows = precompile(step, [target], tmp_path)
    names = {row["kernel"] for row in rows}
    assert {"merge_moments_kernel", "batch_norm_kernel", "batch_norm_backward_kernel"} <= names
    assert {row["spill_bytes"] for row in rows} == {0}
