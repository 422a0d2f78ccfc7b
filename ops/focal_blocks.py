"""The arithmetic of the softmax focal loss in blocks of pixels: what it means, on any device.

With p the softmax over C classes, y the label, q = 1 - p_y, each a value of one pixel, and the
options that `softmax_focal_loss` describes (eps is label_smoothing, w the class weights):

    cross  = (1 - eps) w_y (-log p_y) + eps / C sum_c w_c (-log p_c)
    factor = alpha_y q^gamma
    loss   = factor cross
    d loss / d logit_j = alpha_y (q^gamma dcross_j + cross dq_j)
        dcross_j = (1 - eps) w_y (p_j - [j = y]) + eps / C (sum_c w_c p_j - w_j)
        dq_j     = gamma q^gamma p_y r_j      r_j = (p_j - [j = y]) / q, between -1 and 1

q is the sum of the other classes' probabilities and not 1 - p_y, which in float32 would leave no
digit of it at the many pixels that are classified well.

An image fits where its float32 softmax does not. So each pass walks over blocks of pixels and keeps
nothing but its sums, and softmax is taken again in backward.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

BLOCK_ELEMENTS = 1 << 22  # 16 MiB of float32: small beside a batch, and worth a device's launches


@dataclass(frozen=True)
class Focal:
    """The options of a softmax focal loss; alpha and weight are [C] or None."""

    alpha: torch.Tensor | None
    weight: torch.Tensor | None
    gamma: float
    smoothing: float
    ignore_index: int


@dataclass(frozen=True)
class Terms:
    """What value and gradient of a block share: [n, ...], and `others` [n, C, ...].

    `others` is the softmax with 0 in the label's place. Where `ignored`, labels are 0.
    """

    labels: torch.Tensor
    ignored: torch.Tensor
    cross: torch.Tensor
    power: torch.Tensor  # q^gamma
    q: torch.Tensor
    others: torch.Tensor
    alpha: torch.Tensor | float
    weight: torch.Tensor | float

    def values(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return loss, factor times weight, and weight of each pixel; 0 where ignored."""
        factor = self.power * self.alpha
        weight = torch.ones_like(self.q) * self.weight
        rows = factor * self.cross, factor * weight, weight
        return tuple(row.masked_fill(self.ignored, 0.0) for row in rows)


def accumulator_dtype(logits: torch.Tensor) -> torch.dtype:
    """Return the dtype that losses of `logits` are computed in: float32, or float64 if given."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def pixel_blocks(logits: torch.Tensor, channels: int | None = None) -> Iterator[tuple[slice, ...]]:
    """Yield index tuples over labels [N, ...] that cover each pixel of `logits` once, in order.

    A block holds at most `BLOCK_ELEMENTS` values of `channels` a pixel (those of logits [N, C, ...]
    unless given), or one pixel; `logits_index` turns its index into that of the logits.
    """
    limit = max(1, BLOCK_ELEMENTS // max(1, channels or logits.shape[1]))
    return slices((logits.shape[0], *logits.shape[2:]), limit)


def logits_index(block: tuple[slice, ...]) -> tuple[slice, ...]:
    """Return the index into logits [N, C, ...] of a block of labels [N, ...]."""
    return block[0], slice(None), *block[1:]


def block_terms(logits: torch.Tensor, labels: torch.Tensor, focal: Focal) -> Terms:
    """Return the terms of logits [n, C, ...] with labels [n, ...], in the accumulator's dtype.

    Raises IndexError for a label that is neither ignored nor in [0, C).
    """
    C = logits.shape[1]
    labels = labels.long()  # before comparing: uint8 would take -100 for 156
    ignored = labels == focal.ignore_index
    labels = labels.masked_fill(ignored, 0)
    log_p = logits.to(accumulator_dtype(logits)).log_softmax(1)
    index = labels.unsqueeze(1)
    try:
        ce = -log_p.gather(1, index).squeeze(1)
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        raise IndexError(
            f"labels must be ignore_index or in [0, {C}), got {str(error).splitlines()[0]}"
        ) from error
    smooth = 0.0
    if focal.smoothing:
        classes = log_p if focal.weight is None else log_p * _per_class(focal.weight, log_p)
        smooth = classes.sum(1).mul_(-focal.smoothing / C)
    others = log_p.exp_().scatter_(1, index, 0.0)
    q = others.sum(1).clamp_(max=1.0)
    # -log(1 - q) has all digits where q is small and log_softmax has none; above, the reverse.
    ce = torch.where(q < 0.5, -torch.log1p(-q), ce)
    weight = 1.0 if focal.weight is None else focal.weight[labels]
    return Terms(
        labels=labels,
        ignored=ignored,
        cross=(1 - focal.smoothing) * weight * ce + smooth,
        power=torch.ones_like(q) if focal.gamma == 0 else q**focal.gamma,
        q=q,
        others=others,
        alpha=1.0 if focal.alpha is None else focal.alpha[labels],
        weight=weight,
    )


def block_gradient(
    terms: Terms,
    focal: Focal,
    dloss: torch.Tensor,
    dfactor: torch.Tensor | float,
    divisor: torch.Tensor | float,
    detach: bool,
) -> torch.Tensor:
    """Return the gradient of a block's logits, written into its `others`.

    Args:
        terms: of the block.
        focal: the options.
        dloss: [n, ...], the gradient of each pixel's loss, times divisor.
        dfactor: that of each pixel's factor times weight, times divisor.
        divisor: of both. q^gamma is divided first: where all of them are tiny, so is their sum,
            and its inverse may be out of range where each quotient is not.
        detach: whether q^gamma counts as a constant.
    """
    q, index = terms.q, terms.labels.unsqueeze(1)
    share = terms.power / divisor * terms.alpha
    plain = dloss * share * terms.weight * (1 - focal.smoothing)
    slope = torch.zeros_like(q)
    if focal.gamma and not detach:
        slope = focal.gamma * share * (1 - q) * (dloss * terms.cross + dfactor * terms.weight)
    inner = plain + torch.where(q > 0, slope / torch.where(q > 0, q, 1), 0)
    own = -(plain * q + slope)
    spread = None
    if focal.smoothing:
        C = terms.others.shape[1]
        spread = dloss * share * (focal.smoothing / C)
        tilt = spread * (C if focal.weight is None else focal.weight.sum())
        inner, own = inner + tilt, own + tilt * (1 - q)
    gradient = terms.others.mul_(inner.unsqueeze(1)).scatter_(1, index, own.unsqueeze(1))
    if spread is not None:
        spread = spread.unsqueeze(1)
        if focal.weight is not None:
            spread = spread * _per_class(focal.weight, gradient)
        gradient -= spread
    # Masked, not multiplied by 0: an ignored pixel may hold any logits, NaN included.
    return gradient.masked_fill_(terms.ignored.unsqueeze(1), 0.0)


def add_block(sums: torch.Tensor, terms: Terms) -> tuple[torch.Tensor, ...]:
    """Add a block's values to sums, float64 [1, 3] or by label [C, 3]; return the values."""
    values = terms.values()
    for i, row in enumerate(values):
        if len(sums) == 1:
            sums[0, i] += row.sum()
            continue
        for c in range(len(sums)):
            sums[c, i] += torch.where(terms.labels == c, row, 0).sum()
    return values


def by_label(scale: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Return a, b and divisor of each pixel, or of all, from scale [3, C] or [3, 1]."""
    return [row[labels] if len(row) > 1 else row for row in scale]


def count_block(counts: torch.Tensor, logits: torch.Tensor, terms: Terms) -> None:
    """Add a block's pixels to counts [C, C], label by row, prediction by column."""
    C = logits.shape[1]
    # The first of the largest; NaN is below all.
    prediction = torch.where(logits.isnan(), -math.inf, logits).argmax(1)
    cell = (terms.labels * C + prediction).masked_fill_(terms.ignored, C * C)
    counts += torch.bincount(cell.flatten(), minlength=C * C + 1)[: C * C].view(C, C)


def _per_class(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return weight.view(1, -1, *(1 for _ in like.shape[2:]))


def slices(sizes: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Yield index tuples that cover these sizes once, in order, each with at most limit values."""
    inner = math.prod(sizes[1:])
    if inner > limit:
        for i in range(sizes[0]):
            for rest in slices(sizes[1:], limit):
                yield slice(i, i + 1), *rest
        return
    step = limit // max(1, inner)
    for start in range(0, sizes[0] if inner else 0, step):
        yield slice(start, min(start + step, sizes[0])), *(slice(None) for _ in sizes[1:])
