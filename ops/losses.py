"""The focal losses as modules: their options once, then calls."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .focal_loss import (
    Factors,
    Reduction,
    softmax_focal_loss,
    softmax_focal_loss_reference,
)
from .fuse import Activation
from .linear_focal_loss import linear_focal_loss
from .sigmoid_focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_reference


class SoftmaxFocalLoss(torch.nn.Module):
    """`softmax_focal_loss` of logits [N, C, ...] and labels [N, ...].

    With gamma=0 it takes the place of `torch.nn.CrossEntropyLoss`. Factors a class are buffers, so
    that they move with the module; they are not in its state_dict, nor in torch's.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        *,
        alpha: Factors | None = None,
        weight: Sequence[float] | torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        detach_factor: bool = False,
    ):
        """Take the arguments of `softmax_focal_loss`."""
        super().__init__()
        self.gamma, self.ignore_index, self.reduction = gamma, ignore_index, reduction
        self.label_smoothing, self.detach_factor = label_smoothing, detach_factor
        self.register_buffer("alpha", _factors(alpha), persistent=False)
        self.register_buffer("weight", _factors(weight), persistent=False)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return softmax_focal_loss(logits, labels, **self._options)

    def composed(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss from differentiable torch operations, which store what ours don't."""
        return softmax_focal_loss_reference(logits, labels, **self._options)

    @property
    def _options(self) -> dict:
        names = "gamma", "alpha", "weight", "ignore_index"
        names += "label_smoothing", "reduction", "detach_factor"
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Return the exponent and the reduction."""
        return f"gamma={self.gamma}, reduction={self.reduction!r}"


class SigmoidFocalLoss(torch.nn.Module):
    """`sigmoid_focal_loss`, torchvision's, of inputs and targets of one shape."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"):
        """Take the options of `sigmoid_focal_loss`."""
        super().__init__()
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return sigmoid_focal_loss(inputs, targets, self.alpha, self.gamma, self.reduction)

    def composed(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss from differentiable torch operations, which store what ours don't."""
        loss = sigmoid_focal_loss_reference(inputs, targets, self.alpha, self.gamma)
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()

    def extra_repr(self) -> str:
        """Return the options."""
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


class LinearFocalLoss(torch.nn.Conv2d):
    """A network's last 1x1 convolution together with its focal loss: logits never exist.

    Parameters, initial values and `state_dict` are those of `torch.nn.Conv2d(F, C, 1)`, which it
    replaces; called without labels it is that convolution, for predictions.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        bias: bool = True,
        *,
        gamma: float = 2.0,
        alpha: Factors | None = None,
        class_weight: Sequence[float] | torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        detach_factor: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Take the convolution's sizes, and the options of `linear_focal_loss`."""
        super().__init__(in_channels, num_classes, 1, bias=bias, device=device, dtype=dtype)
        self.gamma, self.ignore_index, self.reduction = gamma, ignore_index, reduction
        self.label_smoothing, self.detach_factor = label_smoothing, detach_factor
        self.register_buffer("alpha", _factors(alpha, device), persistent=False)
        self.register_buffer("class_weight", _factors(class_weight, device), persistent=False)

    def forward(
        self,
        features: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        norm: torch.Tensor | None = None,
        act: Activation = "none",
        slope: float = 0.01,
    ) -> torch.Tensor:
        """Return the loss of features [N, F, H, W] and labels [N, H, W], or without labels logits.

        norm, act and slope, of the layer before, are as for `linear_focal_loss`, and need labels.

        Raises:
            ValueError: norm or act without labels.
        """
        if labels is None:
            if norm is not None or act != "none":
                raise ValueError("labels: want them where norm or act is given, got None")
            return super().forward(features)
        return linear_focal_loss(
            features,
            labels,
            self.weight,
            self.bias,
            norm=norm,
            act=act,
            slope=slope,
            gamma=self.gamma,
            alpha=self.alpha,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            detach_factor=self.detach_factor,
        )

    def composed(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss from differentiable torch operations, which store what ours don't."""
        return softmax_focal_loss_reference(
            F.conv2d(features, self.weight, self.bias),
            labels,
            gamma=self.gamma,
            alpha=self.alpha,
            weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            detach_factor=self.detach_factor,
        )

    def extra_repr(self) -> str:
        """Return the convolution's arguments, the exponent and the reduction."""
        return f"{super().extra_repr()}, gamma={self.gamma}, reduction={self.reduction!r}"


def _factors(
    factors: Factors | None, device: torch.device | str | None = None
) -> torch.Tensor | None:
    return None if factors is None else torch.as_tensor(factors, dtype=torch.float32, device=device)
