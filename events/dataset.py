"""What one event is, and what every data set of events does to it: crop, scale, flip, densify.

Axes, everywhere in this room. An image is [3, H, W]: plane, row, column.

    row     the drift axis, shared by the planes: one row is the same slice of the detector, and
            of time, in all three. The upper half of the rows is one drift volume, the lower half
            the other; the cathode lies between them, an anode at either end.
    column  the wire, different for each plane, since the planes' wires run at +60, -60 and 0
            degrees to the vertical.
"""

import operator
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

PLANES = 3
CLASSES = ("background", "cosmic", "neutrino")  # a label is an index into these
FILE_SIZE = (1280, 2048)
SIZE = (1260, 2048)  # rows 0 to 1259 of the file's 1280, as the published networks are trained


class Event(TypedDict):
    """One event, or, from a DataLoader's default collation, a batch of them.

    Attributes:
        image: Charge, float32 [3, H, W] (a batch: [N, 3, H, W]); absent with `charge=False`.
        labels: 0 background, 1 cosmic, 2 neutrino, uint8 like image; absent with `labels=False`.
        index: The event's place in its data set, an int (a batch: int64 [N]).
        event_id: Run, subrun and event, int64 [3] (a batch: [N, 3]); -1 where unknown.
    """

    image: NotRequired[torch.Tensor]
    labels: NotRequired[torch.Tensor]
    index: int | torch.Tensor
    event_id: torch.Tensor


class Pixels(NamedTuple):
    """One event's occupied pixels, each at most once; all arrays are [N] over all planes."""

    plane: np.ndarray  # int64, 0 to 2
    row: np.ndarray  # int64
    column: np.ndarray  # int64
    charge: np.ndarray | None  # float32
    label: np.ndarray | None  # uint8
    event_id: tuple[int, int, int]  # run, subrun, event


def flips(seed: int, epoch: int, index: int) -> tuple[bool, bool]:
    """Return whether to reverse the rows and whether to reverse the columns of one event.

    Each is a fair coin that depends on nothing but these three non-negative integers, so a
    training that resumes in the middle of an epoch sees what it would have seen.
    """
    bits = int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])
    return bool(bits & 1), bool(bits & 2)


def flip(event: Event, seed: int, epoch: int) -> Event:
    """Return one event (not a batch) with its image and labels flipped as `flips` says.

    All planes flip together, or they would no longer show one event. Reversed rows are the
    reflection in the cathode: the time axis is one for all planes. Reversed columns are half a
    turn about the drift axis, which reverses the wires of every plane at once, whatever their
    angle.
    """
    reversals = flips(seed, epoch, event["index"])
    axes = [axis for axis, turn in zip((-2, -1), reversals, strict=True) if turn]
    return {k: v.flip(axes) if k in ("image", "labels") else v for k, v in event.items()}


class EventDataset(Dataset[Event]):
    """A map-style data set of events; a subclass provides `__len__` and `pixels`.

    Args:
        size: Rows and columns of the images: the first of the detector's, from (0, 0).
        charge: Whether items have an `image`.
        labels: Whether items have `labels`; ask for False where there is no truth.
        clip: Largest charge, in the file's unit; larger ones become this. None keeps all.
        log_unit: With a number u, the image is log(1 + q / u) of the (clipped) charge q, and
            -log(1 - q / u) of a negative one. None keeps q.
        flip_seed: With an integer, items are flipped at random as `flips(flip_seed, epoch,
            index)` says, where epoch is what `set_epoch` set last, first 0. None never flips.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int] = SIZE,
        charge: bool = True,
        labels: bool = True,
        clip: float | None = None,
        log_unit: float | None = None,
        flip_seed: int | None = None,
    ):
        """Take the options; the class describes them."""
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: want positive (rows, columns), got {size}")
        if not (charge or labels):
            raise ValueError("charge, labels: want at least one of them, got neither")
        for name, value in (("clip", clip), ("log_unit", log_unit)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: want a positive number or None, got {value}")
        if flip_seed is not None and flip_seed < 0:
            raise ValueError(f"flip_seed: want a non-negative integer or None, got {flip_seed}")
        self.size = (int(size[0]), int(size[1]))
        self.charge, self.labels = charge, labels
        self.clip, self.log_unit, self.flip_seed = clip, log_unit, flip_seed
        # Shared memory: a DataLoader's persistent workers must see the epoch change too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose flips the items have."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the flips of an epoch, here and in workers; call it between epochs."""
        if epoch < 0:
            raise ValueError(f"epoch: want a non-negative integer, got {epoch}")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Return the number of events."""
        raise NotImplementedError

    def pixels(self, index: int) -> Pixels:
        """Return the occupied pixels of event index, 0 <= index < len(self), as they are stored."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Event:
        """Return an event; a negative index counts from the end.

        Raises:
            IndexError: There is no such event.
        """
        count = len(self)
        position = operator.index(index)
        if not -count <= position < count:
            raise IndexError(f"index: want -{count} <= index < {count}, got {index}")
        position %= count
        pixels = self.pixels(position)
        rows, columns = self.size
        row, column = pixels.row, pixels.column
        inside = (row < rows) & (column < columns)
        if self.flip_seed is not None:
            reverse_rows, reverse_columns = flips(self.flip_seed, self.epoch, position)
            row = rows - 1 - row if reverse_rows else row
            column = columns - 1 - column if reverse_columns else column
        where = ((pixels.plane * rows + row) * columns + column)[inside]

        event: Event = {"index": position, "event_id": torch.tensor(pixels.event_id)}
        if self.charge:
            event["image"] = self._dense(where, self._scaled(pixels.charge[inside]))
        if self.labels:
            event["labels"] = self._dense(where, pixels.label[inside])
        return event

    def _scaled(self, charge: np.ndarray) -> np.ndarray:
        if self.clip is not None:
            charge = np.minimum(charge, np.float32(self.clip))
        if self.log_unit is not None:
            charge = np.copysign(np.log1p(np.abs(charge) / np.float32(self.log_unit)), charge)
        return charge

    def _dense(self, where: np.ndarray, value: np.ndarray) -> torch.Tensor:
        dense = np.zeros((PLANES, *self.size), value.dtype)
        dense.reshape(-1)[where] = value
        return torch.from_numpy(dense)
