import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fullres.ops import conv
from fullres.ops.conv import _conv2d, conv2d, conv2d_triton
from fullres.ops.dispatch import tf32_allowed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]

CASES = {  # x, weight, and the rest of torch's arguments
    "3x3": ([2, 16, 9, 11], [24, 16, 3, 3], {"padding": 1}),
    "1x1": ([2, 5, 4, 3], [6, 5, 1, 1], {}),
    "7x7-stride-2": ([1, 3, 13, 16], [8, 3, 7, 7], {"stride": 2, "padding": 3}),
    "pairs": (
        [2, 4, 9, 10], [6, 4, 3, 2], {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)},
    ),
    "groups": ([1, 12, 5, 6], [8, 3, 3, 3], {"padding": 1, "groups": 4}),
    "depthwise": ([2, 6, 7, 5], [12, 1, 3, 3], {"stride": 2, "padding": 1, "groups": 6}),
    "same": ([1, 3, 5, 6], [4, 3, 3, 5], {"padding": "same"}),
    "same-even": ([2, 3, 5, 6], [4, 3, 4, 2], {"padding": "same"}),
    "same-even-dilated": ([1, 3, 7, 8], [4, 3, 2, 4], {"padding": "same", "dilation": (3, 2)}),
    "valid": ([1, 3, 5, 6], [4, 3, 3, 2], {"padding": "valid", "stride": [1, 2]}),
    "lists-of-one": ([1, 3, 5, 6], [4, 3, 3, 2], {"padding": [1], "stride": (2,)}),
    "one-image": ([3, 5, 6], [4, 3, 3, 3], {"padding": 1}),
    "one-image-same-even": ([3, 5, 6], [4, 3, 2, 2], {"padding": "same"}),
    "one-pixel": ([1, 1, 1, 1], [1, 1, 1, 1], {}),
}  # fmt: skip
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def arguments(case, dtype, rng, *, bias=True, device="cpu"):
    """Seeded x, weight, bias, and the options; variance one, as after a normalisation."""
    x_shape, weight_shape, options = case
    x = torch.randn(x_shape, generator=rng)
    weight = torch.randn(weight_shape, generator=rng) / torch.Size(weight_shape[1:]).numel() ** 0.5
    b = torch.randn(weight_shape[0], generator=rng) if bias else None
    return *(None if t is None else t.to(device, dtype) for t in (x, weight, b)), options


def results(function, given, dy_seed=1):
    """y, and the gradients of what requires them, for a seeded dy."""
    *tensors, options = given
    inputs = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*inputs, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(dy_seed)).to(y)
    return y.detach(), *torch.autograd.grad(y, [t for t in inputs if t is not None], dy)


def assert_close(given):
    """As exact as torch: within twice its error, and what a float32 sum of n terms may lose."""
    x, weight, bias, _ = given
    wide = [t.double().cpu() if torch.is_tensor(t) else t for t in given]
    ours, torchs, want = results(conv2d, given), results(F.conv2d, given), results(F.conv2d, wide)
    pixels = ours[0].numel() // weight.shape[0]
    lengths = weight[0].numel(), weight.numel() // weight.shape[1], pixels, pixels
    for name, got, peer, exact, n in zip(
        ("y", "dx", "dweight", "dbias"), ours, torchs, want, lengths, strict=bias is not None
    ):
        assert (got.shape, got.dtype) == (peer.shape, x.dtype), name
        unit = torch.finfo(x.dtype).eps + 4 * n**0.5 * torch.finfo(torch.float32).eps
        allowed = 2 * (peer.double().cpu() - exact).abs().max() + unit * exact.abs().max()
        assert (got.double().cpu() - exact).abs().max() <= allowed, name


def three_by_three(dtype, rng, **options):
    return arguments(([1, 3, 5, 6], [4, 3, 3, 3], {"padding": 1}), dtype, rng, **options)


# On the CPU


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASE
def test_gradients_are_as_exact_as_torchs(case, dtype, rng):
    assert_close(arguments(case, dtype, rng))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@CASE
def test_gradients_in_float64(case, bias, rng):
    *tensors, options = arguments(case, torch.float64, rng, bias=bias)
    inputs = [t.requires_grad_() for t in tensors if t is not None]
    y = conv2d(*inputs, **options)
    assert y.dtype == torch.float64
    if y.dim() == 4:
        assert y.is_contiguous(memory_format=torch.channels_last)
    if inputs[0].numel() < 200:
        assert torch.autograd.gradcheck(lambda *a: conv2d(*a, **options), inputs)
    torch.testing.assert_close(y, F.conv2d(*inputs, **options))


def test_arguments_by_position_are_torchs(rng):
    x, weight, bias, _ = arguments(([1, 4, 9, 9], [8, 2, 3, 3], {}), torch.float64, rng)
    rest = 2, 1, 2, 2
    torch.testing.assert_close(conv2d(x, weight, bias, *rest), F.conv2d(x, weight, bias, *rest))
    names = {"input": None, "weight": None, "bias": None}
    order = ["stride", "padding", "dilation", "groups"]
    assert list(conv2d.__annotations__)[len(names) : -1] == order


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "x weight", "weight bias", "x bias"])
def test_gradients_nobody_asked_for_are_not_computed(needs, rng):
    x, weight, bias, options = three_by_three(torch.float32, rng)
    tensors = {"x": x, "weight": weight, "bias": bias}
    for name in needs.split():
        tensors[name].requires_grad_()
    with (
        patch.object(conv, "conv2d_dgrad", wraps=conv.conv2d_dgrad) as dgrad,
        patch.object(conv, "conv2d_wgrad", wraps=conv.conv2d_wgrad) as wgrad,
    ):
        conv2d(x, weight, bias, **options).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == set(needs.split())
    assert dgrad.called == ("x" in needs.split())
    assert wgrad.called == ("weight" in needs)
    if wgrad.called:
        assert wgrad.call_args.args[-1] == ("bias" in needs)


def test_gradients_of_an_empty_batch_are_zero(rng):
    given = arguments(([0, 3, 5, 6], [4, 3, 3, 3], {"padding": 1}), torch.float32, rng)
    y, dx, dweight, dbias = results(conv2d, given)
    assert y.shape == (0, 4, 5, 6) and dx.shape == (0, 3, 5, 6)
    assert torch.equal(dweight, torch.zeros(4, 3, 3, 3))
    assert torch.equal(dbias, torch.zeros(4))


def test_backward_may_run_twice_but_not_be_differentiated(rng):
    x, weight, bias, options = three_by_three(torch.float32, rng)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = conv2d(*inputs, **options).square().sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    second = torch.autograd.grad(y, inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="fullres_conv2d.* has no second derivatives"):
        torch.autograd.grad(y, inputs, create_graph=True)


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
    x, weight, b, _ = arguments(([2, 4, 5, 6], [6, 2, 3, 2], {}), dtype, rng, bias=bias)
    for needs_grad in (True, False):
        for t in (x, weight, b):
            if t is not None:
                t.requires_grad_(needs_grad)
        torch.library.opcheck(_conv2d, (x, weight, b, [2, 1], [1, 0], [1, 2], 2))


def test_fake_has_the_strides_of_the_real_where_they_are_ambiguous(rng):
    geometry = [1, 1], [1, 1], [1, 1], 1
    for shapes in [
        ([1, 1, 1, 1], [1, 1, 3, 3]), ([2, 1, 4, 1], [1, 1, 3, 3]), ([0, 3, 2, 2], [4, 3, 1, 1]),
    ]:  # fmt: skip
        x, weight, bias, _ = arguments((*shapes, {}), torch.float32, rng)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = _conv2d(*(mode.from_tensor(t) for t in (x, weight, bias)), *geometry)
        real = _conv2d(x, weight, bias, *geometry)
        assert (fake.shape, fake.stride()) == (real.shape, real.stride())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(dynamic, rng):
    def block(x, weight, bias):
        y = conv2d(x, weight, bias, padding="same").relu()
        return conv2d(y, weight[:, :2], None, 2, (1, 0), groups=2)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x, weight, bias, _ = arguments(([2, 4, 5, 6], [4, 4, 3, 3], {}), torch.float32, rng)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    found = []
    for function in (compiled, block):
        y = function(*inputs)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_as_torchs_convolution_does(dtype, compiled, rng):
    x, weight, bias, _ = three_by_three(torch.float32, rng)
    call = torch.compile(conv2d, fullgraph=True, backend="aot_eager") if compiled else conv2d
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = call(x, weight, bias, padding=1)
        assert y.dtype == F.conv2d(x, weight, bias, padding=1).dtype == dtype
        # float64 is left alone, as there; and the op by itself computes in its arguments' dtype.
        assert conv2d(x.double(), weight.double()).dtype == torch.float64
        assert _conv2d(x, weight, bias, [1, 1], [1, 1], [1, 1], 1).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert call(x, weight, bias, padding=1).dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(y, conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=1))


def test_tf32_needs_leave_for_convolutions_and_for_products():
    def allowed(convolutions, products):
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
        return tf32_allowed()

    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        assert before == (True, "highest")  # torch's defaults
        assert not tf32_allowed()
        expected = torch.version.hip is None
        assert allowed(True, "high") == allowed(True, "medium") == expected
        assert not allowed(True, "highest")
        assert not allowed(False, "high")
    finally:
        allowed(*before)


X, WEIGHT = torch.zeros(2, 4, 5, 6), torch.zeros(8, 4, 3, 3)
BAD = {  # the argument that is named, and what is given in place of good arguments
    "x-has-2-dimensions": ("x", {"x": X[0, 0]}),
    "x-has-5-dimensions": ("x", {"x": X[None]}),
    "x-is-integer": ("x", {"x": X.long(), "weight": WEIGHT.long()}),
    "x-has-no-channels": ("x", {"x": X[:, :0], "weight": WEIGHT[:, :0]}),
    "x-smaller-than-the-filter": ("x", {"x": X[:, :, :2]}),
    "weight-has-3-dimensions": ("weight", {"weight": WEIGHT[0]}),
    "weight-for-other-channels": ("weight", {"weight": WEIGHT[:, :2]}),
    "weight-without-outputs": ("weight", {"weight": WEIGHT[:0]}),
    "weight-of-another-dtype": ("weight", {"weight": WEIGHT.half()}),
    "bias-too-long": ("bias", {"bias": torch.zeros(9)}),
    "bias-of-another-dtype": ("bias", {"bias": torch.zeros(8).half()}),
    "groups-of-no-equal-parts": ("groups", {"groups": 3}),
    "stride-zero": ("stride", {"stride": 0}),
    "stride-of-three-numbers": ("stride", {"stride": (1, 1, 1)}),
    "stride-half": ("stride", {"stride": 0.5}),
    "stride-with-same": ("stride", {"padding": "same", "stride": (1, 2)}),
    "padding-negative": ("padding", {"padding": -1}),
    "padding-of-another-kind": ("padding", {"padding": "reflect"}),
    "padding-of-three-numbers": ("padding", {"padding": (1, 1, 1)}),
    "padding-true": ("padding", {"padding": True}),
    "dilation-zero": ("dilation", {"dilation": (1, 0)}),
}


@pytest.mark.parametrize(("argument", "changes"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("path", ["real", "fake", "fake-on-gpu"])
def test_refuses_with_the_arguments_name(argument, changes, path):
    given = {"x": X, "weight": WEIGHT, "bias": None} | changes
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name, t in given.items():
            if torch.is_tensor(t) and path != "real":
                given[name] = mode.from_tensor(t)
                if path == "fake-on-gpu":
                    given[name] = torch.empty_like(given[name], device="cuda")
        if path != "real":
            with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
                conv2d(**given)
    if path == "real":
        with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
            conv2d(**given)


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
        with pytest.raises(ValueError, match="^x: want .* rows of x and of y below 2"):
            conv2d(x, torch.empty(1, 4096, 3, 3, dtype=torch.bfloat16))


def test_imports_and_runs_on_the_cpu_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch
from fullres.ops.conv import conv2d
x = torch.ones(1, 1, 3, 3, requires_grad=True)
y = conv2d(x, torch.ones(1, 1, 3, 3))
y.backward()
assert y.item() == x.grad.sum() == 9
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Interpreted


def test_the_device_path_launches_our_kernel(rng):
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    x, weight, bias, _ = three_by_three(torch.float16, rng)
    geometry = [1, 1], [1, 1], [1, 1], 1
    with interpreted():
        y = conv2d_triton(x, weight, bias, *geometry)
    torch.testing.assert_close(y, _conv2d(x, weight, bias, *geometry), rtol=1e-3, atol=1e-3)


def test_the_interpreter_leaves_no_trace(pytestconfig):
    triton = pytest.importorskip("triton")
    if pytestconfig.getoption("--emulate"):
        pytest.skip("the emulator is in the interpreter's place")
    from fullres.kernels._tune import interpreted, interpreting

    run, call = triton.JITFunction.run, triton.JITFunction.__call__
    with pytest.raises(ZeroDivisionError), interpreted():
        assert interpreting()
        1 / 0  # noqa: B018
    assert interpreting() == triton.knobs.runtime.interpret
    assert (triton.JITFunction.run, triton.JITFunction.__call__) == (run, call)


# On a device


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASE
def test_device_gradients_are_as_exact_as_torchs(case, dtype, rng):
    torch.backends.cudnn.allow_tf32 = False  # the peer's
    try:
        assert_close(arguments(case, dtype, rng, device="cuda"))
    finally:
        torch.backends.cudnn.allow_tf32 = True


@pytest.mark.gpu
def test_device_addresses_past_two_to_the_31():
    """One channel of 50,000 x 50,000; rows of it against float64 on the CPU."""
    H = W = 50_000
    if torch.cuda.mem_get_info()[0] < 4 * H * W + (4 << 30):
        pytest.skip("needs 14 GiB of free device memory")
    rng = torch.Generator("cuda").manual_seed(1)
    x = torch.empty((1, 1, H, W), dtype=torch.bfloat16, device="cuda").normal_(generator=rng)
    weight = torch.randn(1, 1, 3, 3, generator=rng, device="cuda").bfloat16()
    y = conv2d(x, weight, padding=1)
    assert x.numel() > 2**31
    for h in (1, H // 2, H - 2):
        rows = x[:, :, h - 1 : h + 2].cpu().double()
        want = F.conv2d(rows, weight.cpu().double(), padding=(0, 1))
        squares = F.conv2d(rows**2, weight.cpu().double() ** 2, padding=(0, 1))
        unit, step = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps
        allowed = 4 * unit * 9**0.5 * squares.sqrt() + step * want.abs()
        assert ((y[:, :, h : h + 1].cpu().double() - want).abs() <= allowed).all()


@pytest.mark.gpu
def test_device_op_passes_opcheck_and_compiles(rng):
    case = [2, 16, 9, 11], [8, 16, 3, 3], {}
    x, weight, bias, _ = arguments(case, torch.float32, rng, device="cuda")
    x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(_conv2d, (x, weight, bias, [1, 1], [1, 1], [1, 1], 1))
    compiled = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias, padding=1), conv2d(x, weight, bias, padding=1))


@pytest.mark.gpu
def test_device_under_autocast(rng):
    case = [2, 16, 9, 11], [8, 16, 3, 3], {}
    x, weight, bias, _ = arguments(case, torch.float32, rng, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = conv2d(x, weight, bias, padding=1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), padding=1))
