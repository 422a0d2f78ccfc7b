"""Writer of sparse events in larcv3's HDF5 layout, which `file` describes, an event at a time."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch

from .dataset import CLASSES, PLANES, Pixels
from .file import CHARGE_GROUP, EVENT_ID, LABEL_GROUP

# Offsets and sizes as larcv3 has them: some of its tables are aligned as C aligns a struct.
EXTENTS = np.dtype(
    {"names": ["first", "N"], "formats": ["<u8", "<u4"], "offsets": [0, 8], "itemsize": 16}
)
VOXEL_EXTENTS = np.dtype([("first", "<u8"), ("N", "<u4"), ("ID", "<u4")])
VOXELS = np.dtype([("id", "<u8"), ("value", "<f4")])
IMAGE_META = np.dtype(
    {
        "names": ["valid", "projection_id", "image_sizes", "number_of_voxels", "origin"],
        "formats": ["u1", "<u8", ("<f8", (2,)), ("<u8", (2,)), ("<f8", (2,))],
        "offsets": [0, 8, 16, 32, 48],
        "itemsize": 72,
    }
)

# A plane has some 20,000 pixels: a few chunks to read, and little read for its neighbours.
_VOXELS_CHUNK = 8192
_TABLE_CHUNK = 1024

# Keeps handles alive that a forked child inherits: closing them there would write to the file.
_open: "set[EventWriter]" = set()


def _array(name: str, value: torch.Tensor | np.ndarray) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.ndim != 3 or array.shape[0] != PLANES:
        raise ValueError(f"{name}: want [{PLANES}, H, W], got {list(array.shape)}")
    return array


class EventWriter:
    """Writes a file of events, one event at a time; a context manager.

    The file appears under its name when the block ends, complete; after an exception, or the end
    of the process, there is none. Until then it grows beside it under a hidden name that ends in
    `.partial`. Memory does not grow with the number of events.

    Args:
        path: The file to write.
        charge_group: Name under `Data` of the charge; None writes no charge.
        label_group: Name under `Data` of the labels, or predictions; None writes none.
        overwrite: Whether to replace a file at path.

    Raises:
        FileExistsError: There is such a file, and overwrite is False.
        ValueError: Neither group is to be written, or both have one name.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        charge_group: str | None = CHARGE_GROUP,
        label_group: str | None = LABEL_GROUP,
        overwrite: bool = False,
    ):
        """Open a hidden file beside path; the class describes the arguments."""
        if charge_group == label_group:
            raise ValueError(
                f"charge_group, label_group: want two names or one and None, got {charge_group!r}"
                f" and {label_group!r}"
            )
        self.path = Path(path).absolute()
        self.overwrite = overwrite
        self.charge_group, self.label_group = charge_group, label_group
        self._refuse()
        self._process = os.getpid()
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
        self._file = h5py.File(self._partial, "x")
        _open.add(self)
        try:
            self._append("Events/event_id", np.empty(0, EVENT_ID))
            for group in filter(None, (charge_group, label_group)):
                self._append(f"Data/{group}/extents", np.empty(0, EXTENTS))
                self._append(f"Data/{group}/voxel_extents", np.empty(0, VOXEL_EXTENTS))
                self._append(f"Data/{group}/image_meta", np.empty(0, IMAGE_META))
                self._append(f"Data/{group}/voxels", np.empty(0, VOXELS), _VOXELS_CHUNK)
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> "EventWriter":
        """Return the writer."""
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Close the file, or discard it after an exception."""
        if kind is None:
            self.close()
        else:
            self.discard()

    def write(
        self,
        image: torch.Tensor | np.ndarray | None = None,
        labels: torch.Tensor | np.ndarray | None = None,
        event_id: Sequence[int] | torch.Tensor = (-1, -1, -1),
    ) -> None:
        """Append one event: its pixels with a charge other than 0 or a label other than 0.

        Args:
            image: Charge [3, H, W], stored as float32; None if the writer has no charge group.
            labels: Labels 0, 1 or 2, [3, H, W] of any integer type; None as for image.
            event_id: Run, subrun and event.

        Raises:
            ValueError: A shape, a label or a charge is not as it must be.
        """
        for name, value, group in (
            ("image", image, self.charge_group),
            ("labels", labels, self.label_group),
        ):
            if (value is None) != (group is None):
                wanted = "None, as its group is" if group is None else f"an array for {group}"
                raise ValueError(f"{name}: want {wanted}, got {type(value).__name__}")
        arrays = {}
        if image is not None:
            arrays["image"] = _array("image", image)
        if labels is not None:
            arrays["labels"] = _array("labels", labels)
            if arrays["labels"].dtype.kind not in "iu":
                raise ValueError(f"labels: want integers, got {arrays['labels'].dtype}")
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) > 1:
            raise ValueError(f"image, labels: want one shape, got {sorted(shapes)}")
        ((_, rows, columns),) = shapes
        occupied = np.zeros(PLANES * rows * columns, bool)
        for array in arrays.values():
            occupied |= array.reshape(-1) != 0
        flat = np.flatnonzero(occupied)
        plane, pixel = np.divmod(flat, rows * columns)
        row, column = np.divmod(pixel, columns)
        values = {name: array.reshape(-1)[flat] for name, array in arrays.items()}
        self.write_pixels(
            Pixels(plane, row, column, values.get("image"), values.get("labels"), event_id),
            (rows, columns),
        )

    def write_pixels(self, pixels: Pixels, size: tuple[int, int]) -> None:
        """Append one event of images of size (rows, columns), given by its pixels in any order.

        Raises:
            ValueError: A pixel, a label or a charge is not as it must be.
        """
        if self._file is None or os.getpid() != self._process:
            raise ValueError(f"{self.path}: the writer is closed, or another process's")
        rows, columns = size
        number = [int(n) for n in pixels.event_id]
        if len(number) != 3:
            raise ValueError(f"event_id: want run, subrun and event, got {number}")
        within = (pixels.plane >= 0) & (pixels.plane < PLANES)
        within &= (pixels.row >= 0) & (pixels.row < rows)
        within &= (pixels.column >= 0) & (pixels.column < columns)
        if not within.all():
            raise ValueError(f"pixels: want planes 0 to {PLANES - 1} of {size}, got others")
        # As in real files: by plane, then by id, the same pixels in both groups.
        key = (pixels.plane * columns + pixels.column) * rows + pixels.row
        if (key[1:] <= key[:-1]).any():
            order = np.argsort(key)
            key = key[order]
            pixels = pixels._replace(
                **{
                    name: None if array is None else array[order]
                    for name, array in zip(pixels._fields[:5], pixels[:5], strict=True)
                }
            )
            if (key[1:] == key[:-1]).any():
                raise ValueError("pixels: want each at most once, got one twice")
        stored = []
        if self.charge_group is not None:
            charge = pixels.charge.astype(np.float32)
            if not np.isfinite(charge).all():
                raise ValueError("image: want finite charges that fit float32, got others")
            stored.append((self.charge_group, charge))
        if self.label_group is not None:
            if len(key) and (pixels.label.min() < 0 or pixels.label.max() >= len(CLASSES)):
                raise ValueError(f"labels: want 0 to {len(CLASSES) - 1}, got others")
            stored.append((self.label_group, pixels.label.astype(np.float32)))
        starts = np.searchsorted(key, np.arange(PLANES + 1) * (rows * columns))
        for group, value in stored:
            self._append_event(group, key % (rows * columns), value, starts, size)
        self._append("Events/event_id", np.array([tuple(number)], EVENT_ID))

    def close(self) -> None:
        """Complete the file and give it its name."""
        if self._file is None:
            return
        try:
            self._file.close()
            with open(self._partial, "rb+") as file:
                os.fsync(file.fileno())
            self._refuse()
            os.replace(self._partial, self.path)
        except BaseException:
            self.discard()
            raise
        self._file = None
        _open.discard(self)

    def discard(self) -> None:
        """Remove what was written; nothing appears under the path."""
        if self._file is None:
            return
        try:
            self._file.close()
        finally:
            self._file = None
            _open.discard(self)
            self._partial.unlink(missing_ok=True)

    def _refuse(self) -> None:
        if self.path.exists() and not self.overwrite:
            raise FileExistsError(f"{self.path} exists; overwrite=True replaces it")

    def _append(self, name: str, rows: np.ndarray, chunk: int = _TABLE_CHUNK) -> int:
        """Append rows to a dataset, made at need; return how many it had before."""
        dataset = self._file.get(name)
        if dataset is None:
            dataset = self._file.create_dataset(
                name,
                (0,),
                rows.dtype,
                maxshape=(None,),
                chunks=(chunk,),
                compression="gzip",
                shuffle=True,  # files a quarter smaller, and written sooner
            )
        before = len(dataset)
        if len(rows):
            dataset.resize((before + len(rows),))
            dataset[before:] = rows
        return before

    def _append_event(self, group, ids, value, starts, size) -> None:
        rows, columns = size
        voxels = np.empty(len(ids), VOXELS)
        voxels["id"], voxels["value"] = ids, value
        first = self._append(f"Data/{group}/voxels", voxels)
        extents = np.empty(PLANES, VOXEL_EXTENTS)
        extents["first"], extents["N"] = first + starts[:-1], np.diff(starts)
        extents["ID"] = np.arange(PLANES)
        plane = self._append(f"Data/{group}/voxel_extents", extents)
        meta = np.zeros(PLANES, IMAGE_META)
        meta["valid"], meta["projection_id"] = 1, np.arange(PLANES)
        meta["image_sizes"] = meta["number_of_voxels"] = (columns, rows)
        self._append(f"Data/{group}/image_meta", meta)
        self._append(f"Data/{group}/extents", np.array([(plane, PLANES)], EXTENTS))
