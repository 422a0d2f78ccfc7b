"""The focal loss against float64 compositions and its special cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fullres.ops import focal_loss as module
from fullres.ops.focal_loss import (
    BLOCK_ELEMENTS,
    pixel_blocks,
    softmax_focal_loss,
    softmax_focal_loss_reference,
)

ALPHAS = (None, 0.25, (0.25, 1.0, 4.0))


def composition(logits, labels, gamma, alpha, ignore_index, reduction):
    """Each pixel's loss by equation 5, in float64, with a one-hot of the labels."""
    y = labels.long()
    counts = y != ignore_index
    hot = F.one_hot(torch.where(counts, y, 0), logits.shape[1]).movedim(-1, 1)
    p = (logits.double().softmax(1) * hot).sum(1)
    weight = torch.as_tensor(1.0 if alpha is None else alpha, dtype=torch.float64)
    weight = weight.expand(logits.shape[1])[torch.where(counts, y, 0)] * counts
    loss = -weight * (1 - p) ** gamma * p.log()
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (weight.sum() if isinstance(alpha, tuple) else counts.sum())


def batch(rng, shape=(2, 3, 5, 7), dtype=torch.float64, scale=2.0, labels_dtype=torch.int64):
    logits = (torch.randn(shape, generator=rng, dtype=torch.float64) * scale).to(dtype)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=rng).to(labels_dtype)
    return logits.requires_grad_(), labels


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(7, 3), (2, 3, 4), (2, 3, 5, 7), (1, 3, 1, 9), (2, 3, 2, 3, 4)]),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.3]),
    alpha=st.sampled_from(ALPHAS),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignore_index=st.sampled_from([-100, 1]),
    labels_dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    block=st.sampled_from([1, 20, BLOCK_ELEMENTS]),
    seed=st.integers(0, 999),
)
def test_value_and_gradient_are_those_of_the_equation(
    shape, gamma, alpha, reduction, ignore_index, labels_dtype, block, seed
):
    rng = torch.Generator().manual_seed(seed)
    logits, labels = batch(rng, shape, labels_dtype=labels_dtype)
    labels[0] = 0  # so that some pixel counts
    options = dict(gamma=gamma, alpha=alpha, ignore_index=ignore_index, reduction=reduction)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ELEMENTS", block)
        loss = softmax_focal_loss(logits, labels, **options)
        upstream = torch.rand(loss.shape, generator=rng, dtype=loss.dtype)
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
    for twin in (composition, softmax_focal_loss_reference):
        expected = twin(logits, labels, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        (wanted,) = torch.autograd.grad(expected, logits, upstream)
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_is_that_of_the_value(gamma, reduction, rng):
    logits, labels = batch(rng, (2, 4, 3))
    labels[0, 0] = -100
    alpha = (0.5, 1.0, 0.0, 2.0)

    def loss(x):
        return softmax_focal_loss(x, labels, gamma=gamma, alpha=alpha, reduction=reduction)

    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, (0.25, 1.0, 4.0)])
def test_gamma_zero_is_cross_entropy(weight, reduction, rng):
    logits, labels = batch(rng)
    labels[0, 0] = -100
    loss = softmax_focal_loss(logits, labels, gamma=0, alpha=weight, reduction=reduction)
    torch_weight = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = F.cross_entropy(logits, labels, torch_weight, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), logits)[0])


def test_two_classes_are_the_paper_s_binary_loss(rng):
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


def test_one_factor_scales_the_mean_and_one_a_class_divides_it(rng):
    logits, labels = batch(rng)
    plain = softmax_focal_loss(logits, labels)
    torch.testing.assert_close(softmax_focal_loss(logits, labels, alpha=0.25), 0.25 * plain)
    torch.testing.assert_close(
        softmax_focal_loss(logits, labels, alpha=torch.tensor(0.25)), 0.25 * plain
    )
    torch.testing.assert_close(softmax_focal_loss(logits, labels, alpha=[0.25] * 3), plain)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_have_finite_loss_and_right_gradients(gamma, dtype):
    """p_y is exactly 1 in the first pixel and exactly 0 in the second; then 1 - 2e-9."""
    rows = [[1e4, -1e4, 0], [-1e4, 1e4, 0], [20, 0, 0], [0, 0, 0]]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.uint8)
    loss = softmax_focal_loss(logits, labels, gamma=gamma, reduction="none")
    loss.sum().backward()
    far = 2 * logits[0, 0].item()  # 1e4 as the dtype rounds it
    q = torch.tensor([0, 1, 2 / (math.exp(20) + 2), 2 / 3], dtype=torch.float64)
    ce = torch.tensor([0, far, -math.log1p(-q[2].item()), math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(loss.double(), q**gamma * ce, rtol=1e-5, atol=0)
    ratio = torch.tensor([1, 0, 1, ce[3] / 2], dtype=torch.float64)  # p_y ce / q
    k = q**gamma * (1 + gamma * ratio)
    rounding = torch.finfo(dtype).eps + 1e-5
    torch.testing.assert_close(logits.grad[:, 0].double(), -k * q, rtol=rounding, atol=1e-7)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 3, 4, 4), (0, 3), (2, 3, 0, 4)])
def test_no_pixel_to_count_is_zero_with_zero_gradients(shape, alpha, gamma, reduction, rng):
    logits, labels = batch(rng, shape)
    labels = torch.full_like(labels, -100)
    loss = softmax_focal_loss(logits, labels, gamma=gamma, alpha=alpha, reduction=reduction)
    loss.backward()
    assert loss == 0 and logits.grad.shape == shape and not logits.grad.any()


def test_classes_of_weight_zero_leave_a_finite_mean(rng):
    logits, labels = batch(rng)
    loss = softmax_focal_loss(logits, labels, alpha=(0.0, 0.0, 0.0))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_nan_in_ignored_pixels_reaches_nothing(rng):
    logits, labels = batch(rng)
    labels[0] = -100
    with torch.no_grad():
        logits[0] = float("nan")
    loss = softmax_focal_loss(logits, labels)
    loss.backward()
    assert loss.isfinite() and not logits.grad[0].any() and logits.grad[1].isfinite().all()


def test_uint8_labels_ignore_only_what_they_can_hold(rng):
    """-100 is 156 modulo 256, and 156 is a class of its own."""
    logits, labels = batch(rng, (4, 200), labels_dtype=torch.uint8)
    labels[:] = 156
    expected = softmax_focal_loss(logits, labels.long())
    assert expected > 0 and torch.equal(softmax_focal_loss(logits, labels), expected)
    labels[:] = 255
    assert softmax_focal_loss(logits, labels, ignore_index=255) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_summed_in_float32(dtype, rng):
    logits, labels = batch(rng, (2, 3, 50, 60), dtype)
    loss = softmax_focal_loss(logits, labels)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    expected = composition(exact, labels, 2.0, None, -100, "mean")
    expected.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    rounding = torch.finfo(dtype).eps
    # float16 gradients of 6,000 pixels' mean are subnormal: an absolute step of 6e-8.
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=6e-8)


def test_memory_format_does_not_matter(rng):
    logits, labels = batch(rng)
    expected = softmax_focal_loss(logits, labels)
    last = logits.detach().to(memory_format=torch.channels_last).requires_grad_()
    sliced = F.pad(logits.detach(), (1, 2, 3, 4))[..., 3:8, 1:8].requires_grad_()
    for x in (last, sliced):
        loss = softmax_focal_loss(x, labels)
        loss.backward()
        torch.testing.assert_close(loss, expected)
    assert last.grad.is_contiguous(memory_format=torch.channels_last)
    transposed = softmax_focal_loss(logits.transpose(2, 3), labels.transpose(1, 2))
    torch.testing.assert_close(transposed, expected)


@pytest.mark.parametrize("limit", [1, 4, 9, 64, 10**9])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 5, 7), (1, 3, 4, 5, 6), (0, 3, 4), (2, 3, 0)])
def test_blocks_cover_each_pixel_once(shape, limit, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", limit)
    seen = torch.zeros(shape[0], *shape[2:])
    for block in pixel_blocks(torch.zeros(shape)):
        seen[block] += 1
        assert 0 < seen[block].numel() * shape[1] <= max(limit, shape[1])
    assert (seen == 1).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_keeps_only_the_logits_and_labels_given(reduction, rng):
    logits, labels = batch(rng, (2, 3, 40, 50), torch.bfloat16, labels_dtype=torch.uint8)
    held = {logits.data_ptr(), labels.data_ptr()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        softmax_focal_loss(logits, labels, reduction=reduction)
    assert held <= {x.data_ptr() for x in saved}
    others = sum(x.nbytes for x in saved if x.data_ptr() not in held)
    assert others == (8 if reduction == "mean" else 0)  # the divisor


def test_backward_may_run_twice_but_not_be_differentiated(rng):
    logits, labels = batch(rng)
    loss = softmax_focal_loss(logits, labels)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, logits, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="FocalLossSum has no second derivatives"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_compiles_as_one_graph(reduction, rng):
    logits, labels = batch(rng, (2, 3, 8, 8), torch.float32)

    def step(x):
        return softmax_focal_loss(x, labels, alpha=(0.5, 1.0, 2.0), reduction=reduction).sum()

    expected = step(logits)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(got, torch.autograd.grad(expected, logits)[0])


def test_it_runs_without_data():
    with FakeTensorMode():
        logits = torch.empty(2, 3, 1260, 2048, requires_grad=True)
        labels = torch.empty(2, 1260, 2048, dtype=torch.uint8)
        softmax_focal_loss(logits, labels).backward()
        assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_label_out_of_range_is_an_index_error_as_in_torch(label, reduction, rng):
    logits, labels = batch(rng)
    labels[1, 2, 3] = label
    with pytest.raises(IndexError):
        F.cross_entropy(logits, labels)
    with pytest.raises(IndexError, match=rf"labels .* \[0, 3\), got index {label}"):
        softmax_focal_loss(logits, labels, reduction=reduction)


def test_wrong_arguments_are_named(rng):
    logits, labels = batch(rng)
    for wrong, message in [
        (dict(logits=logits[0, 0, 0]), r"logits must be \[N, C, ...\].*got \[7\]"),
        (dict(logits=logits.long()), "logits must be .*int64"),
        (dict(labels=labels[:1]), r"labels must be \[2, 5, 7\].*got \[1, 5, 7\]"),
        (dict(labels=labels.bool()), "labels must be .*bool"),
        (dict(labels=labels.to("meta")), "labels must be on cpu.*meta"),
        (dict(gamma=-1), "gamma must be .*-1"),
        (dict(gamma=math.nan), "gamma must be .*nan"),
        (dict(alpha=-0.5), "alpha must be .*-0.5"),
        (dict(alpha=[1.0, 2.0]), r"alpha must be .*\[3\].*got \[2\]"),
        (dict(alpha=torch.ones(3, requires_grad=True)), "alpha must not require a gradient"),
        (dict(reduction="average"), "reduction must be .*'average'"),
    ]:
        for function in (softmax_focal_loss, softmax_focal_loss_reference):
            arguments = dict(logits=logits, labels=labels) | wrong
            with pytest.raises(ValueError, match=message):
                function(arguments.pop("logits"), arguments.pop("labels"), **arguments)
