"""The fused last convolution and loss against float64 compositions."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fullres.ops import focal_blocks
from fullres.ops import linear_focal_loss as module
from fullres.ops.focal_loss import reduced, softmax_focal_loss
from fullres.ops.fuse import Prologue, prologue_reference
from fullres.ops.linear_focal_loss import (
    linear_backward,
    linear_backward_triton,
    linear_focal_loss,
    linear_focal_loss_sums,
    linear_forward,
    linear_forward_triton,
)
from fullres.ops.losses import LinearFocalLoss, SigmoidFocalLoss, SoftmaxFocalLoss
from fullres.ops.norm import batch_norm_eval
from fullres.ops.pointwise import prologue_backward
from fullres.ops.sigmoid_focal_loss import sigmoid_focal_loss

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = pytest.mark.parametrize("path", ["reference", "kernel"])
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:divide by zero")


@dataclass(frozen=True)
class Case:
    N: int = 2
    F: int = 16
    H: int = 5
    W: int = 7
    C: int = 3
    norm: bool = False
    act: str = "none"
    bias: bool = True
    options: dict = field(default_factory=dict)


FUSED = {"norm": True, "act": "leaky_relu"}
CASES = {
    "plain": Case(),
    "one-pixel": Case(N=1, H=1, W=1),
    "no-bias-relu": Case(bias=False, act="relu"),
    "norm-leaky-relu": Case(**FUSED),
    "norm-silu": Case(norm=True, act="silu"),
    "features-not-a-power-of-two": Case(F=20, C=5, **FUSED),
    "two-features-one-class": Case(F=2, C=1),
    "several-tiles": Case(N=1, H=30, W=50, **FUSED),
    "many-features": Case(F=130, C=2, H=3, W=3, **FUSED),
    "many-classes": Case(F=9, C=33, H=3, **FUSED),
    "more-than-a-program-holds": Case(F=100, C=70, H=3, W=4, **FUSED),
    "all-options": Case(
        **FUSED,
        options={
            "gamma": 1.5,
            "alpha": (0.5, 1.0, 2.0),
            "class_weight": (1.0, 2.0, 0.5),
            "label_smoothing": 0.1,
            "reduction": "weighted_mean",
        },
    ),
    "detached": Case(**FUSED, options={"reduction": "weighted_mean", "detach_factor": True}),
    "cross-entropy": Case(options={"gamma": 0.0, "reduction": "sum"}),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@contextmanager
def on_kernels():
    """Compute by the kernels, on CPU tensors in triton's interpreter."""
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    with (
        interpreted(),
        patch.object(module, "linear_forward", linear_forward_triton),
        patch.object(module, "linear_backward", linear_backward_triton),
    ):
        yield


def computed_by(path):
    return on_kernels() if path == "kernel" else nullcontext()


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN, so that a lane that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def arguments(case, dtype, rng, device="cpu"):
    """Seeded (features, norm, labels, weight, bias); all but labels ask for gradients."""
    wide = torch.promote_types(dtype, torch.float32)

    def random(*shape, dtype=dtype):
        return torch.randn(shape, generator=rng).to(device, dtype)

    features = random(case.N, case.F, case.H, case.W)
    features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = random(4, case.F, dtype=wide).requires_grad_() if case.norm else None
    labels = torch.randint(case.C, (case.N, case.H, case.W), generator=rng).to(device, torch.uint8)
    if labels.numel() > 1:
        labels[0, 0, 0] = 255
    weight = (random(case.C, case.F) * case.F**-0.5).requires_grad_()
    bias = random(case.C).requires_grad_() if case.bias else None
    return features, norm, labels, weight, bias


def run(case, given, **more):
    """(loss, gradients) by the op."""
    features, norm, labels, weight, bias = given
    loss = linear_focal_loss(
        features, labels, weight, bias, norm=norm, act=case.act, slope=0.1, ignore_index=255,
        **case.options, **more,
    )  # fmt: skip
    wanted = [t for t in (features, norm, weight, bias) if t is not None and t.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, wanted)


def composition(case, given):
    """(loss, gradients) in float64, z rounded to the features' dtype as the op rounds it."""
    features, norm, labels, weight, bias = given
    exact = [None if t is None else t.detach().double().cpu().requires_grad_() for t in given]
    x, n, _, w, b = exact
    z = prologue_reference(Prologue(x, n, act=case.act, slope=0.1))
    z = z + (z.detach().to(features.dtype).double() - z.detach())
    logits = F.conv2d(z, w[:, :, None, None], b)
    options = dict(case.options)
    options["weight"] = options.pop("class_weight", None)
    loss = softmax_focal_loss(logits, labels.cpu(), ignore_index=255, **options)
    wanted = [t for t in (x, n, w, b) if t is not None]
    d, *gradients = torch.autograd.grad(loss, [logits, *wanted])
    products = F.conv_transpose2d(d.abs(), w.detach().abs()[:, :, None, None])
    if n is not None:
        products = products * n.detach()[1].abs()[:, None, None]
    walk = torch.einsum("nchw,nfhw->cf", d**2, z.detach() ** 2).sqrt()
    return loss.detach(), gradients, (products, 4 * walk)


def assert_close(got, case, given):
    """Compare with the float64 composition.

    A logit of F products is off by sqrt(F) float32 roundings of them; the loss and a pixel's
    gradient by that and some forty more, steepened by 1 + gamma cross entropies. Where z is
    computed it may be rounded the other way: a unit of the dtype, and the slope of activations at
    0 with it. Sums of n pixels add sqrt(n) roundings. The gradient of features is rounded again.
    With 16-bit features its products and those of the weight's are of tf32, a factor rounded to 11
    bits: half a unit of that of their sum, or, of many pixels, four deviations of the walk.
    """
    loss, gradients = got
    wanted, dwanted, products = composition(case, given)
    features = given[0]
    eps = torch.finfo(torch.float32).eps
    pixels = max(1, features[:, 0].numel())
    unit = torch.finfo(features.dtype).eps
    computed = unit if case.norm or case.act == "silu" else 0.0
    relative = eps * (100 + 8 * case.F**0.5 + 4 * pixels**0.5) + computed
    assert loss.dtype == torch.promote_types(features.dtype, torch.float32)
    error = (loss.cpu().double() - wanted).abs()
    assert error <= 4 * relative * (1 + wanted.abs()), f"loss: {error / (1 + wanted.abs()):.2e}"
    for index, (g, w) in enumerate(zip(gradients, dwanted, strict=True)):
        rounding = unit if g.dtype != torch.float32 else eps
        scale = w.abs().amax() + w.abs()
        allowed = 4 * relative * scale + rounding * w.abs()
        if g.dtype == torch.float16:
            allowed = allowed + 2.0**-24
        if features.dtype in (torch.float16, torch.bfloat16):
            if index == 0:
                allowed = allowed + 2.0**-11 * products[0]
            elif g.shape == products[1].shape:
                allowed = allowed + 2.0**-11 * products[1]
        excess = ((g.cpu().double() - w).abs() / allowed.clamp_min(1e-300)).max()
        assert excess <= 1, f"gradient {index}: {excess:.2f} times the allowance"


# Values and gradients


@PATHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASE
def test_value_and_gradients_are_those_of_the_composition(case, dtype, path, rng, poisoned):
    given = arguments(case, dtype, rng)
    with computed_by(path):
        got = run(case, given)
    assert got[1][0].stride() == given[0].stride()
    assert_close(got, case, given)


@CASE
def test_float64_is_exact(case, rng):
    given = arguments(case, torch.float64, rng)
    with patch.object(focal_blocks, "BLOCK_ELEMENTS", 200):
        loss, gradients = run(case, given)
    wanted, dwanted, _ = composition(case, given)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients, dwanted, rtol=1e-6, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    case=st.builds(
        Case,
        N=st.integers(1, 2), F=st.integers(1, 20), H=st.integers(1, 5), W=st.integers(1, 9),
        C=st.integers(2, 6), norm=st.booleans(),
        act=st.sampled_from(["none", "relu", "leaky_relu", "silu"]), bias=st.booleans(),
        options=st.fixed_dictionaries(
            {
                "gamma": st.sampled_from([0.0, 1.0, 2.0, 2.5]),
                "alpha": st.sampled_from([None, 0.25]),
                "label_smoothing": st.sampled_from([0.0, 0.1]),
                "reduction": st.sampled_from(["mean", "sum", "weighted_mean"]),
                "detach_factor": st.booleans(),
            }
        ),
    ),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_kernel_takes_every_combination(case, seed):
    given = arguments(case, torch.float32, torch.Generator().manual_seed(seed))
    given[2][-1, -1, -1] = 0  # so that some pixel counts
    with on_kernels():
        got = run(case, given)
    assert_close(got, case, given)


@pytest.mark.parametrize("act", ["none", "silu"])
def test_gradient_is_that_of_the_value(act, rng):
    x, norm, labels, weight, bias = arguments(
        Case(N=1, F=3, H=2, W=2, norm=True), torch.float64, rng
    )

    def loss(x, norm, weight, bias):
        return linear_focal_loss(x, labels, weight, bias, norm=norm, act=act, ignore_index=255)

    assert torch.autograd.gradcheck(loss, (x, norm, weight, bias))


@PATHS
def test_it_is_the_convolution_then_the_loss(path, rng):
    """Also with the weight as a convolution has it, and of rows of features."""
    x, _, labels, weight, bias = arguments(Case(), torch.float32, rng)
    expected = softmax_focal_loss(
        F.conv2d(x, weight[:, :, None, None], bias), labels, ignore_index=255
    )
    rows = x.detach().movedim(1, -1).reshape(-1, 16)
    with computed_by(path):
        for features, y, w in (
            (x, labels, weight[:, :, None, None]),
            (x.contiguous(), labels, weight),
            (rows, labels.flatten(), weight),
        ):
            loss = linear_focal_loss(features, y, w, bias, ignore_index=255)
            torch.testing.assert_close(loss, expected)
            (dw,) = torch.autograd.grad(loss, w)
            (wanted,) = torch.autograd.grad(expected, weight, retain_graph=True)
            torch.testing.assert_close(dw.flatten(1), wanted)


@PATHS
def test_a_norm_passes_its_gradient_on(path, rng):
    """Through batch statistics computed from the features: as torch's batch normalisation."""
    x, _, labels, weight, bias = arguments(Case(), torch.float32, rng)
    gamma, beta = torch.rand(2, 16, generator=rng).unbind()
    gamma, beta = gamma.requires_grad_(), beta.requires_grad_()

    z = F.relu(F.batch_norm(x, None, None, gamma, beta, training=True))
    logits = F.conv2d(z, weight[:, :, None, None], bias)
    expected = softmax_focal_loss(logits, labels, ignore_index=255)
    wanted = torch.autograd.grad(expected, (x, gamma, beta))

    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    norm = batch_norm_eval(mean, variance, gamma, beta, 1e-5)
    with computed_by(path):
        loss = linear_focal_loss(x, labels, weight, bias, norm=norm, act="relu", ignore_index=255)
        got = torch.autograd.grad(loss, (x, gamma, beta))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_g_and_its_sums_are_as_prologue_backward_has_them(dtype, path, rng, poisoned):
    case = Case(**FUSED)
    x, norm, labels, weight, bias = (t.detach() for t in arguments(case, dtype, rng))
    op = linear_backward_triton if path == "kernel" else linear_backward
    scale = torch.tensor([[0.5], [0.0], [70.0]])
    options = (None, None, 2.0, 0.0, 255, False, scale, True, True, False, True)
    with computed_by(path):
        g, sums, _, _ = op(x, norm, "leaky_relu", 0.1, labels, weight, bias, *options)

    z = prologue_reference(Prologue(x, norm, act="leaky_relu", slope=0.1)).to(dtype).float()
    z.requires_grad_()
    logits = F.conv2d(z, weight.float()[:, :, None, None], bias.float())
    loss = softmax_focal_loss(logits, labels, ignore_index=255, reduction="sum") * 0.5 / 70
    (dz,) = torch.autograd.grad(loss, z)
    wanted, sums_wanted = prologue_backward(
        dz.to(dtype), None, x, norm, None, None, "leaky_relu", 0.1, "none", True
    )
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(g, wanted, rtol=4 * unit + 1e-4, atol=4 * unit * 1e-2 + 1e-6)
    torch.testing.assert_close(sums, sums_wanted, rtol=4 * unit, atol=unit + 1e-5)
    assert sums[2].eq(0).all()


@PATHS
def test_only_what_is_asked_for(path, rng, poisoned):
    case = Case(**FUSED)
    given = arguments(case, torch.float32, rng)
    with computed_by(path):
        _, (dx, dnorm, dw, db) = run(case, given)
        names = ("features", "norm", "weight", "bias")
        everything = dict(zip(names, (dx, dnorm, dw, db), strict=True))
        for frozen in ({"features", "norm"}, {"weight", "bias"}, {"norm"}, {"features"}, {"bias"}):
            some = [t if t is None else t.detach().clone() for t in given]
            asked = dict(zip(names, (some[0], some[1], some[3], some[4]), strict=True))
            for name, t in asked.items():
                t.requires_grad_(name not in frozen)
            _, gradients = run(case, some)
            left = [name for name in names if name not in frozen]
            for name, gradient in zip(left, gradients, strict=True):
                torch.testing.assert_close(gradient, everything[name])


@PATHS
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean"])
def test_tiles_and_planes_add_up_to_the_whole(reduction, path, rng):
    case = Case(H=12, **FUSED)
    x, norm, labels, weight, bias = arguments(case, torch.float32, rng)
    options = {"norm": norm, "act": "leaky_relu", "ignore_index": 255}
    leaves = (x, norm, weight, bias)
    with computed_by(path):
        whole = linear_focal_loss(x, labels, weight, bias, reduction=reduction, **options)
        wanted = torch.autograd.grad(whole, leaves)
        sums = 0
        for rows in (slice(0, 5), slice(5, 12)):
            for columns in (slice(0, 3), slice(3, 7)):
                tile = x[..., rows, columns], labels[:, rows, columns]
                sums = sums + linear_focal_loss_sums(*tile, weight, bias, **options)[0]
        tiled = reduced(sums, reduction).float()
        got = torch.autograd.grad(tiled, leaves)
    torch.testing.assert_close(tiled, whole)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


@PATHS
@pytest.mark.parametrize("by_class", [False, True])
def test_sums_and_counts_are_those_of_the_logits(by_class, path, rng):
    from fullres.ops.focal_loss import softmax_focal_loss_sums

    x, _, labels, weight, bias = arguments(Case(C=4, H=9, W=11), torch.float32, rng)
    options = {"ignore_index": 255, "by_class": by_class, "confusion": True}
    logits = F.conv2d(x, weight[:, :, None, None], bias)
    wanted, counts = softmax_focal_loss_sums(logits, labels, **options)
    upstream = torch.rand(wanted.shape, generator=rng, dtype=torch.float64)
    (dwanted,) = torch.autograd.grad(wanted, weight, upstream)
    with computed_by(path):
        got, counted = linear_focal_loss_sums(x, labels, weight, bias, **options)
        (dgot,) = torch.autograd.grad(got, weight, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dgot, dwanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(counted, counts) and counts.sum() == 2 * 9 * 11 - 1


@PATHS
@pytest.mark.parametrize("limit", [1, 100, 1 << 22])
def test_any_layout_and_any_block(path, limit, rng):
    x, norm, labels, weight, bias = arguments(Case(N=2, **FUSED), torch.float32, rng)
    x = x.detach()
    views = {
        "planar": x.contiguous(),
        "a window": F.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
        "a slice of features": torch.cat([x, x], 1)[:, 16:],
        "expanded": x[:1].expand(2, -1, -1, -1),
    }
    with computed_by(path), patch.object(focal_blocks, "BLOCK_ELEMENTS", limit):
        for view in views.values():
            given = (view.requires_grad_(), norm, labels, weight, bias)
            assert_close(run(Case(**FUSED), given), Case(**FUSED), given)


def test_every_configuration_computes_the_composition(rng, poisoned):
    from fullres.kernels import linear_focal_loss as kernels
    from fullres.kernels._tune import pinned

    forward = kernels.linear_focal_loss_kernel
    backward = kernels.linear_focal_loss_backward_kernel
    for config in kernels.CONFIGS:
        case = Case(F=40, C=20, H=9, W=33, **FUSED)
        given = arguments(case, torch.float16, rng)
        with on_kernels(), pinned(forward, config), pinned(backward, config):
            assert_close(run(case, given), case, given)


@pytest.mark.parametrize("T", [1, 3, 100])
def test_any_number_of_programs_covers_each_pixel_once(T, rng, poisoned):
    case = Case(H=20, W=30, **FUSED)
    given = arguments(case, torch.float32, rng)
    with on_kernels(), patch("fullres.kernels.focal_loss.programs", return_value=T):
        assert_close(run(case, given), case, given)


@PATHS
@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4), (2, 16, 4, 4)])
def test_no_pixel_to_count_is_zero_with_zero_gradients(shape, path, rng, poisoned):
    case = Case(N=shape[0], H=shape[2], W=shape[3], **FUSED)
    given = arguments(case, torch.float16, rng)
    given[2].fill_(255)
    with computed_by(path):
        loss, gradients = run(case, given)
    assert loss == 0 and not any(g.any() for g in gradients)


@PATHS
def test_nan_in_ignored_pixels_reaches_nothing(path, rng):
    for case in (Case(), Case(**FUSED), Case(norm=True, act="silu")):
        given = arguments(case, torch.float32, rng)
        given[2][0] = 255
        with torch.no_grad():
            given[0][0] = float("nan")
        with computed_by(path):
            loss, gradients = run(case, given)
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


def test_the_same_bits_twice(rng):
    case = Case(H=30, W=40, **FUSED)
    given = arguments(case, torch.float16, rng)
    with on_kernels():
        (a, first), (b, second) = run(case, given), run(case, given)
    assert torch.equal(a, b) and all(map(torch.equal, first, second))


# Bytes


class Allocations(TorchDispatchMode):
    """The shape and bytes of every fresh tensor, on the device path of our ops."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch._library.custom_ops import OPDEFS

        kwargs = kwargs or {}
        if func.namespace == "fullres":
            with self:  # what the device path allocates counts too
                return OPDEFS[func._schema.name]._backend_fns["cuda"](*args, **kwargs)
        out = func(*args, **kwargs)
        if torch.is_tensor(out) and not func.is_view and not func._schema.is_mutable:
            self.made.append((tuple(out.shape), out.numel() * out.itemsize))
        return out


def test_nothing_is_made_but_the_features_gradient():
    """No [N, C, H, W]; of other bytes only the parts of sums, a row for 1,024 pixels or more."""
    pytest.importorskip("triton")
    from fullres.kernels import launches

    def stand_in(argument):
        if torch.is_tensor(argument):
            return launches.tensor_argument(argument.dtype, argument.numel() * argument.itemsize)
        return argument

    with launches.recorded("sm_90", stand_in) as made, FakeTensorMode(), Allocations() as fresh:
        x = torch.empty(8, 16, 1280, 2048, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        norm = torch.empty(4, 16, requires_grad=True)
        labels = torch.empty(8, 1280, 2048, dtype=torch.uint8)
        weight = torch.empty(3, 16, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(3, dtype=torch.bfloat16, requires_grad=True)
        pixels = labels.numel()
        fresh.made.clear()
        loss = linear_focal_loss(x, labels, weight, bias, norm=norm, act="relu")
        forward = sum(size for _, size in fresh.made)
        fresh.made.clear()
        gradients = torch.autograd.grad(loss, (x, norm, weight, bias))
    assert forward <= pixels // 300
    assert sum(size for _, size in fresh.made) <= 2 * 16 * pixels + pixels // 10
    large = [shape for shape, size in fresh.made if size > pixels // 2]
    assert large == [(8, 16, 1280, 2048)]
    assert gradients[0].stride() == x.stride()
    assert {launch.kernel.split(":")[1] for launch in made} >= {
        "linear_focal_loss_kernel",
        "linear_focal_loss_backward_kernel",
    }


def test_blocks_bound_what_the_cpu_makes(rng):
    """The reference too never holds an image's logits, however they are laid out."""
    case = Case(N=2, H=20, W=30)
    given = arguments(case, torch.float32, rng)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if torch.is_tensor(t) and t.shape[1:2] == (3,):
                    largest = max(largest, t.numel())
            return out

    with patch.object(focal_blocks, "BLOCK_ELEMENTS", 19 * 50):
        with Largest():
            torch.ops.fullres.linear_focal_loss(
                given[0].detach(), None, "none", 0.0, given[2], given[3].detach(), None, None, None,
                2.0, 0.0, 255, False, False,
            )  # fmt: skip
    assert largest <= 3 * 50


def test_backward_keeps_only_what_was_given(rng):
    case = Case(**FUSED)
    given = arguments(case, torch.bfloat16, rng)
    features, norm, labels, weight, bias = given
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_focal_loss(features, labels, weight, bias, norm=norm, ignore_index=255)
    held = {t.data_ptr() for t in given}
    assert held == {x.data_ptr() for x in saved if x.data_ptr() in held}
    assert sum(x.nbytes for x in saved if x.data_ptr() not in held) == 8  # the divisor


# As torch's own


def test_backward_may_run_twice_but_not_be_differentiated(rng):
    x, _, labels, weight, _ = arguments(Case(), torch.float32, rng)
    loss = linear_focal_loss(x, labels, weight, ignore_index=255)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, x, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="LinearFocalLoss has no second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("case", ["plain", "all-options"])
def test_it_compiles_as_one_graph(case, rng):
    case = CASES[case]
    given = arguments(case, torch.float32, rng)
    leaves = [t for t in given if t is not None and t.requires_grad]

    def step(features, norm, labels, weight, bias):
        return linear_focal_loss(
            features, labels, weight, bias, norm=norm, act=case.act, ignore_index=255,
            **case.options,
        )  # fmt: skip

    expected = step(*given)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(got, torch.autograd.grad(expected, leaves))


def test_autocast_rounds_as_a_convolution_and_keeps_the_weights_gradient(rng):
    x, _, labels, weight, bias = arguments(Case(), torch.float32, rng)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_focal_loss(x, labels, weight, bias, ignore_index=255)
    dx, dw = torch.autograd.grad(loss, (x, weight))
    low = [t.detach().to(torch.bfloat16).requires_grad_() for t in (x, weight, bias)]
    same = linear_focal_loss(low[0], labels, low[1], low[2], ignore_index=255)
    wanted = torch.autograd.grad(same, low)
    assert torch.equal(loss, same) and torch.equal(dx, wanted[0].float())
    assert dw.dtype == torch.float32 and torch.equal(dw.to(torch.bfloat16), wanted[1])
    assert not torch.equal(dw, wanted[1].float())  # it has more digits


@pytest.mark.parametrize("case", ["plain", "all-options"])
def test_opcheck(case, rng):
    case = CASES[case]
    given = [t if t is None else t.detach() for t in arguments(case, torch.bfloat16, rng)]
    x, norm, labels, weight, bias = given
    head = (x, norm, case.act, 0.1, labels, weight, bias, None, torch.ones(3), 2.0, 0.1, 255)
    torch.library.opcheck(linear_forward, (*head, True, True))
    torch.library.opcheck(linear_forward, (*head, False, False))
    scale = torch.ones(3, 3)
    has_norm = norm is not None
    torch.library.opcheck(linear_backward, (*head, False, scale, True, has_norm, has_norm, True))
    torch.library.opcheck(linear_backward, (*head, True, scale[:, :1], False, False, False, True))
    torch.library.opcheck(linear_backward, (*head, True, scale[:, :1], True, False, False, False))


X, Y, W = torch.zeros(2, 4, 5, 6), torch.zeros(2, 5, 6, dtype=torch.uint8), torch.zeros(3, 4)
BAD = {
    "features-of-three-dimensions": ("features", {"features": X[0]}),
    "features-are-integers": ("features", {"features": X.long()}),
    "labels-of-another-size": ("labels", {"labels": Y[:1]}),
    "labels-are-floats": ("labels", {"labels": Y.float()}),
    "weight-of-other-features": ("weight", {"weight": W[:, :3]}),
    "weight-3x3": ("weight", {"weight": torch.zeros(3, 4, 3, 3)}),
    "weight-of-another-dtype": ("weight", {"weight": W.half()}),
    "bias-of-other-classes": ("bias", {"bias": torch.zeros(2)}),
    "norm-of-three-rows": ("norm", {"norm": torch.zeros(3, 4)}),
    "norm-of-half-precision": ("norm", {"norm": torch.zeros(4, 4).half()}),
    "act-unknown": ("act", {"act": "tanh"}),
    "gamma-negative": ("gamma", {"gamma": -1.0}),
    "class-weight-of-two": ("weight", {"class_weight": [1.0, 2.0]}),
    "reduction-none": ("reduction", {"reduction": "none"}),
}


@pytest.mark.parametrize(("argument", "changes"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("path", ["real", "fake", "kernel"])
def test_refuses_with_the_arguments_name(argument, changes, path):
    given = {"features": X, "labels": Y, "weight": W} | changes
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        if path == "fake":
            given = {k: mode.from_tensor(t) if torch.is_tensor(t) else t for k, t in given.items()}
            with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
                linear_focal_loss(**given)
    if path != "fake":
        with computed_by("kernel" if path == "kernel" else "reference"):
            with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
                linear_focal_loss(**given)


# Modules


def test_modules_are_their_functions(rng):
    x, _, labels, weight, bias = arguments(Case(), torch.float32, rng)
    logits = F.conv2d(x, weight[:, :, None, None], bias)
    options = {"alpha": [0.5, 1.0, 2.0], "ignore_index": 255, "label_smoothing": 0.1}
    soft = SoftmaxFocalLoss(1.5, weight=[1.0, 2.0, 3.0], **options)
    expected = softmax_focal_loss(logits, labels, gamma=1.5, weight=[1.0, 2.0, 3.0], **options)
    assert torch.equal(soft(logits, labels), expected) and not soft.state_dict()

    linear = LinearFocalLoss(16, 3, gamma=1.5, class_weight=[1.0, 2.0, 3.0], **options)
    convolution = torch.nn.Conv2d(16, 3, 1)
    linear.load_state_dict(convolution.state_dict(), strict=True)
    convolution.load_state_dict(linear.state_dict(), strict=True)
    with torch.no_grad():
        linear.weight.copy_(weight[:, :, None, None])
        linear.bias.copy_(bias)
    torch.testing.assert_close(linear(x, labels), expected)
    assert torch.equal(linear(x), logits)
    with pytest.raises(ValueError, match="^labels: want .*, got None"):
        linear(x, act="relu")
    linear(x, labels).backward()
    assert linear.weight.grad.shape == (3, 16, 1, 1)

    targets = torch.rand(logits.shape, generator=rng)
    sigmoid = SigmoidFocalLoss(reduction="mean")
    wanted = sigmoid_focal_loss(logits, targets, reduction="mean")
    assert torch.equal(sigmoid(logits, targets), wanted)
    assert "gamma=1.5" in repr(linear) and "gamma=1.5" in repr(soft) and "0.25" in repr(sigmoid)


# On a device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASE
def test_device_computes_the_composition(case, dtype, rng):
    given = arguments(case, dtype, rng, "cuda")
    given = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in given]
    got = run(case, given)
    again = run(case, given)
    assert torch.equal(got[0], again[0]) and all(map(torch.equal, got[1], again[1]))
    assert_device_close(got, case, given)


def assert_device_close(got, case, given):
    """As on the CPU, but the gradient's products of 16-bit heads are TF32: 2**-10 a factor."""
    loss, gradients = got
    wanted, dwanted, _ = composition(case, given)
    unit = max(torch.finfo(given[0].dtype).eps, 2.0**-10 if given[0].itemsize == 2 else 1e-5)
    torch.testing.assert_close(loss.cpu().double(), wanted, rtol=4 * unit, atol=4 * unit)
    for g, w in zip(gradients, dwanted, strict=True):
        allowed = 8 * unit * (w.abs() + w.abs().amax()) + 2.0**-24
        assert ((g.cpu().double() - w).abs() <= allowed).all()


@pytest.mark.parametrize("name", ["SoftmaxFocalLoss", "SigmoidFocalLoss", "LinearFocalLoss"])
def test_modules_compute_what_they_are_composed_of(name, rng):
    from fullres import nn as layers

    options = {"reduction": "mean"}
    if name != "SigmoidFocalLoss":
        options |= {"gamma": 1.5, "label_smoothing": 0.1, "ignore_index": 1}
    sizes = (5, 3) if name == "LinearFocalLoss" else ()
    loss = getattr(layers, name)(*sizes, **options).double()
    x = torch.randn(2, 5 if sizes else 3, 4, 6, generator=rng, dtype=torch.float64)
    shape = x.shape if name == "SigmoidFocalLoss" else (2, 4, 6)
    high = 2 if name == "SigmoidFocalLoss" else 3
    labels = torch.randint(0, high, shape, generator=rng, dtype=torch.uint8)
    assert (loss(x, labels) - loss.composed(x, labels)).abs() <= 1e-12
