"""The softmax focal loss against float64 compositions and its special cases."""

import math
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fullres.ops import focal_blocks, focal_loss
from fullres.ops.focal_blocks import BLOCK_ELEMENTS, pixel_blocks
from fullres.ops.focal_loss import (
    focal_loss_backward,
    focal_loss_backward_triton,
    focal_loss_forward,
    focal_loss_forward_triton,
    reduced,
    softmax_focal_loss,
    softmax_focal_loss_reference,
    softmax_focal_loss_sums,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["none", "mean", "sum", "weighted_mean"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered", "ignore:divide by zero", "ignore:All-NaN"
)


def composition(
    logits, labels, gamma=2.0, alpha=None, weight=None, ignore_index=-100, label_smoothing=0.0,
    reduction="mean", detach_factor=False,
):  # fmt: skip
    """The definition in float64, with a one-hot of the labels."""
    C, y = logits.shape[1], labels.long()
    counts = (y != ignore_index).double()
    y = torch.where(counts > 0, y, 0)
    hot = F.one_hot(y, C).movedim(-1, 1).double()
    w = torch.ones(C).double() if weight is None else torch.as_tensor(weight).double()
    a = torch.as_tensor(1.0 if alpha is None else alpha).double().expand(C)
    log_p = logits.double().log_softmax(1)
    shape = (1, C, *(1 for _ in logits.shape[2:]))
    target = (1 - label_smoothing) * hot + label_smoothing / C
    cross = -(target * w.view(shape) * log_p).sum(1)
    p = (log_p.exp() * hot).sum(1)
    factor = (1 - p) ** gamma
    factor = a[y] * (factor.detach() if detach_factor else factor)
    loss = factor * cross * counts
    if reduction == "none":
        return loss
    divisor = {
        "sum": torch.ones(()),
        "mean": (w[y] * counts).sum(),
        "weighted_mean": (factor * w[y] * counts).sum(),
    }[reduction]
    return loss.sum() / divisor


def batch(rng, shape=(2, 3, 5, 7), dtype=torch.float64, scale=2.0, labels_dtype=torch.int64):
    logits = (torch.randn(shape, generator=rng, dtype=torch.float64) * scale).to(dtype)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=rng).to(labels_dtype)
    return logits.requires_grad_(), labels


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN, so that a lane that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@contextmanager
def on_kernels():
    """Compute by the kernels, on CPU tensors in triton's interpreter."""
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    with (
        interpreted(),
        patch.object(focal_loss, "focal_loss_forward", focal_loss_forward_triton),
        patch.object(focal_loss, "focal_loss_backward", focal_loss_backward_triton),
    ):
        yield


def value_and_gradient(logits, labels, rng=None, **options):
    loss = softmax_focal_loss(logits, labels, **options)
    upstream = torch.ones_like(loss) if rng is None else torch.rand(loss.shape, generator=rng)
    (gradient,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype))
    return loss.detach(), gradient


def assert_close(got, logits, labels, upstream=None, **options):
    """Compare with the float64 composition.

    A pixel's loss and gradient take some forty operations of one float32 rounding each, exp(x) up
    to |x| roundings more; they are multiplied by at most (1 + gamma) cross entropies. A sum of n
    adds sqrt(n) roundings of its terms' root sum of squares, and results round once more.
    """
    loss, gradient = got
    eps = torch.finfo(torch.float32).eps
    exact = logits.detach().double().requires_grad_()
    wanted = composition(exact, labels, **options)
    u = torch.ones_like(wanted) if upstream is None else upstream.double()
    (dwanted,) = torch.autograd.grad(wanted, exact, u)
    per_pixel = (40 + 2 * exact.detach().abs().max()) * eps
    each = composition(exact.detach(), labels, **options | {"reduction": "none"}).abs()
    steepness = (1 + options.get("gamma", 2.0)) * (1 + each.max())
    allowed = per_pixel * steepness * (wanted.detach().abs() + wanted.detach().abs().mean() + eps)
    error = (loss.double() - wanted.detach()).abs()
    assert (error <= allowed).all(), f"loss: {(error / allowed).max():.2f} times the allowance"
    size = dwanted.abs().amax(1, keepdim=True) + dwanted.abs().mean() + torch.finfo(torch.half).tiny
    rounding = torch.finfo(logits.dtype).eps * dwanted.abs()
    allowed = per_pixel * steepness * size + rounding
    if logits.dtype == torch.float16:
        allowed += 2.0**-24  # half a step of its subnormals, and as much for the interpreter
    error = (gradient.double() - dwanted).abs()
    assert (error <= allowed).all(), f"gradient: {(error / allowed).max():.2f} times the allowance"


options_of = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.3]),
        "alpha": st.sampled_from([None, 0.25, "classes"]),
        "weight": st.sampled_from([None, "classes"]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "reduction": st.sampled_from(REDUCTIONS),
        "ignore_index": st.sampled_from([-100, 1]),
        "detach_factor": st.booleans(),
    }
)


def with_factors(options, C):
    factors = {
        "alpha": torch.linspace(0.25, 2, C, dtype=torch.float64),
        "weight": torch.linspace(3, 0.5, C, dtype=torch.float64),
    }
    return {
        k: factors[k] if isinstance(v, str) and v == "classes" else v for k, v in options.items()
    }


# The reference


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from([(7, 3), (2, 3, 4), (2, 3, 5, 7), (1, 2, 1, 9), (2, 3, 2, 3, 4)]),
    options=options_of,
    labels_dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    block=st.sampled_from([1, 20, BLOCK_ELEMENTS]),
    seed=st.integers(0, 999),
)
def test_value_and_gradient_are_those_of_the_equation(shape, options, labels_dtype, block, seed):
    rng = torch.Generator().manual_seed(seed)
    logits, labels = batch(rng, shape, labels_dtype=labels_dtype)
    labels[0] = 0  # so that some pixel counts
    options = with_factors(options, shape[1])
    with patch.object(focal_blocks, "BLOCK_ELEMENTS", block):
        loss = softmax_focal_loss(logits, labels, **options)
        upstream = torch.rand(loss.shape, generator=rng, dtype=loss.dtype)
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
    for twin in (composition, softmax_focal_loss_reference):
        expected = twin(logits, labels, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        (wanted,) = torch.autograd.grad(expected, logits, upstream)
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none", "weighted_mean"])
def test_gradient_is_that_of_the_value(gamma, reduction, rng):
    logits, labels = batch(rng, (2, 4, 3))
    labels[0, 0] = -100
    factors = {"alpha": (0.5, 1.0, 0.25, 2.0), "weight": (1.0, 2.0, 3.0, 0.5)}

    def loss(x):
        options = factors | {"gamma": gamma, "reduction": reduction, "label_smoothing": 0.1}
        return softmax_focal_loss(x, labels, **options)

    assert torch.autograd.gradcheck(loss, logits)


def test_gradient_of_sums_by_class_is_that_of_the_sums(rng):
    logits, labels = batch(rng, (2, 3, 4))

    def sums(x):
        found, _ = softmax_focal_loss_sums(x, labels, weight=[1.0, 2.0, 0.5], by_class=True)
        return found

    assert torch.autograd.gradcheck(sums, logits)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, (0.25, 1.0, 4.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gamma_zero_is_torchs_cross_entropy(weight, smoothing, reduction, rng):
    logits, labels = batch(rng)
    labels[0, 0] = -100
    options = {"label_smoothing": smoothing, "reduction": reduction}
    loss = softmax_focal_loss(logits, labels, gamma=0, weight=weight, **options)
    torch_weight = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = F.cross_entropy(logits, labels, torch_weight, **options)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), logits)[0])


def test_two_classes_are_the_papers_binary_loss(rng):
    """Section 3: with x = z1 - z0, p = sigmoid(x); p_t = 0.9 at gamma 2 costs 100 times less."""
    logits, labels = batch(rng, (50, 2))
    x = logits[:, 1] - logits[:, 0]
    p_t = torch.where(labels == 1, x.sigmoid(), (-x).sigmoid())
    expected = -(((1 - p_t) ** 2) * p_t.log())
    torch.testing.assert_close(softmax_focal_loss(logits, labels, reduction="none"), expected)
    sure = torch.tensor([[math.log(0.9), math.log(0.1)]], dtype=torch.float64)
    label = torch.zeros(1, dtype=torch.uint8)
    ratio = F.cross_entropy(sure, label.long()) / softmax_focal_loss(sure, label)
    torch.testing.assert_close(ratio.item(), 100.0)


def test_the_detectors_scheme_is_the_detached_weighted_mean(rng):
    """w = (1 - p)^2 / 3 held constant, sum(w ce) / sum(w): the third cancels."""
    logits, labels = batch(rng)
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    w = ((1 - p) ** 2 / 3).detach()
    expected = (w * F.cross_entropy(logits, labels, reduction="none")).sum() / w.sum()
    loss = softmax_focal_loss(logits, labels, reduction="weighted_mean", detach_factor=True)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(got, torch.autograd.grad(expected, logits)[0])


def test_alpha_scales_what_weight_averages(rng):
    logits, labels = batch(rng)
    plain = softmax_focal_loss(logits, labels)
    for alpha in (0.25, torch.tensor(0.25), [0.25] * 3):
        torch.testing.assert_close(softmax_focal_loss(logits, labels, alpha=alpha), 0.25 * plain)
    torch.testing.assert_close(softmax_focal_loss(logits, labels, weight=[0.25] * 3), plain)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean"])
def test_tiles_sums_add_up_to_the_whole(reduction, parts, rng):
    logits, labels = batch(rng)
    labels[0, :2] = -100
    options = {"weight": [1.0, 2.0, 0.5], "gamma": 1.5}
    whole = softmax_focal_loss(logits, labels, reduction=reduction, **options)
    tiles = zip(logits.chunk(parts, 2), labels.chunk(parts, 1), strict=True)
    sums = sum(softmax_focal_loss_sums(x, y, **options)[0] for x, y in tiles)
    tiled = reduced(sums, reduction)
    torch.testing.assert_close(tiled, whole)
    wanted = torch.autograd.grad(whole, logits)
    torch.testing.assert_close(torch.autograd.grad(tiled, logits), wanted)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["reference", "kernel"])
def test_extreme_logits_have_finite_loss_and_right_gradients(gamma, dtype, path):
    """p_y is exactly 1 in the first pixel and exactly 0 in the second; then 1 - 2e-9."""
    rows = [[1e4, -1e4, 0], [-1e4, 1e4, 0], [20, 0, 0], [0, 0, 0]]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.uint8)
    if path == "kernel":
        with on_kernels():
            loss, gradient = value_and_gradient(logits, labels, gamma=gamma, reduction="none")
    else:
        loss, gradient = value_and_gradient(logits, labels, gamma=gamma, reduction="none")
    far = 2 * logits[0, 0].item()  # 1e4 as the dtype rounds it
    q = torch.tensor([0, 1, 2 / (math.exp(20) + 2), 2 / 3], dtype=torch.float64)
    ce = torch.tensor([0, far, -math.log1p(-q[2].item()), math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(loss.double(), q**gamma * ce, rtol=1e-5, atol=0)
    ratio = torch.tensor([1, 0, 1, ce[3] / 2], dtype=torch.float64)  # p_y ce / q
    k = q**gamma * (1 + gamma * ratio)
    rounding = 2 * torch.finfo(dtype).eps + 1e-5
    torch.testing.assert_close(gradient[:, 0].double(), -k * q, rtol=rounding, atol=1e-7)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "weighted_mean"])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("alpha", [None, (0.25, 1.0, 4.0)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 3, 4, 4), (0, 3), (2, 3, 0, 4)])
@pytest.mark.parametrize("path", ["reference", "kernel"])
def test_no_pixel_to_count_is_zero_with_zero_gradients(path, shape, alpha, gamma, reduction, rng):
    logits, labels = batch(rng, shape, torch.float32)
    labels = torch.full_like(labels, -100)
    options = {"gamma": gamma, "alpha": alpha, "reduction": reduction}
    if path == "kernel":
        with on_kernels():
            loss, gradient = value_and_gradient(logits, labels, **options)
    else:
        loss, gradient = value_and_gradient(logits, labels, **options)
    assert loss == 0 and gradient.shape == shape and not gradient.any()


def test_classes_of_weight_zero_leave_a_finite_mean(rng):
    logits, labels = batch(rng)
    for options in ({"weight": (0.0,) * 3}, {"alpha": 0.0, "reduction": "weighted_mean"}):
        loss, gradient = value_and_gradient(logits, labels, **options)
        assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("path", ["reference", "kernel"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_background_gives_finite_values(path, smoothing, rng):
    """Every pixel so well known that the factors are 1e-41 each, and their sum's inverse is inf."""
    logits = torch.zeros(1, 3, 4, 8)
    logits[:, 0] = 47.0
    logits.requires_grad_()
    labels = torch.zeros(1, 4, 8, dtype=torch.uint8)

    def run():
        loss = softmax_focal_loss(
            logits, labels, reduction="weighted_mean", label_smoothing=smoothing
        )
        return loss, torch.autograd.grad(loss * 65536, logits)[0]

    if path == "kernel":
        with on_kernels():
            loss, gradient = run()
    else:
        loss, gradient = run()
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("path", ["reference", "kernel"])
def test_nan_in_ignored_pixels_reaches_nothing(path, rng):
    logits, labels = batch(rng, dtype=torch.float32)
    labels[0] = -100
    with torch.no_grad():
        logits[0] = float("nan")
    with on_kernels() if path == "kernel" else nullcontext():
        loss, gradient = value_and_gradient(logits, labels, label_smoothing=0.1)
    assert loss.isfinite() and not gradient[0].any() and gradient[1].isfinite().all()


@pytest.mark.parametrize("path", ["reference", "kernel"])
def test_nan_of_a_pixel_that_counts_shows(path, rng):
    logits, labels = batch(rng, dtype=torch.float32)
    with torch.no_grad():
        logits[1, 2, 3, 4] = float("nan")
    with on_kernels() if path == "kernel" else nullcontext():
        loss, gradient = value_and_gradient(logits, labels, reduction="none")
        total, _ = value_and_gradient(logits, labels)
    assert total.isnan() and loss[1, 3, 4].isnan() and loss.isnan().sum() == 1
    assert gradient[1, :, 3, 4].isnan().all() and gradient.isnan().sum() == 3


@pytest.mark.parametrize("path", ["reference", "kernel"])
def test_uint8_labels_ignore_only_what_they_can_hold(path, rng):
    """-100 is 156 modulo 256, and 156 is a class of its own."""
    logits, labels = batch(rng, (4, 200), torch.float32, labels_dtype=torch.uint8)
    labels[:] = 156
    with on_kernels() if path == "kernel" else nullcontext():
        expected = softmax_focal_loss(logits, labels.long())
        assert expected > 0 and torch.equal(softmax_focal_loss(logits, labels), expected)
        labels[:] = 255
        assert softmax_focal_loss(logits, labels, ignore_index=255) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_logits_are_summed_in_float32(dtype, rng):
    logits, labels = batch(rng, (2, 3, 50, 60), dtype)
    got = value_and_gradient(logits, labels)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    assert_close(got, logits, labels)


def layouts(x, labels):
    """(logits, labels) with the same values, lying otherwise."""
    last = x.to(memory_format=torch.channels_last)
    planes = torch.stack([labels, 1 - labels], 1)
    return {
        "channels_last": (last, labels),
        "a window": (F.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2], labels),
        "a window of channels_last": (
            F.pad(last, (1, 2, 3, 4)).to(memory_format=torch.channels_last)[..., 3:-4, 1:-2],
            labels,
        ),
        "a plane's labels": (last, planes[:, 0]),
        "rows and columns exchanged": (
            x.transpose(2, 3).contiguous().transpose(2, 3),
            labels.mT.contiguous().mT,
        ),
        "expanded": (x[:1].expand_as(x), labels),
        "every second column": (x.repeat_interleave(2, 3)[..., ::2], labels),
    }


@pytest.mark.parametrize("path", ["reference", "kernel"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_layout_does_not_matter(path, reduction, rng):
    logits, labels = batch(rng, (2, 3, 5, 7), torch.float32)
    with on_kernels() if path == "kernel" else nullcontext():
        for name, (x, y) in layouts(logits.detach(), labels).items():
            x.requires_grad_()
            got = value_and_gradient(x, y, reduction=reduction)
            assert_close(got, x, y, reduction=reduction)
            if name == "channels_last":
                assert got[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("limit", [1, 4, 9, 64, 10**9])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 5, 7), (1, 3, 4, 5, 6), (0, 3, 4), (2, 3, 0)])
def test_blocks_cover_each_pixel_once(shape, limit):
    seen = torch.zeros(shape[0], *shape[2:])
    with patch.object(focal_blocks, "BLOCK_ELEMENTS", limit):
        for block in pixel_blocks(torch.zeros(shape)):
            seen[block] += 1
            assert 0 < seen[block].numel() * shape[1] <= max(limit, shape[1])
    assert (seen == 1).all()


# The kernels, interpreted


SHAPES = {
    "odd-sizes": (2, 3, 5, 7),
    "one-pixel": (1, 3, 1, 1),
    "one-class": (2, 1, 3, 5),
    "two-classes": (1, 2, 4, 9),
    "rows-of-eight": (2, 8, 3, 5),
    "classes-not-a-power-of-two": (1, 21, 5, 9),
    "anchors": (300, 5),
    "hundreds-of-classes": (3, 150, 2, 3),
    "a-thousand-classes": (20, 1000),
    "more-classes-than-registers": (3, 1025),
    "several-tiles": (1, 3, 40, 60),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_computes_the_equation(shape, last, dtype, rng, poisoned):
    if last and len(shape) == 2:
        pytest.skip("is channels_last already")
    logits, labels = batch(rng, shape, dtype, labels_dtype=torch.uint8 if shape[1] < 256 else None)
    if labels.numel() > 1:
        labels.view(-1)[-1] = 255
    if last:
        logits = logits.detach().to(memory_format=torch.channels_last).requires_grad_()
    options = {"ignore_index": 255, "weight": torch.linspace(1, 2, shape[1])}
    with on_kernels():
        for reduction in ("weighted_mean" if shape[1] > 1 else "mean", "none"):
            options["reduction"] = reduction
            got = value_and_gradient(logits, labels, **options)
            assert got[1].dtype == dtype and got[1].stride() == logits.stride()
            assert_close(got, logits, labels, **options)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(7, 3), (2, 3, 4), (2, 3, 5, 7), (2, 5, 2, 3, 4)]),
    options=options_of,
    labels_dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    seed=st.integers(0, 999),
)
def test_kernel_takes_every_combination_of_options(shape, options, labels_dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    logits, labels = batch(rng, shape, torch.float32, labels_dtype=labels_dtype)
    labels[0] = 0
    options = with_factors(options, shape[1])
    with on_kernels():
        loss = softmax_focal_loss(logits, labels, **options)
        upstream = torch.rand(loss.shape, generator=rng)
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
    assert_close((loss.detach(), gradient), logits, labels, upstream, **options)


def test_every_configuration_computes_the_equation(rng, poisoned):
    from fullres.kernels import focal_loss as kernels
    from fullres.kernels._tune import pinned

    forward = kernels.softmax_focal_loss_kernel
    backward = kernels.softmax_focal_loss_backward_kernel
    for config in kernels.CONFIGS:
        for shape in ((1, 3, 50, 60), (1, 40, 9, 17)):
            logits, labels = batch(rng, shape, torch.float16)
            with on_kernels(), pinned(forward, config), pinned(backward, config):
                assert_close(value_and_gradient(logits, labels), logits, labels)


@pytest.mark.parametrize("T", [1, 3, 7, 100])
def test_any_number_of_programs_covers_each_pixel_once(T, rng, poisoned):
    logits, labels = batch(rng, (2, 3, 40, 60), torch.float32)
    with on_kernels(), patch("fullres.kernels.focal_loss.programs", return_value=T):
        assert_close(value_and_gradient(logits, labels), logits, labels)
        sums, _ = softmax_focal_loss_sums(logits, labels, by_class=True)
    assert sums[:, 2].tolist() == labels.flatten().bincount(minlength=3).tolist()


def test_programs_bound_the_length_of_a_sum():
    from fullres.kernels.focal_loss import CHAIN, programs

    for pixels in (1, 1023, 10_000, 24 * 1280 * 2048, 2**35):
        assert pixels <= programs(pixels) * CHAIN
        assert programs(pixels) <= max(1, -(-pixels // 1024))
        assert programs(pixels) < 2**31


@pytest.mark.parametrize("path", ["reference", "kernel"])
@pytest.mark.parametrize("C", [1, 3, 5, 32])
def test_confusion_counts_the_first_of_the_largest(path, C, rng):
    logits, labels = batch(rng, (2, C, 7, 9), torch.bfloat16)
    labels[0, 0] = -100
    with torch.no_grad():
        logits[1, :, 0] = 1.0  # a tie of all
        logits[1, 0, 1] = float("nan")
        logits[1, :, 2] = float("nan")
    with on_kernels() if path == "kernel" else nullcontext():
        _, counts = softmax_focal_loss_sums(logits, labels, confusion=True)
    known = torch.where(logits.isnan(), -torch.inf, logits.detach())
    expected = torch.zeros(C, C, dtype=torch.int64)
    for y, prediction in zip(labels.flatten().tolist(), known.argmax(1).flatten(), strict=True):
        if y >= 0:
            expected[y, prediction] += 1
    assert counts.dtype == torch.int64 and torch.equal(counts, expected)


@pytest.mark.parametrize("by_class", [False, True])
def test_kernels_sums_are_those_of_the_reference(by_class, rng, poisoned):
    logits, labels = batch(rng, (2, 5, 9, 11), torch.float32)
    labels[0, 0] = -100
    options = {"weight": [1.0, 2.0, 3.0, 4.0, 5.0], "label_smoothing": 0.1, "by_class": by_class}
    wanted, _ = softmax_focal_loss_sums(logits, labels, **options)
    weights = torch.rand(wanted.shape, generator=rng, dtype=torch.float64)
    (dwanted,) = torch.autograd.grad(wanted, logits, weights)
    with on_kernels():
        got, _ = softmax_focal_loss_sums(logits, labels, **options)
        (dgot,) = torch.autograd.grad(got, logits, weights)
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(dgot, dwanted, rtol=1e-4, atol=1e-6)


def test_a_label_out_of_range_is_nan_on_a_device(rng):
    logits, labels = batch(rng, dtype=torch.float32)
    for label in (3, -1, 2**40):
        labels[1, 2, 3] = label
        with on_kernels():
            loss, gradient = value_and_gradient(logits, labels, reduction="none")
            total = softmax_focal_loss(logits, labels)
        assert total.isnan() and loss.isnan().sum() == 1 and loss[1, 2, 3].isnan()
        assert gradient.isnan().sum() == 3


def test_the_same_bits_twice(rng):
    logits, labels = batch(rng, (2, 3, 40, 50), torch.float16)
    with on_kernels():
        first = value_and_gradient(logits, labels)
        assert all(map(torch.equal, first, value_and_gradient(logits, labels)))


def test_pixels_lie_as_their_strides_tell():
    from fullres.ops.pixels import Pixels, pixels_of

    planar = torch.empty(2, 3, 5, 7)
    last = planar.to(memory_format=torch.channels_last)
    labels = torch.empty(2, 5, 7)
    assert pixels_of(planar, labels, channels=(1, None)) == Pixels(
        1, 2, 35, ((0, 105, 1), (0, 35, 1))
    )
    assert pixels_of(last, labels, channels=(1, None)) == Pixels(1, 1, 70, ((0, 0, 3), (0, 0, 1)))
    window = planar[:, :, :, 1:4], labels[:, :, 1:4]
    assert pixels_of(*window, channels=(1, None)).strides == ((105, 7, 1), (35, 7, 1))
    odd = torch.empty(2, 3, 4, 5, 6)[:, :, ::2, ::2, ::2]
    assert pixels_of(odd, channels=(1,)) is None
    with FakeTensorMode():  # neighbours so far apart that a tile's offsets pass int32
        assert pixels_of(torch.empty(9, (1 << 18) - 1), channels=(1,)) is not None
        assert pixels_of(torch.empty(9, 1 << 18), channels=(1,)) is None
    assert pixels_of(planar[:0], channels=(1,)).count == 0


def test_what_three_strides_cannot_tell_is_computed_all_the_same(rng):
    logits, labels = batch(rng, (2, 3, 4, 4, 6), torch.float32)
    x = logits.detach()[:, :, ::2, ::2, ::2].requires_grad_()
    y = labels[:, ::2, ::2, ::2]
    with on_kernels():
        assert_close(value_and_gradient(x, y), x, y)


def test_float64_on_the_device_path_is_float64(rng):
    logits, labels = batch(rng)
    expected = value_and_gradient(logits, labels)
    with on_kernels():
        assert all(map(torch.equal, expected, value_and_gradient(logits, labels)))


# Bytes


class Allocations(TorchDispatchMode):
    """Bytes of every fresh tensor, by the operator that made it."""

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
            self.made.append((str(func), out.numel() * out.itemsize))
        return out


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "none"])
@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
def test_nothing_of_the_images_size_is_made_but_outputs_and_gradients(last, reduction):
    """Parts of the sums are 24 bytes a program, and a 64th of that for the tree's next level."""
    pytest.importorskip("triton")
    from fullres.kernels import launches
    from fullres.kernels.focal_loss import programs

    def stand_in(argument):
        if torch.is_tensor(argument):
            return launches.tensor_argument(argument.dtype, argument.numel() * argument.itemsize)
        return argument

    with launches.recorded("sm_90", stand_in) as made, FakeTensorMode(), Allocations() as fresh:
        logits = torch.empty(8, 3, 1280, 2048, dtype=torch.bfloat16)
        if last:
            logits = logits.to(memory_format=torch.channels_last)
        logits.requires_grad_()
        labels = torch.empty(8, 1280, 2048, dtype=torch.uint8)
        pixels = labels.numel()
        fresh.made.clear()
        loss = softmax_focal_loss(logits, labels, reduction=reduction)
        forward = list(fresh.made)
        upstream = torch.ones_like(loss)
        fresh.made.clear()
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
    outputs = 4 * pixels if reduction == "none" else 0
    slack = 24 * programs(pixels) * 65 // 64 + 256
    assert outputs <= sum(size for _, size in forward) <= outputs + slack
    assert 6 * pixels <= sum(size for _, size in fresh.made) <= 6 * pixels + slack
    assert gradient.stride() == logits.stride()
    assert {launch.kernel.split(":")[1] for launch in made} >= {
        "softmax_focal_loss_kernel",
        "softmax_focal_loss_backward_kernel",
    }


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_keeps_only_the_logits_and_labels_given(reduction, rng):
    logits, labels = batch(rng, (2, 3, 40, 50), torch.bfloat16, labels_dtype=torch.uint8)
    held = {logits.data_ptr(), labels.data_ptr()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        softmax_focal_loss(logits, labels, reduction=reduction)
    assert held <= {x.data_ptr() for x in saved}
    others = sum(x.nbytes for x in saved if x.data_ptr() not in held)
    # The divisor; and the numerator, where the divisor has a gradient.
    assert others == {"none": 0, "sum": 0, "mean": 8, "weighted_mean": 16}[reduction]


# As torch's own


def test_backward_may_run_twice_but_not_be_differentiated(rng):
    logits, labels = batch(rng)
    loss = softmax_focal_loss(logits, labels)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, logits, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="FocalLossSums has no second derivatives"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_compiles_as_one_graph(reduction, rng):
    logits, labels = batch(rng, (2, 3, 8, 8), torch.float32)
    options = {"alpha": (0.5, 1.0, 2.0), "reduction": reduction, "label_smoothing": 0.1}

    def step(x):
        return softmax_focal_loss(x, labels, **options).sum()

    expected = step(logits)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(got, torch.autograd.grad(expected, logits)[0])


def test_autocast_changes_nothing(rng):
    logits, labels = batch(rng, dtype=torch.float32)
    plain = value_and_gradient(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, value_and_gradient(logits, labels)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, rng):
    logits, labels = batch(rng, dtype=dtype)
    logits = logits.detach().to(memory_format=torch.channels_last)
    weight = torch.ones(3)
    options = (logits, labels, None, weight, 2.0, 0.1, -100)
    torch.library.opcheck(focal_loss_forward, (*options, True, True, True))
    torch.library.opcheck(focal_loss_forward, (*options, False, False, False))
    torch.library.opcheck(focal_loss_backward, (*options, True, torch.ones(3, 3), None))
    torch.library.opcheck(focal_loss_backward, (*options, False, None, torch.ones(2, 5, 7)))


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_label_out_of_range_is_an_index_error_as_in_torch(label, reduction, rng):
    logits, labels = batch(rng)
    labels[1, 2, 3] = label
    with pytest.raises(IndexError):
        F.cross_entropy(logits, labels)
    with pytest.raises(IndexError, match=rf"labels .* \[0, 3\), got index {label}"):
        softmax_focal_loss(logits, labels, reduction=reduction)


X, Y = torch.zeros(2, 3, 5, 7), torch.zeros(2, 5, 7, dtype=torch.int64)
BAD = {
    "logits-of-one-dimension": ("logits", {"logits": X[0, 0, 0]}),
    "logits-are-integers": ("logits", {"logits": X.long()}),
    "labels-of-another-size": ("labels", {"labels": Y[:1]}),
    "labels-are-boolean": ("labels", {"labels": Y.bool()}),
    "labels-elsewhere": ("labels", {"labels": Y.to("meta")}),
    "gamma-negative": ("gamma", {"gamma": -1}),
    "gamma-nan": ("gamma", {"gamma": math.nan}),
    "alpha-negative": ("alpha", {"alpha": -0.5}),
    "alpha-of-two": ("alpha", {"alpha": [1.0, 2.0]}),
    "alpha-differentiable": ("alpha", {"alpha": torch.ones(3, requires_grad=True)}),
    "weight-of-two": ("weight", {"weight": [1.0, 2.0]}),
    "weight-one-number": ("weight", {"weight": torch.tensor(2.0)}),
    "smoothing-above-one": ("label_smoothing", {"label_smoothing": 1.5}),
    "reduction-unknown": ("reduction", {"reduction": "average"}),
}


@pytest.mark.parametrize(("argument", "changes"), BAD.values(), ids=BAD.keys())
def test_refuses_with_the_arguments_name(argument, changes):
    given = {"logits": X, "labels": Y} | changes
    for function in (softmax_focal_loss, softmax_focal_loss_reference):
        with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
            function(**given)


def test_refuses_to_count_many_classes():
    for function in (focal_loss_forward, focal_loss_forward_triton):
        with pytest.raises(ValueError, match="^confusion: want C <= 32, got C = 33"):
            function(
                torch.zeros(2, 33), Y[0, 0, :2], None, None, 2.0, 0.0, -100, False, False, True
            )


# On a device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_device_computes_the_equation(shape, last, dtype, rng):
    logits, labels = batch(rng, shape, dtype)
    labels.view(-1)[-1] = -100
    x = logits.detach().cuda()
    if last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "label_smoothing": 0.1}
        got = value_and_gradient(x, labels.cuda(), **options)
        again = value_and_gradient(x, labels.cuda(), **options)
        assert all(map(torch.equal, got, again))
        assert_close([t.cpu() for t in got], logits, labels, **options)


@pytest.mark.gpu
def test_device_counts_by_class(rng):
    logits, labels = batch(rng, (4, 3, 200, 300), torch.bfloat16, labels_dtype=torch.uint8)
    wanted = softmax_focal_loss_sums(logits, labels, by_class=True, confusion=True)
    given = logits.detach().cuda(), labels.cuda()
    got = softmax_focal_loss_sums(*given, by_class=True, confusion=True)
    torch.testing.assert_close(got[0].cpu(), wanted[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1].cpu(), wanted[1])


@pytest.mark.gpu
def test_device_addresses_past_two_to_the_31(rng):
    """Only the last image differs from the others, beyond 2**31 logits."""
    N, C, H, W = 274, 3, 1280, 2048
    if torch.cuda.mem_get_info()[0] < 5 * N * C * H * W:
        pytest.skip("needs 11 GiB of free device memory")
    logits = torch.zeros(N, C, H, W, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    labels = torch.full((N, H, W), 255, dtype=torch.uint8, device="cuda")
    last, y = batch(rng, (1, C, H, W), torch.bfloat16, labels_dtype=torch.uint8)
    logits[-1:], labels[-1:] = last.detach(), y
    loss, gradient = value_and_gradient(logits.requires_grad_(), labels, ignore_index=255)
    assert not gradient[:-1].any()
    assert_close([loss.cpu(), gradient[-1:].cpu()], last, y)
