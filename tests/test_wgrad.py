from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fullres.ops import dispatch
from fullres.ops.conv_wgrad import conv2d_wgrad, conv2d_wgrad_triton
from fullres.ops.fuse import Prologue, gradient_reference, prologue_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """A geometry and what is fused."""

    N: int = 1
    C: int = 8
    H: int = 5
    W: int = 6
    K: int = 8
    R: int = 3
    S: int = 3
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    groups: int = 1
    norm: bool = False
    residual: str = ""  # "plain" or "norm"
    act: str = "none"
    resample: str = "none"
    coef: bool = False
    bias: bool = True

    @property
    def height_width(self):
        """Of z."""
        return {
            "none": (self.H, self.W),
            "pool2": (self.H // 2, self.W // 2),
            "up2": (2 * self.H, 2 * self.W),
        }[self.resample]

    @property
    def output(self):
        sizes = self.height_width, self.padding, self.dilation, (self.R, self.S), self.stride
        return [
            (z + 2 * pad - dil * (taps - 1) - 1) // step + 1
            for z, pad, dil, taps, step in zip(*sizes, strict=True)
        ]


FUSED = {"norm": True, "act": "leaky_relu", "coef": True}
CASES = {
    "odd-sizes-across-tiles": Case(C=16, H=7, W=37, K=16),
    "one-pixel": Case(H=1, W=1),
    "one-output-pixel": Case(H=3, W=3, padding=(0, 0)),
    "grey-image": Case(N=2, C=1, K=16),
    "colour-image-7x7-stride-2": Case(C=3, H=17, W=19, R=7, S=7, stride=(2, 2), padding=(3, 3)),
    "one-class-out": Case(C=24, K=1, R=1, S=1, padding=(0, 0)),
    "channels-not-a-power-of-two": Case(N=2, C=24, K=40),
    "channels-in-several-blocks": Case(C=112, H=4, W=5, K=80),
    "1x1-stride-2-last-row-unread": Case(C=16, H=8, W=9, R=1, S=1, stride=(2, 2), padding=(0, 0)),
    "stride-wider-than-the-filter": Case(H=9, W=8, R=2, S=2, stride=(3, 4), padding=(0, 0)),
    "padding-wider-than-the-filter": Case(C=4, H=2, W=3, padding=(3, 4)),
    "filter-not-square": Case(C=4, H=6, W=9, R=1, S=5, padding=(0, 2)),
    "dilation-differs-by-axis": Case(C=5, H=9, W=11, dilation=(2, 3), padding=(2, 3)),
    "two-groups": Case(C=12, K=10, groups=2),
    "depthwise": Case(N=2, C=24, K=24, groups=24),
    "depthwise-two-outputs-a-channel": Case(C=5, H=7, K=10, stride=(2, 1), groups=5),
    "norm": Case(C=16, K=16, norm=True),
    "residual": Case(residual="plain", bias=False),
    "norm-residual-with-norm-relu": Case(norm=True, residual="norm", act="relu"),
    "all": Case(N=2, C=16, H=7, W=35, K=16, residual="norm", **FUSED),
    "coefficients": Case(coef=True),
    "silu-strided": Case(norm=True, act="silu", coef=True, stride=(2, 2)),
    "grouped-fused": Case(C=12, K=8, groups=4, residual="plain", **FUSED),
    "depthwise-fused": Case(C=6, K=6, groups=6, residual="norm", **FUSED),
    "pooled-odd": Case(H=7, W=9, resample="pool2", residual="norm", **FUSED),
    "pooled-1x1-stride-2": Case(
        H=9, W=8, R=1, S=1, padding=(0, 0), stride=(2, 2), resample="pool2"
    ),
    "pooled-depthwise": Case(C=4, K=4, groups=4, H=6, W=6, resample="pool2", **FUSED),
    "enlarged": Case(H=3, W=4, resample="up2", residual="norm", **FUSED),
    "enlarged-one-pixel-groups": Case(H=1, W=1, groups=2, resample="up2"),
    "enlarged-depthwise": Case(C=3, K=3, groups=3, H=3, W=2, resample="up2", **FUSED),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def table(channels, rng, wide):
    """A norm, or coefficients: a mean, factors of either sign, an inverse deviation."""
    return torch.randn(4, channels, generator=rng).to(wide)


def arguments(case, dtype, rng, device="cpu"):
    """Seeded arguments of conv2d_wgrad; variance one, as after a normalisation."""
    wide = torch.promote_types(dtype, torch.float32)

    def image(*shape):
        t = torch.randn(shape, generator=rng).to(device, dtype)
        return t.contiguous(memory_format=torch.channels_last)

    x = image(case.N, case.C, case.H, case.W)
    norm = table(case.C, rng, wide).to(device) if case.norm else None
    residual = image(*x.shape) if case.residual else None
    residual_norm = table(case.C, rng, wide).to(device) if case.residual == "norm" else None
    g = image(case.N, case.K, *case.output)
    y = image(*g.shape) if case.coef else None
    coef = table(case.K, rng, wide).to(device) if case.coef else None
    shape = [case.K, case.C // case.groups, case.R, case.S]
    return (
        x, norm, residual, residual_norm, case.act, 0.1, case.resample, g, y, coef,
        shape, list(case.stride), list(case.padding), list(case.dilation), case.groups, case.bias,
    )  # fmt: skip


def factors(arguments):
    """z and dy in float64, rounded to the dtype as the op rounds them."""
    dtype = arguments[0].dtype
    z = prologue_reference(Prologue(*arguments[:7])).to(dtype)
    return z.double(), gradient_reference(*arguments[7:10]).to(dtype).double()


def product(z, dy, arguments):
    """The weight's gradient, by torch's autograd."""
    shape, stride, padding, dilation, groups, _ = arguments[10:]
    weight = torch.zeros(shape, dtype=z.dtype, requires_grad=True)
    out = F.conv2d(z, weight, None, stride, padding, dilation, groups)
    return torch.autograd.grad(out, weight, dy)[0]


def assert_close(results, arguments, unit=None, apart=False):
    """Each sum of n terms may be off by four deviations of the random walk of n roundings.

    That is 4 * sqrt(n) float32 units (or `unit`, that of the products) of the terms' root sum of
    squares: generous, for sums are shorter than n. Where z and dy are computed, a step of
    either's last digit may go the other way, and the interpreter truncates to bfloat16: a unit of
    the dtype a factor, of the sum for the bias of truncation, and four deviations of the walk.
    With a residual z is a sum of two such numbers, and may be smaller than both: another unit.
    Where torch's convolution computes dw (`apart`) it is rounded to the dtype besides.
    """
    arguments = [t.cpu() if torch.is_tensor(t) else t for t in arguments]
    x, norm, residual, _, act, _, resample, g, _, coef, *_, bias = arguments
    z, dy = factors(arguments)
    n = max(1, g[:, 0].numel())
    step = torch.finfo(x.dtype).eps
    computed_z = step * (
        (norm is not None or resample == "up2" or act == "silu") + (residual is not None)
    )
    computed_dy = step * (coef is not None)
    accumulated = (unit or torch.finfo(torch.float32).eps) * n**0.5
    for name, got, want, squares, inexact in (
        ("dw", results[0], product(z, dy, arguments), product(z**2, dy**2, arguments),
         computed_z + computed_dy),
        ("db", results[1], dy.sum((0, 2, 3)), (dy**2).sum((0, 2, 3)), computed_dy),
    ):  # fmt: skip
        if name == "db" and not bias:
            assert got.shape == (0,)
            continue
        assert got.dtype == torch.promote_types(x.dtype, torch.float32), name
        rounded = step * (apart and name == "dw")
        error = (got.cpu().double() - want).abs()
        allowed = 4 * (accumulated + inexact) * squares.sqrt() + (inexact + rounded) * want.abs()
        excess = (error / allowed.clamp_min(1e-300)).max()
        assert excess <= 1, f"{name}: {excess:.2f} times the allowance"


@pytest.fixture
def interpreted():
    """Launch kernels on CPU tensors in triton's interpreter; by themselves those for any shape."""
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    with interpreted(), rows_kernel(False):
        yield


@contextmanager
def rows_kernel(takes):
    """Let the kernel for few channels take whatever it can, or nothing."""
    with patch("fullres.kernels.wgrad_rows.takes_rows", return_value=takes):
        yield


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN, so that a lane that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


# The kernels, interpreted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASE
def test_kernel_computes_the_formula(case, dtype, rng, interpreted, poisoned):
    given = arguments(case, dtype, rng)
    dw, db = conv2d_wgrad_triton(*given)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    assert_close((dw, db), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["all", "depthwise-fused", "pooled-odd", "residual", "one-pixel"])
def test_torchs_convolution_in_place_of_the_product(case, dtype, rng, interpreted, poisoned):
    given = arguments(CASES[case], dtype, rng)
    refusal = patch("fullres.ops.conv_wgrad._launch", side_effect=AssertionError)
    with dispatch.prefer("cudnn"), refusal, torch.autocast("cpu", torch.bfloat16):
        results = conv2d_wgrad_triton(*given)
    for got, want in zip(results, conv2d_wgrad(*given), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    assert_close(results, given, apart=True)


def test_torchs_convolution_is_deterministic_where_it_takes_the_product(rng, interpreted):
    given = arguments(CASES["all"], torch.float32, rng)
    seen = []

    def convolution_backward(*given):
        seen.append(torch.backends.cudnn.deterministic)
        return real(*given)

    real = torch.ops.aten.convolution_backward
    with (
        dispatch.prefer("cudnn"),
        patch.object(torch.ops.aten, "convolution_backward", convolution_backward),
    ):
        conv2d_wgrad_triton(*given)
    assert seen == [True] and not torch.backends.cudnn.deterministic


@pytest.mark.parametrize("ranges", [2, 3, 40])
@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
def test_any_number_of_ranges_covers_each_pixel_once(ranges, groups, rng, interpreted, poisoned):
    # 3 leaves the last range a tile short; 40 are more than there are tiles, and more than FAN_IN.
    given = arguments(Case(N=2, H=9, W=17, groups=groups, **FUSED), torch.float32, rng)
    with patch("fullres.kernels.wgrad.conv2d_wgrad_splits", return_value=ranges):
        assert_close(conv2d_wgrad_triton(*given), given)


def configurations():
    from fullres.kernels import wgrad

    return [
        *((wgrad.conv2d_wgrad_kernel, c, 1) for c in wgrad.CONFIGS),
        *((wgrad.conv2d_wgrad_depthwise_kernel, c, 80) for c in wgrad.DEPTHWISE_CONFIGS),
    ]


def test_every_configuration_computes_the_formula(rng, interpreted, poisoned):
    from fullres.kernels._tune import pinned

    for kernel, config, groups in configurations():
        case = Case(C=80, K=160, H=3, W=19, groups=groups, **FUSED)
        given = arguments(case, torch.float16, rng)
        with pinned(kernel, config):
            assert_close(conv2d_wgrad_triton(*given), given)


def test_kernel_takes_any_layout(rng, interpreted):
    given = arguments(Case(N=4, C=6, K=5, residual="norm", **FUSED), torch.float32, rng)

    def views(t):
        return {
            "contiguous": t.contiguous(),
            "every second image": t.repeat_interleave(2, 0)[::2],
            "a window": F.pad(t, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
            "a slice of channels": torch.cat([t, t], 1)[:, t.shape[1] :],
            "expanded": t[:1].expand(4, -1, -1, -1),
        }

    images = {i: views(given[i]) for i in (0, 2, 7, 8)}
    for name in images[0]:
        changed = [images[i][name] if i in images else t for i, t in enumerate(given)]
        changed[1] = given[1].T.contiguous().T  # a norm that is not dense either
        assert_close(conv2d_wgrad_triton(*changed), changed)


@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
def test_nothing_in_nothing_out(groups, rng, interpreted, poisoned):
    empty = arguments(Case(N=0, groups=groups, **FUSED), torch.float16, rng)
    for function in (conv2d_wgrad, conv2d_wgrad_triton):
        dw, db = function(*empty)
        assert torch.equal(dw, torch.zeros(8, 8 // groups, 3, 3))
        assert torch.equal(db, torch.zeros(8))
    given = list(arguments(Case(groups=groups), torch.float16, rng))
    given[7] = torch.zeros_like(given[7])
    dw, db = conv2d_wgrad_triton(*given)
    assert not dw.any() and not db.any()


def test_padding_is_zero_after_the_prologue(rng, interpreted):
    """A shift makes normalised zeros non-zero: a border of them must not be."""
    given = list(arguments(Case(H=1, W=1, norm=True, bias=False), torch.float32, rng))
    given[1][2] = 1e3
    dw, _ = conv2d_wgrad_triton(*given)
    assert dw[:, :, 1, 1].abs().min() > 10
    dw[:, :, 1, 1] = 0
    assert not dw.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("groups", [1, 3], ids=["dense", "depthwise"])
@pytest.mark.parametrize("fused", [{}, {"norm": True, "act": "relu"}], ids=["plain", "fused"])
def test_a_pixel_that_no_tap_meets_does_no_harm(value, groups, fused, rng, interpreted):
    """The last row and column are beyond the strided filter, yet inside the kernel's tile."""
    case = Case(C=3, K=3, H=6, W=8, stride=(2, 2), padding=(0, 0), groups=groups, **fused)
    given = arguments(case, torch.float32, rng)
    given[0][:, :, 5] = value
    given[0][..., 7] = value
    results = conv2d_wgrad_triton(*given)
    assert results[0].isfinite().all()
    given[0][:, :, 5] = 0
    given[0][..., 7] = 0
    assert_close(results, given)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("resample", ["none", "pool2", "up2"])
def test_nan_reaches_the_channels_that_it_is_in(resample, rng, interpreted):
    case = Case(C=4, K=3, H=6, W=6, norm=True, act="relu", resample=resample)
    given = arguments(case, torch.float32, rng)
    given[0][0, 1, 2, 3] = float("nan")
    dw, db = conv2d_wgrad_triton(*given)
    want = conv2d_wgrad(*given)[0]
    assert torch.equal(dw.isnan(), want.isnan())
    assert dw[:, 1].isnan().all() and dw[:, [0, 2, 3]].isfinite().all()
    assert db.isfinite().all()


def test_the_same_bits_twice(rng, interpreted):
    given = arguments(Case(N=2, C=16, H=17, W=33, K=16, **FUSED), torch.float16, rng)
    first, second = conv2d_wgrad_triton(*given), conv2d_wgrad_triton(*given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


geometry = st.builds(
    Case,
    N=st.integers(1, 2), C=st.integers(1, 5), H=st.integers(1, 9), W=st.integers(1, 9),
    K=st.integers(1, 5), R=st.integers(1, 4), S=st.integers(1, 4),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    groups=st.integers(1, 5), norm=st.booleans(),
    residual=st.sampled_from(["", "plain", "norm"]),
    act=st.sampled_from(["none", "relu", "leaky_relu", "silu"]),
    resample=st.sampled_from(["none", "none", "pool2", "up2"]),
    coef=st.booleans(), bias=st.booleans(),
).map(lambda c: replace(c, C=c.C * c.groups, K=c.K * c.groups))  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(geometry.filter(lambda c: min(*c.output, *c.height_width) > 0))
def test_kernel_agrees_at_any_geometry(case):
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    given = arguments(case, torch.float16, torch.Generator().manual_seed(1))
    with interpreted():
        results = conv2d_wgrad_triton(*given)
    for got, want in zip(results, conv2d_wgrad(*given), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    assert_close(results, given)


# The kernel for few channels, interpreted

ROWS_CASES = {
    **{
        name: case
        for name, case in CASES.items()
        if (case.R, case.S, case.stride, case.dilation, case.groups, case.resample)
        == (3, 3, (1, 1), (1, 1), 1, "none")
        and max(case.C, case.K) <= 64
    },
    "several-strips-the-last-shorter": Case(N=2, C=3, H=37, W=40, K=5, residual="norm", **FUSED),
    "two-blocks-of-outputs": Case(C=20, H=3, W=19, K=64, residual="plain", **FUSED),
    "64-channels": Case(C=64, H=3, W=4, K=48, **FUSED),
    "no-padding": Case(H=20, W=18, padding=(0, 0), **FUSED),
    "one-column": Case(H=20, W=1, **FUSED),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROWS_CASES.values(), ids=ROWS_CASES.keys())
def test_rows_kernel_computes_the_formula(case, dtype, rng, interpreted, poisoned):
    given = arguments(case, dtype, rng)
    with rows_kernel(True), patch("fullres.ops.conv_wgrad._launch", side_effect=AssertionError):
        dw, db = conv2d_wgrad_triton(*given)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    assert_close((dw, db), given)


def test_rows_kernel_computes_the_formula_in_every_configuration(rng, interpreted, poisoned):
    from fullres.kernels import wgrad_rows
    from fullres.kernels._tune import pinned

    for config in wgrad_rows.CONFIGS:
        for area in (16, 300):  # of a row or two, or of all
            given = arguments(Case(C=5, K=16, H=4, W=140, **FUSED), torch.float16, rng)
            cut = patch.object(wgrad_rows, "strip_area", return_value=area)
            with rows_kernel(True), pinned(wgrad_rows.conv2d_wgrad_rows_kernel, config), cut:
                assert_close(conv2d_wgrad_triton(*given), given)


def test_rows_kernel_gives_the_same_bits_twice(rng, interpreted):
    given = arguments(Case(N=2, C=16, H=17, W=33, K=16, **FUSED), torch.float16, rng)
    with rows_kernel(True):
        first, second = conv2d_wgrad_triton(*given), conv2d_wgrad_triton(*given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_rows_kernel_passes_nan_to_the_channels_that_it_is_in(rng, interpreted):
    given = arguments(Case(C=4, K=3, H=6, W=6, norm=True, act="relu"), torch.float32, rng)
    given[0][0, 1, 2, 3] = float("nan")
    with rows_kernel(True):
        dw, db = conv2d_wgrad_triton(*given)
    assert dw[:, 1].isnan().all() and dw[:, [0, 2, 3]].isfinite().all()
    assert db.isfinite().all()


def test_few_channels_take_the_rows_kernel():
    takes = pytest.importorskip("fullres.kernels.wgrad_rows").takes_rows
    full = {"N": 8, "P": 1280, "Q": 2048, "itemsize": 2, "y": True, "r": False}
    assert all(takes(**full, C=C, K=K) for C in (1, 16, 48, 64) for K in (1, 16, 64))
    assert not takes(**full, C=65, K=16) and not takes(**full, C=16, K=65)
    assert takes(**{**full, "itemsize": 4}, C=16, K=16)
    assert not takes(**{**full, "itemsize": 4}, C=32, K=16)  # IEEE products fill registers
    # A part for each of thousands of small images would be more than it saves.
    assert not takes(**{**full, "N": 4096, "P": 4, "Q": 4}, C=16, K=16)


def test_strips_bound_the_length_of_a_sum_and_fill_a_device():
    strips = pytest.importorskip("fullres.kernels.strips")
    for N, H, W in ((1, 1, 1), (1, 50_000, 50_000), (8, 1280, 2048), (256, 17, 8), (1, 300, 301)):
        area = strips.strip_area(N, H, W)
        for columns in (16, 128):
            rows = strips.strip_rows(H, area, columns)
            count = strips.strips(N, H, W, area, columns)
            assert 1 <= rows <= H and rows * columns <= strips.CHAIN
            assert N * H * W <= count * rows * columns
            assert count >= min(512, N * H * W // 1024)
            assert count < 2**31 and rows >= min(H, 8) // 2


# Long sums


def test_ranges_bound_the_length_of_a_sum():
    from fullres.kernels.wgrad import CHAIN, PROGRAMS, conv2d_wgrad_splits

    for pixels in (1, 511, 10_000, 8 * 1280 * 2048, 2**31):
        for blocks in (1, 3, 36, 100_000):
            splits = conv2d_wgrad_splits(pixels, blocks)
            assert pixels <= splits * CHAIN
            assert splits <= max(1, pixels // 256)  # none for the sake of a few pixels
            assert splits * blocks >= PROGRAMS or splits * 512 >= pixels  # enough to fill a device


def test_a_tree_of_sums_does_not_drift(interpreted, poisoned):
    """0.1 is not a float32: 40,000 of them added one by one are wrong in the fourth digit."""
    from fullres.ops.conv_wgrad import sum_parts

    parts = torch.full((40_000, 3, 50), 0.1)
    exact = parts.double().sum(0)
    one_by_one = parts[:, 0, 0].numpy().cumsum()[-1]
    assert abs(one_by_one - exact[0, 0]) > 1e-5 * exact[0, 0]
    sums = sum_parts(parts)
    assert sums.shape == (3, 50)
    levels = 3  # of 32 terms each
    allowed = levels * 31 * torch.finfo(torch.float32).eps / 2 * exact
    assert ((sums.double() - exact).abs() <= allowed).all()
    assert torch.equal(parts[:1].sum(0), sum_parts(parts[:1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_long_sums_that_cancel(dtype, rng, interpreted):
    """A large mean of dy, and of z one that its norm takes away: the sums are small differences."""
    import triton

    from fullres.kernels import wgrad
    from fullres.kernels._tune import pinned

    case = Case(N=1, C=2, H=256, W=256, K=3, norm=True, coef=True)
    given = list(arguments(case, torch.float32, rng))
    given[0] += 1e2
    given[1][:, :] = torch.tensor([1e2, 1.0, 0.0, 1.0])[:, None]
    given[7] += 1e2
    given[9][:] = torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None]
    given = [t.to(dtype) if torch.is_tensor(t) and t.dim() == 4 else t for t in given]
    config = triton.Config({"BLOCK_M": 1024, "MAX_J": 16, "MAX_K": 16})  # for speed alone
    with pinned(wgrad.conv2d_wgrad_kernel, config), patch.object(wgrad, "CHAIN", 2048):
        assert_close(conv2d_wgrad_triton(*given), given)


# The op, on the CPU


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@CASE
def test_reference_is_torchs_gradient(case, dtype, rng):
    given = arguments(case, dtype, rng)
    dw, db = conv2d_wgrad(*given)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    assert_close((dw, db), given, torch.finfo(dtype).eps if dtype == torch.float64 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["all", "depthwise", "residual"])
def test_opcheck(case, dtype, rng):
    torch.library.opcheck(conv2d_wgrad, arguments(CASES[case], dtype, rng))


@CASE
def test_fake_is_as_the_real(case, rng):
    given = arguments(case, torch.float16, rng)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = conv2d_wgrad(*(mode.from_tensor(t) if torch.is_tensor(t) else t for t in given))
    for fake, real in zip(fakes, conv2d_wgrad(*given), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_autocast_changes_nothing(rng):
    given = arguments(CASES["all"], torch.float32, rng)
    plain = conv2d_wgrad(*given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = conv2d_wgrad(*given)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


NAMES = (
    "x norm residual residual_norm act slope resample g y coef "
    "weight_shape stride padding dilation groups bias"
).split()
X = torch.zeros(2, 4, 5, 6)
BAD = {  # the argument that is named, what is given in place of good arguments
    "x-has-3-dimensions": ("x", {"x": X[0]}),
    "x-is-integer": ("x", {"x": X.long()}),
    "x-has-no-channels": ("x", {"x": X[:, :0]}),
    "image-smaller-than-the-filter": ("x", {"weight_shape": [8, 4, 9, 3]}),
    "image-pooled-away": ("x", {"x": X[:, :, :1], "resample": "pool2"}),
    "norm-of-other-channels": ("norm", {"norm": torch.zeros(4, 3)}),
    "norm-of-three-rows": ("norm", {"norm": torch.zeros(3, 4)}),
    "norm-of-half-precision": ("norm", {"norm": torch.zeros(4, 4).half()}),
    "residual-of-another-size": ("residual", {"residual": X[:, :, :4]}),
    "residual-of-another-dtype": ("residual", {"residual": X.half()}),
    "residual-norm-without-residual": ("residual_norm", {"residual_norm": torch.zeros(4, 4)}),
    "act-unknown": ("act", {"act": "tanh"}),
    "resample-unknown": ("resample", {"resample": "pool3"}),
    "g-of-another-size": ("g", {"g": torch.zeros(2, 8, 5, 5)}),
    "g-of-other-channels": ("g", {"g": torch.zeros(2, 7, 5, 6)}),
    "g-of-another-dtype": ("g", {"g": torch.zeros(2, 8, 5, 6).half()}),
    "y-alone": ("y", {"y": torch.zeros(2, 8, 5, 6)}),
    "coef-alone": ("y", {"coef": torch.zeros(4, 8)}),
    "coef-too-short": ("coef", {"y": torch.zeros(2, 8, 5, 6), "coef": torch.zeros(4, 7)}),
    "weight-of-other-channels": ("weight_shape", {"weight_shape": [8, 3, 3, 3]}),
    "weight-of-three-numbers": ("weight_shape", {"weight_shape": [8, 4, 3]}),
    "weight-without-taps": ("weight_shape", {"weight_shape": [8, 4, 0, 3]}),
    "groups-not-a-divisor-of-C": ("groups", {"groups": 3}),
    "groups-not-a-divisor-of-K": ("weight_shape", {"groups": 4, "weight_shape": [6, 1, 3, 3]}),
    "stride-zero": ("stride", {"stride": [0, 1]}),
    "stride-one-number": ("stride", {"stride": [1]}),
    "padding-negative": ("padding", {"padding": [1, -1]}),
    "dilation-zero": ("dilation", {"dilation": [1, 0]}),
}


@pytest.mark.parametrize(("argument", "changes"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("path", ["real", "fake", "triton"])
def test_refuses_with_the_arguments_name(argument, changes, path):
    good = (
        X, None, None, None, "none", 0.0, "none", torch.zeros(2, 8, 5, 6), None, None,
        [8, 4, 3, 3], [1, 1], [1, 1], [1, 1], 1, True,
    )  # fmt: skip
    given = dict(zip(NAMES, good, strict=True)) | changes
    function = conv2d_wgrad_triton if path == "triton" else conv2d_wgrad
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        if path == "fake":
            given = {k: mode.from_tensor(t) if torch.is_tensor(t) else t for k, t in given.items()}
            with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
                function(**given)
    if path != "fake":
        with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
            function(**given)


def test_refuses_rows_beyond_int32():
    with FakeTensorMode():
        x = torch.empty(1, 4096, 3, 40_000, dtype=torch.bfloat16)
        g = torch.empty(1, 1, 3, 40_000, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="^x: want .* rows of x and of y below 2"):
            conv2d_wgrad(
                x, None, None, None, "none", 0.0, "none", g, None, None,
                [1, 4096, 1, 1], [1, 1], [0, 0], [1, 1], 1, False,
            )  # fmt: skip


# The op, on a device


@contextmanager
def first_configurations():
    from fullres.kernels import wgrad
    from fullres.kernels._tune import pinned

    dense, depthwise = wgrad.conv2d_wgrad_kernel, wgrad.conv2d_wgrad_depthwise_kernel
    with pinned(dense, wgrad.CONFIGS[0]), pinned(depthwise, wgrad.DEPTHWISE_CONFIGS[0]):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASE
def test_device_computes_the_formula(case, dtype, rng):
    given = arguments(case, dtype, rng, "cuda")
    # bfloat16 through the tuner, as users have it; compiling all for each dtype would take minutes.
    with nullcontext() if dtype == torch.bfloat16 else first_configurations():
        dw, db = conv2d_wgrad(*given)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    assert_close((dw, db), given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROWS_CASES.values(), ids=ROWS_CASES.keys())
def test_device_computes_the_formula_by_rows(case, dtype, rng):
    if dtype == torch.float32:
        case = replace(case, C=min(case.C, 16), K=min(case.K, 16))
    given = arguments(case, dtype, rng, "cuda")
    for takes in (True, False):
        with rows_kernel(takes):
            assert_close(conv2d_wgrad(*given), given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_computes_the_formula_in_every_configuration(dtype, rng):
    from triton.runtime.errors import OutOfResources

    from fullres.kernels import wgrad
    from fullres.kernels._tune import pinned

    for kernel, config, groups in configurations():
        case = Case(N=2, C=80, K=160, H=19, W=67, groups=groups, **FUSED)
        given = arguments(case, dtype, rng, "cuda")
        with pinned(kernel, config):
            try:
                results = conv2d_wgrad_triton(*given)
            except OutOfResources:  # the tuner skips it; the first may not fail anywhere
                assert config not in (wgrad.CONFIGS[0], wgrad.DEPTHWISE_CONFIGS[0])
                continue
        assert_close(results, given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 64])
def test_device_gives_the_same_bits_twice(channels, dtype, rng):
    case = Case(N=2, C=channels, K=channels, H=200, W=300, **FUSED)
    given = arguments(case, dtype, rng, "cuda")
    first = conv2d_wgrad(*given)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, conv2d_wgrad(*given), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_long_sums_that_cancel(dtype, rng):
    """No tensor core may lose in its accumulator what the tree keeps."""
    given = list(arguments(Case(C=16, K=16, H=1024, W=1024), dtype, rng, "cuda"))
    given[7] += 1e2
    assert_close(conv2d_wgrad(*given), given)


@pytest.mark.gpu
def test_device_uses_tf32_only_where_allowed(rng):
    if torch.version.hip is not None:
        pytest.skip("AMD multiplies float32 in IEEE arithmetic only")
    given = arguments(Case(C=64, K=64, H=33, W=65), torch.float32, rng, "cuda")
    assert_close(conv2d_wgrad(*given), given)
    torch.set_float32_matmul_precision("high")
    try:
        tf32 = conv2d_wgrad(*given)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_close(tf32, given, unit=2.0**-10)
    with pytest.raises(AssertionError, match="times the allowance"):
        assert_close(tf32, given)


@pytest.mark.gpu
def test_device_addresses_past_two_to_the_31(rng):
    """Only the last image is not zero, and lies beyond 2**31 elements of x and of g."""
    N, C, H, W = 53, 16, 1280, 2048
    if torch.cuda.mem_get_info()[0] < 4 * N * C * H * W + (4 << 30):
        pytest.skip("needs 12 GiB of free device memory")
    last = arguments(Case(C=C, K=C, H=H, W=W), torch.bfloat16, rng, "cuda")
    given = list(last)
    for i in (0, 7):
        shape = (N, *last[i].shape[1:])
        given[i] = torch.empty(
            shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last
        ).zero_()
        given[i][-1:] = last[i]
        assert given[i].numel() > 2**31
    assert_close(conv2d_wgrad(*given), last)


@pytest.mark.gpu
def test_device_op_passes_opcheck(rng):
    torch.library.opcheck(conv2d_wgrad, arguments(CASES["all"], torch.float32, rng, "cuda"))
