"""The focal loss of independent binary labels, with torchvision's signature and values."""

import math

import torch
import torch.nn.functional as F

from .autograd import first_order
from .focal_blocks import BLOCK_ELEMENTS, accumulator_dtype, slices
from .focal_loss import check_reduction
from .geometry import want
from .pixels import pixels_of

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sigmoid_focal_loss(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
) -> torch.Tensor:
    """Return the focal loss alpha_t (1 - p_t)^gamma ce of each input's sigmoid, reduced.

    `torchvision.ops.sigmoid_focal_loss`: its arguments, their order and their defaults; its values,
    but in float32 for half-precision inputs, and 0 where the mean is over nothing. Lin et al.,
    "Focal Loss for Dense Object Detection", ICCV 2017, equation 5.

    Saves for backward: inputs and targets as they were given. No probabilities, cross entropies or
    factors are made of them. Sums have one order. With create_graph=True backward raises
    RuntimeError, as there are no second derivatives.

    Args:
        inputs: any shape and strides, float16, bfloat16, float32 or float64.
        targets: as inputs; floating, integer or boolean; 0, 1, or between. A constant.
        alpha: weight of 1 against 0 in [0, 1], or negative for none.
        gamma: focusing exponent, >= 0.
        reduction: "none", "mean" (over all values) or "sum".

    Returns:
        A scalar, or for "none" the losses as inputs; float32, and float64 for float64 inputs.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not the above.
    """
    check_reduction(reduction, ("none", "mean", "sum"))
    _check(inputs, targets, alpha, gamma)
    want(not targets.requires_grad, "targets", "a constant", "a tensor that requires a gradient")
    loss = _SigmoidFocalLoss.apply(inputs, targets, float(alpha), float(gamma), reduction == "none")
    return loss / max(1, inputs.numel()) if reduction == "mean" else loss


def sigmoid_focal_loss_reference(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
) -> torch.Tensor:
    """Return the losses of `sigmoid_focal_loss`, from differentiable torch operations."""
    x = inputs.to(accumulator_dtype(inputs))
    t = targets.to(x.dtype)
    p = x.sigmoid()
    q = p * (1 - t) + (1 - p) * t
    loss = F.binary_cross_entropy_with_logits(x, t, reduction="none") * q**gamma
    return loss * (alpha * t + (1 - alpha) * (1 - t)) if alpha >= 0 else loss


class _SigmoidFocalLoss(torch.autograd.Function):
    """The losses, or their sum."""

    @staticmethod
    def forward(ctx, inputs, targets, alpha, gamma, pixels):
        total, loss = sigmoid_forward(inputs, targets, alpha, gamma, pixels)
        ctx.save_for_backward(inputs, targets)
        ctx.options = alpha, gamma
        return loss if pixels else total.to(accumulator_dtype(inputs))

    @staticmethod
    @first_order
    def backward(ctx, dloss):
        return sigmoid_backward(*ctx.saved_tensors, *ctx.options, dloss), None, None, None, None


@torch.library.custom_op("fullres::sigmoid_focal_loss", mutates_args=(), device_types="cpu")
def sigmoid_forward(
    inputs: torch.Tensor, targets: torch.Tensor, alpha: float, gamma: float, pixels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of all losses, a float64 scalar, and if pixels the losses, else [0].

    Arguments and errors are those of `sigmoid_focal_loss`; there is no autograd.
    """
    _check(inputs, targets, alpha, gamma)
    return _forward_in_blocks(inputs, targets, alpha, gamma, pixels)


@sigmoid_forward.register_kernel("cuda")
def sigmoid_forward_triton(
    inputs: torch.Tensor, targets: torch.Tensor, alpha: float, gamma: float, pixels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sigmoid_forward by Triton: on a GPU, or interpreted on the CPU."""
    _check(inputs, targets, alpha, gamma)
    total, loss = _empty_results(inputs, pixels)
    tensors = [inputs, targets, *([loss] if pixels else [])]
    lie = pixels_of(*tensors, channels=(None,) * len(tensors))
    if lie is None or inputs.dtype == torch.float64:
        return _forward_in_blocks(inputs, targets, alpha, gamma, pixels)
    if not lie.count:
        return total.zero_(), loss
    from ..kernels import focal_loss, sigmoid_focal_loss  # here: importing ops needs no triton
    from .norm import merge_sums_triton

    T = focal_loss.programs(lie.count)
    parts = torch.empty(T, 1, 1, dtype=torch.float64, device=inputs.device)
    strides = [step for steps in (*lie.strides, (0, 0, 0))[:3] for step in steps]
    with torch.cuda.device_of(inputs):  # triton launches on the current device
        sigmoid_focal_loss.sigmoid_focal_loss_kernel[(T,)](
            inputs, _numbers(targets), loss if pixels else None, parts,
            lie.N, lie.H, lie.P, *strides, alpha, gamma,
            POWER=int(gamma) if gamma in (0, 1, 2) else -1, ALPHA=alpha >= 0,
        )  # fmt: skip
    return merge_sums_triton(parts).view(()), loss


@sigmoid_forward.register_fake
def _(inputs, targets, alpha, gamma, pixels):
    _check(inputs, targets, alpha, gamma)
    return _empty_results(inputs, pixels)


@torch.library.custom_op(
    "fullres::sigmoid_focal_loss_backward", mutates_args=(), device_types="cpu"
)
def sigmoid_backward(
    inputs: torch.Tensor, targets: torch.Tensor, alpha: float, gamma: float, dloss: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of inputs, of their dtype and memory format.

    dloss is that of the sum, a scalar, or of each loss, in the accumulator's dtype.
    """
    _check(inputs, targets, alpha, gamma, dloss)
    return _backward_in_blocks(inputs, targets, alpha, gamma, dloss)


@sigmoid_backward.register_kernel("cuda")
def sigmoid_backward_triton(
    inputs: torch.Tensor, targets: torch.Tensor, alpha: float, gamma: float, dloss: torch.Tensor
) -> torch.Tensor:
    """Return sigmoid_backward by Triton."""
    _check(inputs, targets, alpha, gamma, dloss)
    dinputs = torch.empty_like(inputs)
    scalar = dloss.dim() == 0
    tensors = [inputs, targets, dinputs, *([] if scalar else [dloss])]
    lie = pixels_of(*tensors, channels=(None,) * len(tensors))
    if lie is None or inputs.dtype == torch.float64:
        return _backward_in_blocks(inputs, targets, alpha, gamma, dloss)
    if lie.count:
        from ..kernels import focal_loss, sigmoid_focal_loss

        strides = [step for steps in (*lie.strides, (0, 0, 0))[:4] for step in steps]
        with torch.cuda.device_of(inputs):  # triton launches on the current device
            sigmoid_focal_loss.sigmoid_focal_loss_backward_kernel[
                (focal_loss.programs(lie.count),)
            ](
                inputs, _numbers(targets), dloss, dinputs,
                lie.N, lie.H, lie.P, *strides, alpha, gamma,
                POWER=int(gamma) if gamma in (0, 1, 2) else -1, ALPHA=alpha >= 0, SCALAR=scalar,
            )  # fmt: skip
    return dinputs


@sigmoid_backward.register_fake
def _(inputs, targets, alpha, gamma, dloss):
    _check(inputs, targets, alpha, gamma, dloss)
    return torch.empty_like(inputs)


def _forward_in_blocks(inputs, targets, alpha, gamma, pixels):
    total, loss = _empty_results(inputs, pixels)
    total.zero_()
    for block in slices(inputs.shape, BLOCK_ELEMENTS) if inputs.dim() else [()]:
        losses = _losses(inputs[block], targets[block], alpha, gamma)
        total += losses.sum()
        if pixels:
            loss[block] = losses
    return total, loss


def _backward_in_blocks(inputs, targets, alpha, gamma, dloss):
    dinputs = torch.empty_like(inputs)
    for block in slices(inputs.shape, BLOCK_ELEMENTS) if inputs.dim() else [()]:
        x, t, p, r, q, ce = _terms(inputs[block], targets[block])
        slope = p * (1 - t) - r * t
        if gamma:
            ratio = torch.where(q > 0, p * r / torch.where(q > 0, q, 1), 0)
            slope += gamma * ce * (1 - 2 * t) * ratio
        factor = dloss[block] if dloss.dim() else dloss
        dinputs[block] = factor * _balance(t, alpha) * q**gamma * slope
    return dinputs


def _losses(inputs, targets, alpha, gamma):
    _, t, _, _, q, ce = _terms(inputs, targets)
    return _balance(t, alpha) * q**gamma * ce


def _terms(inputs, targets):
    x = inputs.to(accumulator_dtype(inputs))
    t = targets.to(x.dtype)
    p, r = x.sigmoid(), (-x).sigmoid()
    # Not torch's binary_cross_entropy_with_logits, which loses digits where x is far below 0.
    ce = torch.where(x < 0, 0, x) - x * t + torch.log1p(torch.exp(-x.abs()))
    return x, t, p, r, p * (1 - t) + r * t, ce


def _balance(t: torch.Tensor, alpha: float) -> torch.Tensor | float:
    return alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1.0


def _numbers(targets: torch.Tensor) -> torch.Tensor:
    return targets.view(torch.uint8) if targets.dtype == torch.bool else targets


def _empty_results(inputs, pixels):
    dtype = accumulator_dtype(inputs)
    loss = torch.empty_like(inputs, dtype=dtype) if pixels else inputs.new_empty(0, dtype=dtype)
    return inputs.new_empty((), dtype=torch.float64), loss


def _check(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    alpha: float,
    gamma: float,
    dloss: torch.Tensor | None = None,
) -> None:
    """Raise ValueError, naming argument, wanted and given, for what no path computes."""
    dtypes = "float16, bfloat16, float32 or float64"
    want(inputs.dtype in _INPUT_DTYPES, "inputs", dtypes, inputs.dtype)
    shape = list(inputs.shape)
    want(list(targets.shape) == shape, "targets", str(shape), list(targets.shape))
    want(not targets.is_complex(), "targets", "real numbers", targets.dtype)
    want(targets.device == inputs.device, "targets", f"device {inputs.device}", targets.device)
    want(-math.inf < alpha <= 1, "alpha", "a number <= 1", alpha)
    want(0 <= gamma < math.inf, "gamma", "a finite number >= 0", gamma)
    if dloss is not None:
        dtype = accumulator_dtype(inputs)
        holds = list(dloss.shape) in ([], shape) and dloss.dtype == dtype
        want(holds, "dloss", f"{shape} or a scalar of {dtype}", f"{list(dloss.shape)}")
