from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fullres.ops import dispatch
from fullres.ops.conv_transpose import _conv_transpose2d, conv_transpose2d, conv_transpose2d_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """x [N, K, P, Q], weight [K, C / groups, R, S]."""

    N: int = 1
    K: int = 8
    P: int = 5
    Q: int = 6
    C: int = 8
    R: int = 3
    S: int = 3
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    output_padding: tuple = (0, 0)
    groups: int = 1
    dilation: tuple = (1, 1)
    bias: bool = True

    @property
    def output(self):
        axes = (
            (self.P, self.Q), self.stride, self.padding, self.dilation, (self.R, self.S),
            self.output_padding,
        )  # fmt: skip
        return [
            (size - 1) * step - 2 * pad + dil * (taps - 1) + more + 1
            for size, step, pad, dil, taps, more in zip(*axes, strict=True)
        ]


CASES = {
    "2x2-stride-2": Case(N=2, K=32, P=7, Q=9, C=16, R=2, S=2, stride=(2, 2)),
    "2x2-stride-2-no-bias": Case(K=16, Q=33, C=24, R=2, S=2, stride=(2, 2), bias=False),
    "3x3": Case(padding=(1, 1)),
    "3x3-stride-2": Case(stride=(2, 2), padding=(1, 1), output_padding=(1, 1)),
    "4x4-stride-2-shifted": Case(R=4, S=4, stride=(2, 2), padding=(1, 1)),
    "1x1-stride-2-output-padding": Case(R=1, S=1, stride=(2, 2), output_padding=(1, 0)),
    "stride-wider-than-the-filter": Case(R=2, S=2, stride=(3, 4), output_padding=(2, 0)),
    "one-pixel": Case(P=1, Q=1, K=1, C=1),
    "one-class-out": Case(K=24, C=1, R=2, S=2, stride=(2, 2)),
    "patches": Case(K=70, C=3, P=2, R=4, S=4, stride=(4, 4)),
    "not-square": Case(R=2, S=5, stride=(2, 1), padding=(0, 2)),
    "dilated": Case(dilation=(2, 3), stride=(2, 2), padding=(1, 2), output_padding=(1, 2)),
    "output-padding-beyond-the-stride": Case(dilation=(3, 3), output_padding=(2, 1)),
    "output-padding-beyond-a-stride-of-2": Case(
        dilation=(4, 5), stride=(2, 2), padding=(3, 0), output_padding=(3, 4)
    ),
    "groups": Case(K=12, C=10, groups=2, stride=(2, 2)),
    "depthwise": Case(K=6, C=6, groups=6, R=2, S=2, stride=(2, 2)),
    "depthwise-two-inputs-a-channel": Case(K=10, C=5, groups=5, padding=(1, 1)),
    "padding-all-but-one-pixel": Case(P=3, Q=3, padding=(2, 2)),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def arguments(case, dtype, rng, device="cpu"):
    """Seeded arguments of conv_transpose2d."""

    def tensor(*shape):
        t = torch.randn(shape, generator=rng).to(device, dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    return (
        tensor(case.N, case.K, case.P, case.Q),
        tensor(case.K, case.C // case.groups, case.R, case.S),
        tensor(case.C) if case.bias else None,
        list(case.stride), list(case.padding), list(case.output_padding), case.groups,
        list(case.dilation),
    )  # fmt: skip


def differentiated(function, arguments, dy):
    """The result, and the gradients of x, weight and bias."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in arguments[:3]]
    y = function(*leaves, *arguments[3:])
    given = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(y, given, dy.to(y)))
    return y.detach(), *(None if t is None else next(gradients) for t in leaves)


def squared(arguments):
    return [t**2 if torch.is_tensor(t) else t for t in arguments]


def assert_close(results, arguments, dy, unit=None, rounded=None):
    """A rounding of the result, and four deviations of the random walk of n float32 roundings.

    n terms are added in float32 (or `unit`): 4 * sqrt(n) units of their root sum of squares.
    """
    arguments = [t.cpu().double() if torch.is_tensor(t) else t for t in arguments]
    dy = dy.cpu().double()
    wants = differentiated(F.conv_transpose2d, arguments, dy)
    squares = differentiated(F.conv_transpose2d, squared(arguments), dy**2)
    K, CG, R, S = arguments[1].shape
    pixels = dy[:, 0].numel()
    lengths = K * R * S, CG * arguments[6] * R * S, pixels, pixels
    for name, got, want, square, n in zip(
        ("y", "dx", "dweight", "dbias"), results, wants, squares, lengths, strict=True
    ):
        if want is None:
            assert got is None, name
            continue
        numbers = torch.finfo(rounded or got.dtype)
        step = numbers.eps
        single = unit or min(torch.finfo(torch.float32).eps, step)
        error = (got.cpu().double() - want).abs()
        allowed = 4 * single * max(1, n) ** 0.5 * square.sqrt() + step * want.abs()
        allowed += numbers.tiny * step  # the last digit of the smallest numbers
        excess = (error / allowed).max() if error.numel() else 0
        assert excess <= 1, f"{name}: {excess:.2f} times the allowance"


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


def forward_close(y, given, unit=None):
    """Compare the result alone."""
    case_dy = torch.zeros_like(y)
    _, dx, dw, db = differentiated(
        F.conv_transpose2d,
        [t.cpu().double() if torch.is_tensor(t) else t for t in given],
        case_dy.cpu().double(),
    )
    assert_close((y, dx, dw, db), given, case_dy, unit, y.dtype)


# The kernel, interpreted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASE
def test_kernel_computes_the_formula(case, dtype, rng, interpreted, poisoned):
    given = arguments(case, dtype, rng)
    y = conv_transpose2d_triton(*given)
    assert list(y.shape) == [case.N, case.C, *case.output]
    assert y.is_contiguous(memory_format=torch.channels_last)
    forward_close(y, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["2x2-stride-2", "dilated", "depthwise", "one-class-out"])
def test_torch_computes_it_where_dispatch_says_so(case, dtype, rng, interpreted, poisoned):
    given = arguments(CASES[case], dtype, rng)
    ours = patch("fullres.ops.conv_transpose.launch", side_effect=AssertionError("ours ran"))
    with dispatch.prefer("cudnn"), ours:
        y = conv_transpose2d_triton(*given)
    want = _conv_transpose2d(*given)
    assert (y.shape, y.stride(), y.dtype) == (want.shape, want.stride(), want.dtype)
    forward_close(y, given, unit=torch.finfo(dtype).eps)  # the CPU adds float16 in float16


def test_nothing_in_nothing_out(rng, interpreted):
    given = arguments(Case(N=0, stride=(2, 2)), torch.float16, rng)
    for function in (conv_transpose2d, conv_transpose2d_triton):
        assert function(*given).shape == (0, 8, 11, 13)


def test_pixels_that_no_tap_meets_are_the_bias(rng, interpreted, poisoned):
    given = arguments(Case(R=2, S=2, stride=(3, 3)), torch.float32, rng)
    y = conv_transpose2d_triton(*given)
    assert torch.equal(y[:, :, 2::3], given[2][None, :, None, None].expand_as(y[:, :, 2::3]))


def test_the_same_bits_twice(rng, interpreted):
    given = arguments(CASES["2x2-stride-2"], torch.float16, rng)
    assert torch.equal(conv_transpose2d_triton(*given), conv_transpose2d_triton(*given))


cases = st.builds(
    Case,
    N=st.integers(1, 2), K=st.integers(1, 4), P=st.integers(1, 5), Q=st.integers(1, 5),
    C=st.integers(1, 4), R=st.integers(1, 4), S=st.integers(1, 4),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    output_padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    groups=st.integers(1, 3),
    dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    bias=st.booleans(),
).map(lambda c: Case(**{**vars(c), "K": c.K * c.groups, "C": c.C * c.groups}))  # fmt: skip


def exists(c):
    fits = all(
        more < max(step, dil)
        for more, step, dil in zip(c.output_padding, c.stride, c.dilation, strict=True)
    )
    return fits and min(c.output) > 0


@settings(max_examples=12, deadline=None, derandomize=True)
@given(cases.filter(exists))
def test_kernel_and_gradients_agree_at_any_geometry(case):
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    rng = torch.Generator().manual_seed(1)
    given = arguments(case, torch.float16, rng)
    with interpreted():
        forward_close(conv_transpose2d_triton(*given), given)
    given = arguments(case, torch.float32, rng)
    dy = torch.randn(case.N, case.C, *case.output, generator=rng)
    assert_close(differentiated(conv_transpose2d, given, dy), given, dy)


# The op, on the CPU


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@CASE
def test_result_and_gradients_are_torchs(case, dtype, rng):
    given = arguments(case, dtype, rng)
    dy = torch.randn(case.N, case.C, *case.output, generator=rng).to(dtype)
    assert_close(differentiated(conv_transpose2d, given, dy), given, dy)


def test_takes_what_torch_takes(rng):
    x, w, b, *_ = arguments(Case(), torch.float64, rng)
    for options in (
        {"stride": 2},
        {"stride": (2, 1), "padding": 1, "output_padding": (1, 0)},
        {"bias": b, "dilation": 2},
        {"weight": w[:, :2], "groups": 4},
    ):
        options = {"weight": w, **options}
        for image in (x, x[0]):
            got, want = conv_transpose2d(image, **options), F.conv_transpose2d(image, **options)
            torch.testing.assert_close(got, want)
    positional = w, b, 2, 1, 1, 1, 1
    torch.testing.assert_close(conv_transpose2d(x, *positional), F.conv_transpose2d(x, *positional))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_saves_only_what_its_gradients_need(frozen, rng):
    given = arguments(CASES["2x2-stride-2"], torch.float32, rng)
    leaves = dict(zip(("x", "weight", "bias"), given[:3], strict=True))
    for name, t in leaves.items():
        t.requires_grad_(name != frozen)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = conv_transpose2d(*given)
    kept = {
        "x": [leaves["x"]], "weight": [leaves["weight"]], "bias": [leaves["x"], leaves["weight"]]
    }[frozen]  # fmt: skip
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in kept)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in kept}
    y.sum().backward()
    assert {name for name, t in leaves.items() if t.grad is not None} == {*leaves} - {frozen}


def test_autocast_is_as_torchs(rng):
    given = arguments(Case(stride=(2, 2)), torch.float32, rng)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = conv_transpose2d(*given), F.conv_transpose2d(*given)
    assert got.dtype == want.dtype == torch.bfloat16
    cast = [t.bfloat16() if torch.is_tensor(t) else t for t in given]
    assert torch.equal(got, conv_transpose2d(*cast))


def test_has_no_second_derivatives(rng):
    x, *rest = arguments(Case(), torch.float32, rng)
    x.requires_grad_()
    y = conv_transpose2d(x, *rest)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("case", ["2x2-stride-2", "dilated", "depthwise"])
def test_opcheck(case, rng):
    given = arguments(CASES[case], torch.float32, rng)
    for t in given[:3]:
        t.requires_grad_()
    torch.library.opcheck(_conv_transpose2d, given)


@CASE
def test_fake_is_as_the_real(case, rng):
    given = arguments(case, torch.float16, rng)
    with FakeTensorMode() as mode:
        fake = conv_transpose2d(*(mode.from_tensor(t) if torch.is_tensor(t) else t for t in given))
    real = conv_transpose2d(*given)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_compiles_as_one_graph(rng):
    given = arguments(CASES["2x2-stride-2"], torch.float32, rng)
    dy = torch.randn(2, 16, 14, 18, generator=rng)
    compiled = torch.compile(conv_transpose2d, fullgraph=True, backend="aot_eager")
    plain = differentiated(conv_transpose2d, given, dy)
    assert all(
        torch.equal(a, b) for a, b in zip(differentiated(compiled, given, dy), plain, strict=True)
    )


X, W = torch.zeros(2, 8, 5, 6), torch.zeros(8, 4, 3, 3)
BAD = {
    "x-has-2-dimensions": ("x", {"x": X[0, 0]}),
    "x-is-integer": ("x", {"x": X.long()}),
    "nothing-left-of-the-image": ("x", {"padding": 4}),
    "weight-of-three-dimensions": ("weight", {"weight": W[0]}),
    "weight-of-other-channels": ("weight", {"weight": W[:7]}),
    "weight-of-another-dtype": ("weight", {"weight": W.half()}),
    "bias-of-other-channels": ("bias", {"bias": torch.zeros(8)}),
    "groups-not-a-divisor": ("groups", {"groups": 3}),
    "stride-zero": ("stride", {"stride": 0}),
    "stride-three-numbers": ("stride", {"stride": (1, 1, 1)}),
    "padding-negative": ("padding", {"padding": -1}),
    "padding-same": ("padding", {"padding": "same"}),
    "dilation-zero": ("dilation", {"dilation": 0}),
    "output-padding-of-a-stride": ("output_padding", {"output_padding": 1}),
    "output-padding-negative": ("output_padding", {"output_padding": (0, -1)}),
}


@pytest.mark.parametrize(("argument", "changes"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_refuses_with_the_arguments_name(argument, changes, fake):
    given = {"x": X, "weight": W} | changes
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(t) if torch.is_tensor(t) else t for k, t in given.items()}
        if fake:
            with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
                conv_transpose2d(**fakes)
    if not fake:
        with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
            conv_transpose2d(**given)


# The op, on a device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["triton", "cudnn"])
@CASE
def test_device_result_and_gradients_are_torchs(case, implementation, dtype, rng, poisoned):
    given = arguments(case, dtype, rng, "cuda")
    dy = torch.randn(case.N, case.C, *case.output, generator=rng).to("cuda", dtype)
    with dispatch.prefer(implementation):
        results = differentiated(conv_transpose2d, given, dy)
        again = differentiated(conv_transpose2d, given, dy)
    assert_close(results, given, dy)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True) if a is not None)


@pytest.mark.gpu
def test_device_addresses_past_two_to_the_31(rng):
    """Only the last image is not zero; its result lies beyond 2**31 elements."""
    N, C, H, W = 53, 16, 1280, 2048
    if torch.cuda.mem_get_info()[0] < 4 * N * C * H * W + (4 << 30):
        pytest.skip("needs 12 GiB of free device memory")
    case = Case(K=32, C=C, P=H // 2, Q=W // 2, R=2, S=2, stride=(2, 2), bias=False)
    last = arguments(case, torch.bfloat16, rng, "cuda")
    x = torch.empty(
        (N, *last[0].shape[1:]), dtype=torch.bfloat16, device="cuda",
        memory_format=torch.channels_last,
    ).zero_()  # fmt: skip
    x[-1:] = last[0]
    y = conv_transpose2d(x, *last[1:])
    assert y.numel() > 2**31 and not y[:-1].any()
    forward_close(y[-1:], last)
