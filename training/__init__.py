"""Training whole images: module, data, callbacks, metrics and checkpoints.

The names below load their files on first use: Lightning takes seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig
    from .loss import SegmentationLoss
    from .metrics import SegmentationMetrics
    from .prediction import predict
    from .run import train

_HOMES = {  # public name: its file
    "SegmentationLoss": "loss",
    "SegmentationMetrics": "metrics",
    "TrainConfig": "config",
    "predict": "prediction",
    "train": "run",
}

__all__ = ["SegmentationLoss", "SegmentationMetrics", "TrainConfig", "predict", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
