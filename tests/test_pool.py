"""Pooling: against torch in float64, in the interpreter and on a device; the bytes that it keeps.

Tests of values run the device path: in triton's interpreter for CPU tensors, on a GPU for CUDA's.
"""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fullres.ops import pool

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = pytest.mark.parametrize("device", DEVICES)

CASES = {  # shape of x, arguments of both max_pool2d and avg_pool2d
    "2x2-odd-sizes": ((2, 16, 7, 37), {"kernel_size": 2}),
    "3x3-stride-2-resnet": ((1, 24, 9, 12), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "ceil": ((1, 8, 8, 9), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    "ceil-past-the-padding": (
        (1, 4, 6, 7), {"kernel_size": (2, 3), "stride": 3, "padding": 1, "ceil_mode": True}
    ),
    "overlapping-5x5": ((1, 3, 6, 7), {"kernel_size": 5, "stride": 1, "padding": 2}),
    "rows-unlike-columns": (
        (1, 5, 9, 8), {"kernel_size": (1, 4), "stride": (2, 1), "padding": (0, 2)}
    ),
    "stride-wider-than-the-window": ((2, 8, 9, 11), {"kernel_size": (2, 1), "stride": (3, 4)}),
    "one-window": ((3, 1, 5, 6), {"kernel_size": (5, 6)}),
    "one-pixel": ((1, 136, 1, 1), {"kernel_size": 1}),
    "large-windows": ((1, 40, 13, 21), {"kernel_size": (7, 10), "stride": 6, "padding": 3}),
}  # fmt: skip
CASE = pytest.mark.parametrize(("shape", "window"), CASES.values(), ids=CASES.keys())
DILATED = {
    "dilation": ((1, 8, 9, 10), {"kernel_size": 3, "dilation": (2, 3), "padding": 1}),
    "dilation-stride": ((2, 3, 11, 9), {"kernel_size": 2, "stride": 2, "dilation": 3}),
}
SIZES = {  # shape of x, output size
    "global": ((2, 24, 15, 9), 1),
    "divisor": ((1, 8, 12, 8), (3, 4)),
    "overlapping": ((1, 8, 7, 10), (3, 4)),
    "larger-than-the-image": ((1, 3, 3, 5), (7, 8)),
    "one-given": ((1, 4, 5, 6), (None, 4)),
    "both-kept": ((1, 4, 5, 6), (None, None)),
}
SIZE = pytest.mark.parametrize(("shape", "size"), SIZES.values(), ids=SIZES.keys())


class DevicePath(TorchDispatchMode):
    """Run the CUDA implementation of our operators on tensors of any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fullres":
            return OPDEFS[func._schema.name]._backend_fns["cuda"](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def launching(device):
    """Let our operators launch kernels inside, in the interpreter where there is no device."""
    stack = ExitStack()
    if device == "cpu":
        pytest.importorskip("triton")
        from fullres.kernels._tune import interpreted

        stack.enter_context(interpreted())
        stack.enter_context(DevicePath())
    return stack


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN or the largest integer, so that a lane never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def image(shape, dtype, rng, device="cpu"):
    x = torch.randn(shape, generator=rng).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def small_integers(shape, dtype, rng, device="cpu"):
    """Many equal values, exact in every dtype."""
    x = torch.randint(-2, 3, shape, generator=rng).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def with_gradient(function, x, dy, dtype=None):
    """Return the function's result of x and the gradient that dy leaves there."""
    x = x.to(dtype or x.dtype).detach().requires_grad_()
    y = function(x)
    results = y if isinstance(y, tuple) else (y,)
    (dx,) = torch.autograd.grad(results[0], x, dy.to(results[0].dtype))
    return *results, dx


def close(got, wanted, magnitude, dtype, terms):
    """One rounding, and for each term of a sum and its weight two of float32.

    `magnitude` is the same sum of absolute values. The interpreter truncates to bfloat16: a unit.
    """
    assert got.dtype == dtype and got.shape == wanted.shape
    assert got.dim() == 3 or got.is_contiguous(memory_format=torch.channels_last)
    allowed = torch.finfo(dtype).eps * wanted.abs()
    allowed = allowed + 2 * terms * torch.finfo(torch.float32).eps * magnitude
    if dtype != torch.float32:
        allowed = allowed + torch.finfo(dtype).smallest_normal
    excess = ((got.double() - wanted).abs() / allowed.clamp_min(1e-300)).max()
    assert excess <= 1, f"{excess:.3g} times the allowance"


def assert_max(ours, torchs, x, device, rng):
    """Values and indices are torch's own; the gradient is float64's."""
    y_shape = torchs(x).shape if not isinstance(torchs(x), tuple) else torchs(x)[0].shape
    dy = image(y_shape, x.dtype, rng, device) if len(y_shape) == 4 else None
    with launching(device):
        y, indices, dx = with_gradient(ours, x, dy)
    wanted_y, wanted_indices, wanted_dx = with_gradient(torchs, x, dy, torch.float64)
    assert torch.equal(y.double(), wanted_y)
    assert indices.dtype == torch.int64 and torch.equal(indices, wanted_indices)
    *_, magnitude = with_gradient(torchs, x, dy.abs(), torch.float64)
    close(dx, wanted_dx, magnitude, x.dtype, terms=32)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "window"), (CASES | DILATED).values(), ids=(CASES | DILATED).keys()
)
@DTYPE
@DEVICE
def test_max_pool_takes_the_first_of_equals(shape, window, dtype, device, rng, poisoned):
    x = small_integers(shape, dtype, rng, device)
    assert_max(
        lambda t: pool.max_pool2d(t, **window, return_indices=True),
        lambda t: F.max_pool2d(t, **window, return_indices=True),
        x, device, rng,
    )  # fmt: skip


@SIZE
@DTYPE
@DEVICE
def test_adaptive_max_pool_takes_the_first_of_equals(shape, size, dtype, device, rng, poisoned):
    x = small_integers(shape, dtype, rng, device)
    assert_max(
        lambda t: pool.adaptive_max_pool2d(t, size, return_indices=True),
        lambda t: F.adaptive_max_pool2d(t, size, return_indices=True),
        x, device, rng,
    )  # fmt: skip


def assert_mean(ours, torchs, x, device, rng, terms):
    dy = image(torchs(x.double()).shape, x.dtype, rng, device)
    with launching(device):
        y, dx = with_gradient(ours, x, dy)
    wanted = with_gradient(torchs, x, dy, torch.float64)
    magnitudes = with_gradient(torchs, x.abs(), dy.abs(), torch.float64)
    for got, value, magnitude in zip((y, dx), wanted, magnitudes, strict=True):
        close(got, value, magnitude.abs(), x.dtype, terms)


@CASE
@DTYPE
@DEVICE
def test_avg_pool_is_the_mean(shape, window, dtype, device, rng, poisoned):
    x = image(shape, dtype, rng, device)
    for more in ({}, {"count_include_pad": False}, {"divisor_override": -3}):
        assert_mean(
            lambda t, m=more: pool.avg_pool2d(t, **window, **m),
            lambda t, m=more: F.avg_pool2d(t, **window, **m),
            x, device, rng, terms=32,
        )  # fmt: skip


@SIZE
@DTYPE
@DEVICE
def test_adaptive_avg_pool_is_the_mean(shape, size, dtype, device, rng, poisoned):
    x = image(shape, dtype, rng, device)
    assert_mean(
        lambda t: pool.adaptive_avg_pool2d(t, size),
        lambda t: F.adaptive_avg_pool2d(t, size),
        x, device, rng, terms=32,
    )  # fmt: skip


@DEVICE
def test_a_large_window_is_summed_in_parts_of_one_order(device, rng, poisoned):
    """0.1 is not a float32: 128,000 of them added one by one are wrong in the third digit."""
    from fullres.kernels.pool import window_parts

    x = torch.full((1, 3, 400, 320), 0.1, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    assert window_parts(1, 3, 400 * 320) > 8
    with launching(device):
        first, second = (pool.adaptive_avg_pool2d(x, 1) for _ in range(2))
    assert torch.equal(first, second)
    exact = x[0, 0, 0, 0].double()
    # Chains of T parts and of a lane's pixels, and a tree.
    terms = window_parts(1, 3, 400 * 320) + 32
    assert ((first.double() - exact).abs() <= terms * torch.finfo(x.dtype).eps / 2 * exact).all()


def test_parts_cover_large_windows_and_leave_small_ones_whole():
    from fullres.kernels.pool import PARTS, window_parts

    assert window_parts(8, 2048, 40 * 64) == 16  # 128 programs a part
    assert window_parts(1, 16, 10**9) == PARTS
    assert window_parts(10**6, 16, 81) == 1


def test_maxima_of_256_places_take_a_byte_and_more_take_two():
    image_shape = torch.zeros(1, 1, 40, 40)
    for kernel, dtype in ([16, 16], torch.uint8), ([16, 17], torch.int16):
        w = pool.windows(image_shape, kernel, kernel, [0, 0], [1, 1], False, None)
        assert w.taps_dtype == dtype
    wide = torch.zeros(1, 1, 1, 1).expand(1, 1, 200, 200)
    assert pool.windows(wide, [], [], [], [], False, [1, 1]).taps_dtype == torch.int32


@DEVICE
def test_the_last_place_of_256_is_told(device, rng):
    x = image((1, 8, 16, 16), torch.float32, rng, device)
    x[:, :, 15, 15] = 100.0
    with launching(device):
        y, dx = with_gradient(lambda t: pool.max_pool2d(t, 16), x, torch.ones(1, 8, 1, 1).to(x))
    assert (y == 100).all() and (dx[:, :, 15, 15] == 1).all() and dx.sum() == 8


@DEVICE
def test_nan_wins_and_infinities_pass(device, rng):
    x = image((1, 8, 9, 9), torch.float32, rng, device)
    x[0, :4, 2:4, 3:5] = float("nan")  # several in one window: torch takes the last
    x[0, 5], x[0, 6, 4, 4], x[0, 7, 1, 1] = -torch.inf, torch.inf, torch.nan
    window = {"kernel_size": 3, "stride": 2, "padding": 1, "return_indices": True}
    dy = image((1, 8, 5, 5), torch.float32, rng, device)
    with launching(device):
        got = with_gradient(lambda t: pool.max_pool2d(t, **window), x, dy)
        mean = pool.avg_pool2d(x, 3, 2, 1)
    wanted = with_gradient(lambda t: F.max_pool2d(t, **window), x, dy)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    torch.testing.assert_close(mean, F.avg_pool2d(x, 3, 2, 1), equal_nan=True)


def pairs(least, most):
    return st.tuples(st.integers(least, most), st.integers(least, most))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 2), st.integers(1, 9), pairs(1, 9), pairs(1, 4), pairs(1, 3), pairs(0, 2),
    pairs(1, 3), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_window_is_torchs_or_refused_by_both(
    N, C, size, kernel, stride, padding, dilation, ceil_mode, include
):
    rng = torch.Generator().manual_seed(1)
    x = small_integers((N, C, *size), torch.float16, rng)
    window = kernel, stride, padding, dilation, ceil_mode
    try:
        F.max_pool2d(x.float(), *window)
    except RuntimeError:
        with pytest.raises(ValueError, match=": want .*, got "):
            pool.max_pool2d(x, *window)
        return
    try:
        pool.max_pool2d(x, *window)
    except ValueError as error:  # torch reads outside its image there
        assert "a pixel in each window" in str(error)
        assert any(side < step for side, step in zip(size, dilation, strict=True))
        return
    assert_max(
        lambda t: pool.max_pool2d(t, *window, return_indices=True),
        lambda t: F.max_pool2d(t, *window, return_indices=True),
        x, "cpu", rng,
    )  # fmt: skip
    if dilation == (1, 1):
        means = kernel, stride, padding, ceil_mode, include
        assert_mean(
            lambda t: pool.avg_pool2d(t, *means), lambda t: F.avg_pool2d(t, *means),
            x, "cpu", rng, terms=32,
        )  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(pairs(1, 9), pairs(1, 12))
def test_any_adaptive_window_is_torchs(size, count):
    rng = torch.Generator().manual_seed(2)
    x = small_integers((1, 3, *size), torch.float32, rng)
    assert_max(
        lambda t: pool.adaptive_max_pool2d(t, count, return_indices=True),
        lambda t: F.adaptive_max_pool2d(t, count, return_indices=True),
        x, "cpu", rng,
    )  # fmt: skip
    assert_mean(
        lambda t: pool.adaptive_avg_pool2d(t, count),
        lambda t: F.adaptive_avg_pool2d(t, count),
        x, "cpu", rng, terms=32,
    )  # fmt: skip
    spans = [
        max(-(-(p + 1) * side // n) - p * side // n for p in range(n))
        for side, n in zip(size, count, strict=True)
    ]
    assert pool.windows(x, [], [], [], [], False, count).shape == spans


FUNCTIONS = {
    "max": lambda t: pool.max_pool2d(t, 3, 2, 1),
    "adaptive-max": lambda t: pool.adaptive_max_pool2d(t, (2, 3)),
    "avg": lambda t: pool.avg_pool2d(t, 3, 2, 1),
    "adaptive-avg": lambda t: pool.adaptive_avg_pool2d(t, (2, 3)),
}
FUNCTION = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


@FUNCTION
@DEVICE
def test_the_same_bits_twice(function, device, rng):
    x = image((2, 16, 11, 15), torch.float32, rng, device)
    with launching(device):
        y = function(x)
        dy = image(y.shape, torch.float32, rng, device)
        first, second = (with_gradient(function, x, dy) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@FUNCTION
def test_any_layout_is_taken(function, rng):
    x = image((2, 6, 9, 11), torch.float32, rng)
    wide = F.pad(x, (1, 2, 0, 0))[..., 1:-2]
    for view in x.contiguous(), wide, torch.cat([x, x], 1)[:, 6:], x[:1].expand(2, -1, -1, -1):
        with launching("cpu"):
            y = function(view)
            dy = torch.ones_like(y).expand_as(y)
            _, dx = with_gradient(function, view, dy)
        assert y.is_contiguous(memory_format=torch.channels_last)
        wanted, wanted_dx = with_gradient(function, view.contiguous(), dy)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(dx, wanted_dx)


# The op, on the CPU


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS], ids=str)
@CASE
def test_reference_is_torchs(shape, window, dtype, rng):
    x = small_integers(shape, dtype, rng)
    wanted = F.max_pool2d(x, **window, return_indices=True)
    got = pool.max_pool2d(x, **window, return_indices=True)
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    dy = small_integers(wanted[0].shape, dtype, rng)  # sums of few small integers are exact
    ours = with_gradient(lambda t: pool.max_pool2d(t, **window), x, dy)
    torchs = with_gradient(lambda t: F.max_pool2d(t, **window), x, dy, torch.float64)
    assert torch.equal(ours[1].double(), torchs[1])
    got = with_gradient(lambda t: pool.avg_pool2d(t, **window), x, dy)
    wanted = with_gradient(lambda t: F.avg_pool2d(t, **window), x, dy, torch.float64)
    for a, b in zip(got, wanted, strict=True):
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def saved_bytes(function, x):
    """Return the bytes that function(x) keeps for backward, x's among them."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(x)
    return sum(kept.values()), y


def test_what_is_kept_for_backward(rng):
    x = image((2, 8, 16, 20), torch.float32, rng).requires_grad_()
    for function, wanted in (
        (lambda t: pool.max_pool2d(t, 2), 2 * 8 * 8 * 10),
        (lambda t: pool.max_pool2d(t, 3, 2, 1, return_indices=True)[0], 2 * 8 * 8 * 10),
        (lambda t: pool.max_pool2d(t, 16, 1), 2 * 8 * 1 * 5),
        (lambda t: pool.adaptive_max_pool2d(t, (2, 3)), 2 * 8 * 2 * 3),
        (lambda t: pool.adaptive_max_pool2d(t, 1), 2 * 2 * 8),  # 320 places
        (lambda t: pool.avg_pool2d(t, 2), 0),
        (lambda t: pool.adaptive_avg_pool2d(t, 1), 0),
    ):
        kept, y = saved_bytes(function, x)
        assert kept == wanted
        y.sum().backward()


def test_no_place_is_written_where_none_is_asked_for(rng, monkeypatch):
    kept = []
    written = pool.max_pool

    def noting(*arguments):
        y, taps = written(*arguments)
        kept.append(taps.numel())
        return y, taps

    monkeypatch.setattr(pool, "max_pool", noting)
    x = image((1, 8, 4, 4), torch.float32, rng)
    for device_path in False, True:
        with launching("cpu") if device_path else ExitStack():
            assert torch.equal(pool.max_pool2d(x, 2), F.max_pool2d(x, 2))
            with torch.no_grad():
                pool.adaptive_max_pool2d(x.clone().requires_grad_(), 2)
            pool.max_pool2d(x, 2, return_indices=True)
            pool.max_pool2d(x.clone().requires_grad_(), 2)
    assert kept == [0, 0, 32, 32] * 2


def test_unbatched_images_and_empty_batches(rng):
    x = torch.randn(3, 8, 9, generator=rng)
    for name, arguments in (
        ("max_pool2d", (2,)), ("avg_pool2d", (3, 2, 1)), ("adaptive_avg_pool2d", ((None, 2),)),
        ("adaptive_max_pool2d", (2,)),
    ):  # fmt: skip
        ours, torchs = getattr(pool, name), getattr(F, name)
        torch.testing.assert_close(ours(x, *arguments), torchs(x, *arguments))
        empty = x.new_empty(0, 3, 8, 9).requires_grad_()
        for device_path in False, True:
            with launching("cpu") if device_path else ExitStack():
                y = ours(empty, *arguments)
                (dx,) = torch.autograd.grad(y.sum(), empty)
            assert y.shape == torchs(empty, *arguments).shape and dx.shape == empty.shape
    y, indices = pool.max_pool2d(x, 2, return_indices=True)
    wanted = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, wanted[0]) and torch.equal(indices, wanted[1])


@FUNCTION
def test_autocast_leaves_the_dtype_alone(function, rng):
    x = image((1, 8, 9, 9), torch.float32, rng)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(x), function(x))
        y = function(x)
    assert y.dtype == torch.float32 and torch.equal(y, function(x))


@pytest.mark.parametrize("dynamic", [False, True])
@FUNCTION
def test_compiles_as_one_graph(function, dynamic, rng):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (12, 15), (11, 14):
        x = image((2, 8, *size), torch.float32, rng)
        dy = image(function(x).shape, torch.float32, rng)
        got, wanted = with_gradient(compiled, x, dy), with_gradient(function, x, dy)
        assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


@FUNCTION
def test_has_no_second_derivatives_and_says_so(function, rng):
    x = image((1, 8, 9, 9), torch.float32, rng).requires_grad_()
    with pytest.raises(RuntimeError, match="Pool2d has no second derivatives"):
        torch.autograd.grad(function(x).sum(), x, create_graph=True)


def test_opcheck(rng):
    x = image((2, 4, 7, 9), torch.float32, rng)
    window, empty = ([3, 2], [2, 2], [1, 1], [1, 1], True, None), ([], [], [], [], False, [2, 3])
    for arguments in window, empty:
        y, taps = pool.max_pool(x, *arguments, True)
        torch.library.opcheck(pool.max_pool, (x, *arguments, True))
        torch.library.opcheck(pool.max_pool, (x, *arguments, False))
        shape = list(x.shape)
        torch.library.opcheck(pool.max_pool_backward, (y, taps, shape, *arguments))
        kernel, stride, padding, _, ceil_mode, size = arguments
        means = kernel, stride, padding, ceil_mode, True, None, size
        torch.library.opcheck(pool.avg_pool, (x, *means))
        torch.library.opcheck(pool.avg_pool_backward, (y, shape, *means))


X = torch.zeros(1, 4, 8, 9)
BAD = {  # function, the argument that is named, arguments
    "two-dimensions": ("max_pool2d", "input", (X[0, 0], 2)),
    "integers": ("max_pool2d", "input", (X.long(), 2)),
    "no-channels": ("avg_pool2d", "input", (X[:, :0], 2)),
    "no-rows": ("adaptive_avg_pool2d", "input", (X[:, :, :0], 2)),
    "image-smaller-than-the-window": ("max_pool2d", "input", (X, 10)),
    "window-in-the-padding": ("max_pool2d", "input", (X[:, :, :2], (2, 1), 1, (1, 0), 3)),
    "kernel-zero": ("max_pool2d", "kernel_size", (X, 0)),
    "kernel-of-three": ("avg_pool2d", "kernel_size", (X, (2, 2, 2))),
    "kernel-a-float": ("avg_pool2d", "kernel_size", (X, 2.0)),
    "kernel-none": ("avg_pool2d", "kernel_size", (X, (None, 2))),
    "stride-zero": ("max_pool2d", "stride", (X, 2, 0)),
    "padding-more-than-half": ("max_pool2d", "padding", (X, 3, 1, 2)),
    "padding-negative": ("avg_pool2d", "padding", (X, 3, 1, -1)),
    "dilation-zero": ("max_pool2d", "dilation", (X, 2, 2, 0, 0)),
    "divisor-zero": ("avg_pool2d", "divisor_override", (X, 2, 2, 0, False, True, 0)),
    "size-zero": ("adaptive_avg_pool2d", "output_size", (X, 0)),
    "size-of-three": ("adaptive_max_pool2d", "output_size", (X, (1, 2, 3))),
    "size-a-word": ("adaptive_avg_pool2d", "output_size", (X, "same")),
}


@pytest.mark.parametrize(("name", "argument", "arguments"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("path", ["real", "fake", "triton"])
def test_refuses_with_the_arguments_name(name, argument, arguments, path):
    with ExitStack() as stack:
        if path == "triton":
            stack.enter_context(launching("cpu"))
        if path == "fake":
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            arguments = [mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]
        with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
            getattr(pool, name)(*arguments)


def test_gradients_unlike_the_result_are_named():
    window = [2, 2], [2, 2], [0, 0], [1, 1], False, None
    y, taps = pool.max_pool(X, *window, True)
    for function in pool.max_pool_backward, pool.max_pool_backward_triton:
        with pytest.raises(ValueError, match=r"^dy: want \[1, 4, 4, 4\], got \[1, 4, 4, 3\]"):
            function(y[..., :3], taps, list(X.shape), *window)
        with pytest.raises(ValueError, match="^taps: want torch.uint8, got torch.int16"):
            function(y, taps.short(), list(X.shape), *window)


# On a device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_device_in_every_configuration(dtype, rng):
    from fullres.kernels import pool as kernels
    from fullres.kernels._tune import pinned

    x = small_integers((2, 24, 33, 65), dtype, rng, "cuda")
    window = {"kernel_size": 3, "stride": 2, "padding": 1}
    for config in kernels.CONFIGS:
        with ExitStack() as stack:
            for kernel in (
                kernels.max_pool_kernel, kernels.max_pool_backward_kernel,
                kernels.avg_pool_kernel, kernels.avg_pool_backward_kernel,
            ):  # fmt: skip
                stack.enter_context(pinned(kernel, config))
            assert_max(
                lambda t: pool.max_pool2d(t, **window, return_indices=True),
                lambda t: F.max_pool2d(t, **window, return_indices=True),
                x, "cuda", rng,
            )  # fmt: skip
            assert_mean(
                lambda t: pool.avg_pool2d(t, **window), lambda t: F.avg_pool2d(t, **window),
                x, "cuda", rng, terms=32,
            )  # fmt: skip


@pytest.mark.gpu
def test_device_addresses_past_two_to_the_31(rng):
    """Only the last image is not zero, and lies beyond 2**31 elements of x, and of y of 3x3."""
    N, C, H, W = 53, 16, 1280, 2048
    if torch.cuda.mem_get_info()[0] < 5 * 2 * N * C * H * W + (2 << 30):
        pytest.skip("needs 24 GiB of free device memory")
    last = image((1, C, H, W), torch.bfloat16, rng, "cuda")
    x = torch.empty(
        (N, C, H, W), dtype=last.dtype, device="cuda", memory_format=torch.channels_last
    ).zero_()
    x[-1:] = last
    assert x.numel() > 2**31
    for ours in (
        lambda t: pool.max_pool2d(t, 3, 1, 1), lambda t: pool.avg_pool2d(t, 3, 1, 1),
        lambda t: pool.adaptive_avg_pool2d(t, 1),
    ):  # fmt: skip
        dy = torch.zeros_like(ours(x))
        dy[-1] = 1
        y, dx = with_gradient(ours, x, dy)
        wanted = with_gradient(ours, last, dy[-1:])
        assert torch.equal(y[-1:], wanted[0]) and torch.equal(dx[-1:], wanted[1])
        assert not dx[:-1].any()
        del y, dx, dy, wanted


@pytest.mark.gpu
def test_device_ops_pass_opcheck(rng):
    x = image((2, 4, 7, 9), torch.float32, rng, "cuda")
    torch.library.opcheck(pool.max_pool, (x, [3, 2], [2, 2], [1, 1], [1, 1], True, None, True))
    torch.library.opcheck(pool.avg_pool, (x, [], [], [], False, True, None, [1, 1]))
