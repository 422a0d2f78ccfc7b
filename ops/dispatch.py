"""Which implementation a convolution takes on a GPU: the one place that decides.

Ours, unless a table says that cuDNN was measured faster at that shape on that card. A table is CSV,
a line a shape, written by the kernel benchmark and made to be read:

    pass,dtype,channels,outputs,kernel,stride,dilation,groups,triton_ms,cudnn_ms
    forward,bfloat16,128,128,3x3,1x1,1x1,1,0.412,0.371

Tables of cards that we have measured lie in ops/tables/, named after the card. FULLRES_DISPATCH
overrides them: "triton" or "cudnn" for every call, or the path of another table. `prefer` does so
for a stretch of code. The decision depends on nothing else, so a run repeats itself.
"""

import csv
import functools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

Implementation = Literal["triton", "cudnn"]
VARIABLE = "FULLRES_DISPATCH"
TABLES = Path(__file__).parent / "tables"

_IMPLEMENTATIONS = ("triton", "cudnn")
_TIMES = ("triton_ms", "cudnn_ms")
_preferred: ContextVar[Implementation | None] = ContextVar("preferred", default=None)


@dataclass(frozen=True)
class Shape:
    """What a table tells convolutions apart by; sizes of images are not among it."""

    pass_: Literal["forward", "dgrad", "wgrad"]
    dtype: torch.dtype
    channels: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def words(self) -> tuple[str, ...]:
        """Return the fields as a table holds them."""
        return tuple(
            "x".join(map(str, v)) if isinstance(v, tuple) else str(v).removeprefix("torch.")
            for v in astuple(self)
        )


_COLUMNS = (*(field.name.removesuffix("_") for field in fields(Shape)), *_TIMES)


def implementation(shape: Shape, device: torch.device) -> Implementation:
    """Return what a convolution of this shape runs on this device.

    Raises:
        ValueError: FULLRES_DISPATCH is neither an implementation nor a readable table.
    """
    if (preferred := _preferred.get()) is not None:
        return preferred
    setting = os.environ.get(VARIABLE, "")
    if setting in _IMPLEMENTATIONS:
        return setting
    slower = _slower(Path(setting)) if setting else _slower_on(_card(device))
    return "cudnn" if shape.words() in slower else "triton"


@contextmanager
def prefer(choice: Implementation) -> Iterator[None]:
    """Run every convolution inside, of this thread or task, by this implementation.

    Raises:
        ValueError: for another name.
    """
    if choice not in _IMPLEMENTATIONS:
        raise ValueError(f"choice: want one of {', '.join(_IMPLEMENTATIONS)}, got {choice!r}")
    token = _preferred.set(choice)
    try:
        yield
    finally:
        _preferred.reset(token)


def write_table(path: Path, times: Iterable[tuple[Shape, float, float]]) -> None:
    """Write a table of (shape, milliseconds of ours, milliseconds of cuDNN)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(_COLUMNS)
        for shape, triton_ms, cudnn_ms in times:
            rows.writerow([*shape.words(), f"{triton_ms:.4g}", f"{cudnn_ms:.4g}"])


def table_name(card: str) -> str:
    """Return the name of a card's table: "NVIDIA H200" has nvidia-h200.csv."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".csv"


@functools.cache
def _slower(path: Path) -> frozenset[tuple[str, ...]]:
    """Return the shapes at which a table says that ours is slower."""
    try:
        with open(path, newline="") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
                raise ValueError(f"no column {', '.join(missing)}")
            rows = list(rows)
        names = _COLUMNS[: -len(_TIMES)]
        return frozenset(
            tuple(row[name] for name in names)
            for row in rows
            if float(row["triton_ms"]) > float(row["cudnn_ms"])
        )
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{VARIABLE}: want triton, cudnn or a table with the columns {','.join(_COLUMNS)}; "
            f"got {path} ({type(error).__name__}: {error})"
        ) from error


@functools.cache
def _slower_on(card: str) -> frozenset[tuple[str, ...]]:
    path = TABLES / table_name(card)
    return _slower(path) if path.exists() else frozenset()


@functools.cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tf32_allowed() -> bool:
    """Return whether float32 products may round their factors to TF32: where torch says so twice.

    `torch.backends.cudnn.allow_tf32`, on by default, speaks for convolutions and
    `torch.set_float32_matmul_precision` for products; TF32 must never come by default.
    """
    # These two follow both settings, which can't be read once somebody sets the precision of
    # convolutions alone.
    return (
        torch.backends.cudnn.conv.fp32_precision == "tf32"
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
        and torch.version.hip is None  # Triton multiplies float32 on AMD in IEEE arithmetic only
    )
