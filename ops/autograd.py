"""What the autograd functions of all operations share."""

from collections.abc import Callable
from functools import wraps

import torch


def first_order(backward: Callable) -> Callable:
    """Return the `backward` of an autograd.Function, made to raise under create_graph=True.

    torch's once_differentiable raises only where the incoming gradient requires one itself. Where
    it does not, as below any scalar loss, a gradient penalty's own term would silently be lost.
    """

    @wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():  # only create_graph=True runs a backward so
            # torch's own name for what a custom op registers begins with the prefix.
            name = type(ctx).__name__.removeprefix("GeneratedBackwardFor").removesuffix("Backward")
            raise RuntimeError(
                f"{name.lstrip('_')} has no second "
                "derivatives: backward and grad must run with create_graph=False"
            )
        return backward(ctx, *gradients)

    return checked
