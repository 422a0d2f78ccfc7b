"""The sigmoid focal loss against torchvision's formula in float64."""

import math
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres.ops import sigmoid_focal_loss as module
from fullres.ops.sigmoid_focal_loss import (
    sigmoid_backward,
    sigmoid_backward_triton,
    sigmoid_focal_loss,
    sigmoid_focal_loss_reference,
    sigmoid_forward,
    sigmoid_forward_triton,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = pytest.mark.parametrize("path", ["reference", "kernel"])


def torchvisions(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
    """torchvision.ops.sigmoid_focal_loss, as its documentation and source have it."""
    p = torch.sigmoid(inputs)
    ce_loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce_loss * ((1 - p_t) ** gamma)
    if alpha >= 0:
        alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
        loss = alpha_t * loss
    return {"none": lambda: loss, "mean": loss.mean, "sum": loss.sum}[reduction]()


@contextmanager
def on_kernels():
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    with (
        interpreted(),
        patch.object(module, "sigmoid_forward", sigmoid_forward_triton),
        patch.object(module, "sigmoid_backward", sigmoid_backward_triton),
    ):
        yield


def computed_by(path):
    return on_kernels() if path == "kernel" else nullcontext()


def batch(rng, shape=(3, 50, 7), dtype=torch.float32, hard=True):
    inputs = (3 * torch.randn(shape, generator=rng)).to(dtype)
    targets = torch.rand(shape, generator=rng)
    targets = (targets > 0.7).to(dtype) if hard else targets.to(dtype)
    return inputs.requires_grad_(), targets


def value_and_gradient(inputs, targets, upstream=None, **options):
    loss = sigmoid_focal_loss(inputs, targets, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, inputs, upstream)[0]


def assert_close(got, inputs, targets, upstream=None, **options):
    """Some thirty float32 roundings a value, and |x| of the exponential; gradients round again."""
    exact = inputs.detach().double().requires_grad_()
    wanted = torchvisions(exact, targets.double(), **options)
    upstream = torch.ones_like(wanted) if upstream is None else upstream.double()
    (dwanted,) = torch.autograd.grad(wanted, exact, upstream)
    eps = (30 + 2 * exact.detach().abs().max().item()) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got[0].double(), wanted.detach(), rtol=4 * eps, atol=eps * 1e-3)
    rounding = torch.finfo(inputs.dtype).eps + 4 * eps
    scale = dwanted.abs().mean().item()
    least = 2.0**-24 if inputs.dtype == torch.float16 else 0.0
    torch.testing.assert_close(got[1].double(), dwanted, rtol=rounding, atol=eps * scale + least)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(), (1,), (7,), (3, 50, 7), (2, 3, 4, 5)]),
    alpha=st.sampled_from([0.25, 0.0, 1.0, -1.0]),
    gamma=st.sampled_from([0, 0.5, 1, 2, 3.3]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    hard=st.booleans(),
    path=st.sampled_from(["reference", "kernel"]),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_are_torchvisions(shape, alpha, gamma, reduction, hard, path, seed):
    rng = torch.Generator().manual_seed(seed)
    inputs, targets = batch(rng, shape, hard=hard)
    options = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
    upstream = torch.rand(shape if reduction == "none" else (), generator=rng)
    with computed_by(path):
        got = value_and_gradient(inputs, targets, upstream, **options)
    assert_close(got, inputs, targets, upstream, **options)


def test_the_arguments_are_torchvisions_in_order(rng):
    inputs, targets = batch(rng)
    got = sigmoid_focal_loss(inputs, targets, 0.5, 1.5, "sum")
    torch.testing.assert_close(got, torchvisions(inputs, targets, 0.5, 1.5, "sum"))
    plain = sigmoid_focal_loss(inputs, targets)
    torch.testing.assert_close(plain, torchvisions(inputs, targets))
    torch.testing.assert_close(plain, sigmoid_focal_loss_reference(inputs, targets))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient_is_that_of_the_value(gamma, rng):
    inputs, targets = batch(rng, (3, 4), torch.float64, hard=False)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, targets, gamma=gamma), inputs)


@PATHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_computed_in_float32(dtype, path, rng):
    inputs, targets = batch(rng, dtype=dtype)
    with computed_by(path):
        for reduction in ("none", "mean"):
            got = value_and_gradient(inputs, targets, reduction=reduction)
            assert got[0].dtype == torch.float32 and got[1].dtype == dtype
            assert_close(got, inputs, targets, reduction=reduction)


@PATHS
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16], ids=str)
def test_targets_of_any_type(dtype, path, rng):
    inputs, targets = batch(rng)
    with computed_by(path):
        assert_close(value_and_gradient(inputs, targets.to(dtype)), inputs, targets)


@PATHS
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_inputs_are_finite(gamma, path):
    inputs = torch.tensor([1e4, -1e4, 1e4, -1e4, 90.0, 20.0, 0.0], requires_grad=True)
    targets = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    with computed_by(path):
        loss, gradient = value_and_gradient(inputs, targets, alpha=-1, gamma=gamma)
    q = torch.tensor([0, 0, 1, 1, math.exp(-90), 1 / (1 + math.exp(20)), 0.5], dtype=torch.float64)
    ce = torch.where(q == 1, 1e4, -torch.log1p(-q.where(q < 1, 0)))
    torch.testing.assert_close(loss.double(), q**gamma * ce, rtol=2e-5, atol=1e-37)
    assert gradient.isfinite().all()


@PATHS
def test_empty_and_transposed_and_strided(path, rng):
    inputs, targets = batch(rng, (4, 6, 8))
    x = inputs.detach()
    with computed_by(path):
        for reduction in ("none", "mean", "sum"):
            empty = torch.empty(0, 3, requires_grad=True)
            loss, gradient = value_and_gradient(empty, torch.empty(0, 3), reduction=reduction)
            assert loss.sum() == 0 and gradient.shape == (0, 3)
            for view, t in (
                (x.permute(2, 0, 1), targets.permute(2, 0, 1)),
                (x[:, ::2, ::2], targets[:, ::2, ::2]),
                (x, targets.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
                (x[:1].expand(4, -1, -1), targets),
            ):
                view = view.requires_grad_()
                got = value_and_gradient(view, t, reduction=reduction)
                assert_close(got, view, t, reduction=reduction)


@PATHS
def test_nan_shows_where_it_is(path, rng):
    inputs, targets = batch(rng)
    with torch.no_grad():
        inputs[1, 2, 3] = float("nan")
    with computed_by(path):
        loss, gradient = value_and_gradient(inputs, targets)
    assert loss.isnan().nonzero().tolist() == gradient.isnan().nonzero().tolist() == [[1, 2, 3]]


def test_the_same_bits_twice(rng):
    inputs, targets = batch(rng, (3, 5000))
    with on_kernels():
        first = value_and_gradient(inputs, targets, reduction="sum")
        assert all(map(torch.equal, first, value_and_gradient(inputs, targets, reduction="sum")))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_backward_keeps_only_what_was_given(reduction, rng):
    inputs, targets = batch(rng)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sigmoid_focal_loss(inputs, targets, reduction=reduction)
    assert {x.data_ptr() for x in saved} == {inputs.data_ptr(), targets.data_ptr()}


def test_backward_may_run_twice_but_not_be_differentiated(rng):
    inputs, targets = batch(rng)
    loss = sigmoid_focal_loss(inputs, targets, reduction="sum")
    (first,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, inputs, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="SigmoidFocalLoss has no second derivatives"):
        torch.autograd.grad(loss, inputs, create_graph=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_it_compiles_as_one_graph(reduction, rng):
    inputs, targets = batch(rng)

    def step(x):
        return sigmoid_focal_loss(x, targets, reduction=reduction).sum()

    expected = step(inputs)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(got, torch.autograd.grad(expected, inputs)[0])


def test_opcheck(rng):
    inputs, targets = batch(rng, dtype=torch.bfloat16)
    given = inputs.detach(), targets, 0.25, 2.0
    for pixels in (False, True):
        torch.library.opcheck(sigmoid_forward, (*given, pixels))
    torch.library.opcheck(sigmoid_backward, (*given, torch.ones(())))
    torch.library.opcheck(sigmoid_backward, (*given, torch.ones(3, 50, 7)))


X = torch.zeros(2, 3)
BAD = {
    "inputs-are-integers": ("inputs", {"inputs": X.long()}),
    "targets-of-another-size": ("targets", {"targets": X[:1]}),
    "targets-complex": ("targets", {"targets": X.to(torch.complex64)}),
    "targets-elsewhere": ("targets", {"targets": X.to("meta")}),
    "targets-differentiable": ("targets", {"targets": X.clone().requires_grad_()}),
    "alpha-above-one": ("alpha", {"alpha": 1.5}),
    "gamma-negative": ("gamma", {"gamma": -1}),
    "reduction-unknown": ("reduction", {"reduction": "average"}),
}


@pytest.mark.parametrize(("argument", "changes"), BAD.values(), ids=BAD.keys())
def test_refuses_with_the_arguments_name(argument, changes):
    with pytest.raises(ValueError, match=rf"^{argument}: want .*, got "):
        sigmoid_focal_loss(**{"inputs": X, "targets": X} | changes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_device_computes_torchvisions_formula(reduction, dtype, rng):
    inputs, targets = batch(rng, (4, 5000, 80), dtype)
    x = inputs.detach().cuda().requires_grad_()
    got = value_and_gradient(x, targets.cuda(), reduction=reduction)
    again = value_and_gradient(x, targets.cuda(), reduction=reduction)
    assert all(map(torch.equal, got, again))
    assert_close([t.cpu() for t in got], inputs, targets, reduction=reduction)
