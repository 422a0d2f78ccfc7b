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
from fullres.ops.conv_dgrad import conv2d_dgrad, conv2d_dgrad_triton
from fullres.ops.fuse import (
    Prologue,
    gradient_reference,
    gradient_sums_reference,
    preactivation,
    prologue_backward_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """A geometry and what is fused; H and W are of x, before it is resampled."""

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
    coef: bool = False
    x: bool = False
    norm: bool = False
    residual: str = ""  # "plain" or "norm"
    act: str = "none"
    resample: str = "none"
    add: bool = False
    sums: bool = False

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


FUSED = {"x": True, "norm": True, "act": "leaky_relu", "coef": True, "sums": True, "add": True}
CASES = {
    "odd-sizes-across-tiles": Case(C=16, H=7, W=37, K=16),
    "one-pixel": Case(H=1, W=1),
    "one-output-pixel": Case(H=3, W=3, padding=(0, 0)),
    "grey-image": Case(N=2, C=1, K=16),
    "colour-image-7x7-stride-2": Case(C=3, H=17, W=19, R=7, S=7, stride=(2, 2), padding=(3, 3)),
    "one-class-out": Case(C=24, K=1, R=1, S=1, padding=(0, 0)),
    "channels-not-a-power-of-two": Case(N=2, C=24, K=40),
    "channels-in-several-blocks": Case(C=112, H=4, W=5, K=80),
    "1x1-stride-2-last-row-untouched": Case(
        C=16, H=8, W=9, R=1, S=1, stride=(2, 2), padding=(0, 0)
    ),
    "2x2-stride-2": Case(C=16, H=8, W=9, K=32, R=2, S=2, stride=(2, 2), padding=(0, 0)),
    "3x3-stride-2": Case(C=8, H=9, W=70, stride=(2, 2)),
    "4x4-stride-2-shifted": Case(C=3, H=8, W=6, R=4, S=4, stride=(2, 2), padding=(1, 1)),
    "4x4-stride-4-many-outputs": Case(C=3, H=8, W=12, K=70, R=4, S=4, stride=(4, 4)),
    "stride-wider-than-the-filter": Case(H=9, W=8, R=2, S=2, stride=(3, 4), padding=(0, 0)),
    "stride-wider-than-the-image": Case(H=3, W=2, stride=(5, 4)),
    "padding-wider-than-the-filter": Case(C=4, H=2, W=3, padding=(3, 4)),
    "filter-not-square": Case(C=4, H=6, W=9, R=1, S=5, padding=(0, 2)),
    "dilation-differs-by-axis": Case(C=5, H=9, W=11, dilation=(2, 3), padding=(2, 3)),
    "dilation-and-stride": Case(C=4, H=11, W=12, stride=(2, 2), dilation=(3, 2), padding=(2, 1)),
    "dilation-and-stride-share-a-factor": Case(
        C=4, H=13, W=14, S=4, stride=(4, 6), dilation=(6, 4), padding=(5, 3)
    ),
    "two-groups": Case(C=12, K=10, groups=2),
    "groups-stride-2": Case(C=12, K=10, groups=2, H=6, stride=(2, 2)),
    "depthwise": Case(N=2, C=24, K=24, groups=24),
    "depthwise-two-outputs-a-channel": Case(C=5, H=7, K=10, stride=(2, 1), groups=5),
    "depthwise-stride-wider-than-the-filter": Case(
        C=5, H=7, K=5, R=2, S=2, stride=(3, 3), groups=5
    ),
    "coefficients": Case(coef=True),
    "add": Case(add=True),
    "sums-alone": Case(x=True, sums=True),
    "act-without-norm-or-sums": Case(x=True, act="relu"),
    "norm": Case(x=True, norm=True, act="relu", sums=True),
    "residual": Case(x=True, residual="plain", act="relu", sums=True),
    "norm-residual-with-norm": Case(x=True, norm=True, residual="norm", act="relu", sums=True),
    "all": Case(N=2, C=16, H=7, W=35, K=16, residual="norm", **FUSED),
    "all-stride-2": Case(N=2, C=16, H=7, W=35, K=16, residual="norm", stride=(2, 2), **FUSED),
    "all-2x2-stride-2": Case(
        C=16, H=6, W=7, K=8, R=2, S=2, padding=(0, 0), residual="plain", stride=(2, 2), **FUSED
    ),
    "silu-strided": Case(x=True, norm=True, act="silu", coef=True, stride=(2, 2)),
    "grouped-fused": Case(C=12, K=8, groups=4, residual="plain", **FUSED),
    "depthwise-fused": Case(C=6, K=6, groups=6, residual="norm", **FUSED),
    "rows-of-several-blocks": Case(C=24, H=40, W=70, K=16, **FUSED),
    "pooled-odd": Case(H=7, W=9, resample="pool2", residual="norm", **FUSED),
    "pooled-1x1-stride-2": Case(
        H=9, W=8, R=1, S=1, padding=(0, 0), stride=(2, 2), resample="pool2", x=True
    ),
    "enlarged": Case(H=3, W=4, resample="up2", residual="norm", **FUSED),
    "enlarged-depthwise": Case(C=3, K=3, groups=3, H=3, W=2, resample="up2", **FUSED),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def arguments(case, dtype, rng, device="cpu"):
    """Seeded arguments of conv2d_dgrad; variance one, as after a normalisation."""
    wide = torch.promote_types(dtype, torch.float32)

    def image(*shape):
        t = torch.randn(shape, generator=rng).to(device, dtype)
        return t.contiguous(memory_format=torch.channels_last)

    def table(channels):  # a mean, factors of either sign, an inverse deviation
        return torch.randn(4, channels, generator=rng).to(device, wide)

    size = [case.N, case.C, case.H, case.W]
    g = image(case.N, case.K, *case.output)
    y = image(*g.shape) if case.coef else None
    return (
        g, y, table(case.K) if case.coef else None,
        image(case.K, case.C // case.groups, case.R, case.S), size,
        image(*size) if case.x else None, table(case.C) if case.norm else None,
        image(*size) if case.residual else None,
        table(case.C) if case.residual == "norm" else None,
        case.act, 0.1, case.resample, image(*size) if case.add else None,
        list(case.stride), list(case.padding), list(case.dilation), case.groups, case.sums,
    )  # fmt: skip


def product(dy, weight, size, arguments):
    """dz by torch's autograd."""
    stride, padding, dilation, groups, _ = arguments[13:]
    z = torch.zeros(size, dtype=dy.dtype, requires_grad=True)
    out = F.conv2d(z, weight, None, stride, padding, dilation, groups)
    return torch.autograd.grad(out, z, dy)[0]


def assert_close(results, arguments, unit=None, apart=False):
    """Two units of the result for its rounding; four deviations of n float32 roundings of products.

    n products are added in float32 (or `unit`): 4 * sqrt(n) units of their root sum of squares.
    Where dy is computed, a step of its last digit may go the other way: a unit of the dtype of each
    term, and of the whole for the interpreter, which truncates to bfloat16. Where dz is rounded in
    between (`apart`, resample), a unit of the sum of what it is made of. All pass through act' and
    resample as the gradient does, by magnitude. At a preactivation within its own rounding of 0,
    the slope may be that of either side.
    """
    arguments = [t.cpu() if torch.is_tensor(t) else t for t in arguments]
    g, y, coef, weight, size, x, norm, residual, residual_norm, act, slope, resample, add = (
        arguments[:13]
    )
    got, sums = (t.cpu().double() for t in results)
    dtype = g.dtype
    step = torch.finfo(dtype).eps
    single = torch.finfo(torch.float32).eps if dtype != torch.float64 else step

    def double(t):
        return None if t is None else t.double()

    image = torch.zeros(size, dtype=torch.float64) if x is None else x.double()
    p = Prologue(image, double(norm), double(residual), double(residual_norm), act, slope, resample)
    flat = replace(p, act="none")

    def back(error):
        """Errors as the gradient goes; any of a window may be the largest that silu makes."""
        if (act, resample) != ("silu", "pool2"):
            return prologue_backward_reference(flat, error)
        rest = size[3] - 2 * error.shape[3], size[2] - 2 * error.shape[2]
        return F.pad(F.interpolate(error, scale_factor=2), (0, rest[0], 0, rest[1]))

    dy = gradient_reference(g, y, coef).to(dtype).double()
    height_width = Case(H=size[2], W=size[3], resample=resample).height_width
    z_size = [*size[:2], *height_width]
    dz = product(dy, weight.double(), z_size, arguments)
    squares = product(dy**2, weight.double() ** 2, z_size, arguments)
    n = max(1, weight.shape[0] * weight.shape[2] * weight.shape[3])
    inexact = step * (coef is not None)
    error = 4 * ((unit or single) * n**0.5 + inexact) * squares.sqrt() + inexact * dz.abs()
    if apart or resample != "none":
        error = error + step * (dz.abs() + error)
    want = prologue_backward_reference(p, dz, double(add))
    gain = 1.1 if act == "silu" else 1.0  # silu' lies between -0.1 and 1.1
    # Resampling does to errors what it does to a gradient of their magnitude.
    allowed = (
        gain * back(error)
        + 2 * step * want.abs()
        + step * torch.finfo(dtype).tiny  # the last digit of the smallest numbers
    )
    if act == "silu" or resample != "none" or add is not None:
        whole = back(dz.abs()) + (0 if add is None else add.double().abs())
        allowed = allowed + 16 * single * gain * whole
    difference = (got - want).abs()
    if act in ("relu", "leaky_relu"):
        near = preactivation(p).abs() <= 4 * single * preactivation(magnitudes(p))
        difference = torch.where(near, 0.0, difference)
    excess = (difference / allowed).max() if got.numel() else torch.tensor(0.0)
    assert excess <= 1, f"gradient: {excess:.2f} times the allowance"

    if not arguments[17]:
        assert sums.shape == (0,)
        return
    assert results[1].dtype == torch.promote_types(dtype, torch.float32)
    exact = gradient_sums_reference(p, got)
    magnitude = torch.stack(
        [sum_of_squares(got, image, norm), sum_of_squares(got, residual, residual_norm)]
    )
    count = max(1, got[:, 0].numel())
    bound = (
        4 * single * count**0.5 * torch.stack([(got**2).sum((0, 2, 3)).sqrt(), *magnitude.sqrt()])
        + 2 * single * exact.abs()
    )
    excess = ((sums - exact).abs() / bound.clamp_min(1e-300)).max()
    assert excess <= 1, f"sums: {excess:.2f} times the allowance"


def magnitudes(p):
    """A prologue whose preactivation is the sum of the magnitudes of p's terms."""

    def of(norm):
        if norm is not None:
            return norm.abs() * torch.tensor([-1.0, 1, 1, 1], dtype=norm.dtype)[:, None]

    residual = None if p.residual is None else p.residual.abs()
    return replace(
        p, x=p.x.abs(), norm=of(p.norm), residual=residual, residual_norm=of(p.residual_norm)
    )


def sum_of_squares(g, image, norm):
    """Of g * (image - mean), for each channel."""
    if image is None:
        return torch.zeros(g.shape[1], dtype=torch.float64)
    mean = 0 if norm is None else norm[0].double()[:, None, None]
    return ((g.abs() * (image.double() - mean).abs()) ** 2).sum((0, 2, 3))


@pytest.fixture
def interpreted():
    """Launch kernels on CPU tensors in triton's interpreter."""
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    with interpreted():
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
    dx, sums = conv2d_dgrad_triton(*given)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert_close((dx, sums), given)


def configurations():
    from fullres.kernels import dgrad

    return [
        *((dgrad.conv2d_dgrad_kernel, c, {"C": 80, "K": 160}) for c in dgrad.CONFIGS),
        *((dgrad.conv2d_dgrad_rows_kernel, c, {"C": 24, "K": 16}) for c in dgrad.ROWS_CONFIGS),
        *(
            (dgrad.conv2d_dgrad_depthwise_kernel, c, {"C": 80, "K": 160, "groups": 80})
            for c in dgrad.DEPTHWISE_CONFIGS
        ),
    ]


def test_every_configuration_computes_the_formula(rng, interpreted, poisoned):
    from fullres.kernels._tune import pinned

    for kernel, config, changes in configurations():
        case = Case(H=3, W=19, **changes, **FUSED)
        given = arguments(case, torch.float16, rng)
        with pinned(kernel, config):
            assert_close(conv2d_dgrad_triton(*given), given)


@pytest.mark.parametrize("strips", [1, 3, 40])
@pytest.mark.parametrize("changes", [{}, {"groups": 8}, {"S": 2, "stride": (1, 2)}])
def test_any_number_of_strips_covers_each_pixel_once(strips, changes, rng, interpreted, poisoned):
    # 40 are more than there are tiles: the rest still write their row of sums.
    given = arguments(Case(N=2, H=9, W=17, **changes, **FUSED), torch.float32, rng)
    with (
        patch("fullres.kernels.dgrad.conv2d_dgrad_rolls", return_value=False),
        patch("fullres.kernels.dgrad.conv2d_dgrad_strips", return_value=strips),
    ):
        assert_close(conv2d_dgrad_triton(*given), given)


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
@pytest.mark.parametrize("changes", [{}, {"S": 4, "padding": (2, 0)}, {"padding": (0, 2)}])
def test_strips_of_any_height_cover_each_pixel_once(rows, changes, rng, interpreted, poisoned):
    case = Case(N=2, H=9, W=67, C=5, K=3, residual="plain", **changes, **FUSED)
    given = arguments(case, torch.float32, rng)
    with (
        patch("fullres.kernels.dgrad.conv2d_dgrad_rows", return_value=rows),
        patch("fullres.kernels.dgrad.conv2d_dgrad_kernel", None),  # the rows kernel is meant
    ):
        assert_close(conv2d_dgrad_triton(*given), given)


@pytest.mark.parametrize("case", ["odd-sizes-across-tiles", "all", "sums-alone", "grey-image"])
def test_shapes_of_the_rows_kernel_go_through_the_general_one_too(case, rng, interpreted, poisoned):
    given = arguments(CASES[case], torch.float16, rng)
    with (
        patch("fullres.kernels.dgrad.conv2d_dgrad_rolls", return_value=False),
        patch("fullres.kernels.dgrad.conv2d_dgrad_rows_kernel", None),
    ):
        assert_close(conv2d_dgrad_triton(*given), given)


def test_parts_stay_far_smaller_than_their_image():
    from fullres.kernels.dgrad import (
        conv2d_dgrad_rows,
        conv2d_dgrad_rows_strips,
        conv2d_dgrad_strips,
    )

    for N, H, W in ((1, 1280, 2048), (8, 1280, 2048), (1, 50_000, 50_000), (64, 1000, 64)):
        rows = conv2d_dgrad_rows_strips(N, H, W, conv2d_dgrad_rows(N, H, W))
        assert 12 * rows <= 0.007 * 2 * N * H * W
    for pixels in (100, 10_000, 1280 * 2048, 8 * 1280 * 2048, 2**33):
        for phases in (1, 4, 16):
            rows = conv2d_dgrad_strips(pixels // phases, phases) * phases
            assert rows <= 4096 + phases
            # [3] of 4 bytes a channel a row, against 2 bytes a channel a pixel.
            assert rows == phases or 12 * rows <= 0.04 * 2 * pixels
    assert 12 * 4096 < 0.01 * 2 * 1280 * 2048


def test_kernel_takes_any_layout(rng, interpreted):
    case = Case(N=4, C=6, K=5, residual="norm", **FUSED)
    given = arguments(case, torch.float32, rng)

    def views(t):
        return {
            "contiguous": t.contiguous(),
            "every second image": t.repeat_interleave(2, 0)[::2],
            "a window": F.pad(t, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
            "a slice of channels": torch.cat([t, t], 1)[:, t.shape[1] :],
            "expanded": t[:1].expand(4, -1, -1, -1),
        }

    images = {i: views(given[i]) for i in (0, 1, 5, 7, 12)}
    for name in images[0]:
        changed = [images[i][name] if i in images else t for i, t in enumerate(given)]
        changed[2] = given[2].T.contiguous().T  # coefficients that are not dense either
        changed[3] = given[3].contiguous()
        assert_close(conv2d_dgrad_triton(*changed), changed)


@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
def test_nothing_in_nothing_out(groups, rng, interpreted, poisoned):
    empty = arguments(Case(N=0, groups=groups, **FUSED), torch.float16, rng)
    for function in (conv2d_dgrad, conv2d_dgrad_triton):
        dx, sums = function(*empty)
        assert dx.shape == (0, 8, 5, 6) and torch.equal(sums, torch.zeros(3, 8))
    given = list(arguments(Case(groups=groups, x=True, sums=True), torch.float16, rng))
    given[0] = torch.zeros_like(given[0])
    dx, sums = conv2d_dgrad_triton(*given)
    assert not dx.any() and not sums.any()


@pytest.mark.parametrize("groups", [1, 3], ids=["dense", "depthwise"])
def test_a_pixel_that_no_tap_meets_is_given_the_other_gradient_alone(groups, rng, interpreted):
    fused = {"x": True, "norm": True, "act": "relu", "add": True, "sums": True}
    case = Case(C=3, K=3, H=6, W=8, R=2, S=2, stride=(3, 3), padding=(0, 0), groups=groups, **fused)
    given = arguments(case, torch.float32, rng)
    given[5][:, :, 2] = given[6][0][None, :, None] + torch.randn(3, 8, generator=rng)
    dx, _ = conv2d_dgrad_triton(*given)
    p = Prologue(given[5], given[6], act="relu")
    want = given[12].where(preactivation(p) > 0, 0)
    assert torch.equal(dx[:, :, 2::3], want[:, :, 2::3])
    assert torch.equal(dx[:, :, :, 2::3], want[:, :, :, 2::3])
    assert want[:, :, 2].any() and (want[:, :, 2] == 0).any()
    assert not torch.equal(dx, want)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stride": (2, 2)},
        {"R": 2, "S": 2, "stride": (2, 2), "padding": (0, 0)},
        {"groups": 4},
        {"dilation": (2, 2), "padding": (2, 2)},
    ],
    ids=["dense", "strided", "2x2", "depthwise", "dilated"],
)
def test_nan_and_infinity_reach_the_pixels_whose_taps_meet_them(value, changes, rng, interpreted):
    given = arguments(Case(C=4, K=4, H=8, W=8, **changes), torch.float32, rng)
    given[0][0, 1, 1, 2] = value
    got, want = conv2d_dgrad_triton(*given)[0], conv2d_dgrad(*given)[0]
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert 0 < got.isfinite().sum() < got.numel()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_padding_of_the_gradient_is_zero_after_the_coefficients(rng, interpreted):
    """a * 0 + b * (0 - mean) + d is not 0: the gradient outside of its image must be."""
    given = list(arguments(Case(H=1, W=1, coef=True), torch.float32, rng))
    given[2][3] = 1e6
    assert_close(conv2d_dgrad_triton(*given), given)


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "silu"])
def test_acts_choose_at_zero_and_nan_as_torch(act, interpreted):
    x = torch.tensor([0.0, -0.0, float("nan"), -1.0, 2.0]).reshape(1, 1, 1, 5)
    ones = torch.ones_like(x)
    got, _ = conv2d_dgrad_triton(
        ones, None, None, torch.ones(1, 1, 1, 1), [1, 1, 1, 5], x, None, None, None, act, 0.1,
        "none", None, [1, 1], [0, 0], [1, 1], 1, False,
    )  # fmt: skip
    leaf = x.clone().requires_grad_()
    {"relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.1), "silu": F.silu}[act](
        leaf
    ).sum().backward()
    torch.testing.assert_close(got, leaf.grad, equal_nan=True)


def test_the_same_bits_twice(rng, interpreted):
    given = arguments(Case(N=2, C=16, H=17, W=33, K=16, **FUSED), torch.float16, rng)
    first, second = conv2d_dgrad_triton(*given), conv2d_dgrad_triton(*given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


geometry = st.builds(
    Case,
    N=st.integers(1, 2), C=st.integers(1, 5), H=st.integers(1, 9), W=st.integers(1, 9),
    K=st.integers(1, 5), R=st.integers(1, 4), S=st.integers(1, 4),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3), norm=st.booleans(),
    residual=st.sampled_from(["", "plain", "norm"]),
    act=st.sampled_from(["none", "relu", "leaky_relu", "silu"]),
    resample=st.sampled_from(["none", "none", "pool2", "up2"]),
    coef=st.booleans(), add=st.booleans(), sums=st.booleans(), x=st.just(True),
).map(lambda c: replace(c, C=c.C * c.groups, K=c.K * c.groups))  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True)
@given(geometry.filter(lambda c: min(*c.output, *c.height_width) > 0))
def test_kernel_agrees_at_any_geometry(case):
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    given = arguments(case, torch.float16, torch.Generator().manual_seed(1))
    with interpreted():
        results = conv2d_dgrad_triton(*given)
    for got, want in zip(results, conv2d_dgrad(*given), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    assert_close(results, given)


# torch's convolution between our passes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        "all", "add", "coefficients", "all-stride-2", "depthwise-fused", "pooled-odd", "enlarged",
        "sums-alone", "grey-image", "dilation-and-stride",
    ],
)  # fmt: skip
def test_torchs_convolution_takes_the_product_where_dispatch_says_so(
    case, dtype, rng, interpreted, poisoned
):
    given = arguments(CASES[case], dtype, rng)
    with (
        dispatch.prefer("cudnn"),
        patch("fullres.ops.conv_dgrad.launch", side_effect=AssertionError("our kernel ran")),
    ):
        results = conv2d_dgrad_triton(*given)
    for got, want in zip(results, conv2d_dgrad(*given), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    # On the CPU torch adds up float16 products in float16.
    assert_close(results, given, unit=torch.finfo(dtype).eps, apart=True)


def test_torchs_convolution_is_asked_for_the_same_bits_and_our_precision(rng, interpreted):
    seen = []
    cudnn = torch.backends.cudnn

    def product(*arguments):
        seen.append((cudnn.deterministic, cudnn.conv.fp32_precision))
        return [torch.zeros(1, 8, 5, 6)]

    def settings():
        return cudnn.deterministic, cudnn.conv.fp32_precision

    before = settings()
    with dispatch.prefer("cudnn"), patch("torch.ops.aten.convolution_backward", product):
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            try:
                conv2d_dgrad_triton(*arguments(Case(), torch.float32, rng))
            finally:
                torch.set_float32_matmul_precision("highest")
    assert seen == [(True, "ieee"), (True, "tf32" if torch.version.hip is None else "ieee")]
    assert settings() == before


# The op, on the CPU


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@CASE
def test_reference_is_torchs_gradient(case, dtype, rng):
    given = arguments(case, dtype, rng)
    dx, sums = conv2d_dgrad(*given)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert_close((dx, sums), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["all", "depthwise", "residual", "pooled-odd"])
def test_opcheck(case, dtype, rng):
    torch.library.opcheck(conv2d_dgrad, arguments(CASES[case], dtype, rng))


@CASE
def test_fake_is_as_the_real(case, rng):
    given = arguments(case, torch.float16, rng)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = conv2d_dgrad(*(mode.from_tensor(t) if torch.is_tensor(t) else t for t in given))
    for fake, real in zip(fakes, conv2d_dgrad(*given), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_autocast_changes_nothing(rng):
    given = arguments(CASES["all"], torch.float32, rng)
    plain = conv2d_dgrad(*given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = conv2d_dgrad(*given)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


NAMES = (
    "g y coef weight input_size x norm residual residual_norm act slope resample add "
    "stride padding dilation groups sums"
).split()
G, X, WEIGHT = torch.zeros(2, 8, 5, 6), torch.zeros(2, 4, 5, 6), torch.zeros(8, 4, 3, 3)
BAD = {  # the argument that is named, what is given in place of good arguments
    "g-is-integer": ("x", {"g": G.long(), "x": None, "act": "none"}),
    "g-of-another-size": ("g", {"g": G[..., :5]}),
    "g-of-other-channels": ("g", {"g": G[:, :7]}),
    "g-of-another-dtype": ("g", {"g": G.half()}),
    "y-alone": ("y", {"y": G}),
    "coef-alone": ("y", {"coef": torch.zeros(4, 8)}),
    "coef-too-short": ("coef", {"y": G, "coef": torch.zeros(4, 7)}),
    "weight-of-other-channels": ("weight", {"weight": WEIGHT[:, :3]}),
    "weight-of-three-dimensions": ("weight", {"weight": WEIGHT[0]}),
    "weight-of-another-dtype": ("weight", {"weight": WEIGHT.half()}),
    "weight-without-taps": ("weight", {"weight": WEIGHT[:, :, :0]}),
    "input-size-of-three-numbers": ("input_size", {"input_size": [2, 4, 5], "x": None}),
    "input-size-not-that-of-x": ("input_size", {"input_size": [2, 4, 5, 7]}),
    "image-smaller-than-the-filter": ("x", {"weight": torch.zeros(8, 4, 9, 3)}),
    "act-without-x": ("x", {"x": None}),
    "sums-without-x": ("x", {"x": None, "act": "none", "sums": True}),
    "norm-of-other-channels": ("norm", {"norm": torch.zeros(4, 3)}),
    "residual-of-another-size": ("residual", {"residual": X[:, :, :4]}),
    "residual-norm-without-residual": ("residual_norm", {"residual_norm": torch.zeros(4, 4)}),
    "act-unknown": ("act", {"act": "tanh"}),
    "resample-unknown": ("resample", {"resample": "pool3"}),
    "add-of-another-size": ("add", {"add": X[:, :, :4]}),
    "add-of-another-dtype": ("add", {"add": X.half()}),
    "groups-not-a-divisor-of-C": ("groups", {"groups": 3}),
    "stride-zero": ("stride", {"stride": [0, 1]}),
    "padding-negative": ("padding", {"padding": [1, -1]}),
    "dilation-zero": ("dilation", {"dilation": [1, 0]}),
}


@pytest.mark.parametrize(("argument", "changes"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("path", ["real", "fake", "triton"])
def test_refuses_with_the_arguments_name(argument, changes, path):
    good = (
        G, None, None, WEIGHT, [2, 4, 5, 6], X, None, None, None, "relu", 0.0, "none", None,
        [1, 1], [1, 1], [1, 1], 1, False,
    )  # fmt: skip
    given = dict(zip(NAMES, good, strict=True)) | changes
    function = conv2d_dgrad_triton if path == "triton" else conv2d_dgrad
    fakes = FakeTensorMode(allow_non_fake_inputs=True) if path == "fake" else nullcontext()
    with fakes as mode, pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
        if mode is not None:
            given = {k: mode.from_tensor(t) if torch.is_tensor(t) else t for k, t in given.items()}
        function(**given)


# The op, on a device


@contextmanager
def first_configurations():
    from fullres.kernels import dgrad
    from fullres.kernels._tune import pinned

    with (
        pinned(dgrad.conv2d_dgrad_kernel, dgrad.CONFIGS[0]),
        pinned(dgrad.conv2d_dgrad_rows_kernel, dgrad.ROWS_CONFIGS[0]),
        pinned(dgrad.conv2d_dgrad_depthwise_kernel, dgrad.DEPTHWISE_CONFIGS[0]),
    ):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASE
def test_device_computes_the_formula(case, dtype, rng, poisoned):
    given = arguments(case, dtype, rng, "cuda")
    # Tuned once, for bfloat16: to time all for each dtype would take minutes.
    with nullcontext() if dtype == torch.bfloat16 else first_configurations():
        dx, sums = conv2d_dgrad(*given)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert_close((dx, sums), given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_computes_the_formula_in_every_configuration(dtype, rng):
    from triton.runtime.errors import OutOfResources

    from fullres.kernels import dgrad
    from fullres.kernels._tune import pinned

    for kernel, config, changes in configurations():
        case = Case(N=2, H=19, W=67, **changes, **FUSED)
        given = arguments(case, dtype, rng, "cuda")
        with pinned(kernel, config):
            try:
                results = conv2d_dgrad_triton(*given)
            except OutOfResources:  # the tuner skips it; the first may not fail anywhere
                firsts = dgrad.CONFIGS, dgrad.ROWS_CONFIGS, dgrad.DEPTHWISE_CONFIGS
                assert all(config is not configs[0] for configs in firsts)
                continue
        assert_close(results, given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["triton", "cudnn"])
@pytest.mark.parametrize("channels", [16, 64])
def test_device_gives_the_same_bits_twice(channels, implementation, dtype, rng):
    case = Case(N=2, C=channels, K=channels, H=200, W=300, **FUSED)
    given = arguments(case, dtype, rng, "cuda")
    with dispatch.prefer(implementation):
        first = conv2d_dgrad(*given)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, conv2d_dgrad(*given), strict=True))
    assert_close(first, given, apart=implementation == "cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "cudnn"])
def test_device_uses_tf32_only_where_allowed(implementation, rng):
    if torch.version.hip is not None:
        pytest.skip("AMD multiplies float32 in IEEE arithmetic only")
    given = arguments(Case(C=64, K=64, H=33, W=65), torch.float32, rng, "cuda")
    with dispatch.prefer(implementation):
        assert_close(conv2d_dgrad(*given), given)
        torch.set_float32_matmul_precision("high")
        try:
            tf32 = conv2d_dgrad(*given)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert_close(tf32, given, unit=2.0**-10)
    with pytest.raises(AssertionError, match="times the allowance"):
        assert_close(tf32, given)


@pytest.mark.gpu
def test_device_addresses_past_two_to_the_31(rng):
    """Only the last image is not zero, and lies beyond 2**31 elements of g and of x."""
    N, C, H, W = 53, 16, 1280, 2048
    if torch.cuda.mem_get_info()[0] < 6 * N * C * H * W + (4 << 30):
        pytest.skip("needs 15 GiB of free device memory")
    case = Case(C=C, K=C, H=H, W=W, x=True, norm=True, act="relu", sums=True)
    last = arguments(case, torch.bfloat16, rng, "cuda")
    given = list(last)
    given[4] = [N, C, H, W]
    for i in (0, 5):
        given[i] = torch.empty(
            given[4], dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last
        ).zero_()
        given[i][-1:] = last[i]
        assert given[i].numel() > 2**31
    dx, sums = conv2d_dgrad(*given)
    assert not dx[:-1].any()
    assert_close((dx[-1:], sums), last)


@pytest.mark.gpu
def test_device_op_passes_opcheck(rng):
    torch.library.opcheck(conv2d_dgrad, arguments(CASES["all"], torch.float32, rng, "cuda"))
