"""The metrics against counting pixel by pixel, and against torchmetrics' own.

Two ranks are compared with one in test_loss.py, where two processes run.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from fullres.training import metrics as module
from fullres.training.metrics import SegmentationMetrics, confusion_matrix

NAMES = ("accuracy", "non_background_accuracy", "cosmic_iou", "neutrino_iou", "mean_iou")


def count(predictions, labels):
    """The five metrics by counting one pixel after another."""
    pairs = list(zip(predictions.flatten().tolist(), labels.flatten().tolist(), strict=True))

    def share(part, whole):
        whole = [pair for pair in pairs if whole(*pair)]
        return sum(part(*pair) for pair in whole) / len(whole) if whole else 1.0

    cosmic, neutrino = (
        share(lambda p, y, c=c: p == y == c, lambda p, y, c=c: c in (p, y)) for c in (1, 2)
    )
    return {
        "accuracy": share(lambda p, y: p == y, lambda p, y: True),
        "non_background_accuracy": share(lambda p, y: p == y, lambda p, y: y != 0),
        "cosmic_iou": cosmic,
        "neutrino_iou": neutrino,
        "mean_iou": (cosmic + neutrino) / 2,
    }


def batch(rng, n=3, size=(6, 5), dtype=torch.float32):
    logits = [torch.randn(n, 3, *size, generator=rng).to(dtype) for _ in range(3)]
    labels = torch.randint(3, (n, 3, *size), generator=rng).to(torch.uint8)
    return logits, labels


def metrics_of(logits, labels):
    metrics = SegmentationMetrics()
    metrics.update(logits, labels)
    return metrics.compute()


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    classes=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_each_metric_is_what_counting_pixels_gives(n, height, width, classes, seed):
    rng = torch.Generator().manual_seed(seed)
    logits, labels = batch(rng, n, (height, width))
    labels %= classes  # some classes absent
    for x in logits:
        x[:, classes:] = -10
    predictions = torch.stack([x.argmax(1) for x in logits], 1)
    got = metrics_of(logits, labels)
    wanted = count(predictions, labels)
    for i in range(3):
        plane = count(predictions[:, i], labels[:, i])
        wanted |= {f"plane{i}/{name}": value for name, value in plane.items()}
    assert list(got) == list(wanted)
    assert {k: v.item() for k, v in got.items()} == pytest.approx(wanted, abs=1e-15)


def test_it_agrees_with_torchmetrics_where_the_definitions_do(rng):
    logits, labels = batch(rng)
    predictions = torch.stack([x.argmax(1) for x in logits], 1)
    got = metrics_of(logits, labels)
    iou = MulticlassJaccardIndex(3, average=None)(predictions, labels)
    accuracy = MulticlassAccuracy(3, average="micro")(predictions, labels)
    others = MulticlassAccuracy(3, average="micro", ignore_index=0)(predictions, labels.long())
    for name, wanted in [
        ("accuracy", accuracy),
        ("non_background_accuracy", others),
        ("cosmic_iou", iou[1]),
        ("neutrino_iou", iou[2]),
        ("mean_iou", iou[1:].mean()),
    ]:
        torch.testing.assert_close(got[name].float(), wanted)


@pytest.mark.parametrize("sizes", [[3], [1, 2], [2, 0, 1], [1, 1, 1]])
def test_the_split_into_batches_does_not_matter(sizes, rng):
    logits, labels = batch(rng)
    labels[0] = 0  # an average of batch averages would differ
    metrics = SegmentationMetrics()
    for part, y in zip(
        zip(*(x.split(sizes) for x in logits), strict=True), labels.split(sizes), strict=True
    ):
        metrics.update(part, y)
    assert metrics.compute() == metrics_of(logits, labels)


def test_forward_gives_the_batch_and_adds_to_the_whole(rng):
    logits, labels = batch(rng)
    metrics = SegmentationMetrics()
    for n in range(3):
        one = [x[n : n + 1] for x in logits]
        assert metrics(one, labels[n : n + 1]) == metrics_of(one, labels[n : n + 1])
    assert metrics.compute() == metrics_of(logits, labels)
    metrics.reset()
    assert metrics.confusion.sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_prediction_is_the_first_largest_logit_in_any_dtype(dtype, rng):
    logits, labels = batch(rng, size=(40, 40), dtype=dtype)  # bfloat16 has many equal ones
    with torch.autocast("cpu", torch.bfloat16):
        got = metrics_of(logits, labels)
    predictions = torch.stack([x.argmax(1) for x in logits], 1)
    assert got == metrics_of(predictions, labels) == metrics_of(predictions.int(), labels.long())


def test_nothing_to_find_and_nothing_found_is_right():
    background = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert all(value == 1 for value in metrics_of(background, background).values())


def test_what_is_found_where_nothing_is_counts_as_wrong():
    background = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    got = metrics_of(torch.full_like(background, 2), background)
    wanted = {"accuracy": 0, "non_background_accuracy": 1, "cosmic_iou": 1, "neutrino_iou": 0}
    assert {name: got[name].item() for name in wanted} == wanted
    assert got["mean_iou"] == 0.5


def test_nan_logits_are_predicted_background(rng):
    logits, labels = batch(rng)
    background = [x.clone() for x in logits]
    for x, y, channel in zip(logits, background, [slice(3), 0, 1], strict=True):
        x[0, channel] = float("nan")
        y[0, 0] = 10
    assert metrics_of(logits, labels) == metrics_of(background, labels)


def test_counts_are_exact_beyond_what_float32_and_int32_hold():
    metrics = SegmentationMetrics()
    pixels = 1 << 33
    metrics.confusion[0, 0, 0] = pixels
    metrics.pixels += pixels
    metrics.update(
        torch.full((1, 3, 1, 1), 1, dtype=torch.uint8), torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    )
    assert metrics.confusion[0, 0].tolist() == [pixels, 1, 0]
    assert metrics.compute()["plane0/accuracy"] == pixels / (pixels + 1) < 1


def test_the_count_of_accelerators_is_that_of_the_cpu(rng, monkeypatch):
    """On a device counting compares cell by cell, since bincount would wait for it."""
    label = torch.randint(5, (50,), generator=rng).to(torch.uint8)
    prediction = torch.randint(5, (50,), generator=rng).to(torch.uint8)
    wanted = confusion_matrix(prediction, label)
    assert wanted.sum() == ((label < 3) & (prediction < 3)).sum()
    with monkeypatch.context() as patch:
        patch.setattr(module, "WAITS_FOR_NOBODY", ())
        assert torch.equal(confusion_matrix(prediction, label), wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_labels_out_of_range_are_reported_and_never_wrap_into_a_class(dtype):
    values = [v for v in (-1, 3, 86, 127, 255, 256) if v in range(*_limits(dtype))]
    for value in values:
        labels = torch.zeros(1, 3, 1, 1, dtype=dtype)
        labels[0, 1] = value
        metrics = SegmentationMetrics()
        metrics.update(torch.zeros_like(labels), labels)
        assert metrics.confusion.sum() == 2
        with pytest.raises(ValueError, match="must be 0, 1 or 2; got 1 pixels"):
            metrics.compute()


def _limits(dtype):
    limits = torch.iinfo(dtype)
    return limits.min, limits.max + 1


def test_a_reset_in_inference_mode_does_not_end_the_updates(rng):
    logits, labels = batch(rng)
    metrics = SegmentationMetrics()
    with torch.inference_mode():
        metrics.reset()
    metrics.update(logits, labels)
    assert metrics.compute() == metrics_of(logits, labels)


def test_logits_that_require_gradients_leave_no_graph(rng):
    logits, labels = batch(rng)
    metrics = SegmentationMetrics()
    metrics.update([x.requires_grad_() for x in logits], labels)
    assert not metrics.confusion.requires_grad


@pytest.mark.gpu
def test_on_a_device_under_deterministic_algorithms_it_is_that_of_the_cpu(rng):
    logits, labels = batch(rng)
    metrics = SegmentationMetrics().cuda()
    torch.use_deterministic_algorithms(True)
    try:
        metrics.update([x.cuda() for x in logits], labels.cuda())
        got = metrics.compute()
    finally:
        torch.use_deterministic_algorithms(False)
    assert {k: v.cpu() for k, v in got.items()} == metrics_of(logits, labels)


def test_wrong_arguments_are_named(rng):
    logits, labels = batch(rng)
    metrics = SegmentationMetrics()
    with pytest.raises(ValueError, match=r"labels must be integers \[N, 3, H, W\].*float32"):
        metrics.update(logits, labels.float())
    with pytest.raises(ValueError, match=r"labels must be integers \[N, 3, H, W\].*\[3, 2"):
        metrics.update(logits, labels[:, :2])
    with pytest.raises(ValueError, match="logits must be 3 floating-point tensors"):
        metrics.update(logits[:2], labels)
    with pytest.raises(ValueError, match="logits must be 3 floating-point tensors"):
        metrics.update([x[..., 1:] for x in logits], labels)
    with pytest.raises(ValueError, match="predictions must be integers"):
        metrics.update(logits[0], labels)
