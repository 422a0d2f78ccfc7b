"""Train convolutional networks on whole, huge images.

`import fullres` costs an import of torch and no more: a room is loaded when one of its names is
first used, and Triton when a kernel first runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import bench, engine, events, functional, kernels, models, nn, ops, training
    from .engine import Plan, convert, max_batch, max_image, meter, plan, report, revert
    from .models import resnet18, resnet34, resnet50, resnet101, resnet152, uresnet

__version__ = "0.1.0"

_ROOMS = (
    "bench",
    "engine",
    "events",
    "functional",
    "kernels",
    "models",
    "nn",
    "ops",
    "training",
)
_HOMES = {  # public name: its room
    "Plan": "engine",
    "convert": "engine",
    "max_batch": "engine",
    "max_image": "engine",
    "meter": "engine",
    "plan": "engine",
    "report": "engine",
    "revert": "engine",
    "resnet18": "models",
    "resnet34": "models",
    "resnet50": "models",
    "resnet101": "models",
    "resnet152": "models",
    "uresnet": "models",
}

__all__ = [
    "Plan",
    "bench",
    "convert",
    "engine",
    "events",
    "functional",
    "kernels",
    "max_batch",
    "max_image",
    "meter",
    "models",
    "nn",
    "ops",
    "plan",
    "report",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "revert",
    "training",
    "uresnet",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
