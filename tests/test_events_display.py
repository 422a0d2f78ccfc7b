"""Displays: nothing hot is lost, truth is drawn as given, and nothing global is touched."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fullres.events import draw_event, generate_event
from fullres.events.display import ERRORS, _errors, _iou, _pooled, _window

SIZE = (1260, 2048)


@pytest.mark.parametrize("size", [(1260, 2048), (1280, 2048), (63, 77), (641, 5000)], ids=str)
@pytest.mark.parametrize("corner", ["first", "last", "inside"])
def test_a_single_hot_pixel_survives_pooling(size, corner):
    plane = np.zeros(size, np.float32)
    at = {"first": (0, 0), "last": (size[0] - 1, size[1] - 1), "inside": (size[0] // 3, 40)}
    plane[at[corner]] = 7.0
    picture = _pooled(plane, widen=True)
    assert picture.max() == 7.0
    assert picture.shape[0] <= 640 and picture.shape[1] <= 1024


def test_a_single_hot_pixel_is_seen_in_the_picture(tmp_path):
    import matplotlib.image

    image = torch.zeros(3, *SIZE)
    image[:, 0, 0] = 50.0  # the same scale of colours for both
    draw_event(image, path=tmp_path / "without.png")
    image[1, 700, 1301] = 50.0
    draw_event(image, path=tmp_path / "with.png")
    a, b = (matplotlib.image.imread(tmp_path / f"{n}.png") for n in ("without", "with"))
    changed = (np.abs(a - b).max(axis=2) > 0.3).sum()
    assert 1 <= changed <= 30


def test_every_given_array_has_its_panels_and_the_errors_their_numbers():
    item = generate_event(1, 2, (160, 256), neutrino_fraction=1.0)
    image, labels = item["image"], item["labels"]
    prediction = labels.clone()
    prediction[0][labels[0] == 2] = 1
    panels = {
        3: (image,),
        6: (image, labels),
        12: (image, labels, prediction),
    }
    for count, arrays in panels.items():
        figure = draw_event(*arrays, event_id=item["event_id"], title="generated")
        axes = [ax for ax in figure.axes if ax.get_xlabel() == "wire"]
        assert len(axes) == count
        assert "run 1, subrun 0, event 2" in figure._suptitle.get_text()
    titles = [ax.get_title(loc="right") for ax in axes if ax.get_title(loc="left") == "errors"]
    assert len(titles) == 3
    cosmic = _iou(prediction[0].numpy(), labels[0].numpy(), 1)
    assert f"cosmic {cosmic:.3f}" in titles[0] and "neutrino 0.000" in titles[0]
    assert "neutrino 1.000" in titles[1]


def test_intersection_over_union_counts_pixels():
    truth, prediction = np.array([[2, 2, 1, 0]]), np.array([[2, 1, 1, 0]])
    assert _iou(prediction, truth, 2) == 0.5 and _iou(prediction, truth, 1) == 0.5
    assert np.isnan(_iou(truth, truth, 3))


def test_each_error_has_its_kind():
    labels, prediction = np.repeat([0, 1, 2], 3), np.tile([0, 1, 2], 3)
    kinds = [ERRORS[k].split()[0] for k in _errors(labels, prediction)]
    assert kinds[0] == kinds[4] == kinds[8] == "correct"
    assert kinds[1] == kinds[3] == "cosmic"
    assert kinds[2] == kinds[5] == "falsely"
    assert kinds[6] == kinds[7] == "missed"


def test_the_zoom_is_around_the_neutrino_and_its_rows_are_shared():
    mask = np.zeros((3, *SIZE), bool)
    mask[0, 300:500, 1000:1200] = mask[2, 300:500, 40:60] = True
    rows, columns = _window(mask)
    assert rows.start <= 305 and rows.stop >= 495 and rows.stop - rows.start < 400
    assert columns[0].start <= 1005 and columns[0].stop >= 1195
    assert columns[2].start >= 0 and columns[2].stop >= 59
    assert len(columns) == 3 and _window(np.zeros_like(mask)) is None


@pytest.mark.parametrize("image", [torch.zeros(3, 40, 50), -torch.ones(3, 40, 50)], ids=["0", "-1"])
def test_an_event_without_charge_can_be_drawn(image, tmp_path):
    labels = torch.zeros(image.shape, dtype=torch.uint8)
    draw_event(image, labels, labels, tmp_path / "empty.png", zoom=True)
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_wrong_shapes_are_refused():
    image = torch.zeros(3, 40, 50)
    with pytest.raises(ValueError, match="image"):
        draw_event(image[0])
    with pytest.raises(ValueError, match="labels"):
        draw_event(image, torch.zeros(3, 40, 51))
    with pytest.raises(ValueError, match="prediction"):
        draw_event(image, prediction=torch.zeros(3, 41, 50))


def test_drawing_needs_no_screen_and_leaves_pyplot_alone(tmp_path):
    script = (
        "import sys, torch; from fullres.events import draw_event\n"
        f"draw_event(torch.ones(3, 40, 50), path={str(tmp_path / 'a.png')!r})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    environment = {"PATH": "", "MPLBACKEND": "TkAgg", "MPLCONFIGDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0
