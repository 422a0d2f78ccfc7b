import importlib.util
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fullres.ops import conv_backward, dispatch
from fullres.ops.conv_backward import conv2d_backward, conv2d_backward_triton
from fullres.ops.conv_dgrad import conv2d_dgrad
from fullres.ops.conv_wgrad import conv2d_wgrad


def beside(name):
    """Return a test file of this folder, which pytest imports under no name of its own."""
    spec = importlib.util.spec_from_file_location(f"beside_{name}", Path(__file__).with_name(name))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


dgrad = beside("test_dgrad.py")  # what its two gradients have to be, others have said
wgrad = beside("test_wgrad.py")
interpreted, poisoned = wgrad.interpreted, wgrad.poisoned
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """A size and what is fused; the filter is R x R."""

    N: int = 1
    C: int = 8
    H: int = 5
    W: int = 6
    K: int = 8
    R: int = 3
    norm: bool = False
    residual: str = ""  # "plain" or "norm"
    act: str = "none"
    coef: bool = False
    add: bool = False
    sums: bool = False
    bias: bool = False


FUSED = {"norm": True, "act": "leaky_relu", "coef": True, "sums": True}
ALL = {**FUSED, "residual": "norm", "add": True, "bias": True}
CASES = {
    "odd-sizes-across-tiles": Case(C=16, H=7, W=37, K=16),
    "one-pixel": Case(H=1, W=1, **ALL),
    "one-row": Case(H=1, W=40, **ALL),
    "one-column": Case(H=40, W=1, **ALL),
    "several-strips-the-last-shorter": Case(N=2, C=4, H=37, W=5, K=3, **ALL),
    "grey-image": Case(N=2, C=1, K=16, bias=True),
    "one-class-out": Case(C=24, K=1),
    "channels-not-a-power-of-two": Case(N=2, C=24, K=20, **FUSED),
    "more-in-than-out": Case(C=32, K=8, **FUSED),
    "more-out-than-in": Case(C=8, K=32, **ALL),
    "norm-alone": Case(norm=True),
    "coefficients-alone": Case(coef=True, bias=True),
    "add-alone": Case(add=True),
    "sums-alone": Case(sums=True),
    "bias-alone": Case(W=21, H=20, bias=True),
    "act-without-norm": Case(act="relu", sums=True),
    "residual-plain": Case(residual="plain", act="relu", sums=True),
    "residual-without-norm-of-x": Case(residual="norm", act="leaky_relu", sums=True),
    "silu": Case(norm=True, act="silu", coef=True, add=True),
    "all": Case(N=2, C=16, H=19, W=35, K=16, **ALL),
    "all-32": Case(C=32, H=6, W=20, K=32, **ALL),
    "1x1": Case(N=2, C=16, H=7, W=11, K=24, R=1),
    "1x1-one-pixel": Case(H=1, W=1, R=1, **ALL),
    "1x1-silu": Case(C=5, K=3, R=1, norm=True, act="silu", coef=True, sums=True),
    "1x1-all-in-two-ranges": Case(N=2, C=24, H=9, W=9, K=32, R=1, **ALL),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def arguments(case, dtype, rng, device="cpu"):
    """Seeded arguments of conv2d_backward; variance one, as after a normalisation."""
    wide = torch.promote_types(dtype, torch.float32)

    def image(*shape):
        t = torch.randn(shape, generator=rng).to(device, dtype)
        return t.contiguous(memory_format=torch.channels_last)

    def table(channels):
        return torch.randn(4, channels, generator=rng).to(device, wide)

    size = case.N, case.C, case.H, case.W
    g = image(case.N, case.K, case.H, case.W)
    return [
        g, image(*g.shape) if case.coef else None, table(case.K) if case.coef else None,
        image(case.K, case.C, case.R, case.R), image(*size),
        table(case.C) if case.norm else None, image(*size) if case.residual else None,
        table(case.C) if case.residual == "norm" else None, case.act, 0.1, "none",
        image(*size) if case.add else None,
        [1, 1], [case.R // 2] * 2, [1, 1], 1, case.sums, case.bias,
    ]  # fmt: skip


def dgrad_arguments(given):
    return [*given[:4], list(given[4].shape), *given[4:17]]


def wgrad_arguments(given):
    return [*given[4:11], *given[:3], list(given[3].shape), *given[12:16], given[17]]


def assert_close(results, given, apart=False):
    """As the two gradients' own tests: allowances by formula about float64."""
    dgrad.assert_close(results[:2], dgrad_arguments(given), apart=apart)
    wgrad.assert_close(results[2:], wgrad_arguments(given), apart=apart)


@contextmanager
def one_pass():
    """Let the one kernel take whatever it can, however small."""
    kernels = pytest.importorskip("fullres.kernels.backward")
    with patch.object(kernels, "two_pass_bytes", return_value=1 << 62):
        yield


@contextmanager
def two_passes():
    with (
        dispatch.prefer("cudnn"),
        patch.object(conv_backward, "_launch", side_effect=AssertionError),
    ):
        yield


# The kernels, interpreted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASE
def test_kernel_computes_the_formula(case, dtype, rng, interpreted, poisoned):
    if dtype == torch.float32 and case.R == 3:
        case = replace(case, C=min(case.C, 16), K=min(case.K, 16))
    given = arguments(case, dtype, rng)
    with one_pass(), patch.object(conv_backward, "conv2d_dgrad_triton", side_effect=AssertionError):
        results = conv2d_backward_triton(*given)
    for i in (0, 2):
        assert results[i].is_contiguous(memory_format=torch.channels_last)
    assert_close(results, given)


@pytest.mark.parametrize(("K", "R"), [(16, 1), (16, 3), (32, 3)])
def test_every_configuration_computes_the_formula(K, R, rng, interpreted, poisoned):
    from fullres.kernels import backward
    from fullres.kernels._tune import pinned

    kernel = backward.conv2d_backward_kernel(3, K, R, 2)
    for config in kernel.every_config:
        for C, fused in ((3, ALL), (16, {}), (16, FUSED)):  # with 16 no load needs a mask
            given = arguments(Case(C=C, K=K, H=4, W=141, R=R, **fused), torch.float16, rng)
            with one_pass(), pinned(kernel, config):
                assert_close(conv2d_backward_triton(*given), given)


def test_each_pixel_counts_once_whatever_the_strips(rng, interpreted, poisoned):
    """Strips of one row each have nothing but neighbours."""
    from fullres.kernels import backward

    given = arguments(Case(N=2, H=9, W=17, **ALL), torch.float32, rng)
    for area in (1, 128):
        with one_pass(), patch.object(backward, "strip_area", return_value=area):
            assert_close(conv2d_backward_triton(*given), given)
    given = arguments(Case(N=2, H=29, W=17, R=1, **ALL), torch.float32, rng)
    for pixels in (128, 256):
        with one_pass(), patch.object(backward, "range_pixels", return_value=pixels):
            assert_close(conv2d_backward_triton(*given), given)


def test_no_sum_is_longer_than_a_chain_and_programs_fill_a_device():
    backward = pytest.importorskip("fullres.kernels.backward")
    from fullres.kernels.wgrad import CHAIN

    for M in (1, 1000, 8 * 1280 * 2048, 50_000**2):
        pixels = backward.range_pixels(M)
        assert pixels % backward.MOST_PIXELS == 0 and pixels <= CHAIN
        assert backward.conv2d_backward_programs(1, 1, M, 16, 16, 1, 2, {}) * pixels >= M
    for R in (1, 3):  # 2**31 elements and more, in launches of one axis
        for config in backward.conv2d_backward_kernel(16, 16, R, 2).every_config:
            rest = 16, 16, R, 2, config.kwargs
            assert backward.conv2d_backward_programs(64, 1280, 2048, *rest) < 2**31
            assert backward.conv2d_backward_programs(1, 1280, 2048, *rest) >= 400


@pytest.mark.parametrize("R", [1, 3])
def test_kernel_takes_any_layout(R, rng, interpreted):
    given = arguments(Case(N=2, C=6, K=5, R=R, **ALL), torch.float32, rng)

    def views(t):
        return {
            "contiguous": t.contiguous(),
            "every second": t.repeat_interleave(2, 0)[::2],
            "a window": F.pad(t, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
            "a slice of channels": torch.cat([t, t], 1)[:, t.shape[1] :],
        }

    images = {i: views(given[i]) for i in (0, 1, 3, 4, 6, 11)}
    for name in images[0]:
        changed = [images[i][name] if i in images else t for i, t in enumerate(given)]
        changed[5] = given[5].T.contiguous().T  # a norm that is not dense either
        with one_pass():
            assert_close(conv2d_backward_triton(*changed), changed)


def test_padding_is_zero_after_both_prologues(rng, interpreted):
    """Shifts make zeros of x and of (g, y) non-zero: their borders must not be."""
    given = arguments(Case(C=4, K=4, H=1, W=1, norm=True, coef=True), torch.float32, rng)
    given[2][3] = 1e3
    given[5][2] = 1e3
    with one_pass():
        gradient, _, dw, _ = conv2d_backward_triton(*given)
    assert dw[:, :, 1, 1].abs().min() > 1e5
    dw[:, :, 1, 1] = 0
    assert not dw.any()
    given[3][:, :, 1, 1] = 0
    with one_pass():
        assert not conv2d_backward_triton(*given)[0].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("R", [1, 3])
def test_nan_goes_where_it_belongs(R, rng, interpreted):
    """In an image's interior as in torch; a NaN of z at the border also where no tap meets it."""
    case = Case(C=4, K=3, H=6, W=6, R=R, norm=True, act="relu", sums=True, bias=True)
    given = arguments(case, torch.float32, rng)
    given[4][0, 1, 2, 3] = float("nan")
    with one_pass():
        got = conv2d_backward_triton(*given)
    for a, b in zip(got, conv2d_backward(*given), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert got[2][:, [0, 2, 3]].isfinite().all()

    given = arguments(case, torch.float32, rng)
    given[0][0, 2, 3, 2] = float("inf")
    with one_pass():
        got = conv2d_backward_triton(*given)
    for a, b in zip(got, conv2d_backward(*given), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


def test_the_same_bits_twice(rng, interpreted):
    for R in (1, 3):
        given = arguments(Case(N=2, C=8, H=17, W=33, K=8, R=R, **ALL), torch.float16, rng)
        with one_pass():
            first, second = conv2d_backward_triton(*given), conv2d_backward_triton(*given)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_long_sums_that_cancel(dtype, rng, interpreted):
    """The mean of x is taken away before anything is scaled: sums are small differences."""
    from fullres.kernels import backward

    case = Case(C=2, H=128, W=64, K=2, norm=True, sums=True, bias=True)
    given = arguments(case, torch.float32, rng)
    given[4] += 1e2
    given[5][:, :] = torch.tensor([1e2, 1.0, 0.0, 1.0])[:, None]
    given[0] += 1e2
    given = [t.to(dtype) if torch.is_tensor(t) and t.dim() == 4 else t for t in given]
    with one_pass(), patch.object(backward, "strip_area", return_value=8192):
        assert_close(conv2d_backward_triton(*given), given)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("channels", [4, 7])
def test_a_large_mean_of_y_stays_where_y_is(channels, rng, interpreted):
    """Beside y, where 0 stands for it, b * (0 - mean) is beyond float16: Inf * 0 would be NaN."""
    case = Case(C=4, H=4, W=100, K=channels, coef=True, bias=True)  # three tiles wide
    given = arguments(case, torch.float16, rng)
    given[1] = (given[1].float() + 1e4).half()
    given[2][0], given[2][2] = 1e4, 10.0
    with one_pass():
        assert_close(conv2d_backward_triton(*given), given)


cases = st.builds(
    Case,
    N=st.integers(1, 2), C=st.integers(1, 20), H=st.integers(1, 20), W=st.integers(1, 40),
    K=st.integers(1, 20), R=st.sampled_from([1, 3]), norm=st.booleans(),
    residual=st.sampled_from(["", "plain", "norm"]),
    act=st.sampled_from(["none", "relu", "leaky_relu", "silu"]),
    coef=st.booleans(), add=st.booleans(), sums=st.booleans(), bias=st.booleans(),
)  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases)
def test_kernel_agrees_at_any_size(case):
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    given = arguments(case, torch.float16, torch.Generator().manual_seed(1))
    with interpreted(), one_pass():
        results = conv2d_backward_triton(*given)
    for got, want in zip(results, conv2d_backward(*given), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    assert_close(results, given)


# Which of the two


LARGE = Case(C=16, H=1280, W=2048, K=16, **FUSED)
PASSES = {  # case, changed arguments by index, whether one kernel computes all
    "16-channels-at-full-resolution": (LARGE, {}, True),
    "32-channels": (replace(LARGE, C=32, K=32), {}, True),
    "16-to-32": (replace(LARGE, K=32), {}, True),
    "residual": (replace(LARGE, residual="norm", add=True), {}, True),
    "64-channels-fill-the-registers": (replace(LARGE, C=64, K=64), {}, False),
    "1x1-64-channels": (replace(LARGE, C=64, K=64, R=1), {}, True),
    "1x1-65-channels": (replace(LARGE, C=65, K=64, R=1), {}, False),
    "5x5": (replace(LARGE, R=5), {}, False),
    "two-groups": (replace(LARGE, C=32), {3: [16, 16, 3, 3], 15: 2}, False),
    "dilated": (LARGE, {13: [2, 2], 14: [2, 2]}, False),
    "parts-outweigh-tiny-images": (replace(LARGE, N=256, H=8, W=8), {}, False),
}


@pytest.mark.parametrize(("case", "changes", "one"), PASSES.values(), ids=PASSES.keys())
def test_one_pass_is_taken_where_registers_suffice_and_bytes_are_saved(case, changes, one, rng):
    pytest.importorskip("triton")

    def asks(*, dtype=torch.bfloat16):
        with FakeTensorMode():
            given = arguments(replace(case, H=1, W=1, N=1), dtype, None)
            for i in (0, 1, 4, 6, 11):
                if given[i] is not None:
                    given[i] = torch.empty(case.N, given[i].shape[1], case.H, case.W, dtype=dtype)
            for i, value in changes.items():
                given[i] = torch.empty(value, dtype=dtype) if i == 3 else value
            g, y, _, weight, *_, add = given[:12]
            prologue = conv_backward.Prologue(*given[4:11])
            geometry = conv_backward.Geometry(weight.shape, *given[12:16])
            return conv_backward.takes_one_pass(g, y, weight, prologue, add, geometry, given[16])

    assert asks() == one
    if one:
        with dispatch.prefer("cudnn"):
            assert not asks()
        if case.R == 3 and max(case.C, case.K) > 16:
            assert not asks(dtype=torch.float32)


def test_strided_and_resampled_images_take_two_passes(rng, interpreted):
    given = arguments(Case(C=4, K=3, H=6, W=8, **FUSED), torch.float32, rng)
    given[10] = "pool2"
    for i in (0, 1):
        given[i] = given[i][:, :, :3, :4].contiguous(memory_format=torch.channels_last)
    with one_pass(), patch.object(conv_backward, "_launch", side_effect=AssertionError):
        assert_close(conv2d_backward_triton(*given), given)
    given = arguments(Case(C=4, K=3, H=6, W=8, **FUSED), torch.float32, rng)
    given[12] = [2, 2]
    for i in (0, 1):
        given[i] = given[i][:, :, :3, :4].contiguous(memory_format=torch.channels_last)
    with one_pass(), patch.object(conv_backward, "_launch", side_effect=AssertionError):
        assert_close(conv2d_backward_triton(*given), given)


def test_dispatch_decides_by_the_tables_line(rng, interpreted, tmp_path, monkeypatch):
    """Written by a benchmark, one line turns the pass that it names, and no other."""
    given = arguments(Case(C=16, H=9, W=9, K=16, **FUSED), torch.float32, rng)
    shape = dispatch.Shape("backward", torch.float32, 16, 16, (3, 3))
    for ours, launched in ((1.0, True), (3.0, False)):
        table = tmp_path / f"{ours}.csv"
        dispatch.write_table(table, [(shape, ours, 2.0)])
        monkeypatch.setenv("FULLRES_DISPATCH", str(table))
        with (
            one_pass(),
            patch.object(conv_backward, "_launch", wraps=conv_backward._launch) as launch,
        ):
            assert_close(conv2d_backward_triton(*given), given)
        assert launch.called == launched


def test_both_ways_give_the_same(rng, interpreted):
    given = arguments(CASES["all"], torch.float16, rng)
    with one_pass():
        one = conv2d_backward_triton(*given)
    with two_passes():
        two = conv2d_backward_triton(*given)
    assert_close(one, given)
    assert_close(two, given, apart=True)
    for a, b in zip(one, two, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


# The op, on the CPU


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@CASE
def test_reference_is_both_references(case, dtype, rng):
    given = arguments(case, dtype, rng)
    results = conv2d_backward(*given)
    both = *conv2d_dgrad(*dgrad_arguments(given)), *conv2d_wgrad(*wgrad_arguments(given))
    for a, b in zip(results, both, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        # torch may add a product's terms in another order where it computes both gradients.
        unit = 8 * torch.finfo(dtype).eps
        assert (a - b).abs().max() <= unit * b.abs().max() if a.numel() else a.shape == b.shape


@pytest.mark.parametrize("R", [1, 3])
def test_nothing_in(R, rng, interpreted, poisoned):
    given = arguments(Case(N=0, R=R, **ALL), torch.float16, rng)
    for function in (conv2d_backward, conv2d_backward_triton):
        gradient, sums, dw, db = function(*given)
        assert gradient.shape == given[4].shape
        assert torch.equal(sums, torch.zeros(3, 8))
        assert torch.equal(dw, torch.zeros(8, 8, R, R)) and torch.equal(db, torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["all", "add-alone", "1x1-silu"])
def test_opcheck(case, dtype, rng):
    torch.library.opcheck(conv2d_backward, tuple(arguments(CASES[case], dtype, rng)))


@CASE
def test_fake_is_as_the_real(case, rng):
    given = arguments(case, torch.float16, rng)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = conv2d_backward(*(mode.from_tensor(t) if torch.is_tensor(t) else t for t in given))
    for fake, real in zip(fakes, conv2d_backward(*given), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_autocast_changes_nothing(rng):
    given = arguments(CASES["all"], torch.float32, rng)
    plain = conv2d_backward(*given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = conv2d_backward(*given)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


NAMES = (
    "g y coef weight x norm residual residual_norm act slope resample add "
    "stride padding dilation groups sums bias"
).split()
X, G, WEIGHT = torch.zeros(2, 4, 5, 6), torch.zeros(2, 8, 5, 6), torch.zeros(8, 4, 3, 3)
BAD = {  # the argument that is named, what is given in place of good arguments
    "x-has-3-dimensions": ("x", {"x": X[0]}),
    "x-is-integer": ("x", {"x": X.long()}),
    "image-smaller-than-the-filter": ("x", {"weight": torch.zeros(8, 4, 9, 3)}),
    "norm-of-other-channels": ("norm", {"norm": torch.zeros(4, 3)}),
    "residual-of-another-size": ("residual", {"residual": X[:, :, :4]}),
    "residual-norm-without-residual": ("residual_norm", {"residual_norm": torch.zeros(4, 4)}),
    "act-unknown": ("act", {"act": "tanh"}),
    "resample-unknown": ("resample", {"resample": "pool3"}),
    "g-of-another-size": ("g", {"g": G[:, :, :4]}),
    "g-of-another-dtype": ("g", {"g": G.half()}),
    "y-alone": ("y", {"y": G}),
    "coef-alone": ("y", {"coef": torch.zeros(4, 8)}),
    "coef-too-short": ("coef", {"y": G, "coef": torch.zeros(4, 7)}),
    "weight-of-3-dimensions": ("weight", {"weight": WEIGHT[0]}),
    "weight-of-other-channels": ("weight", {"weight": WEIGHT[:, :3]}),
    "weight-of-another-dtype": ("weight", {"weight": WEIGHT.half()}),
    "add-of-another-size": ("add", {"add": X[:1]}),
    "groups-not-a-divisor-of-C": ("groups", {"groups": 3}),
    "stride-zero": ("stride", {"stride": [0, 1]}),
    "padding-negative": ("padding", {"padding": [1, -1]}),
    "dilation-zero": ("dilation", {"dilation": [1, 0]}),
}


@pytest.mark.parametrize(("argument", "changes"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("path", ["real", "fake", "triton"])
def test_refuses_with_the_arguments_name(argument, changes, path):
    good = (
        G, None, None, WEIGHT, X, None, None, None, "none", 0.0, "none", None,
        [1, 1], [1, 1], [1, 1], 1, False, True,
    )  # fmt: skip
    given = dict(zip(NAMES, good, strict=True)) | changes
    function = conv2d_backward_triton if path == "triton" else conv2d_backward
    mode = FakeTensorMode(allow_non_fake_inputs=True) if path == "fake" else nullcontext()
    with mode:
        if path == "fake":
            given = {k: mode.from_tensor(t) if torch.is_tensor(t) else t for k, t in given.items()}
        with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
            function(**given)


# The op, on a device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASE
def test_device_computes_the_formula(case, dtype, rng):
    if dtype == torch.float32 and case.R == 3:
        case = replace(case, C=min(case.C, 16), K=min(case.K, 16))
    given = arguments(case, dtype, rng, "cuda")
    with one_pass():
        assert_close(conv2d_backward(*given), given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 3])
def test_device_computes_the_formula_in_every_configuration(R, dtype, rng):
    from triton.runtime.errors import OutOfResources

    from fullres.kernels import backward
    from fullres.kernels._tune import pinned

    channels = 16 if dtype == torch.float32 else 32
    kernel = backward.conv2d_backward_kernel(channels, channels, R, dtype.itemsize)
    for config in kernel.every_config:
        case = Case(N=2, C=channels, K=channels, H=61, W=150, R=R, **ALL)
        given = arguments(case, dtype, rng, "cuda")
        with one_pass(), pinned(kernel, config):
            try:
                results = conv2d_backward(*given)
            except OutOfResources:  # the tuner skips it; the first may not fail anywhere
                assert config is not kernel.every_config[0]
                continue
        assert_close(results, given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [16, 32])
def test_device_gives_the_same_bits_twice(channels, dtype, rng):
    case = Case(N=2, C=channels, K=channels, H=200, W=300, **ALL)
    given = arguments(case, dtype, rng, "cuda")
    first = conv2d_backward(*given)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, conv2d_backward(*given), strict=True))


@pytest.mark.gpu
def test_device_agrees_with_two_passes(rng):
    given = arguments(Case(N=2, C=16, K=16, H=300, W=200, **ALL), torch.bfloat16, rng, "cuda")
    assert_close(conv2d_backward(*given), given)
    with two_passes():
        assert_close(conv2d_backward(*given), given, apart=True)


@pytest.mark.gpu
def test_device_addresses_past_two_to_the_31(rng):
    """Only the last image is not zero, and lies beyond 2**31 elements of x and of g."""
    N, C, H, W = 53, 16, 1280, 2048
    if torch.cuda.mem_get_info()[0] < 6 * N * C * H * W + (4 << 30):
        pytest.skip("needs 16 GiB of free device memory")
    last = arguments(Case(C=C, K=C, H=H, W=W, bias=True), torch.bfloat16, rng, "cuda")
    given = list(last)
    for i in (0, 4):
        given[i] = torch.empty(
            (N, C, H, W), dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last
        ).zero_()
        given[i][-1:] = last[i]
        assert given[i].numel() > 2**31
    gradient, sums, dw, db = conv2d_backward(*given)
    assert not gradient[:-1].any()
    assert_close((gradient[-1:], sums, dw, db), last)


@pytest.mark.gpu
def test_device_op_passes_opcheck(rng):
    torch.library.opcheck(
        conv2d_backward, tuple(arguments(CASES["all"], torch.float32, rng, "cuda"))
    )
