"""The segmentation losses against float64 compositions, on one process and on two.

Run as a script, this file is one rank of the two-process test.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fullres.ops import focal_blocks
from fullres.ops.batch_norm import SyncBatchNorm
from fullres.ops.focal_loss import focal_loss_backward_triton, focal_loss_forward_triton
from fullres.training import loss as module
from fullres.training.loss import SCHEMES, SegmentationLoss
from fullres.training.metrics import SegmentationMetrics

SPLITS = {"uneven": [2, 1], "one rank empty": [3, 0]}


def reference(logits, labels, scheme, gamma=2.0):
    """The loss of a whole batch, as its definition reads, by plain differentiable operations."""
    total = 0
    for i, x in enumerate(logits):
        y = labels[:, i].long()
        ce = F.cross_entropy(x, y, reduction="none")
        p = x.softmax(1).gather(1, y[:, None])[:, 0]
        if scheme == "lin":
            total = total + ((1 - p) ** gamma * ce).mean()
            continue
        w = {
            "focal": lambda p=p: ((1 - p) ** 2 / 3).detach(),
            "light": lambda y=y: torch.tensor([1, 1.5, 10]).double()[y],
            "even": lambda y=y: (y.numel() / y.flatten().bincount(minlength=3).double())[y],
            "none": lambda ce=ce: torch.ones_like(ce),
        }[scheme]()
        total = total + (w * ce).sum() / w.sum()
    return total


def batch(rng, n=2, size=(5, 7), dtype=torch.float64, scale=3.0, planes=3):
    logits = [
        (torch.randn(n, 3, *size, generator=rng, dtype=torch.float64) * scale)
        .to(dtype)
        .requires_grad_()
        for _ in range(planes)
    ]
    labels = torch.randint(3, (n, planes, *size), generator=rng).to(torch.uint8)
    return logits, labels


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    n=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    scale=st.sampled_from([0.1, 3.0, 20.0]),
    block=st.sampled_from([1, 16, 1 << 20]),
    seed=st.integers(0, 999),
)
def test_value_and_gradient_are_those_of_the_definition(
    scheme, n, height, width, scale, block, seed
):
    rng = torch.Generator().manual_seed(seed)
    logits, labels = batch(rng, n, (height, width), scale=scale)
    with patch.object(focal_blocks, "BLOCK_ELEMENTS", block):
        loss = SegmentationLoss(scheme)(logits, labels)
        gradients = torch.autograd.grad(loss, logits)
    expected = reference(logits, labels, scheme)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "focal"])
def test_gradient_is_that_of_the_value(scheme, rng):
    logits, labels = batch(rng, 1, (2, 3))
    assert torch.autograd.gradcheck(lambda *x: SegmentationLoss(scheme)(x, labels), logits)


def test_no_gradient_flows_through_the_focal_weight(rng):
    """The gradient is that of the weights held where they are, and of nothing else."""
    logits, labels = batch(rng, 1, (2, 3), planes=1)
    y = labels[:, 0].long()
    p = logits[0].softmax(1)
    w = (1 - p.gather(1, y[:, None])) ** 2
    wanted = (w / w.sum() * (p - F.one_hot(y, 3).movedim(-1, 1))).detach()
    (got,) = torch.autograd.grad(SegmentationLoss("focal")(logits, labels), logits)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_logits_are_accumulated_in_float32(scheme, dtype, rng):
    logits, labels = batch(rng, 2, (33, 65), dtype)
    loss = SegmentationLoss(scheme)(logits, labels)
    gradients = torch.autograd.grad(loss, logits)
    exact = [x.detach().double().requires_grad_() for x in logits]
    expected = reference(exact, labels, scheme)
    assert loss.dtype == torch.float32
    # Sums of fp32 in blocks, then float64: about the rounding of one term.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert got.dtype == dtype
        rounding = torch.finfo(dtype).eps + 1e-5
        torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=rounding * 1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [0.0, 30.0, 48.0, 60.0, 1e4, -1e4])
def test_all_background_is_finite_however_sure_the_network(scheme, dtype, margin):
    """At margin 1e4 every p_y is exactly 1 and the focal weights add up to 0; at 48, to 1e-41."""
    logits = [torch.zeros(1, 3, 4, 4, dtype=dtype) for _ in range(3)]
    for x in logits:
        x[:, 0] = margin
        x.requires_grad_()
    labels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    loss = SegmentationLoss(scheme)(logits, labels)
    (loss * 65536).backward()  # as a gradient scaler does
    assert loss.isfinite() and loss >= 0
    assert all(x.grad.isfinite().all() for x in logits)


@contextmanager
def on_kernels():
    """Compute by the kernels, on CPU tensors in triton's interpreter."""
    pytest.importorskip("triton")
    from fullres.kernels._tune import interpreted

    with (
        interpreted(),
        patch.object(module, "focal_loss_forward", focal_loss_forward_triton),
        patch.object(module, "focal_loss_backward", focal_loss_backward_triton),
    ):
        yield


@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_compute_the_definition(scheme, last, rng):
    logits, labels = batch(rng, 2, (9, 13), torch.float32)
    exact = [x.detach().double().requires_grad_() for x in logits]
    expected = reference(exact, labels, scheme)
    if last:
        logits = [x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in logits]
    with on_kernels():
        loss = SegmentationLoss(scheme)(logits, labels)
        gradients = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("margin", [0.0, 30.0, 48.0, 1e4, -1e4])
def test_kernels_are_finite_however_sure_the_network(margin):
    """At 48 the weights are 8e-42 each: none may be multiplied by the inverse of their sum."""
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 0] = margin
    logits.requires_grad_()
    labels = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    with on_kernels():
        loss = SegmentationLoss("focal")([logits], labels)
        (gradient,) = torch.autograd.grad(loss * 65536, logits)
    plain = SegmentationLoss("focal")([logits], labels)
    (wanted,) = torch.autograd.grad(plain * 65536, logits)
    assert loss.isfinite() and gradient.isfinite().all()
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-12)


def test_focal_weights_keep_their_ratio_where_p_rounds_to_one():
    """1 - p_y of 2e-9 and 4e-9 are both 0 in fp32 if taken by subtraction."""
    logits = torch.zeros(1, 3, 1, 2)
    logits[0, 0, 0] = torch.tensor([20.0, 20.0 - torch.log(torch.tensor(2.0)).item()])
    logits.requires_grad_()
    labels = torch.zeros(1, 1, 1, 2, dtype=torch.uint8)
    SegmentationLoss("focal")([logits], labels).backward()
    exact = logits.detach().double().requires_grad_()
    reference([exact], labels, "focal").backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_absent_class_contributes_nothing(scheme, rng):
    logits, labels = batch(rng)
    labels[labels == 2] = 1
    loss = SegmentationLoss(scheme)(logits, labels)
    gradients = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    if scheme == "even":
        expected = sum(
            F.cross_entropy(x, labels[:, i].long(), reduction="none")[labels[:, i] == c].mean() / 2
            for i, x in enumerate(logits)
            for c in (0, 1)
        )
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_empty_batch_is_zero_with_zero_gradients(scheme, rng):
    logits, labels = batch(rng, 0)
    loss = SegmentationLoss(scheme)(logits, labels)
    loss.backward()
    assert loss == 0 and all(x.grad.shape == x.shape for x in logits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_label_dtype_and_memory_format_do_not_matter(scheme, rng):
    logits, labels = batch(rng, 2, (4, 6))
    loss = SegmentationLoss(scheme)(logits, labels)
    last = [x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in logits]
    wide = [F.pad(x.detach(), (0, 2, 0, 3))[..., :4, :6].requires_grad_() for x in logits]
    for given_logits in (last, wide):
        for dtype in (torch.int32, torch.int64):
            assert torch.equal(SegmentationLoss(scheme)(given_logits, labels.to(dtype)), loss)
    (gradient,) = torch.autograd.grad(SegmentationLoss(scheme)(last, labels), last[:1])
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_backward_keeps_nothing_but_what_the_caller_holds(rng):
    logits, labels = batch(rng, 2, (40, 50), torch.bfloat16)
    held = {x.data_ptr() for x in (*logits, labels)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        SegmentationLoss("focal")(logits, labels)
    others = [x for x in saved if x.data_ptr() not in held]
    assert len(saved) > len(others)
    assert sum(x.nbytes for x in others) == 8 * (3 + 3 * 3)  # sums of weights, class weights


def test_backward_may_run_twice_but_not_be_differentiated(rng):
    logits, labels = batch(rng)
    loss = SegmentationLoss("focal")(logits, labels)
    first = torch.autograd.grad(loss, logits, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, logits, retain_graph=True)))
    with pytest.raises(RuntimeError, match="PlanesLoss has no second derivatives"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_frozen_logits_get_no_gradient(rng):
    logits, labels = batch(rng)
    logits[1].requires_grad_(False)
    SegmentationLoss()(logits, labels).backward()
    assert logits[1].grad is None and logits[0].grad is not None


def test_global_value_is_the_loss_without_a_graph(rng):
    logits, labels = batch(rng)
    criterion = SegmentationLoss()
    assert criterion.global_value is None
    loss = criterion(logits, labels)
    assert torch.equal(criterion.global_value, loss) and not criterion.global_value.requires_grad


def test_predictions_are_counted_in_the_same_pass(rng):
    logits, labels = batch(rng)
    metrics = SegmentationMetrics()
    metrics.update(logits, labels)
    criterion = SegmentationLoss(count=True)
    loss = criterion(logits, labels)
    assert torch.equal(criterion.confusion, metrics.confusion)
    plain = SegmentationLoss()
    assert torch.equal(plain(logits, labels), loss) and plain.confusion is None


def test_under_autocast_the_loss_is_float32(rng):
    logits, labels = batch(rng, dtype=torch.float32)
    plain = SegmentationLoss()(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(SegmentationLoss()(logits, labels), plain)


def test_it_compiles_as_one_graph(rng):
    logits, labels = batch(rng, dtype=torch.float32)
    criterion = SegmentationLoss()
    loss = torch.compile(criterion, fullgraph=True, backend="aot_eager")(logits, labels)
    expected = criterion(logits, labels)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, logits))


def test_it_runs_without_data():
    with FakeTensorMode():
        logits = [torch.empty(1, 3, 1260, 2048, requires_grad=True) for _ in range(3)]
        labels = torch.empty(1, 3, 1260, 2048, dtype=torch.uint8)
        SegmentationLoss("even")(logits, labels).backward()
        assert all(x.grad.shape == x.shape for x in logits)


def test_nan_logits_give_a_nan_loss(rng):
    logits, labels = batch(rng)
    with torch.no_grad():
        logits[0][0, 0, 0, 0] = float("nan")
    assert SegmentationLoss()(logits, labels).isnan()


def test_wrong_arguments_are_named(rng):
    logits, labels = batch(rng)
    criterion = SegmentationLoss()
    with pytest.raises(ValueError, match="scheme must be one of"):
        SegmentationLoss("focus")
    with pytest.raises(ValueError, match="gamma"):
        SegmentationLoss("lin", gamma=-1)
    with pytest.raises(ValueError, match="gamma"):
        SegmentationLoss("light", gamma=1.0)
    with pytest.raises(ValueError, match="logits must be a sequence.*tensor"):
        criterion(logits[0], labels)
    with pytest.raises(ValueError, match="logits must be a sequence.*none"):
        criterion([], labels)
    with pytest.raises(ValueError, match="one shape"):
        criterion([logits[0], logits[1], logits[2][..., 1:]], labels)
    with pytest.raises(ValueError, match="floating-point"):
        criterion([x.int() for x in logits], labels)
    with pytest.raises(ValueError, match=r"labels must be \[2, 3, 5, 7\].*got \[2, 3, 5, 6\]"):
        criterion(logits, labels[..., 1:])
    with pytest.raises(ValueError, match="labels must be.*float32"):
        criterion(logits, labels.float())
    with pytest.raises(IndexError, match=r"labels must be .* in \[0, 3\)"):
        criterion(logits, labels + 2)


# Two processes: a step of a small network under DistributedDataParallel.


def images():
    rng = torch.Generator().manual_seed(7)
    x = torch.randn(3, 3, 6, 5, generator=rng, dtype=torch.float64)
    labels = torch.randint(3, (3, 3, 6, 5), generator=rng).to(torch.uint8)
    labels[2] = 0  # what rank 1 holds is all background
    return x, labels


class Planes(torch.nn.Module):
    """A convolution and a normalisation over each plane alone, as the U-ResNet has them."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 3, 3, padding=1, dtype=torch.float64)
        self.norm = torch.nn.BatchNorm2d(3, dtype=torch.float64)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.linspace(-1, 1 + i, p.numel()).view_as(p))

    def forward(self, x):
        return [self.norm(self.conv(x[:, i : i + 1])) for i in range(3)]


def rank_main(rank: int, folder: Path):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda x, **kw: calls.append(tuple(x.shape)) or all_reduce(x, **kw)
    x, labels = images()
    results = {}
    for name, sizes in SPLITS.items():
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        metrics = SegmentationMetrics()
        for scheme in SCHEMES:
            model = SyncBatchNorm.convert_sync_batchnorm(Planes())
            model = torch.nn.parallel.DistributedDataParallel(model)
            criterion = SegmentationLoss(scheme)
            logits = model(x[own])
            calls.clear()
            loss = criterion(logits, labels[own])
            in_forward = list(calls)
            calls.clear()
            loss.backward()
            results[name, scheme] = {
                "loss": loss.detach(),
                "global": criterion.global_value,
                "gradients": [p.grad for p in model.parameters()],
                "buffers": list(model.module.buffers()),
                "calls": (in_forward, list(calls)),
            }
        calls.clear()
        alone = SegmentationLoss("even", synchronize=False)(logits, labels[own])
        results[name, "alone"] = alone.detach(), [x.detach() for x in logits], list(calls)
        metrics.update(logits, labels[own])
        results[name, "metrics"] = metrics.compute()
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()  # a rank that leaves early can take the other with it
    dist.destroy_process_group()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_step_as_one_with_the_whole_batch(two_ranks, split, scheme):
    x, labels = images()
    model = Planes()
    expected = reference(model(x), labels, scheme)
    expected.backward()
    ranks = [results[split, scheme] for results in two_ranks]
    exact = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, expected, **exact)
    for rank in ranks:
        torch.testing.assert_close(rank["global"], expected, **exact)
        wanted = [p.grad for p in model.parameters()]
        torch.testing.assert_close(rank["gradients"], wanted, **exact)
        torch.testing.assert_close(rank["buffers"], list(model.buffers()), **exact)
        # The loss has one in forward; those in backward are of the normalisations.
        assert rank["calls"] == ([(3, 3, 3)], [(2, 3)] * 3)


def test_without_synchronization_a_rank_has_its_own_loss_and_calls_nobody(two_ranks):
    _, labels = images()
    for results, y in zip(two_ranks, (labels[:2], labels[2:]), strict=True):
        loss, logits, calls = results["uneven", "alone"]
        expected = SegmentationLoss("even")(logits, y)  # one process: nobody to ask
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert calls == []


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_measure_as_one_with_the_whole_batch(two_ranks, split):
    x, labels = images()
    metrics = SegmentationMetrics()
    metrics.update(Planes()(x), labels)
    for results in two_ranks:
        assert results[split, "metrics"] == metrics.compute()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
