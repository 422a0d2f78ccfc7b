"""Segmentation metrics pooled over all pixels of all images and ranks.

Everything is a ratio of entries of one confusion matrix [planes, label, prediction] of integer
counts, added up over batches and ranks, so no result depends on how pixels were split into
batches. (An average of batch averages does: IoU and non-background accuracy are ratios of sums.)

Of the matrix of one plane, or of the sum over planes:

    accuracy                 correct pixels / all pixels
    non_background_accuracy  correct pixels / all pixels, among those whose label is not background
    cosmic_iou, neutrino_iou intersection / union of the predicted and the labelled pixels
    mean_iou                 (cosmic_iou + neutrino_iou) / 2: background does not enter
"""

from collections.abc import Sequence

import torch
import torchmetrics

CLASSES = 3  # background, cosmic, neutrino
WAITS_FOR_NOBODY = ("cpu",)  # devices where bincount, which asks for its largest value, is free


class SegmentationMetrics(torchmetrics.Metric):
    """The five metrics of the module's docstring, for all planes together and for each one.

    `compute()` returns a flat dict of float64 scalars: "accuracy", "non_background_accuracy",
    "cosmic_iou", "neutrino_iou" and "mean_iou", then the same as "plane0/accuracy" and so on. The
    first five pool the pixels of all planes; they are not means of the planes' values.

    Where there was nothing to find and nothing was found, the answer was right: a ratio 0 / 0 (an
    empty union, no pixel that is not background) is 1.

    Counts are int64 and exact. `update` communicates with nobody and never waits for the device;
    temporaries are a few bytes a pixel of one plane of one image. Counting runs in a fixed order
    of integer sums: the result is deterministic on every device, and unaffected by autocast.

    Attributes:
        confusion: int64 [planes, 3, 3], label by row, prediction by column, of this rank.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, planes: int = 3, **kwargs):
        """Make the metrics, all counts zero.

        Args:
            planes: number of planes.
            **kwargs: what `torchmetrics.Metric` takes, as `process_group` or `sync_on_compute`.
        """
        super().__init__(**kwargs)
        self.confusion: torch.Tensor
        self.pixels: torch.Tensor
        zeros = torch.zeros(planes, CLASSES, CLASSES, dtype=torch.int64)
        self.add_state("confusion", zeros, dist_reduce_fx="sum")
        # All pixels seen, to notice labels that no entry of the matrix has counted.
        self.add_state("pixels", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Sequence[torch.Tensor] | torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch.

        Args:
            logits: one [N, 3, H, W] of any floating dtype a plane, whose largest entry is the
                prediction, the first of equal ones. A comparison with NaN is false: a pixel with
                NaN for background or cosmic counts as predicted background. Or predictions
                themselves, an integer tensor like `labels`.
            labels: integers [N, planes, H, W]: 0 background, 1 cosmic, 2 neutrino. Others are an
                error that `compute` reports, since looking here would wait for the device.

        Raises:
            ValueError: a shape or dtype is not the above.
        """
        _check(logits, labels, planes=self.confusion.shape[0])
        predicted = isinstance(logits, torch.Tensor)
        counts = torch.zeros_like(self.confusion)
        for i in range(labels.shape[1]):
            for n in range(labels.shape[0]):
                prediction = logits[n, i] if predicted else _predict(logits[i][n].detach())
                counts[i] += confusion_matrix(prediction, labels[n, i])
        # Not in place: the states may have been made in inference mode, by a reset in validation.
        self.confusion = self.confusion + counts
        self.pixels = self.pixels + labels.numel()

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the metrics of everything counted since the last reset, on all ranks.

        Raises:
            ValueError: some label or prediction was not 0, 1 or 2.
        """
        uncounted = int(self.pixels - self.confusion.sum())
        if uncounted:
            raise ValueError(
                f"labels and predictions must be 0, 1 or 2; got {uncounted} pixels with another"
            )
        metrics = _metrics(self.confusion.sum(0))
        for i, confusion in enumerate(self.confusion):
            metrics |= {f"plane{i}/{name}": value for name, value in _metrics(confusion).items()}
        return metrics


def confusion_matrix(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return int64 [3, 3] counts of pixels, label by row; pixels with other values are left out.

    Args:
        prediction: integers, any shape.
        label: integers of the same shape.
    """
    outside = _outside(prediction) | _outside(label)
    # In uint8, one byte a pixel. What wraps around is outside and overwritten.
    cell = label.to(torch.uint8).mul(CLASSES).add_(prediction.to(torch.uint8))
    cell.masked_fill_(outside, CLASSES**2)
    if cell.device.type in WAITS_FOR_NOBODY:
        counts = torch.bincount(cell.flatten(), minlength=CLASSES**2 + 1)[: CLASSES**2]
    else:
        counts = torch.stack([torch.count_nonzero(cell == k) for k in range(CLASSES**2)])
    return counts.view(CLASSES, CLASSES)


def _outside(values: torch.Tensor) -> torch.Tensor:
    outside = values >= CLASSES
    return outside | (values < 0) if values.dtype.is_signed else outside


def _predict(logits: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest of three logits [3, H, W], the first of equal ones, in uint8.

    argmax would make int64, eight times as much.
    """
    background, cosmic, neutrino = logits
    prediction = (cosmic > background).to(torch.uint8)
    return prediction.masked_fill_(neutrino > torch.maximum(background, cosmic), 2)


def _metrics(confusion: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the metrics of one confusion matrix, int64 [3, 3]."""
    correct, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou = _ratio(correct, labelled + predicted - correct)
    return {
        "accuracy": _ratio(correct.sum(), labelled.sum()),
        "non_background_accuracy": _ratio(correct[1:].sum(), labelled[1:].sum()),
        "cosmic_iou": iou[1],
        "neutrino_iou": iou[2],
        "mean_iou": iou[1:].mean(),
    }


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return torch.where(whole > 0, part.double() / whole.clamp(min=1), 1.0)


def _check(
    logits: Sequence[torch.Tensor] | torch.Tensor, labels: torch.Tensor, planes: int
) -> None:
    if labels.ndim != 4 or labels.shape[1] != planes or not _is_integer(labels):
        raise ValueError(
            f"labels must be integers [N, {planes}, H, W]; got {list(labels.shape)} {labels.dtype}"
        )
    if isinstance(logits, torch.Tensor):
        if logits.shape != labels.shape or not _is_integer(logits):
            raise ValueError(
                f"predictions must be integers {list(labels.shape)} like labels, and logits one "
                f"tensor a plane; got a tensor {list(logits.shape)} {logits.dtype}"
            )
        return
    n, _, *size = labels.shape
    wanted = [n, CLASSES, *size]
    if len(logits) != planes or any(
        list(x.shape) != wanted or not x.is_floating_point() for x in logits
    ):
        raise ValueError(
            f"logits must be {planes} floating-point tensors {wanted}, one a plane; got "
            + (", ".join(f"{list(x.shape)} {x.dtype}" for x in logits) or "none")
        )


def _is_integer(values: torch.Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
