"""Passes over whole images: against float64, in the interpreter, on a device, and as compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fullres.kernels import aot
from fullres.kernels._tune import interpreted
from fullres.ops import pointwise
from fullres.ops.fuse import (
    Prologue,
    prologue_backward_reference,
    prologue_reference,
    resampled_size,
)

ACTS = ["none", "relu", "leaky_relu", "silu"]
SHAPES = {  # N, C, H, W
    "odd-sizes-16": (2, 16, 7, 37),
    "one-pixel": (1, 8, 1, 1),
    "grey": (1, 1, 5, 301),
    "colour": (2, 3, 9, 34),
    "channels-not-a-power-of-two": (1, 24, 11, 13),
    "channels-in-two-tiles": (1, 136, 5, 9),
}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN, so that a lane that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def image(shape, dtype, rng, device="cpu", mean=0.0):
    x = torch.randn(shape, generator=rng, dtype=torch.float64) + mean
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def norm(C, rng, device="cpu", mean=0.0):
    rows = torch.randn(4, C, generator=rng, dtype=torch.float64)
    rows[0] += mean
    rows[1, ::3] = 0.0  # a gamma of 0, and of either sign
    return rows.to(device, torch.float32)


def launch(name, *arguments, device):
    """Run an op's device path: in the interpreter where there is no device."""
    function = getattr(pointwise, f"{name}_triton")
    if device == "cpu":
        with interpreted():
            return function(*arguments)
    return function(*arguments)


def exact(name, *arguments):
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    return getattr(pointwise, name)(*wide)


def close(got, wanted, dtype, scale=1.0):
    """One rounding to the dtype (truncation, for the interpreter), and float32's of each step."""
    assert got.dtype == dtype and got.shape == wanted.shape
    allowed = torch.finfo(dtype).eps * wanted.abs() + 32 * torch.finfo(torch.float32).eps * scale
    if dtype != torch.float32:
        allowed = allowed + torch.finfo(dtype).smallest_normal
    error = (got.double() - wanted).abs()
    assert bool((error <= allowed).all()), f"{(error / allowed).max():.3g} times what is allowed"


@SHAPE
@DTYPE
@DEVICE
@pytest.mark.parametrize("act", ACTS)
def test_prologue_is_the_formula(shape, dtype, device, act, rng):
    x, r = (image(shape, dtype, rng, device) for _ in range(2))
    n, rn = (norm(shape[1], rng, device) for _ in range(2))
    for arguments in (x, n, r, rn), (x, n, r, None), (x, n, None, None), (x, None, None, None):
        got = launch("prologue", *arguments, act, 0.1, "none", device=device)
        wanted = exact("prologue", *arguments, act, 0.1, "none")
        assert got.is_contiguous(memory_format=torch.channels_last)
        close(got, wanted, dtype, scale=100.0)


@SHAPE
@DTYPE
@DEVICE
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_moments_are_those_of_float64(shape, dtype, device, mean, rng):
    y = image(shape, dtype, rng, device, mean)
    got, wanted = launch("moments", y, device=device).double(), exact("moments", y)
    count = y.numel() // y.shape[1]
    assert got[0].tolist() == [count] * shape[1]
    # Each step of a mean rounds to half a unit of it; the chain and the trees are short.
    eps = torch.finfo(torch.float32).eps
    spread = (wanted[2] / count).sqrt()
    assert bool(((got[1] - wanted[1]).abs() <= 8 * eps * (wanted[1].abs() + spread)).all())
    allowed = 64 * eps * wanted[2] + count * (8 * eps * (abs(mean) + 1)) ** 2
    assert bool(((got[2] - wanted[2]).abs() <= allowed + 16 * eps * count * spread).all())


@DEVICE
def test_variance_far_from_zero_keeps_its_digits(device, rng):
    y = image((1, 16, 64, 80), torch.float32, rng, device, mean=1e4)
    got, wanted = launch("moments", y, device=device), exact("moments", y)
    # Means are rounded to steps of 2^-10 deviations here, which over n = 5,120 pixels cancel by
    # sqrt(n); three times that. E[x^2] - E[x]^2 would be off by 1e8 * 2^-24, some deviations.
    torch.testing.assert_close(got[2].double(), wanted[2], rtol=3 * 2**-10 / 5120**0.5, atol=0)


def assert_sums(sums, g, p):
    """Those of g as it is stored: four deviations of the walk of n roundings, and the largest."""
    rows = [g.double()]
    for t, table in (p.x, p.norm), (p.residual, p.residual_norm):
        t = torch.zeros_like(g) if t is None else t
        centred = t.double() if table is None else t.double() - table[0, :, None, None].double()
        rows.append(rows[0] * centred)
    for got, row in zip(sums.double(), rows, strict=True):
        spread = row.square().sum((0, 2, 3)).sqrt() + row.abs().amax()
        allowed = 32 * torch.finfo(torch.float32).eps * spread * row[:, 0].numel() ** 0.5
        assert bool(((got - row.sum((0, 2, 3))).abs() <= allowed).all())


@SHAPE
@DTYPE
@DEVICE
@pytest.mark.parametrize("act", ACTS)
def test_prologue_backward_is_the_gradient(shape, dtype, device, act, rng):
    x, r, dz, add = (image(shape, dtype, rng, device) for _ in range(4))
    n, rn = (norm(shape[1], rng, device) for _ in range(2))
    for more, arguments in (
        (add, (x, n, r, rn)),
        (None, (x, n, None, None)),
        (None, (x,) + (None,) * 3),
    ):
        arguments = dz, more, *arguments, act, 0.1, "none", True
        g, sums = launch("prologue_backward", *arguments, device=device)
        wanted, _ = exact("prologue_backward", *arguments)
        close(g, wanted, dtype, scale=100.0)
        assert_sums(sums, g, Prologue(*arguments[2:6]))


RESAMPLED = {  # N, C, H, W of x
    "even": (2, 16, 6, 38),
    "odd-both": (2, 16, 7, 37),
    "least": (1, 8, 2, 2),
    "odd-grey": (1, 1, 5, 301),
    "odd-column": (2, 3, 8, 33),
    "channels-in-two-tiles": (1, 136, 5, 4),
    "one-column-pair": (3, 8, 9, 3),
}
RESAMPLE = pytest.mark.parametrize("resample", ["pool2", "up2"])


def resample_cases(shape, dtype, rng, device):
    """Prologues of which pooling in float64 finds the same maximum: no two are nearly equal."""
    x, r = (image(shape, dtype, rng, device) for _ in range(2))
    n, rn = (norm(shape[1], rng, device) for _ in range(2))
    n[1, n[1] == 0] = 1.0  # where all are equal, rounding decides
    return [(x, n, r, rn), (x, n, None, None), (x, None, None, None), (x, None, r, None)]


@RESAMPLE
@pytest.mark.parametrize("shape", RESAMPLED.values(), ids=RESAMPLED.keys())
@DTYPE
@DEVICE
def test_resampled_prologue_is_the_formula(shape, dtype, device, resample, rng, poisoned):
    for act, arguments in zip(ACTS, resample_cases(shape, dtype, rng, device), strict=True):
        arguments = *arguments, act, 0.1, resample
        got, wanted = launch("prologue", *arguments, device=device), exact("prologue", *arguments)
        assert got.is_contiguous(memory_format=torch.channels_last)
        close(got, wanted, dtype, scale=100.0)


@RESAMPLE
@pytest.mark.parametrize("shape", RESAMPLED.values(), ids=RESAMPLED.keys())
@DTYPE
@DEVICE
def test_resampled_backward_is_the_gradient(shape, dtype, device, resample, rng, poisoned):
    add = image(shape, dtype, rng, device)
    size = resampled_size(*shape[2:], resample)
    dz = image((*shape[:2], *size), dtype, rng, device)
    for act, more, arguments in zip(
        # SiLU falls and rises: values far apart may meet in it, and either is then the larger.
        ["none", "relu", "leaky_relu", "none" if resample == "pool2" else "silu"],
        [add, None, add, None],
        resample_cases(shape, dtype, rng, device),
        strict=True,
    ):
        arguments = dz, more, *arguments, act, 0.1, resample, True
        g, sums = launch("prologue_backward", *arguments, device=device)
        wanted, _ = exact("prologue_backward", *arguments)
        assert g.is_contiguous(memory_format=torch.channels_last)
        close(g, wanted, dtype, scale=100.0)
        assert_sums(sums, g, Prologue(*arguments[2:6]))


@DEVICE
def test_the_first_maximum_wins(device, rng):
    """Small integers are often equal, and ReLU makes more so; in torch the first is taken."""
    x = torch.randint(-1, 2, (2, 8, 7, 9), generator=rng).to(device, torch.float32)
    dz = image((2, 8, 3, 4), torch.float32, rng, device)
    for act in ("none", "relu"):
        arguments = dz, None, x, None, None, None, act, 0.0, "pool2", False
        got, _ = launch("prologue_backward", *arguments, device=device)
        z = prologue_reference(Prologue(x, act=act)).requires_grad_()
        (wanted,) = torch.autograd.grad(torch.nn.functional.max_pool2d(z, 2), z, dz)
        if act == "relu":
            wanted = wanted * (x > 0)
        assert torch.equal(got, wanted)


@DEVICE
def test_nan_wins_a_maximum_and_takes_its_gradient(device, rng):
    nan, inf = float("nan"), float("inf")
    windows = torch.tensor([[1, nan, 2, 3], [nan, 1, nan, 2], [inf, nan, 1, 0], [-inf] * 4])
    x = windows.reshape(1, 4, 2, 2).to(device)
    dz = image((1, 4, 1, 1), torch.float32, rng, device)
    arguments = x, None, None, None, "none", 0.0, "pool2"
    z = launch("prologue", *arguments, device=device)
    assert z.flatten().tolist()[3] == -inf and z.flatten()[:3].isnan().all()
    g, _ = launch("prologue_backward", dz, None, *arguments, False, device=device)
    leaf = x.requires_grad_()
    (wanted,) = torch.autograd.grad(torch.nn.functional.max_pool2d(leaf, 2), leaf, dz)
    assert torch.equal(g, wanted)


@SHAPE
@DTYPE
@DEVICE
def test_normalised_gradient_is_the_formula(shape, dtype, device, rng):
    g, y = (image(shape, dtype, rng, device) for _ in range(2))
    coef = norm(shape[1], rng, device)
    got = launch("normalised_gradient", g, y, coef, device=device)
    close(got, exact("normalised_gradient", g, y, coef), dtype, scale=100.0)


@DEVICE
def test_nan_and_inf_stay_where_they_are(device, rng):
    x = image((1, 4, 3, 5), torch.float32, rng, device)
    x[0, 0, 1, 1], x[0, 1, 2, 2] = float("nan"), float("-inf")
    for act in ACTS:
        got = launch("prologue", x, None, None, None, act, 0.1, "none", device=device)
        wanted = exact("prologue", x, None, None, None, act, 0.1, "none")
        torch.testing.assert_close(got.double(), wanted, equal_nan=True, rtol=1e-5, atol=1e-5)
    moments = launch("moments", x, device=device)
    assert moments[2, :2].isnan().all() and moments[:, 2:].isfinite().all()


@DEVICE
def test_the_same_bits_twice(device, rng):
    shape = (2, 16, 33, 65)
    x, dz = (image(shape, torch.float32, rng, device) for _ in range(2))
    a, b = (launch("moments", x, device=device) for _ in range(2))
    assert torch.equal(a, b)
    for resample in "none", "pool2", "up2":
        size = resampled_size(*shape[2:], resample)
        dz = image((*shape[:2], *size), torch.float32, rng, device)
        arguments = dz, None, x, None, None, None, "relu", 0.0, resample, True
        a, b = (launch("prologue_backward", *arguments, device=device) for _ in range(2))
        assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize("resample", ["none", "pool2", "up2"])
def test_an_empty_batch_is_empty(resample, rng):
    x = torch.empty(0, 4, 3, 5)
    dz = torch.empty(0, 4, *resampled_size(3, 5, resample))
    rest = None, None, None, "relu", 0.0, resample
    for function in pointwise.prologue, pointwise.prologue_triton:
        assert function(x, *rest).shape == dz.shape
    for function in pointwise.prologue_backward, pointwise.prologue_backward_triton:
        g, sums = function(dz, None, x, *rest, True)
        assert g.shape == x.shape and sums.tolist() == [[0.0] * 4] * 3
    assert launch("moments", x, device="cpu").tolist() == [[0.0] * 4] * 3


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.booleans())
def test_moments_at_any_shape_and_layout(N, C, H, W, sliced):
    rng = torch.Generator().manual_seed(N + 7 * C + 31 * H + 101 * W)
    y = torch.randn(N, C, H + sliced, W, generator=rng)[:, :, sliced:]
    got, wanted = launch("moments", y, device="cpu"), exact("moments", y)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resample", ["none", "pool2", "up2"])
@pytest.mark.parametrize("act", ACTS)
def test_gradients_of_the_reference(act, resample, rng):
    x, r = (image((1, 3, 5, 7), torch.float64, rng).requires_grad_() for _ in range(2))
    n, rn = (norm(3, rng).double() for _ in range(2))
    n[1, n[1] == 0] = 1.0  # where all are equal, a maximum has no gradient to compare
    z = prologue_reference(Prologue(x, n, r, rn, act, 0.1, resample))
    dz = torch.randn(z.shape, generator=rng, dtype=torch.float64)
    z.backward(dz)
    stored = Prologue(x.detach(), n, r.detach(), rn, act, 0.1, resample)
    g = prologue_backward_reference(stored, dz)
    torch.testing.assert_close(x.grad, g * n[1, :, None, None])
    torch.testing.assert_close(r.grad, g * rn[1, :, None, None])


def test_opcheck(rng):
    x, r, dz = (image((1, 4, 3, 5), torch.float32, rng) for _ in range(3))
    n, large = norm(4, rng), image((1, 4, 6, 10), torch.float32, rng)
    ops = torch.ops.fullres
    for op, arguments in (
        (ops.prologue, (x, n, r, None, "silu", 0.0, "none")),
        (ops.prologue, (x, n, r, None, "relu", 0.0, "pool2")),
        (ops.moments, (x,)),
        (ops.prologue_backward, (dz, None, x, n, r, None, "relu", 0.0, "none", True)),
        (ops.prologue_backward, (dz, dz, x, n, None, None, "relu", 0.0, "none", False)),
        (ops.prologue_backward, (large, dz, x, n, r, n, "silu", 0.0, "up2", True)),
        (ops.normalised_gradient, (dz, x, n)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3)}, "x: want"),
        ({"x": torch.zeros(1, 4, 3, 5, dtype=torch.int32)}, "x: want a dtype"),
        ({"norm": torch.zeros(3, 4)}, r"norm: want \[4, 4\], got \[3, 4\]"),
        ({"residual": torch.zeros(1, 4, 3, 6)}, "residual: want"),
        ({"residual_norm": torch.zeros(4, 4)}, "residual_norm: want None without a residual"),
        ({"act": "gelu"}, "act: want one of .* got 'gelu'"),
        ({"resample": "pool3"}, "resample: want one of .* got 'pool3'"),
        ({"x": torch.zeros(1, 4, 1, 5), "resample": "pool2"}, "x: want at least 2 x 2 pixels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(1, 4, 3, 5), "norm": None, "residual": None}
    arguments |= {"residual_norm": None, "act": "relu", "slope": 0.0, "resample": "none"}
    for function in pointwise.prologue, pointwise.prologue_triton:
        with pytest.raises(ValueError, match=message):
            function(**(arguments | change))


def test_gradients_of_a_wrong_size_are_named():
    x, dz = torch.zeros(1, 4, 6, 8), torch.zeros(1, 4, 3, 4)
    pooled = None, None, None, "relu", 0.0, "pool2", True
    for function in pointwise.prologue_backward, pointwise.prologue_backward_triton:
        with pytest.raises(ValueError, match=r"^dz: want \[1, 4, 3, 4\], got \[1, 4, 6, 8\]"):
            function(x, None, x, *pooled)
        with pytest.raises(ValueError, match=r"^add: want \[1, 4, 6, 8\], got \[1, 4, 3, 4\]"):
            function(dz, dz, x, *pooled)


def test_rows_beyond_int32_are_refused():
    with FakeTensorMode():
        x = torch.empty(1, 16384, 2, 32768, dtype=torch.float16)
        pointwise.prologue(x, None, None, None, "relu", 0.0, "none")
        with pytest.raises(ValueError, match=r"^x: want rows below 2\*\*29 elements"):
            pointwise.prologue(x, None, None, None, "relu", 0.0, "up2")


def launches(target, dtype=torch.bfloat16, C=16):
    """What the passes launch, with all that they can have."""
    from fullres.engine.precompile import record_launches

    def step():
        x = torch.empty(2, C, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
        n = torch.empty(4, C)
        for resample in "none", "pool2", "up2":
            fused = n, x, n, "leaky_relu", 0.01, resample
            z = torch.ops.fullres.prologue(x, *fused)
            g, _ = torch.ops.fullres.prologue_backward(z, x, x, *fused, True)
        torch.ops.fullres.moments(x)
        torch.ops.fullres.normalised_gradient(g, x, n)

    return [launch for launch in record_launches(step, target) if "merge" not in launch.kernel]


@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiled_kernels_read_vectors_and_spill_nothing(target):
    from fullres.kernels.launches import compile_launch

    first = {}  # a launch is recorded in its first configuration last
    for launch in launches(target):
        label = launch.label.partition("ELEMENTS")[0]
        first[launch.kernel, "pool2" in label, "up2" in label] = launch
    assert len(first) == 8
    for launch in first.values():
        report = compile_launch(launch)
        assert report.shared_bytes <= aot.SHARED_LIMIT[target], report
        assert not report.spill_bytes, report
        assert report.loads_16 is None or report.loads_16 > 0, report


def test_no_configuration_spills():
    from fullres.kernels.launches import compile_launch

    backward = [launch for launch in launches("sm_80") if "backward" in launch.kernel]
    assert len(backward) == 8  # three configurations without resampling and enlarged, two pooled
    for launch in backward:
        assert not compile_launch(launch).spill_bytes, launch.label
