"""Reader of sparse events in larcv3's HDF5 layout, an event at a time.

    Events/event_id                 [events]  run, subrun, event; may be absent
    Data/GROUP/extents              [events]  (first, N): rows of the two tables of planes
    Data/GROUP/voxel_extents        [planes]  (first, N, ID): rows of voxels; ID is the plane
    Data/GROUP/image_meta           [planes]  number_of_voxels = (columns, rows), and more
    Data/GROUP/voxels               [pixels]  (id, value), id = column * rows + row

The pixels of all events follow one another in `voxels`, and the small tables say where an event's
begin, so a reader holds 24 bytes or so a plane, and one event, whatever the length of the file.
"""

import os
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from .dataset import CLASSES, PLANES, SIZE, EventDataset, Pixels

CHARGE_GROUP = "sparse2d_sbndwire_group"
LABEL_GROUP = "sparse2d_sbnd_cosmicseg_group"
EVENT_ID = np.dtype([("run", "<i8"), ("subrun", "<i8"), ("event", "<i8")])

_FIELDS = {
    "extents": ("first", "N"),
    "voxel_extents": ("first", "N", "ID"),
    "image_meta": ("number_of_voxels",),
    "voxels": ("id", "value"),
}


class EventFileError(ValueError):
    """A file does not hold what it should; the message names file, group and event."""


# HDF5 shares one open file, and so one descriptor and its caches, among all handles of a process
# *and* what it forks. No handle may therefore cross a fork: this lock is held while HDF5 works,
# and taken to close every handle just before a fork; each process then opens its own at need.
_lock = threading.RLock()
_open: "weakref.WeakSet[EventFile]" = weakref.WeakSet()


def _before_fork() -> None:
    _lock.acquire()
    for file in list(_open):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_lock.release, after_in_child=_lock.release
    )


class EventFile(EventDataset):
    """The events of one HDF5 file, as a map-style data set of `Event` items.

    Opening reads the tables of extents and checks them; pixels are read when an item is asked
    for. Handles are opened per process at first use and never cross a fork, so one object may be
    used in threads, forked and spawned workers and be pickled.

    A plane's label ids must be a subset of its charge ids: pixels without a label are background,
    and a label where there is no charge is a mismatch.

    Args:
        path: The file.
        charge_group: Name under `Data` of the charge.
        label_group: Name under `Data` of the labels, 0 background, 1 cosmic, 2 neutrino.
        size: Rows and columns of the images, at most the file's; row r of the crop is row r of
            the file, so (1260, 2048) drops the last 20 of 1280 rows.
        **options: `charge`, `labels`, `clip`, `log_unit` and `flip_seed`, see `EventDataset`. With
            `labels=False` the label group may be absent; with `charge=False` the charge group.

    Raises:
        FileNotFoundError: There is no such file.
        EventFileError: (a ValueError) The file is not HDF5, truncated or not of this layout; from
            an item, the event is damaged or inconsistent.
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        charge_group: str = CHARGE_GROUP,
        label_group: str = LABEL_GROUP,
        size: tuple[int, int] = SIZE,
        **options,
    ):
        """Open the file and check its tables; the class describes the arguments."""
        super().__init__(size=size, **options)
        self.path = Path(path).absolute()
        if not self.path.exists():
            raise FileNotFoundError(f"no event file {self.path}")
        self._groups = {}
        if self.charge:
            self._groups["charge"] = charge_group
        if self.labels:
            self._groups["labels"] = label_group
        self._handle: h5py.File | None = None
        self._extents: dict[str, np.ndarray] = {}
        self._planes: dict[str, np.ndarray] = {}
        with _lock:
            try:
                self._read_tables()
            finally:
                self.close()

    def __len__(self) -> int:
        """Return the number of events."""
        return self._count

    def shape(self, index: int) -> tuple[int, int]:
        """Return rows and columns of an event's images in the file, of which `size` is a crop."""
        with _lock:
            return self._read_shape(next(iter(self._groups.values())), index)

    def close(self) -> None:
        """Close this process's handle, if it has one; the next item opens another."""
        with _lock:
            _open.discard(self)
            handle, self._handle = self._handle, None
            if handle is not None:
                handle.close()

    def __getstate__(self) -> dict:
        """Return all but the handle, which belongs to this process."""
        return {**self.__dict__, "_handle": None}

    def pixels(self, index: int) -> Pixels:
        """Return the stored pixels of one event, checked; before any crop, scale or flip.

        Raises:
            EventFileError: The event is damaged or inconsistent.
        """
        with _lock:
            read = {kind: self._read_event(name, index) for kind, name in self._groups.items()}
            event_id = self._read_event_id(index)
        (ids, plane, value, shape), *second = read.values()
        charge = value if self.charge else None
        label = None if self.charge else self._checked_labels(index, plane, value)
        if second:
            label = self._aligned_labels(index, ids, plane, shape, *second[0])
        column, row = np.divmod(ids, shape[0])
        return Pixels(plane, row, column, charge, label, event_id)

    # Reading, under the lock.

    def _fail(self, what: str, group: str = "", event: int | None = None, plane=None):
        place = [f"{self.path}"]
        place += [f"group {group}"] if group else []
        place += [f"event {event}"] if event is not None else []
        place += [f"plane {plane}"] if plane is not None else []
        return EventFileError(f"{', '.join(place)}: {what}")

    @contextmanager
    def _reading(self, what: str, group: str = "", event: int | None = None):
        """Turn what HDF5 raises for damaged bytes into an error that says where they are."""
        try:
            yield
        except (OSError, RuntimeError, KeyError) as error:
            raise self._fail(f"cannot read {what}: {error}", group, event) from error

    def _file(self) -> h5py.File:
        if self._handle is None:
            with self._reading("it as HDF5 (no such file, or truncated?)"):
                # Shared file systems often refuse locks, which readers can do without.
                self._handle = h5py.File(self.path, "r", locking="best-effort")
            _open.add(self)
        return self._handle

    def _dataset(self, group: str, name: str) -> h5py.Dataset:
        file = self._file()
        dataset = None
        with self._reading(name, group):
            parent = file.get(f"Data/{group}")
            if not isinstance(parent, h5py.Group):
                found = ", ".join(sorted(file["Data"])) if "Data" in file else "no Data at all"
                raise self._fail(f"no such group under Data; there are: {found}", group)
            dataset = parent.get(name)
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1:
            raise self._fail(f"no dataset {name} with one dimension", group)
        missing = set(_FIELDS[name]) - set(dataset.dtype.names or ())
        if missing:
            raise self._fail(f"dataset {name} lacks the field {', '.join(sorted(missing))}", group)
        return dataset

    def _read_tables(self) -> None:
        for group in self._groups.values():
            with self._reading("extents", group):
                extents = self._dataset(group, "extents")[:]
            with self._reading("voxel_extents", group):
                planes = self._dataset(group, "voxel_extents")[:]
            self._check_within(group, extents, len(planes), "extents", "voxel_extents")
            metas, pixels = self._dataset(group, "image_meta"), self._dataset(group, "voxels")
            self._check_within(group, extents, len(metas), "extents", "image_meta")
            wrong = np.flatnonzero(extents["N"] != PLANES)
            if len(wrong):
                event = int(wrong[0])
                found = int(extents["N"][event])
                raise self._fail(f"want {PLANES} planes, found {found}", group, event)
            self._check_planes(group, extents, planes, len(pixels))
            self._extents[group] = np.ascontiguousarray(extents["first"].astype(np.int64))
            self._planes[group] = planes
        lengths = {group: len(extents) for group, extents in self._extents.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{n} in {group}" for group, n in lengths.items())
            raise self._fail(f"charge and labels have different numbers of events: {shown}")
        self._count = min(lengths.values())
        self._check_event_ids()
        if self._count:
            for group in self._groups.values():
                self._read_shape(group, 0)

    def _check_within(self, group: str, table: np.ndarray, limit: int, name: str, target: str):
        """Check that every (first, N) of a table of events lies within the table it points to."""
        first, number = table["first"].astype(np.uint64), table["N"].astype(np.uint64)
        bad = np.flatnonzero((first > limit) | (number > limit) | (first + number > limit))
        if len(bad):
            event = int(bad[0])
            raise self._fail(
                f"{name} point to {number[event]} rows from {first[event]} of "
                f"{target}, which has {limit}",
                group,
                event,
            )

    def _check_planes(self, group: str, extents: np.ndarray, planes: np.ndarray, limit: int):
        """Check that every event has planes 0, 1 and 2 once, each with pixels that exist."""
        rows = extents["first"].astype(np.int64)[:, None] + np.arange(PLANES)
        mine = planes[rows]  # [events, PLANES]
        first, number = mine["first"].astype(np.uint64), mine["N"].astype(np.uint64)
        bad = (first > limit) | (number > limit) | (first + number > limit)
        if bad.any():
            event, k = (int(i) for i in np.argwhere(bad)[0])
            raise self._fail(
                f"voxel_extents point to {number[event, k]} rows from {first[event, k]} of voxels, "
                f"which has {limit}",
                group,
                event,
                mine["ID"][event, k],
            )
        bad = (np.sort(mine["ID"], axis=1) != np.arange(PLANES)).any(axis=1)
        if bad.any():
            event = int(np.flatnonzero(bad)[0])
            raise self._fail(f"want planes 0, 1, 2, got {mine['ID'][event].tolist()}", group, event)

    def _event_ids(self) -> h5py.Dataset | None:
        with self._reading("Events/event_id"):
            return self._file().get("Events/event_id")

    def _check_event_ids(self) -> None:
        ids = self._event_ids()
        if ids is None:
            return
        if set(EVENT_ID.names) - set(ids.dtype.names or ()):
            raise self._fail(f"Events/event_id: want {EVENT_ID.names}, got {ids.dtype.names}")
        if ids.shape != (self._count,):
            raise self._fail(f"Events/event_id: want {self._count} rows, got shape {ids.shape}")

    def _read_event_id(self, index: int) -> tuple[int, int, int]:
        ids = self._event_ids()
        if ids is None:
            return (-1, -1, -1)
        with self._reading("Events/event_id", event=index):
            row = ids[index]
        return tuple(int(row[name]) for name in EVENT_ID.names)

    def _read_shape(self, group: str, index: int) -> tuple[int, int]:
        """Return (rows, columns) of an event, the same in all its planes and enough for a crop."""
        first = int(self._extents[group][index])
        metas = self._dataset(group, "image_meta")
        with self._reading("image_meta", group, index):
            shapes = metas[first : first + PLANES]["number_of_voxels"]
        if shapes.shape != (PLANES, 2) or (shapes != shapes[0]).any():
            raise self._fail(
                f"want one number_of_voxels for all planes, got {shapes.tolist()}", group, index
            )
        columns, rows = (int(n) for n in shapes[0])
        if rows < self.size[0] or columns < self.size[1]:
            raise self._fail(
                f"images of {rows} x {columns} are smaller than the size {self.size} asked for",
                group,
                index,
            )
        return rows, columns

    def _read_event(self, group: str, index: int):
        """Return ids, planes and values of an event's pixels by plane, and (rows, columns)."""
        rows, columns = shape = self._read_shape(group, index)
        table = self._planes[group][self._extents[group][index] :][:PLANES]
        dataset = self._dataset(group, "voxels")
        parts = []
        for first, number, plane in sorted(
            (tuple(int(row[n]) for n in ("first", "N", "ID")) for row in table), key=lambda t: t[2]
        ):
            with self._reading(f"voxels of plane {plane}", group, index):
                voxels = dataset[first : first + number]
            if number and voxels["id"].max() >= rows * columns:
                raise self._fail(
                    f"pixel id {voxels['id'].max()} is out of range for {rows} x {columns}",
                    group,
                    index,
                    plane,
                )
            ids = voxels["id"].astype(np.int64)
            if (np.diff(ids) <= 0).any():  # files store them in ascending order
                order = np.argsort(ids, kind="stable")
                ids, voxels = ids[order], voxels[order]
                twice = np.flatnonzero(np.diff(ids) == 0)
                if len(twice):
                    raise self._fail(f"pixel id {ids[twice[0]]} occurs twice", group, index, plane)
            value = voxels["value"].astype(np.float32)
            if not np.isfinite(value).all():
                raise self._fail("a value is not finite", group, index, plane)
            parts.append((ids, np.full(number, plane, np.int64), value))
        return *(np.concatenate(part) for part in zip(*parts, strict=True)), shape

    # Checking labels.

    def _checked_labels(self, index: int, plane: np.ndarray, value: np.ndarray) -> np.ndarray:
        known = (value == 0) | (value == 1) | (value == 2)
        if not known.all():
            wrong = int(np.flatnonzero(~known)[0])
            raise self._fail(
                f"want labels {list(range(len(CLASSES)))}, found {value[wrong]}",
                self._groups["labels"],
                index,
                plane[wrong],
            )
        return value.astype(np.uint8)

    def _aligned_labels(self, index, ids, plane, shape, label_ids, label_plane, value, label_shape):
        """Return a label for each charge pixel, background where the file has none."""
        group = self._groups["labels"]
        if label_shape != shape:
            raise self._fail(f"images of {label_shape}, but charge of {shape}", group, index)
        label = self._checked_labels(index, label_plane, value)
        if np.array_equal(ids, label_ids) and np.array_equal(plane, label_plane):
            return label
        pixels = shape[0] * shape[1]
        have, want = plane * pixels + ids, label_plane * pixels + label_ids
        place = np.searchsorted(have, want)
        found = np.zeros(len(want), bool)
        inside = place < len(have)
        found[inside] = have[place[inside]] == want[inside]
        if not found.all():
            wrong = int(np.flatnonzero(~found)[0])
            raise self._fail(
                f"a label at pixel id {label_ids[wrong]}, where there is no charge",
                group,
                index,
                label_plane[wrong],
            )
        aligned = np.zeros(len(have), np.uint8)
        aligned[place] = label
        return aligned
