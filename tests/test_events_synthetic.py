"""The generator: what its events are a function of, and that they look like the real ones."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fullres.events import EventFile, SyntheticEvents, generate_event, generate_file
from fullres.events import synthetic as module

SMALL = (160, 256)


def equal(a, b):
    return torch.equal(a["image"], b["image"]) and torch.equal(a["labels"], b["labels"])


@pytest.fixture(scope="module")
def whole():
    """Eight events of full size."""
    return list(SyntheticEvents(8, seed=11))


def test_an_event_is_a_function_of_seed_and_index_alone():
    events = SyntheticEvents(20, seed=4, size=SMALL)
    backwards = {k: events[k] for k in reversed(range(20))}
    for k in (0, 7, 19):
        assert equal(backwards[k], SyntheticEvents(100, seed=4, size=SMALL)[k])
        assert equal(backwards[k], generate_event(4, k, SMALL))
        assert backwards[k]["event_id"].tolist() == [4, 0, k]
    assert not equal(events[0], events[1])
    assert not equal(events[0], SyntheticEvents(20, seed=5, size=SMALL)[0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_generate_what_the_parent_generates(start):
    events = SyntheticEvents(4, seed=4, size=SMALL)
    loader = DataLoader(events, batch_size=1, num_workers=2, multiprocessing_context=start)
    for k, batch in enumerate(loader):
        assert torch.equal(batch["image"][0], events[k]["image"])
        assert torch.equal(batch["labels"][0], events[k]["labels"])


def test_the_global_random_state_is_neither_used_nor_changed():
    np.random.seed(1)
    torch.manual_seed(1)
    state, seen = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = generate_event(1, 1, SMALL)
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), seen)
    np.random.seed(2)
    assert equal(first, generate_event(1, 1, SMALL))


def test_items_are_those_of_a_file(whole):
    item = whole[0]
    assert item["image"].shape == item["labels"].shape == (3, 1260, 2048)
    assert item["image"].dtype == torch.float32 and item["labels"].dtype == torch.uint8
    assert set(item) == {"image", "labels", "index", "event_id"}
    log = SyntheticEvents(8, seed=11, log_unit=5, clip=100, flip_seed=1)[0]["image"]
    by_hand = torch.log1p(item["image"].clamp(max=100) / 5)
    assert torch.allclose(log.sum(), by_hand.sum(), rtol=1e-4)


def test_a_crop_is_cut_from_the_whole_detector(whole):
    uncut = generate_event(11, 0, (1280, 2048))
    assert torch.equal(uncut["image"][:, :1260], whole[0]["image"])


def test_charge_and_occupancy_are_like_the_real_ones(whole, real_events):
    def summary(items):
        image = torch.stack([item["image"] for item in items])
        occupied = image > 0
        share = occupied.float().mean(dim=(2, 3))
        return share.median(dim=0).values, image[occupied].median(), image[occupied].min()

    share, median, least = summary(whole)
    real_share, real_median, _ = summary(list(EventFile(real_events)))
    assert least >= 5.0
    assert ((share / real_share > 0.5) & (share / real_share < 2)).all()
    assert 0.5 < median / real_median < 2
    for item in whole:
        occupied = (item["image"] > 0).float().mean(dim=(1, 2))
        assert ((occupied > 0.0008) & (occupied < 0.025)).all()
        assert item["image"].max() < 10_000


def test_labels_are_where_charge_is_and_of_all_classes(whole):
    for item in whole:
        assert (item["image"][item["labels"] > 0] >= 5.0).all()
        noise = (item["labels"] == 0) & (item["image"] > 0)
        assert noise[0].sum() > 5000 and noise[1].sum() > 5000 and noise[2].sum() < 5000
    labels = torch.stack([item["labels"] for item in whole])
    assert (labels == 1).sum() > (labels == 2).sum() > 0


def test_columns_without_wires_are_empty(whole):
    for item in whole:
        columns = (item["image"] > 0).any(dim=1)
        for plane, margin in enumerate((32, 32, 192)):
            assert not columns[plane, :margin].any() and not columns[plane, -margin:].any()
            assert columns[plane, margin : margin + 200].any()


def test_planes_share_the_time_axis():
    """Pixels of one neutrino begin, end and lie at the same ticks in all planes."""
    compared = 0
    for item in SyntheticEvents(12, seed=3, neutrino_fraction=1.0):
        rows = [(item["labels"][plane] == 2).sum(dim=1).float() for plane in range(3)]
        if min(float(r.sum()) for r in rows) < 200:
            continue
        compared += 1
        seen = [torch.nonzero(r).flatten().float() for r in rows]
        for quantile in (0.02, 0.5, 0.98):
            at = torch.stack([torch.quantile(s, quantile) for s in seen])
            assert at.max() - at.min() <= 12
        assert torch.corrcoef(torch.stack(rows)).min() > 0.3
    assert compared >= 8


def test_a_point_lands_on_the_columns_of_its_geometry(monkeypatch):
    """The wires at +60 and -60 degrees together measure what the vertical wires measure."""
    monkeypatch.setattr(module, "_cosmics", lambda *_: [])
    monkeypatch.setattr(module, "_noise", lambda *_: (np.empty(0, int), np.empty(0, np.float32)))

    def point(rng, detector):
        at = np.array([[0.4, -0.6, 0.7]]) * detector.half
        return [module._particles(at, [[1.0, 0, 0]], [1.0], module._PROTON, False)]

    monkeypatch.setattr(module, "_neutrino", point)
    item = generate_event(0, 0, (1280, 2048), neutrino_fraction=1.0)
    assert (item["labels"] == 2).any() and not (item["labels"] == 1).any()
    centre = []
    for plane in item["image"]:
        row, column = torch.nonzero(plane, as_tuple=True)
        weight = plane[row, column] / plane.sum()
        centre.append((float((row * weight).sum()), float((column * weight).sum()) + 0.5))
    rows, columns = zip(*centre, strict=True)
    assert max(rows) - min(rows) < 0.5
    assert abs(columns[0] + columns[1] - 1024 - columns[2]) < 1.5
    half = module._Detector((1280, 2048)).half
    assert abs(columns[2] - 1024 - 0.7 * half[2] / module.WIRE_CM) < 1.5
    assert abs(rows[2] + 0.5 - 640 - (0.4 * half[0] + 0.5) / module.ROW_CM) < 2


def test_what_comes_late_looks_displaced_towards_the_cathode(monkeypatch):
    monkeypatch.setattr(module, "_cosmics", lambda *_: [])
    monkeypatch.setattr(module, "_noise", lambda *_: (np.empty(0, int), np.empty(0, np.float32)))

    def rows(x, t0):
        def point(rng, detector):
            at = np.array([[x, 0.1, 0.2]]) * detector.half
            return [module._particles(at, [[0, 1.0, 0]], [2.0], module._PROTON, False, t0)]

        monkeypatch.setattr(module, "_neutrino", point)
        item = generate_event(0, 0, (640, 1024), neutrino_fraction=1.0)
        return torch.nonzero(item["image"].sum(dim=(0, 2))).flatten().float().mean()

    for x, towards in ((-0.5, 1), (0.5, -1)):
        shift = rows(x, 40.0) - rows(x, 0.0)
        assert abs(shift - towards * 40) < 1.5
        assert rows(x, 170.0).isnan()  # past the cathode: outside the readout window


@pytest.mark.parametrize("fraction, low, high", [(0.0, 0, 0), (0.5, 12, 28), (1.0, 34, 40)])
def test_the_neutrino_fraction_is_kept(fraction, low, high):
    events = SyntheticEvents(40, seed=2, size=SMALL, neutrino_fraction=fraction)
    found = sum(bool((item["labels"] == 2).any()) for item in events)
    assert low <= found <= high


def test_an_event_of_background_alone_is_possible():
    events = SyntheticEvents(60, seed=2, size=SMALL, neutrino_fraction=0.0)
    assert any(not item["labels"].any() and item["image"].any() for item in events)


@pytest.mark.parametrize("size", [(32, 32), (64, 1024), (1000, 40)], ids=str)
def test_other_sizes_work(size):
    for item in SyntheticEvents(5, size=size):
        assert item["image"].shape == (3, *size)


@pytest.mark.parametrize(
    "arguments",
    [{"count": -1}, {"seed": -1}, {"size": (161, 256)}, {"size": (16, 256)}]
    + [{"neutrino_fraction": 1.5}],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SyntheticEvents(**{"count": 3, **arguments})


def test_a_generated_file_holds_the_generated_events(tmp_path):
    path, calls = tmp_path / "generated.h5", []
    generate_file(path, 3, 8, SMALL, progress=lambda *done: calls.append(done))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    file, events = EventFile(path, size=SMALL), SyntheticEvents(3, 8, SMALL)
    assert len(file) == 3
    for k in range(3):
        assert equal(file[k], events[k])
        assert torch.equal(file[k]["event_id"], events[k]["event_id"])
    with pytest.raises(FileExistsError):
        generate_file(path, 1, size=SMALL)


def test_an_interrupted_generation_leaves_no_file(tmp_path):
    def interrupt(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_file(tmp_path / "half.h5", 5, size=SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_room_does_not_import_matplotlib():
    script = "import sys, fullres.events; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
