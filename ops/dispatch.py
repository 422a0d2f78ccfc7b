"""Which implementation a convolution takes on a GPU: the one place that decides.

Ours, unless a table says that something else was measured faster at that shape on that card. A
table is CSV, a line a shape and pass, made to be read:

    pass,dtype,channels,outputs,kernel,stride,dilation,groups,triton_ms,otherwise_ms
    forward,bfloat16,128,128,3x3,1x1,1x1,1,0.412,0.371
    backward,bfloat16,16,16,3x3,1x1,1x1,1,2.21,3.05

triton_ms is our own kernel's time. otherwise_ms is that of what takes its place: for forward, dgrad
and wgrad cuDNN with our passes of ops/pointwise.py around it, the same results; for backward, where
our kernel makes both gradients in one pass, dgrad and wgrad one after the other, each as its own
line decides.

`fullres bench kernels` writes the table of the card that it runs on, named by `table_name`, beside
its other results. Copied into ops/tables/ it is the card's own from then on. FULLRES_DISPATCH
overrides that: "triton" or "cudnn" for every call, or the path of another table. `prefer` does so
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

Implementation = Literal["triton", "cudnn", "two_pass"]
VARIABLE = "FULLRES_DISPATCH"
TABLES = Path(__file__).parent / "tables"

_CHOICES = ("triton", "cudnn")  # of the environment and of code
_PAIRS = ("kernel", "stride", "dilation")
_TIMES = ("triton_ms", "otherwise_ms")
_preferred: ContextVar[str | None] = ContextVar("preferred", default=None)


@dataclass(frozen=True)
class Shape:
    """What a table tells convolutions apart by; sizes of images are not among it."""

    pass_: Literal["forward", "dgrad", "wgrad", "backward"]
    dtype: torch.dtype
    channels: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self):
        """Take any sequence for a pair: operators are handed lists."""
        for name in _PAIRS:
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def words(self) -> tuple[str, ...]:
        """Return the fields as a table holds them."""
        return tuple(
            "x".join(map(str, v)) if isinstance(v, tuple) else str(v).removeprefix("torch.")
            for v in astuple(self)
        )


_COLUMNS = (*(field.name.removesuffix("_") for field in fields(Shape)), *_TIMES)


def implementation(shape: Shape, device: torch.device) -> Implementation:
    """Return what a convolution of this shape runs on this device.

    "triton" is our kernel of that pass. Otherwise "cudnn" or, of the pass "backward", "two_pass".

    Raises:
        ValueError: FULLRES_DISPATCH is neither an implementation nor a readable table.
    """
    choice = _preferred.get() or os.environ.get(VARIABLE, "")
    if choice not in _CHOICES:
        slower = _slower(Path(choice)) if choice else _slower_on(_card(device))
        choice = "cudnn" if shape in slower else "triton"
    return "two_pass" if choice == "cudnn" and shape.pass_ == "backward" else choice


@contextmanager
def prefer(choice: Literal["triton", "cudnn"]) -> Iterator[None]:
    """Run every convolution inside, of this thread or task, by this implementation.

    Raises:
        ValueError: for another name.
    """
    if choice not in _CHOICES:
        raise ValueError(f"choice: want one of {', '.join(_CHOICES)}, got {choice!r}")
    token = _preferred.set(choice)
    try:
        yield
    finally:
        _preferred.reset(token)


def write_table(path: Path, times: Iterable[tuple[Shape, float, float]]) -> None:
    """Write a table of (shape, milliseconds of ours, milliseconds of what takes its place)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(_COLUMNS)
        for shape, triton_ms, otherwise_ms in times:
            rows.writerow([*shape.words(), f"{triton_ms:.4g}", f"{otherwise_ms:.4g}"])
    _slower.cache_clear()  # what was read of an earlier table of that name
    _slower_on.cache_clear()


def read_table(path: Path) -> dict[Shape, tuple[float, float]]:
    """Return a table's times by shape, as `write_table` was given them, to four digits.

    Raises:
        ValueError: there is no such file, or it is no table.
    """
    try:
        with open(path, newline="") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
                raise ValueError(f"no column {', '.join(missing)}")
            return {_shape(row): tuple(float(row[name]) for name in _TIMES) for row in rows}
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        wanted = ",".join(_COLUMNS)
        raise ValueError(
            f"want a table with the columns {wanted}; got {path} ({type(error).__name__}: {error})"
        ) from error


def table_name(card: str) -> str:
    """Return the name of a card's table: "NVIDIA H200" has nvidia-h200.csv."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".csv"


def _shape(row: dict[str, str]) -> Shape:
    pairs = {name: tuple(map(int, row[name].split("x"))) for name in _PAIRS}
    numbers = {name: int(row[name]) for name in ("channels", "outputs", "groups")}
    return Shape(row["pass"], getattr(torch, row["dtype"]), **numbers, **pairs)


@functools.cache
def _slower(path: Path) -> frozenset[Shape]:
    """Return the shapes at which a table says that ours is slower."""
    try:
        times = read_table(path)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: want {', '.join(_CHOICES)} or a table; {error}") from error
    return frozenset(shape for shape, (ours, otherwise) in times.items() if ours > otherwise)


@functools.cache
def _slower_on(card: str) -> frozenset[Shape]:
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
