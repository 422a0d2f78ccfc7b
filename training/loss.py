"""The segmentation losses: weighted pixel cross entropies, one mean a plane, exact over ranks.

For plane i over the pixels of the whole global batch, with p the softmax over the classes, y the
label and ce = -log p_y:

    loss = sum_i  sum(w * ce) / sum(w)         w, by scheme:
      focal  (1 - p_y)^2 / 3, a constant: no gradient flows through it
      light  1 for background, 1.5 for cosmic, 10 for neutrino
      even   1 / (number of the plane's pixels with label y)
      none   1
      lin    sum((1 - p_y)^gamma * ce) / number of pixels, the gradient through all factors
             (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4)

Numerators and denominators of all planes travel between ranks in one all_reduce.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..ops.autograd import first_order
from ..ops.focal_blocks import accumulator_dtype
from ..ops.focal_loss import focal_loss_backward, focal_loss_forward

SCHEMES = ("focal", "light", "even", "none", "lin")
CLASSES = 3  # background, cosmic, neutrino
NOTHING_IGNORED = -(2**63)  # the one integer that stands for no label: all others are looked at
LIGHT_WEIGHTS = (1.0, 1.5, 10.0)


class SegmentationLoss(torch.nn.Module):
    """The loss of a batch of labelled planes, the same for one process and for many.

    Under an initialised `torch.distributed` with more than one rank in `process_group`, the sums
    over pixels and the class frequencies are those of all ranks together. A rank's value is
    world_size * (its own share of the global loss): the *mean* over ranks of the values is the
    loss of the global batch, and the mean over ranks of the gradients, which is what
    DistributedDataParallel takes, is its gradient. Both are exact also where ranks hold different
    numbers of images, or none. For the log, `global_value` holds the global loss itself.

    Each forward is one all_reduce on every rank, in training and in evaluation, with or without
    gradients; backward has none. So all ranks must call forward equally often; a rank without
    images left passes an empty batch.

    With gradients accumulated over micro-batches, each micro-batch is normalised by its own
    denominators: the accumulated gradient is that of the mean of the micro-batch losses and not
    of the loss of their union. The two agree for "none" and "lin" with micro-batches of one size;
    elsewhere a micro-batch with few hard or rare pixels weighs each of them more.

    Saves for backward: logits and labels as given, which the caller holds anyway, and a few
    scalars. No pass makes anything of their size but the gradient: `fullres.ops.focal_loss`.
    Backward with create_graph=True raises RuntimeError: there are no second derivatives.

    Attributes:
        confusion: the last forward's counts, int64 [planes, 3, 3], label by row, prediction by
            column, of this rank's batch, taken while the logits are read anyway; None unless
            count=True. The prediction is the first of the largest logits, NaN being below all.
        global_value: the last forward's loss of the global batch, a detached scalar that is equal
            on all ranks; None before the first forward. Reading it needs no communication. With
            synchronize=False each rank has that of its own batch.
    """

    def __init__(
        self,
        scheme: str = "focal",
        *,
        gamma: float = 2.0,
        process_group: dist.ProcessGroup | None = None,
        synchronize: bool = True,
        count: bool = False,
    ):
        """Make the loss of one scheme.

        Args:
            scheme: one of `SCHEMES`.
            gamma: focusing exponent >= 0 of "lin"; the other schemes have none to set.
            process_group: the ranks that share a global batch, those over which gradients are
                averaged. None is all ranks.
            synchronize: False for the loss of this rank's batch alone, without communication, as
                for validation with unequal numbers of batches.
            count: whether each forward counts predictions into `confusion`.

        Raises:
            ValueError: unknown scheme, or gamma negative, not finite, or set for another scheme.
        """
        super().__init__()
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
        if not 0 <= gamma < float("inf") or (gamma != 2.0 and scheme != "lin"):
            raise ValueError(
                f'gamma must be finite, >= 0, and left at 2 unless scheme is "lin"; got {gamma} '
                f"with scheme {scheme!r}"
            )
        self.scheme = scheme
        self.gamma = float(gamma)
        self.process_group = process_group
        self.synchronize = synchronize
        self.count = count
        self.global_value: torch.Tensor | None = None
        self.confusion: torch.Tensor | None = None

    def forward(self, logits: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Return this rank's loss, a scalar, float32 or for float64 logits float64.

        A plane without weight, where the batch is empty or each p_y has rounded to 1 so far that
        w underflows, contributes 0 with zero gradients.

        Args:
            logits: one [N, 3, H, W] a plane: float16, bfloat16, float32 or float64, any memory
                format; all of one shape, dtype and device.
            labels: [N, planes, H, W], uint8, int32 or int64: 0 background, 1 cosmic, 2 neutrino.

        Raises:
            ValueError: a shape, dtype or device is not the above.
            IndexError: a label on the CPU is not 0, 1 or 2. On an accelerator the loss is NaN.
        """
        _check(logits, labels)
        world = _world_size(self.process_group) if self.synchronize else 1
        value, self.global_value, confusion = _PlanesLoss.apply(
            self.scheme, self.gamma, self.process_group, world, self.count, labels, *logits
        )
        self.confusion = confusion if self.count else None
        return value

    def extra_repr(self) -> str:
        """Return the arguments that are not defaults."""
        gamma = f", gamma={self.gamma}" if self.scheme == "lin" else ""
        return f"scheme={self.scheme!r}{gamma}"


class _PlanesLoss(torch.autograd.Function):
    """The planes' losses, as (world_size * this rank's share, global loss, counts)."""

    @staticmethod
    def forward(ctx, scheme, gamma, process_group, world, count, labels, *logits):
        # focal's third cancels out of its quotient.
        power = {"focal": 2.0, "lin": gamma}.get(scheme, 0.0)
        ctx.options = power, 0.0, NOTHING_IGNORED, scheme == "focal"
        found = [
            focal_loss_forward(x, labels[:, i], None, None, *ctx.options[:3], True, False, count)
            for i, x in enumerate(logits)
        ]
        sums = torch.stack([s for s, _, _ in found])
        counts = torch.stack([c for _, _, c in found])
        local = sums.select(-1, 0)
        if world > 1:
            local = local.clone()
            dist.all_reduce(sums, group=process_group)
        numerator, weight, pixels = sums.unbind(-1)  # each [planes, classes]
        class_weight = _class_weight(scheme, pixels)
        # With pixel weights the class sums hold them already.
        weight = (weight if scheme == "focal" else class_weight * pixels).sum(1)
        weight = weight.masked_fill(weight == 0, 1.0)
        # Softmax is taken again in backward, so the caller's own tensors are all it needs.
        ctx.save_for_backward(labels, weight, class_weight, *logits)
        ctx.world = world
        dtype = accumulator_dtype(logits[0])
        value = world * ((class_weight * local).sum(1) / weight).sum()
        global_value = ((class_weight * numerator).sum(1) / weight).sum()
        value, global_value = value.to(dtype), global_value.to(dtype)
        ctx.mark_non_differentiable(global_value, counts)
        return value, global_value, counts

    @staticmethod
    @first_order
    def backward(ctx, dvalue, *_):
        labels, weight, class_weight, *logits = ctx.saved_tensors
        dlogits = []
        for i, x in enumerate(logits):
            if not ctx.needs_input_grad[6 + i]:
                dlogits.append(None)
                continue
            # Apart, for w / sum(w) <= 1, where dvalue / sum(w) may overflow for tiny sums.
            a = dvalue * ctx.world * class_weight[i]
            scale = torch.stack([a, torch.zeros_like(a), weight[i].expand_as(a)])
            scale = scale.to(accumulator_dtype(x))
            dlogits.append(
                focal_loss_backward(x, labels[:, i], None, None, *ctx.options, scale, None)
            )
        return None, None, None, None, None, None, *dlogits


def _class_weight(scheme: str, count: torch.Tensor) -> torch.Tensor:
    """Return the weight of each class [planes, classes], given the number of its pixels."""
    if scheme == "light":
        return count.new_tensor(LIGHT_WEIGHTS).expand_as(count)
    if scheme == "even":  # an absent class has no pixel to weigh: 0, where 1 / 0 would be inf
        return torch.where(count > 0, 1 / count.clamp(min=1), 0)
    return torch.ones_like(count)


def _world_size(process_group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(process_group)


def _check(logits: Sequence[torch.Tensor], labels: torch.Tensor) -> None:
    if isinstance(logits, torch.Tensor) or not logits:
        raise ValueError(
            "logits must be a sequence of [N, 3, H, W] tensors, one a plane; got "
            f"{'a tensor ' + str(list(logits.shape)) if len(logits) else 'none'}"
        )
    first = logits[0]
    if (
        any(x.ndim != 4 or x.shape != first.shape for x in logits)
        or first.shape[1] != CLASSES
        or any(x.dtype != first.dtype or x.device != first.device for x in logits)
        or not first.is_floating_point()
    ):
        raise ValueError(
            "logits must be floating-point [N, 3, H, W] of one shape, dtype and device; got "
            + ", ".join(f"{list(x.shape)} {x.dtype} on {x.device}" for x in logits)
        )
    wanted = [first.shape[0], len(logits), *first.shape[2:]]
    if list(labels.shape) != wanted or labels.dtype not in (torch.uint8, torch.int32, torch.int64):
        raise ValueError(
            f"labels must be {wanted} (N, planes, H, W) of uint8, int32 or int64; "
            f"got {list(labels.shape)} of {labels.dtype}"
        )
    if labels.device != first.device:
        raise ValueError(f"labels must be on {first.device} like logits; got {labels.device}")
