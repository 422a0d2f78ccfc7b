"""The writer: exact round trips, the real file's layout, and files that are whole or absent."""

import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from fullres.events import EventFile, EventWriter
from fullres.events.file import CHARGE_GROUP, LABEL_GROUP

SIZE = (33, 47)


def event(seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    where = rng.random((3, *size)) < 0.1
    image = np.where(where, rng.gamma(2, 20, where.shape), 0).astype(np.float32)
    return torch.from_numpy(image), torch.from_numpy(rng.integers(0, 3, where.shape) * where)


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    path = tmp_path / "round.h5"
    pairs = [event(k) for k in range(5)]
    pairs[1] = tuple(torch.zeros_like(array) for array in pairs[1])  # an empty event
    pairs[2][0][:, 3, 4] = -1.5e-38  # tiny, negative, still a charge
    with EventWriter(path) as writer:
        for k, (image, labels) in enumerate(pairs):
            writer.write(image, labels.numpy() if k % 2 else labels, (2**40, k, 3))
    file = EventFile(path, size=SIZE)
    assert len(file) == 5
    for k, (image, labels) in enumerate(pairs):
        assert torch.equal(file[k]["image"], image)
        assert torch.equal(file[k]["labels"], labels.to(torch.uint8))
        assert file[k]["event_id"].tolist() == [2**40, k, 3]


def test_a_real_file_rewritten_has_its_tables_and_types(real_events, tmp_path):
    path = tmp_path / "copy.h5"
    with EventWriter(path) as writer:
        for item in EventFile(real_events, size=(1280, 2048)):
            writer.write(item["image"], item["labels"], item["event_id"])
    names = []
    with h5py.File(real_events) as real, h5py.File(path) as copy:
        real.visititems(lambda name, o: names.append(name) if isinstance(o, h5py.Dataset) else None)
        assert len(names) == 9
        for name in names:
            a, b = real[name], copy[name]
            assert a.id.get_type().equal(b.id.get_type()), name
            fields = a.dtype.names
            assert all(np.array_equal(a[:][n], b[:][n]) for n in fields), name


def test_only_pixels_with_charge_or_a_label_are_stored(tmp_path):
    image, labels = torch.zeros(3, *SIZE), torch.zeros(3, *SIZE, dtype=torch.uint8)
    image[0, 1, 2], labels[2, 5, 6] = 7.0, 2
    with EventWriter(tmp_path / "two.h5") as writer:
        writer.write(image, labels)
    with h5py.File(tmp_path / "two.h5") as file:
        for name in (CHARGE_GROUP, LABEL_GROUP):
            assert file[f"Data/{name}/voxel_extents"]["N"].tolist() == [1, 0, 1]
        ids = file[f"Data/{CHARGE_GROUP}/voxels"]["id"].tolist()
    assert ids == [2 * SIZE[0] + 1, 6 * SIZE[0] + 5]


def test_predictions_alone_are_read_under_their_group(tmp_path):
    _, labels = event()
    with EventWriter(tmp_path / "p.h5", charge_group=None, label_group="prediction") as writer:
        writer.write(labels=labels)
    file = EventFile(tmp_path / "p.h5", size=SIZE, charge=False, label_group="prediction")
    assert torch.equal(file[0]["labels"], labels.to(torch.uint8))
    assert "image" not in file[0]


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_pixels_may_come_in_any_order(tmp_path, order):
    with EventWriter(tmp_path / "a.h5") as writer:
        writer.write(*event())
    pixels = EventFile(tmp_path / "a.h5", size=SIZE).pixels(0)
    if order == "shuffled":
        turn = np.random.default_rng(1).permutation(len(pixels.row))
        pixels = pixels._replace(**{n: getattr(pixels, n)[turn] for n in pixels._fields[:5]})
    with EventWriter(tmp_path / "b.h5") as writer:
        writer.write_pixels(pixels, SIZE)
    item = EventFile(tmp_path / "b.h5", size=SIZE)[0]
    assert torch.equal(item["image"], event()[0])


def test_what_cannot_be_stored_is_refused_and_leaves_the_rest_whole(tmp_path):
    image, labels = event()
    poisoned, wrong = image.clone(), labels.clone()
    poisoned[0, 0, 0], wrong[0, 0, 0] = float("nan"), 3
    path = tmp_path / "kept.h5"
    with EventWriter(path) as writer:
        writer.write(image, labels)
        for bad in (
            (poisoned, labels),
            (image, wrong),
            (image, -labels),
            (image, labels.float()),
            (image[:2], labels[:2]),
            (image, labels[:, 1:]),
            (image, None),
            (None, labels),
        ):
            with pytest.raises(ValueError):
                writer.write(*bad)
        with pytest.raises(ValueError, match="event_id"):
            writer.write(image, labels, (1, 2))
        writer.write(image, labels)
    file = EventFile(path, size=SIZE)
    assert len(file) == 2 and torch.equal(file[1]["image"], image)


def test_an_exception_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        with EventWriter(tmp_path / "half.h5") as writer:
            writer.write(*event())
            raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_file_under_the_name(tmp_path):
    script = (
        "import sys, torch; from fullres.events import EventWriter\n"
        "writer = EventWriter(sys.argv[1])\n"
        "writer.write(torch.ones(3, 9, 9), torch.ones(3, 9, 9, dtype=torch.uint8))\n"
        "print('written', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "half.h5")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdin.close()
    process.stdout.close()
    assert not (tmp_path / "half.h5").exists()
    assert all(p.name.endswith(".partial") for p in tmp_path.iterdir())


def test_a_file_is_replaced_only_when_told_and_only_when_complete(tmp_path):
    path = tmp_path / "there.h5"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="there.h5"):
        EventWriter(path)
    with pytest.raises(RuntimeError):
        with EventWriter(path, overwrite=True):
            raise RuntimeError
    assert path.read_bytes() == b"precious"
    with EventWriter(path, overwrite=True) as writer:
        writer.write(*event())
        assert path.read_bytes() == b"precious"
    assert len(EventFile(path, size=SIZE)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "race.h5"
    with pytest.raises(FileExistsError):
        with EventWriter(path) as writer:
            writer.write(*event())
            path.write_bytes(b"another's")
    assert path.read_bytes() == b"another's" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_writing_does_no_harm(tmp_path):
    path = tmp_path / "forked.h5"
    with EventWriter(path) as writer:
        writer.write(*event(0))
        child = os.fork()
        if child == 0:
            try:
                writer.write(*event(1))
            except ValueError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        writer.write(*event(2))
    file = EventFile(path, size=SIZE)
    assert len(file) == 2 and torch.equal(file[1]["image"], event(2)[0])


def test_two_groups_of_one_name_or_none_are_refused(tmp_path):
    for name in ("same", None):
        with pytest.raises(ValueError, match="charge_group, label_group"):
            EventWriter(tmp_path / "x.h5", charge_group=name, label_group=name)
    assert list(tmp_path.iterdir()) == []
