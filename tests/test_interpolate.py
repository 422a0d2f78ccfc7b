"""Images of another size: against torch in float64, in the interpreter and on a device.

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

from fullres.ops import interpolate as module
from fullres.ops.interpolate import interpolate

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = pytest.mark.parametrize("device", DEVICES)
BILINEAR = {"mode": "bilinear"}
CORNERS = {"mode": "bilinear", "align_corners": True}

CASES = {  # shape of x, arguments
    "twice": ((2, 16, 7, 9), {"scale_factor": 2, **BILINEAR}),
    "twice-one-pixel": ((1, 8, 1, 1), {"scale_factor": 2.0, **BILINEAR}),
    "twice-one-column": ((1, 3, 5, 1), {"size": (10, 2), **BILINEAR}),
    "twice-corners": ((1, 136, 4, 5), {"scale_factor": 2, **CORNERS}),
    "larger": ((1, 8, 5, 6), {"size": (11, 17), **BILINEAR}),
    "smaller": ((2, 5, 13, 17), {"size": (4, 3), **BILINEAR}),
    "rows-smaller-columns-larger": ((1, 8, 9, 4), {"size": (4, 9), **CORNERS}),
    "to-one-pixel": ((1, 8, 6, 7), {"size": 1, **CORNERS}),
    "from-one-row": ((1, 8, 1, 7), {"size": (5, 3), **CORNERS}),
    "the-same-size": ((1, 8, 6, 7), {"size": (6, 7), **BILINEAR}),
    "odd-factors": ((1, 8, 6, 7), {"scale_factor": (1.3, 3.7), **BILINEAR}),
    "odd-factors-recomputed": (
        (1, 8, 6, 7), {"scale_factor": (1.3, 3.7), "recompute_scale_factor": True, **BILINEAR}
    ),
    "nearest-twice": ((2, 16, 5, 7), {"scale_factor": 2}),
    "nearest-larger": ((1, 3, 5, 7), {"size": (13, 24)}),
    "nearest-smaller": ((1, 8, 13, 24), {"size": (5, 7)}),
    "nearest-factors-of-the-same-size": ((1, 3, 2, 4), {"scale_factor": (1.3, 2.2)}),
    "nearest-odd-factors": ((1, 8, 7, 9), {"scale_factor": (2.3, 0.6)}),
}  # fmt: skip
CASE = pytest.mark.parametrize(("shape", "arguments"), CASES.values(), ids=CASES.keys())


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
    """Fill fresh memory with NaN, so that a lane that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def image(shape, dtype, rng, device="cpu"):
    x = torch.randn(shape, generator=rng).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def with_gradient(function, x, dz, dtype=None):
    """Return the function's result of x and the gradient that dz leaves there."""
    x = x.to(dtype or x.dtype).detach().requires_grad_()
    z = function(x)
    (dx,) = torch.autograd.grad(z, x, dz.to(z.dtype))
    return z, dx


def assert_torchs(arguments, x, dz, device):
    """Each result rounded once, and eight roundings of float32 for its weights and its terms.

    The magnitude allowed for is the same sum of absolute values; the interpreter truncates to
    bfloat16: a unit.
    """

    def ours(t):
        return interpolate(t, **arguments)

    def torchs(t):
        if arguments.get("mode", "nearest") == "bilinear":
            return F.interpolate(t, **arguments)
        # On a GPU or in float64 torch may take others; a gradient goes where the value came from.
        numbers = torch.arange(t[0, 0].numel(), dtype=torch.float32).view(1, 1, *t.shape[2:])
        taken = F.interpolate(numbers, **arguments)[0, 0].long().to(t.device)
        return t.flatten(2)[:, :, taken.flatten()].view(*t.shape[:2], *taken.shape)

    with launching(device):
        got = with_gradient(ours, x, dz)
    wanted = with_gradient(torchs, x, dz, torch.float64)
    magnitudes = with_gradient(torchs, x.abs(), dz.abs(), torch.float64)
    for result, value, magnitude in zip(got, wanted, magnitudes, strict=True):
        assert result.dtype == x.dtype and result.shape == value.shape
        assert result.is_contiguous(memory_format=torch.channels_last)
        single = torch.finfo(torch.float32).eps
        eps = torch.finfo(x.dtype).eps
        allowed = eps * value.abs() + 8 * single * magnitude
        if x.dtype in (torch.float16, torch.bfloat16):
            allowed = allowed + torch.finfo(x.dtype).smallest_normal
        excess = ((result.double() - value).abs() / allowed.clamp_min(1e-300)).max()
        assert excess <= 1, f"{excess:.3g} times the allowance"


@CASE
@DTYPE
@DEVICE
def test_is_torchs(shape, arguments, dtype, device, rng, poisoned):
    x = image(shape, dtype, rng, device)
    dz = image(F.interpolate(x.float(), **arguments).shape, dtype, rng, device)
    assert_torchs(arguments, x, dz, device)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from([{}, BILINEAR, CORNERS]),
)
def test_any_size_is_torchs(size, count, arguments):
    rng = torch.Generator().manual_seed(1)
    x, dz = (image((1, 3, *sides), torch.float32, rng) for sides in (size, count))
    assert_torchs({"size": count, **arguments}, x, dz, "cpu")


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.floats(0.3, 4), st.floats(0.3, 4)),
    st.sampled_from(["nearest", "bilinear"]),
)
def test_any_factor_is_torchs(size, factors, mode):
    rng = torch.Generator().manual_seed(1)
    count = [int(side * factor) for side, factor in zip(size, factors, strict=True)]
    x = image((1, 3, *size), torch.float32, rng)
    if not all(count):
        with pytest.raises(ValueError, match="^size: want "):
            interpolate(x, scale_factor=factors, mode=mode)
        return
    dz = image((1, 3, *count), torch.float32, rng)
    assert_torchs({"scale_factor": factors, "mode": mode}, x, dz, "cpu")


@pytest.mark.parametrize("arguments", [BILINEAR, CORNERS], ids=["half", "corners"])
@DEVICE
def test_points_of_wide_images_keep_their_digits(arguments, device):
    """At 40,000 pixels a float32 keeps 8 bits behind the point, and so does torch's interpolate."""
    n, count = 40_000, 50_001
    x = torch.arange(n, dtype=torch.float32) % 2  # slopes of 1 a pixel
    o = torch.arange(count)
    above, below = (
        (o * (n - 1), count - 1) if arguments is CORNERS else ((2 * o + 1) * n - count, 2 * count)
    )
    above = above.clamp(min=0)
    weight = (above % below).double() / below
    first = (above // below).clamp(max=n - 1)
    wanted = (1 - weight) * x[first] + weight * x[(first + 1).clamp(max=n - 1)]
    image = x.expand(1, 1, 1, -1).to(device)
    with launching(device):
        z = interpolate(image, size=(1, count), **arguments)
    single = torch.finfo(torch.float32).eps
    for result in z.cpu(), interpolate(image.cpu(), size=(1, count), **arguments):
        assert (result[0, 0, 0].double() - wanted).abs().max() < 4 * single
    torchs = F.interpolate(image.cpu(), size=(1, count), **arguments)[0, 0, 0]
    assert (torchs - wanted).abs().max() > 2**-11


@pytest.mark.parametrize("arguments", [{}, BILINEAR, CORNERS], ids=["nearest", "half", "corners"])
@DEVICE
def test_infinities_and_nan_pass_as_in_torch(arguments, device, rng):
    x = image((1, 2, 5, 6), torch.float32, rng, device)
    # Off the border, where torch takes a value 0 times that counts nothing.
    x[0, 0, 2, 2], x[0, 1, 2, 3] = torch.nan, torch.inf
    with launching(device):
        z = interpolate(x, size=(10, 12), **arguments)
    wanted = F.interpolate(x, size=(10, 12), **arguments)
    torch.testing.assert_close(z, wanted, equal_nan=True)


@DEVICE
def test_the_same_bits_twice(device, rng):
    for arguments in {"scale_factor": 2}, {"scale_factor": 2, **BILINEAR}, {"size": 19, **CORNERS}:
        x = image((2, 8, 7, 11), torch.float32, rng, device)
        with launching(device):
            dz = image(interpolate(x, **arguments).shape, torch.float32, rng, device)
            first, second = (
                with_gradient(lambda t, a=arguments: interpolate(t, **a), x, dz) for _ in range(2)
            )
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "arguments", [{"scale_factor": 2, **BILINEAR}, {"size": 9, **CORNERS}], ids=["twice", "size"]
)
def test_any_layout_and_an_empty_batch_are_taken(arguments, rng):
    x = image((2, 6, 5, 7), torch.float32, rng)
    views = x.contiguous(), F.pad(x, (1, 2))[..., 1:-2], x[:1].expand(2, -1, -1, -1), x[:0]
    for view in views:
        with launching("cpu"):
            z = interpolate(view, **arguments)
            dz = torch.ones(()).expand(z.shape)
            _, dx = with_gradient(lambda t: interpolate(t, **arguments), view, dz)
        wanted = with_gradient(lambda t: F.interpolate(t, **arguments), view.contiguous(), dz)
        torch.testing.assert_close(z, wanted[0])
        torch.testing.assert_close(dx, wanted[1])


# The op, on the CPU


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS], ids=str)
@CASE
def test_reference_is_torchs(shape, arguments, dtype, rng):
    x = image(shape, dtype, rng)
    dz = image(F.interpolate(x.float(), **arguments).shape, dtype, rng)
    assert_torchs(arguments, x, dz, "reference")
    z = interpolate(x.double(), **arguments)  # whose weights torch rounds to float32
    torch.testing.assert_close(z, F.interpolate(x.double(), **arguments), rtol=1e-6, atol=1e-6)


def test_both_paths_count_in_the_same_fixed_point():
    kernels = pytest.importorskip("fullres.kernels.interpolate")
    assert module.ONE == kernels.ONE.value == 1 << kernels.FRACTION.value
    assert module.ONE * kernels.UNIT.value == 1.0


def test_nothing_is_kept_for_backward(rng):
    x = image((2, 8, 6, 7), torch.float32, rng).requires_grad_()

    def refuse(t):
        raise AssertionError(f"kept {list(t.shape)}")

    for arguments in {"scale_factor": 2}, {"scale_factor": 2, **BILINEAR}, {"size": 9, **CORNERS}:
        with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t):
            z = interpolate(x, **arguments)
        z.sum().backward()
        total = torch.tensor(float(z.numel()))
        torch.testing.assert_close(x.grad.sum(), total)  # each output's weights sum to 1
        x.grad = None


def test_autocast_leaves_the_dtype_alone(rng):
    x = image((1, 8, 5, 5), torch.float32, rng)
    plain = interpolate(x, scale_factor=2, mode="bilinear")
    for dtype in torch.bfloat16, torch.float16:
        with torch.autocast("cpu", dtype):
            assert torch.equal(interpolate(x, scale_factor=2, mode="bilinear"), plain)
            half = interpolate(x.to(dtype), scale_factor=2, mode="bilinear")
        assert half.dtype == dtype
        assert torch.equal(half, interpolate(x.to(dtype), scale_factor=2, mode="bilinear"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic, rng):
    for arguments in {"scale_factor": 2, **BILINEAR}, {"size": (9, 11), **CORNERS}, {"size": 5}:
        torch.compiler.reset()

        def function(t, a=arguments):
            return interpolate(t, **a)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for size in (6, 8), (5, 7):
            x = image((2, 8, *size), torch.float32, rng)
            dz = image(function(x).shape, torch.float32, rng)
            got, wanted = with_gradient(compiled, x, dz), with_gradient(function, x, dz)
            assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_has_no_second_derivatives_and_says_so(rng):
    x = image((1, 8, 5, 5), torch.float32, rng).requires_grad_()
    with pytest.raises(RuntimeError, match="Interpolate has no second derivatives"):
        torch.autograd.grad(interpolate(x, size=3).sum(), x, create_graph=True)


def test_opcheck(rng):
    x = image((2, 4, 5, 6), torch.float32, rng)
    for arguments in (
        ([10, 12], [2.0, 2.0], "bilinear", False), ([7, 3], [], "bilinear", True),
        ([7, 3], [], "nearest", False),
    ):  # fmt: skip
        torch.library.opcheck(module.resize, (x, *arguments))
        z = module.resize(x, *arguments)
        torch.library.opcheck(module.resize_backward, (z, list(x.shape), *arguments))


X = torch.zeros(1, 4, 5, 6)
BAD = {  # the argument that is named, arguments
    "unbatched": ("input", {"input": X[0], "scale_factor": 2}),
    "integers": ("input", {"input": X.long(), "scale_factor": 2}),
    "no-rows": ("input", {"input": X[:, :, :0], "size": 2}),
    "neither": ("size", {}),
    "both": ("size", {"size": 2, "scale_factor": 2}),
    "size-of-three": ("size", {"size": (2, 3, 4)}),
    "size-zero": ("size", {"size": (0, 3)}),
    "size-a-float": ("size", {"size": 2.0}),
    "size-beyond-fixed-point": ("size", {"size": (1, 2**22)}),
    "factor-zero": ("scale_factor", {"scale_factor": 0.0}),
    "factor-leaves-nothing": ("size", {"scale_factor": 0.1}),
    "mode": ("mode", {"scale_factor": 2, "mode": "bicubic"}),
    "corners-of-nearest": ("align_corners", {"scale_factor": 2, "align_corners": False}),
    "recomputed-size": ("recompute_scale_factor", {"size": 2, "recompute_scale_factor": True}),
    "antialias": ("antialias", {"size": 2, "mode": "bilinear", "antialias": True}),
}


@pytest.mark.parametrize(("argument", "changes"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("path", ["real", "fake", "triton"])
def test_refuses_with_the_arguments_name(argument, changes, path):
    given = {"input": X, **changes}
    with ExitStack() as stack:
        if path == "triton":
            stack.enter_context(launching("cpu"))
        if path == "fake":
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            given["input"] = mode.from_tensor(given["input"])
        with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
            interpolate(**given)


# On a device


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [{}, BILINEAR], ids=["nearest", "bilinear"])
def test_device_addresses_past_two_to_the_31(arguments, rng):
    """Only the last image is not zero, and lies beyond 2**31 elements of z."""
    N, C, H, W = 53, 16, 640, 1024
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free device memory")
    last = image((1, C, H, W), torch.bfloat16, rng, "cuda")
    x = torch.empty(
        (N, C, H, W), dtype=last.dtype, device="cuda", memory_format=torch.channels_last
    ).zero_()
    x[-1:] = last
    for size in (2 * H, 2 * W), (2 * H, 2 * W + 1):  # the first of fixed weights
        dz = torch.empty(
            (N, C, *size), dtype=x.dtype, device="cuda", memory_format=torch.channels_last
        ).zero_()
        dz[-1] = 1
        assert dz.numel() > 2**31

        def function(t, size=size):
            return interpolate(t, size=size, **arguments)

        z, dx = with_gradient(function, x, dz)
        wanted = with_gradient(function, last, dz[-1:])
        assert torch.equal(z[-1:], wanted[0]) and torch.equal(dx[-1:], wanted[1])
        assert not dx[:-1].any() and not z[:-1].any()
        del z, dx, dz, wanted
