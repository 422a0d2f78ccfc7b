import subprocess
import sys
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fullres.ops.conv import _conv2d, _tf32_allowed, conv2d, conv2d_reference, conv2d_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]

SHAPES = {  # N, C, H, W, K, R, padding
    "odd-sizes-across-tiles": (1, 16, 7, 37, 16, 3, 1),
    "one-pixel-all-border": (1, 16, 1, 1, 16, 3, 1),
    "one-pixel-no-tap-to-spare": (1, 8, 3, 3, 8, 3, 0),
    "grey-image": (2, 1, 6, 5, 16, 3, 1),
    "colour-image-window-of-9": (1, 3, 9, 34, 16, 3, 1),
    "one-class-out": (1, 24, 5, 6, 1, 1, 0),
    "channels-not-a-power-of-two": (2, 24, 5, 33, 24, 3, 1),
    "channels-in-several-steps-and-blocks": (1, 112, 4, 5, 112, 3, 1),
    "1x1-widens": (2, 16, 5, 40, 32, 1, 0),
    "1x1-with-a-border-of-bias": (1, 16, 3, 4, 8, 1, 1),
    "valid": (1, 16, 8, 35, 24, 3, 0),
    "padding-wider-than-the-filter": (1, 4, 2, 3, 8, 3, 3),
    "batch-of-three": (3, 8, 5, 6, 16, 3, 1),
}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def arguments(shape, dtype, rng, *, bias=True, device="cpu"):
    """Seeded x, weight, bias and padding; variance one, as after a normalisation."""
    N, C, H, W, K, R, padding = shape
    x = torch.randn(N, C, H, W, generator=rng)
    weight = torch.randn(K, C, R, R, generator=rng) / (C * R * R) ** 0.5
    b = torch.randn(K, generator=rng) if bias else None
    x, weight, b = (None if t is None else t.to(device, dtype) for t in (x, weight, b))
    return x.contiguous(memory_format=torch.channels_last), weight, b, padding


def exact(x, weight, bias, padding):
    return F.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), 1, padding
    )


def allowance(x, weight, bias, padding, unit=None):
    """How far from `exact` each output may be: a sum of n terms in float32, rounded once.

    The errors of n additions walk at random: sqrt(n) float32 units of the terms' root sum of
    squares, of which four deviations are allowed; then one unit of the dtype, for the interpreter
    truncates to bfloat16 where devices round. `unit` is that of the products, if not float32's.
    """
    n = weight[0].numel() + (bias is not None)
    squares = exact(x.double() ** 2, weight.double() ** 2, None, padding)
    if bias is not None:
        squares += bias.double()[:, None, None] ** 2
    accumulated = 4 * (unit or torch.finfo(torch.float32).eps) * n**0.5 * squares.sqrt()
    return accumulated + torch.finfo(x.dtype).eps * exact(x, weight, bias, padding).abs()


def assert_close(y, x, weight, bias, padding, unit=None):
    error = (y.double() - exact(x, weight, bias, padding)).abs()
    excess = error / allowance(x, weight, bias, padding, unit).clamp_min(1e-300)
    assert not error.isnan().any()
    assert y.dtype == x.dtype
    assert not excess.numel() or excess.max() <= 1, f"{excess.max():.2f} times the allowance"


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


# The kernel, interpreted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@SHAPE
def test_kernel_computes_the_formula(shape, dtype, rng, interpreted, poisoned):
    given = arguments(shape, dtype, rng)
    assert_close(conv2d_triton(*given), *given)
    # Torch itself stays within the same allowance, so it is not a loose one for this dtype.
    assert_close(F.conv2d(*given[:3], padding=given[3]), *given)


@pytest.mark.parametrize("shape", [SHAPES["valid"], SHAPES["1x1-widens"]], ids=["3x3", "1x1"])
def test_kernel_without_bias(shape, rng, interpreted, poisoned):
    given = arguments(shape, torch.float32, rng, bias=False)
    assert_close(conv2d_triton(*given), *given)


def test_kernel_takes_any_layout(rng, interpreted):
    x, weight, bias, padding = arguments((4, 16, 6, 9, 24, 3, 1), torch.float32, rng)
    layouts = {
        "contiguous": x.contiguous(),
        "channels_last weight": x,
        "every second image": x.repeat_interleave(2, 0)[::2],
        "a window": F.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
        "a slice of channels": torch.cat([x, x], 1)[:, 16:],
        "expanded": x[:1].expand(4, -1, -1, -1),
    }
    for name, view in layouts.items():
        w = weight.contiguous(memory_format=torch.channels_last) if "weight" in name else weight
        y = conv2d_triton(view, w, bias, padding)
        assert y.is_contiguous(memory_format=torch.channels_last), name
        assert_close(y, view, weight, bias, padding)


def test_kernel_accepts_an_empty_batch(rng, interpreted):
    y = conv2d_triton(*arguments((0, 16, 5, 6, 8, 3, 1), torch.float32, rng))
    assert y.shape == (0, 8, 5, 6)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("C", [3, 16])
def test_kernel_passes_nan_and_inf_to_the_pixels_that_see_them_only(C, value, rng, interpreted):
    x, weight, bias, padding = arguments((1, C, 7, 40, 8, 3, 1), torch.float32, rng)
    x[0, 1, 3, 31] = value  # at the last column of a tile: its right neighbour is in the next
    x[0, 0, 0, 0] = value
    y, want = conv2d_triton(x, weight, bias, padding), exact(x, weight, bias, padding)
    torch.testing.assert_close(y.isnan(), want.isnan())
    torch.testing.assert_close(y.isposinf(), want.isposinf())
    torch.testing.assert_close(y.isneginf(), want.isneginf())
    torch.testing.assert_close(y[want.isfinite()], want[want.isfinite()].float())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.tuples(
        st.integers(0, 2), st.integers(1, 20), st.integers(1, 10), st.integers(1, 40),
        st.integers(1, 20), st.sampled_from([1, 3]), st.integers(0, 2),
    ).filter(lambda s: min(s[2], s[3]) + 2 * s[6] >= s[5])
)  # fmt: skip
def test_kernel_agrees_at_any_shape(shape):
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    given = arguments(shape, torch.float16, torch.Generator().manual_seed(1))
    with interpreted():
        y = conv2d_triton(*given)
    reference = conv2d_reference(*given)
    assert (y.shape, y.stride(), y.dtype) == (reference.shape, reference.stride(), reference.dtype)
    assert_close(y, *given)


@contextmanager
def only(kernel, config=None):
    """Launch this kernel, with its first configuration unless another is given."""
    from fullres.kernels import _tune, conv

    config = config or kernel.configs[0]
    with patch.object(conv, "conv2d_fwd_kernel_for", return_value=kernel):
        with _tune.pinned(kernel, config):
            yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if s[1] <= 32 and s[5] == 3], ids=str)
def test_both_kernels_compute_the_formula(shape, dtype, rng, interpreted, poisoned):
    from fullres.kernels.conv import conv2d_fwd_kernel, conv2d_fwd_rows_kernel

    given = arguments(shape, dtype, rng)
    for kernel in (conv2d_fwd_kernel, conv2d_fwd_rows_kernel):
        with only(kernel):
            assert_close(conv2d_triton(*given), *given)


def test_every_configuration_computes_the_formula(rng, interpreted, poisoned):
    given = arguments((1, 24, 19, 35, 80, 3, 1), torch.float16, rng)
    for kernel, config in configurations():
        with only(kernel, config):
            assert_close(conv2d_triton(*given), *given)


def configurations():
    from fullres.kernels.conv import (
        CONFIGS,
        ROWS_CONFIGS,
        conv2d_fwd_kernel,
        conv2d_fwd_rows_kernel,
    )

    return [
        *((conv2d_fwd_kernel, config) for config in CONFIGS),
        *((conv2d_fwd_rows_kernel, config) for config in ROWS_CONFIGS),
    ]


def test_the_interpreter_leaves_no_trace():
    triton = pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted, interpreting

    run, call = triton.JITFunction.run, triton.JITFunction.__call__
    with pytest.raises(ZeroDivisionError), interpreted():
        assert interpreting()
        1 / 0  # noqa: B018
    assert interpreting() == triton.knobs.runtime.interpret
    assert (triton.JITFunction.run, triton.JITFunction.__call__) == (run, call)


# The op, on the CPU


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@SHAPE
def test_reference_is_torchs_convolution(shape, dtype, rng):
    given = arguments(shape, dtype, rng)
    y = conv2d(*given[:3], padding=given[3])
    assert_close(y, *given)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_padding_by_name(rng):
    x, weight, bias, _ = arguments((1, 3, 5, 6, 4, 3, 0), torch.float32, rng)
    assert torch.equal(conv2d(x, weight, padding="same"), conv2d(x, weight, padding=1))
    assert torch.equal(conv2d(x, weight, padding="valid"), conv2d(x, weight))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5, 2, 3, 1), (1, 2, 3, 3, 3, 1, 0)], ids=["3x3", "1x1"]
)
def test_gradients_in_float64(shape, bias, rng):
    x, weight, b, padding = arguments(shape, torch.float64, rng, bias=bias)
    inputs = [t.requires_grad_() for t in (x, weight, b) if t is not None]
    assert torch.autograd.gradcheck(lambda *a: conv2d(*a, padding=padding), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: conv2d(*a, padding=padding), inputs)


def gradients(function, given, dy):
    x, weight, bias, padding = given
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    return torch.autograd.grad(function(*inputs, padding=padding), inputs, dy)


def assert_gradients_close(given, dy):
    """Each gradient is a sum over what it doesn't hold: the same allowance, with that length."""
    ours = gradients(conv2d, given, dy)
    want = gradients(
        F.conv2d, [t.double() if torch.is_tensor(t) else t for t in given], dy.double()
    )
    torchs = gradients(F.conv2d, given, dy)
    K, C, R, S = given[1].shape
    for name, g, gt, w, n in zip(
        ("dx", "dweight", "dbias"), ours, torchs, want,
        (K * R * S, dy[:, 0].numel(), dy[:, 0].numel()), strict=True,
    ):  # fmt: skip
        assert g.dtype == given[0].dtype
        unit = torch.finfo(g.dtype).eps + 4 * n**0.5 * torch.finfo(torch.float32).eps
        allowed = 2 * (gt.double() - w).abs().max() + unit * w.abs().max()
        assert (g.double() - w).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_as_exact_as_torchs(dtype, rng):
    given = arguments((2, 16, 9, 11, 24, 3, 1), dtype, rng)
    assert_gradients_close(given, torch.randn(2, 24, 9, 11, generator=rng).to(dtype))


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "x weight", "weight bias"])
def test_gradients_nobody_asked_for_are_not_computed(needs, rng):
    x, weight, bias, _ = arguments((1, 3, 5, 6, 4, 3, 1), torch.float32, rng)
    tensors = {"x": x, "weight": weight, "bias": bias}
    for name in needs.split():
        tensors[name].requires_grad_()
    conv2d(x, weight, bias, padding=1).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == set(needs.split())


def test_gradients_of_an_empty_batch_are_zero(rng):
    x, weight, bias, _ = arguments((0, 3, 5, 6, 4, 3, 1), torch.float32, rng)
    conv2d(x.requires_grad_(), weight.requires_grad_(), bias, padding=1).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("needs", "saved"),
    [
        ("x weight bias", 8 * 16 * 1280 * 2048 * 2 + 32 * 16 * 9 * 2),
        ("weight", 8 * 16 * 1280 * 2048 * 2),
        ("x", 32 * 16 * 9 * 2),  # a frozen weight keeps no activation
        ("bias", 0),
        ("", 0),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_bytes_saved_for_backward(needs, saved, layout):
    packed = []
    with FakeTensorMode():
        x = torch.empty(8, 16, 1280, 2048, dtype=torch.bfloat16).to(memory_format=layout)
        weight = torch.empty(32, 16, 3, 3, dtype=torch.bfloat16)
        bias = torch.empty(32, dtype=torch.bfloat16)
        for name in needs.split():
            {"x": x, "weight": weight, "bias": bias}[name].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            conv2d(x, weight, bias, padding=1)
    assert sum(t.untyped_storage().nbytes() for t in packed) == saved
    assert all(t is x or t is weight or t._base is None for t in packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_opcheck(dtype, bias, rng):
    x, weight, b, padding = arguments((2, 3, 5, 6, 4, 3, 1), dtype, rng, bias=bias)
    for needs_grad in (True, False):
        for t in (x, weight, b):
            if t is not None:
                t.requires_grad_(needs_grad)
        torch.library.opcheck(_conv2d, (x, weight, b, padding))


def test_fake_has_the_strides_of_the_real_where_they_are_ambiguous(rng):
    for shape in [(1, 1, 1, 1, 1, 1, 0), (2, 1, 4, 1, 1, 3, 1), (0, 3, 2, 2, 4, 1, 0)]:
        given = arguments(shape, torch.float32, rng)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = _conv2d(*(mode.from_tensor(t) for t in given[:3]), given[3])
        real = _conv2d(*given)
        assert (fake.shape, fake.stride()) == (real.shape, real.stride())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(dynamic, rng):
    def block(x, weight, bias):
        return conv2d(x, weight, bias, padding="same").relu()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x, weight, bias, _ = arguments((2, 3, 5, 6, 4, 3, 1), torch.float32, rng)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    for function in (compiled, block):
        for t in inputs:
            t.grad = None
        y = function(*inputs)
        y.square().sum().backward()
        if function is compiled:
            got = [y.detach(), *(t.grad for t in inputs)]
    for g, w in zip(got, [y.detach(), *(t.grad for t in inputs)], strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_as_torchs_convolution_does(dtype, compiled, rng):
    x, weight, bias, _ = arguments((1, 3, 5, 6, 4, 3, 1), torch.float32, rng)
    call = torch.compile(conv2d, fullgraph=True, backend="aot_eager") if compiled else conv2d
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = call(x, weight, bias, padding=1)
        assert y.dtype == F.conv2d(x, weight, bias, padding=1).dtype == dtype
        # float64 is left alone, as there; and the op by itself computes in its arguments' dtype.
        assert conv2d(x.double(), weight.double()).dtype == torch.float64
        assert _conv2d(x, weight, bias, 1).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert call(x, weight, bias, padding=1).dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(y, conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=1))


def test_tf32_needs_leave_for_convolutions_and_for_products():
    def allowed(convolutions, products):
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
        return _tf32_allowed()

    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        assert before == (True, "highest")  # torch's defaults
        assert not _tf32_allowed()
        expected = torch.version.hip is None
        assert allowed(True, "high") == allowed(True, "medium") == expected
        assert not allowed(True, "highest")
        assert not allowed(False, "high")
    finally:
        allowed(*before)


X, WEIGHT = torch.zeros(2, 3, 5, 6), torch.zeros(4, 3, 3, 3)
BAD = {
    "x-has-3-dimensions": ("x", (X[0], WEIGHT)),
    "x-is-integer": ("x", (X.long(), WEIGHT.long())),
    "x-has-no-channels": ("x", (X[:, :0], WEIGHT[:, :0])),
    "x-smaller-than-the-filter": ("x", (X[:, :, :2], WEIGHT)),
    "weight-has-3-dimensions": ("weight", (X, WEIGHT[0])),
    "weight-5x5": ("weight", (X, torch.zeros(4, 3, 5, 5))),
    "weight-3x1": ("weight", (X, WEIGHT[..., :1])),
    "weight-for-other-channels": ("weight", (X, WEIGHT[:, :2])),
    "weight-without-outputs": ("weight", (X, WEIGHT[:0])),
    "weight-of-another-dtype": ("weight", (X, WEIGHT.half())),
    "bias-too-long": ("bias", (X, WEIGHT, torch.zeros(5))),
    "bias-of-another-dtype": ("bias", (X, WEIGHT, torch.zeros(4).half())),
    "padding-negative": ("padding", (X, WEIGHT, None, -1)),
    "padding-of-another-kind": ("padding", (X, WEIGHT, None, "reflect")),
    "padding-of-two-numbers": ("padding", (X, WEIGHT, None, (1, 1))),
}


@pytest.mark.parametrize(("argument", "given"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("path", ["real", "fake", "fake-on-gpu", "triton"])
def test_refuses_with_the_arguments_name(argument, given, path):
    x, weight, bias, padding = (*given, *(None, 0)[len(given) - 2 :])
    if path == "triton":
        if not isinstance(padding, int):
            pytest.skip("the type of padding is conv2d's to check; torch checks the op's own")
        pytest.importorskip("triton")
        with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
            conv2d_triton(x, weight, bias, padding)
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        if path != "real":
            x, weight, bias = (
                None if t is None else mode.from_tensor(t) for t in (x, weight, bias)
            )
        if path == "fake-on-gpu":
            x, weight, bias = (
                None if t is None else torch.empty_like(t, device="cuda") for t in (x, weight, bias)
            )
        if path != "real":
            with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
                conv2d(x, weight, bias, padding=padding)
    if path == "real":
        with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
            conv2d(x, weight, bias, padding=padding)


def test_refuses_float64_on_a_gpu_and_two_devices():
    with FakeTensorMode():
        x = torch.empty(1, 3, 5, 6, dtype=torch.float64, device="cuda")
        weight = torch.empty(4, 3, 3, 3, dtype=torch.float64, device="cuda")
        with pytest.raises(ValueError, match="^x: want a dtype in .* on cuda, got torch.float64"):
            conv2d(x, weight)
        with pytest.raises(ValueError, match="^weight: want x's device cuda:0, got cpu"):
            conv2d(x.float(), torch.empty(4, 3, 3, 3, device="cpu"))


def test_refuses_rows_beyond_int32():
    with FakeTensorMode():
        x = torch.empty(1, 4096, 3, 40_000, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="^x: want 16 rows"):
            conv2d(x, torch.empty(1, 4096, 3, 3, dtype=torch.bfloat16))


def test_imports_and_runs_on_the_cpu_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch
from fullres.ops.conv import conv2d
assert conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item() == 9
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The op, on a device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@SHAPE
def test_device_computes_the_formula(shape, dtype, rng):
    from fullres.kernels.conv import conv2d_fwd_kernel

    given = arguments(shape, dtype, rng, device="cuda")
    # bfloat16 through the tuner, as users have it; compiling all for each dtype would take minutes.
    tuned = dtype == torch.bfloat16
    with nullcontext() if tuned else only(conv2d_fwd_kernel):
        y = conv2d(*given[:3], padding=given[3])
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y.cpu(), *(t.cpu() if torch.is_tensor(t) else t for t in given))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 24, 21, 67, 80, 3, 1), (1, 64, 19, 70, 128, 3, 1), (2, 48, 9, 50, 16, 1, 0)],
    ids=str,
)
def test_device_computes_the_formula_in_every_configuration(shape, dtype, rng):
    from triton.runtime.errors import OutOfResources

    from fullres.kernels.conv import CONFIGS, ROWS_CONFIGS, conv2d_fwd_rows_kernel

    given = arguments(shape, dtype, rng, device="cuda")
    host = [t.cpu() if torch.is_tensor(t) else t for t in given]
    for kernel, config in configurations():
        if kernel is conv2d_fwd_rows_kernel and (shape[5] != 3 or shape[1] > 32):
            continue
        with only(kernel, config):
            try:
                y = conv2d_triton(*given)
            except OutOfResources:  # the tuner skips it; the first may not fail anywhere
                assert config not in (CONFIGS[0], ROWS_CONFIGS[0])
                continue
        assert_close(y.cpu(), *host)


@pytest.mark.gpu
def test_device_uses_tf32_only_where_allowed(rng):
    if torch.version.hip is not None:
        pytest.skip("AMD multiplies float32 in IEEE arithmetic only")
    x, weight, bias, _ = arguments((2, 64, 33, 65, 64, 3, 1), torch.float32, rng, device="cuda")
    given = x.cpu(), weight.cpu(), bias.cpu(), 1
    ieee = conv2d(x, weight, bias, padding=1).cpu()
    assert_close(ieee, *given)
    torch.set_float32_matmul_precision("high")
    try:
        tf32 = conv2d(x, weight, bias, padding=1).cpu()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_close(tf32, *given, unit=2.0**-10)
    with pytest.raises(AssertionError, match="times the allowance"):
        assert_close(tf32, *given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_gradients_are_as_exact_as_torchs(dtype, rng):
    given = arguments((2, 16, 40, 50, 24, 3, 1), dtype, rng, device="cuda")
    torch.backends.cudnn.allow_tf32 = False  # backward is torch's
    try:
        assert_gradients_close(given, torch.randn(2, 24, 40, 50, generator=rng).to("cuda", dtype))
    finally:
        torch.backends.cudnn.allow_tf32 = True


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "padding"),
    [((53, 16, 1280, 2048), 1), ((1, 1, 50_000, 50_000), 1)],
    ids=["a-batch-past-2-to-the-31", "an-image-past-2-to-the-31"],
)
def test_device_addresses_past_two_to_the_31(shape, padding):
    N, C, H, W = shape
    needed = 2 * 2 * N * C * H * W + (4 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    rng = torch.Generator("cuda").manual_seed(1)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    x.normal_(generator=rng)
    weight = torch.randn(C, C, 3, 3, generator=rng, device="cuda").bfloat16()
    y = conv2d(x, weight, padding=padding)
    assert x.numel() > 2**31
    # Whole rows of the first, a middle and the last image, each against float64 on the CPU.
    for n in sorted({0, N // 2, N - 1}):
        for h in (1, H // 2, H - 2):
            rows = x[n : n + 1, :, h - 1 : h + 2].cpu()
            got = y[n : n + 1, :, h : h + 1, 1:-1].cpu()
            assert_close(got, rows, weight.cpu(), None, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_gives_the_same_bits_twice(dtype, rng):
    x, weight, bias, _ = arguments((4, 32, 64, 96, 32, 3, 1), dtype, rng, device="cuda")
    first = conv2d(x, weight, bias, padding=1)
    for _ in range(5):
        assert torch.equal(first, conv2d(x, weight, bias, padding=1))


@pytest.mark.gpu
def test_device_op_passes_opcheck_and_compiles(rng):
    x, weight, bias, _ = arguments((2, 16, 9, 11, 8, 3, 1), torch.float32, rng, device="cuda")
    torch.library.opcheck(_conv2d, (x.requires_grad_(), weight.requires_grad_(), bias, 1))
    compiled = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias, padding=1), conv2d(x, weight, bias, padding=1))


@pytest.mark.gpu
def test_device_under_autocast(rng):
    x, weight, bias, _ = arguments((2, 16, 9, 11, 8, 3, 1), torch.float32, rng, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = conv2d(x, weight, bias, padding=1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), padding=1))
