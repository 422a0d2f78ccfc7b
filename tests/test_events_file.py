"""The reader: what it decodes, what it refuses, and from where it may be used."""

import multiprocessing
import os
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fullres.events import EventFile, EventFileError, EventWriter, flip, flips
from fullres.events.file import CHARGE_GROUP, LABEL_GROUP

CHARGE, LABELS = f"Data/{CHARGE_GROUP}", f"Data/{LABEL_GROUP}"
SIZE = (32, 48)


def events(count, seed=3, size=SIZE, share=0.05):
    """Random sparse images and labels, the labels where there is charge."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        where = rng.random((3, *size)) < share
        image = np.where(where, rng.gamma(2, 20, where.shape) + 5, 0).astype(np.float32)
        yield image, (rng.integers(0, 3, where.shape) * where).astype(np.uint8)


@pytest.fixture
def small(tmp_path):
    """Four events of 32 x 48, whose tables tests then damage."""
    path = tmp_path / "small.h5"
    with EventWriter(path) as writer:
        for k, (image, labels) in enumerate(events(4)):
            writer.write(image, labels, (7, 1, k))
    return path


def change(path, dataset, row, field, value):
    with h5py.File(path, "r+") as file:
        record = file[dataset][row]
        record[field] = value
        file[dataset][row] = record


def first_pixel(path, event, plane, group=CHARGE_GROUP):
    with h5py.File(path) as file:
        return int(file[f"Data/{group}/voxel_extents"]["first"][3 * event + plane])


def decoded(path, event, size):
    """Decode one pixel at a time, as the format's description says."""
    image, labels = np.zeros((3, *size), np.float32), np.zeros((3, *size), np.uint8)
    with h5py.File(path) as file:
        for array, name in ((image, CHARGE), (labels, LABELS)):
            group = file[name]
            start, number = (int(group["extents"][event][n]) for n in ("first", "N"))
            for k in range(start, start + number):
                first, count, plane = (int(group["voxel_extents"][k][n]) for n in range(3))
                for pixel, value in group["voxels"][first : first + count]:
                    row, column = int(pixel) % 1280, int(pixel) // 1280
                    if row < size[0]:
                        array[plane, row, column] = value
    return image, labels


@pytest.mark.parametrize("size", [(1260, 2048), (1280, 2048)], ids=["crop", "whole"])
def test_real_events_equal_a_decoding_pixel_by_pixel(real_events, size):
    item = EventFile(real_events, size=size)[2]
    image, labels = decoded(real_events, 2, size)
    assert item["image"].dtype == torch.float32 and item["labels"].dtype == torch.uint8
    assert np.array_equal(item["image"].numpy(), image)
    assert np.array_equal(item["labels"].numpy(), labels)
    assert item["index"] == 2 and item["event_id"].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("flip_seed", [None, 9])
def test_a_crop_of_any_size_is_the_corner_of_the_whole(small, flip_seed):
    size = (20, 31)
    whole, crop = EventFile(small, size=SIZE), EventFile(small, size=size, flip_seed=flip_seed)
    for k in range(4):
        turns = flips(9, 0, k) if flip_seed else (False, False)
        axes = [1] * turns[0] + [2] * turns[1]
        for key in ("image", "labels"):
            assert torch.equal(crop[k][key], whole[k][key][:, :20, :31].flip(axes))


def test_the_last_twenty_rows_of_a_real_event_are_dropped(real_events):
    whole, crop = EventFile(real_events, size=(1280, 2048))[1], EventFile(real_events)[1]
    assert crop["image"].shape == (3, 1260, 2048)
    for key in ("image", "labels"):
        assert torch.equal(crop[key], whole[key][:, :1260])
        narrow = EventFile(real_events, size=(700, 1001))[1]
        assert torch.equal(narrow[key], whole[key][:, :700, :1001])


def test_indices_count_as_those_of_a_list(small):
    file = EventFile(small, size=SIZE)
    assert len(file) == 4 and len(list(file)) == 4
    assert file[-1]["index"] == 3 and file[np.int64(1)]["event_id"].tolist() == [7, 1, 1]
    for index in (4, -5):
        with pytest.raises(IndexError, match=str(index)):
            file[index]
    with pytest.raises(TypeError):
        file[0.5]


def test_charge_is_clipped_then_scaled_by_the_documented_formula(small):
    plain = EventFile(small, size=SIZE)[0]["image"]
    assert torch.equal(EventFile(small, size=SIZE, clip=40)[0]["image"], plain.clamp(max=40))
    both = EventFile(small, size=SIZE, clip=40, log_unit=5)[0]["image"]
    torch.testing.assert_close(both, torch.log1p(plain.clamp(max=40) / 5))
    assert torch.equal(both == 0, plain == 0)


def test_labels_and_charge_may_each_be_left_out(small):
    assert "labels" not in EventFile(small, size=SIZE, labels=False)[0]
    assert "image" not in EventFile(small, size=SIZE, charge=False)[0]
    whole = EventFile(small, size=SIZE)[0]
    only = EventFile(small, size=SIZE, charge=False)[0]
    assert torch.equal(only["labels"], whole["labels"])
    with h5py.File(small, "r+") as file:
        del file[LABELS]
    assert torch.equal(EventFile(small, size=SIZE, labels=False)[0]["image"], whole["image"])
    with pytest.raises(EventFileError, match=f"group {LABEL_GROUP}.*there are: {CHARGE_GROUP}"):
        EventFile(small, size=SIZE)


@pytest.mark.parametrize(
    "options",
    [{"size": (0, 5)}, {"clip": 0}, {"log_unit": -1}, {"flip_seed": -1}]
    + [{"clip": float("nan")}, {"charge": False, "labels": False}],
    ids=str,
)
def test_options_out_of_range_are_refused(small, options):
    with pytest.raises(ValueError):
        EventFile(small, **{"size": SIZE, **options})


# Flips.


def test_flips_depend_on_seed_epoch_and_index_alone_and_are_fair():
    drawn = np.array([flips(5, epoch, index) for epoch in range(20) for index in range(100)])
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 0.05
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.08
    assert flips(5, 3, 41) == tuple(drawn[341])
    for other in ((6, 0), (5, 1)):
        assert [flips(*other, k) for k in range(50)] != [flips(5, 0, k) for k in range(50)]


def test_flipped_items_are_exact_mirror_images_in_all_planes(small):
    plain, flipping = EventFile(small, size=SIZE), EventFile(small, size=SIZE, flip_seed=9)
    seen = set()
    for epoch in range(6):
        flipping.set_epoch(epoch)
        for index in range(4):
            reverse_rows, reverse_columns = flips(9, epoch, index)
            seen.add((reverse_rows, reverse_columns))
            axes = [1] * reverse_rows + [2] * reverse_columns
            item, by_hand = flipping[index], flip(plain[index], 9, epoch)
            for key in ("image", "labels"):
                assert torch.equal(item[key], plain[index][key].flip(axes))
                assert torch.equal(item[key], by_hand[key])
    assert len(seen) == 4


def test_a_new_epoch_reaches_persistent_workers(small):
    file = EventFile(small, size=SIZE, flip_seed=9)
    loader = DataLoader(file, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 5):
        file.set_epoch(epoch)
        for k, batch in enumerate(loader):
            assert torch.equal(batch["image"][0], file[k]["image"])


# Processes.


def digest(file, index):
    item = file[index]
    return float(item["image"].double().sum()), int(item["labels"].sum())


def read_in_process(file, queue):
    queue.put([digest(file, k % len(file)) for k in range(12)])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_what_the_parent_reads(small, start):
    file = EventFile(small, size=SIZE)
    wanted = [file[k] for k in range(4)]  # the parent's handle is open when workers start
    loader = DataLoader(file, batch_size=2, num_workers=2, multiprocessing_context=start)
    for k, batch in enumerate(loader):
        assert batch["image"].shape == (2, 3, *SIZE) and batch["index"].tolist() == [
            2 * k,
            2 * k + 1,
        ]
        for j in range(2):
            assert torch.equal(batch["image"][j], wanted[2 * k + j]["image"])
            assert torch.equal(batch["labels"][j], wanted[2 * k + j]["labels"])


def test_two_forked_processes_and_the_parent_read_at_once(small):
    file = EventFile(small, size=SIZE)
    wanted = [digest(file, k % 4) for k in range(12)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_in_process, args=(file, queue)) for _ in range(2)]
    for process in processes:
        process.start()
        digest(file, 0)  # opens again between the forks
    assert [digest(file, k % 4) for k in range(12)] == wanted
    assert [queue.get(timeout=60) for _ in processes] == [wanted, wanted]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_handle_crosses_a_fork(small):
    file = EventFile(small, size=SIZE)
    file[0]
    assert file._handle is not None
    child = os.fork()
    if child == 0:
        os._exit(0 if file._handle is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert digest(file, 0) == digest(EventFile(small, size=SIZE), 0)


def test_a_reader_pickles_without_its_handle(small):
    file = EventFile(small, size=SIZE, flip_seed=2, clip=30)
    wanted = digest(file, 1)
    assert digest(pickle.loads(pickle.dumps(file)), 1) == wanted


def test_opening_and_reading_take_one_event_from_voxels(small, monkeypatch):
    read = []
    original = h5py.Dataset.__getitem__

    def counted(self, key, **more):
        value = original(self, key, **more)
        if self.name.endswith("voxels"):
            read.append(len(value))
        return value

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    file = EventFile(small, size=SIZE)
    assert read == []
    item = file[2]
    assert sum(read) == 2 * int((item["image"] != 0).sum())


# Refusals.


def refused(path, *words, event=None, **options):
    """The file opens, or an event reads, only with an error that has all the words."""
    with pytest.raises(EventFileError) as error:
        file = EventFile(path, size=SIZE, **options)
        assert event is not None, "opened"
        file[event]
    for word in (path.name, *words):
        assert word in str(error.value)
    return str(error.value)


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.h5"):
        EventFile(tmp_path / "absent.h5")


def test_other_bytes_and_truncated_files_are_refused_at_opening(small, tmp_path):
    other = tmp_path / "other.h5"
    other.write_bytes(b"no HDF5 at all" * 100)
    refused(other, "HDF5")
    cut = tmp_path / "cut.h5"
    cut.write_bytes(small.read_bytes()[:-2000])
    refused(cut, "truncated")


def test_a_damaged_chunk_names_its_event_and_spares_the_others(tmp_path):
    path = tmp_path / "damaged.h5"
    size = (128, 128)
    with EventWriter(path) as writer:
        for image, labels in events(3, size=size, share=0.3):
            writer.write(image, labels)
    with h5py.File(path) as file:
        chunk = file[CHARGE]["voxels"].id.get_chunk_info(2)  # holds pixels of event 1
    content = bytearray(path.read_bytes())
    for k in range(chunk.byte_offset + 200, chunk.byte_offset + chunk.size - 200):
        content[k] ^= 0x5A
    path.write_bytes(content)
    file = EventFile(path, size=size)
    file[0]
    with pytest.raises(EventFileError, match=rf"damaged.h5, group {CHARGE_GROUP}, event 1"):
        file[1]
    file[0]


@pytest.mark.parametrize("name", ["extents", "voxel_extents", "image_meta", "voxels"])
def test_a_missing_dataset_is_named(small, name):
    with h5py.File(small, "r+") as file:
        del file[LABELS][name]
    refused(small, f"group {LABEL_GROUP}", f"no dataset {name}")


@pytest.mark.parametrize("name, field", [("extents", "N"), ("voxel_extents", "ID")])
def test_a_missing_field_is_named(small, name, field):
    with h5py.File(small, "r+") as file:
        rows = file[CHARGE][name][:]
        del file[CHARGE][name]
        kept = [n for n in rows.dtype.names if n != field]
        file[CHARGE][name] = rows[kept].astype([(n, rows.dtype[n]) for n in kept])
    refused(small, f"group {CHARGE_GROUP}", name, f"field {field}")


@pytest.mark.parametrize(
    "name, row, field, value, words",
    [
        ("extents", 2, "first", 11, ("event 2", "voxel_extents, which has 12")),
        ("extents", 2, "first", 2**63 + 5, ("event 2", "voxel_extents")),
        ("extents", 1, "N", 2, ("event 1", "want 3 planes, found 2")),
        ("voxel_extents", 4, "N", 2**31, ("event 1", "plane 1", "of voxels")),
        ("voxel_extents", 10, "first", 2**64 - 1, ("event 3", "plane 1", "of voxels")),
        ("voxel_extents", 7, "ID", 2, ("event 2", "[0, 2, 2]")),
        ("voxel_extents", 7, "ID", 5, ("event 2", "[0, 5, 2]")),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_tables_that_point_nowhere_are_refused_at_opening(small, name, row, field, value, words):
    change(small, f"{LABELS}/{name}", row, field, value)
    refused(small, f"group {LABEL_GROUP}", *words)


@pytest.mark.parametrize(
    "group, field, value, words",
    [
        (CHARGE_GROUP, "id", SIZE[0] * SIZE[1], ("pixel id 1536 is out of range", "plane 1")),
        (CHARGE_GROUP, "value", np.nan, ("not finite", "plane 1")),
        (CHARGE_GROUP, "value", -np.inf, ("not finite", "plane 1")),
        (LABEL_GROUP, "value", 3, ("found 3.0", "plane 1")),
        (LABEL_GROUP, "value", 0.5, ("found 0.5", "plane 1")),
        (LABEL_GROUP, "value", np.nan, ("not finite", "plane 1")),
    ],
    ids=str,
)
def test_impossible_pixels_are_refused_when_read(small, group, field, value, words):
    change(small, f"Data/{group}/voxels", first_pixel(small, 2, 1, group), field, value)
    message = refused(small, f"group {group}", "event 2", *words, event=2)
    assert EventFile(small, size=SIZE)[1]["index"] == 1, message


def test_a_pixel_that_occurs_twice_is_refused(small):
    at = first_pixel(small, 0, 2)
    with h5py.File(small) as file:
        pixel = int(file[CHARGE]["voxels"]["id"][at + 3])
    change(small, f"{CHARGE}/voxels", at, "id", pixel)
    refused(small, "event 0", "plane 2", f"pixel id {pixel} occurs twice", event=0)


def test_pixels_need_not_be_stored_in_order(small):
    wanted = EventFile(small, size=SIZE)[1]
    with h5py.File(small, "r+") as file:
        for name in (CHARGE, LABELS):
            voxels = file[name]["voxels"]
            first, number, _ = file[name]["voxel_extents"][4]
            part = slice(int(first), int(first) + int(number))
            voxels[part] = voxels[part][::-1]
    item = EventFile(small, size=SIZE)[1]
    assert torch.equal(item["image"], wanted["image"])
    assert torch.equal(item["labels"], wanted["labels"])


def test_pixels_without_a_label_are_background_and_labels_without_charge_refused(tmp_path):
    (image, labels), *_ = events(1)
    labels[0, :16] = 0
    path = tmp_path / "subset.h5"
    with EventWriter(path, label_group=None) as writer:
        writer.write(image)
    with EventWriter(tmp_path / "labels.h5", charge_group=None) as writer:
        writer.write(labels=labels)
    with h5py.File(path, "r+") as file, h5py.File(tmp_path / "labels.h5") as other:
        other.copy(LABELS, file["Data"])
    item = EventFile(path, size=SIZE)[0]
    assert np.array_equal(item["labels"].numpy(), labels)

    free = int(np.flatnonzero(image[1].T.reshape(-1) == 0)[0])
    change(path, f"{LABELS}/voxels", first_pixel(path, 0, 1, LABEL_GROUP), "id", free)
    words = (f"group {LABEL_GROUP}", "event 0", "plane 1", f"id {free}", "no charge")
    refused(path, *words, event=0)


def test_groups_with_other_shapes_or_numbers_of_events_are_refused(small, tmp_path):
    copy = tmp_path / "copy.h5"
    shutil.copy(small, copy)
    for row in range(3, 6):
        change(copy, f"{LABELS}/image_meta", row, "number_of_voxels", (48, 64))
    refused(copy, f"group {LABEL_GROUP}", "event 1", "(64, 48)", "(32, 48)", event=1)
    with h5py.File(small, "r+") as file:
        file[LABELS]["extents"].resize((3,))
    refused(small, "different numbers of events", f"3 in {LABEL_GROUP}")


def test_a_size_beyond_the_images_is_refused(small):
    with pytest.raises(EventFileError, match="32 x 48 are smaller than"):
        EventFile(small)


def test_event_ids_may_be_absent_but_not_of_another_length(small):
    with h5py.File(small, "r+") as file:
        ids = file["Events/event_id"][:]
        file["Events/event_id"].resize((3,))
    refused(small, "Events/event_id", "want 4")
    with h5py.File(small, "r+") as file:
        del file["Events"]
    assert ids["event"][2] == 2
    assert EventFile(small, size=SIZE)[2]["event_id"].tolist() == [-1, -1, -1]


def test_a_file_without_events_is_empty(tmp_path):
    with EventWriter(tmp_path / "none.h5"):
        pass
    assert len(EventFile(tmp_path / "none.h5")) == 0
