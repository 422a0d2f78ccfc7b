"""`fullres predict` and the rest of the command line, as a user types it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fullres.events import EventFile, generate_file
from fullres.training.config import TrainConfig
from fullres.training.prediction import load_model, predict
from fullres.training.run import train

TINY = "filters=4,depth=2,level_blocks=1,deepest_blocks=1,deepest_channels=8,deepest_kernel=3"


def fullres(*words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fullres", *map(str, words)], capture_output=True, text=True
    )


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


@pytest.fixture(scope="module")
def events(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("events") / "events.h5"
    generate_file(path, 3, seed=5, size=(80, 128))
    return path


@pytest.fixture(scope="module")
def checkpoint(events) -> Path:
    out = events.parent / "run"
    train(
        TrainConfig(
            data=str(events),
            image_size="75x120",
            preset="a21",
            network=TINY,
            steps=3,
            workers=0,
            device="cpu",
            out=str(out),
        )
    )
    return out / "last.ckpt"


def test_labels_are_those_of_the_network_under_the_ids_of_the_data(events, checkpoint, tmp_path):
    made = predict(checkpoint, events, tmp_path, displays=0, device="cpu")
    model, config = load_model(checkpoint)
    scaled = EventFile(events, size=config.size, labels=False, log_unit=1.0)
    labels = EventFile(made.labels, size=(80, 128), charge=False)
    for index in range(3):
        with torch.no_grad():
            logits = model(scaled[index]["image"][None])
        expected = torch.stack([plane[0].argmax(0) for plane in logits]).to(torch.uint8)
        assert labels.shape(index) == EventFile(events, size=(80, 128)).shape(index)
        found = labels[index]["labels"]
        assert torch.equal(found[:, :75, :120], expected)
        assert not found[:, 75:].any() and not found[:, :, 120:].any()
        assert torch.equal(labels[index]["event_id"], scaled[index]["event_id"])


def test_metrics_are_those_of_all_pixels(events, checkpoint, tmp_path):
    made = predict(checkpoint, events, tmp_path, displays=0, device="cpu")
    truth = EventFile(events, size=(75, 120))
    labels = EventFile(made.labels, size=(75, 120), charge=False)
    right = sum((truth[i]["labels"] == labels[i]["labels"]).sum() for i in range(3))
    assert made.metrics["accuracy"] == pytest.approx(right.item() / (3 * 3 * 75 * 120), rel=1e-12)


def test_command_draws_and_reports(events, checkpoint, tmp_path):
    done = fullres(
        "predict", "--checkpoint", checkpoint, "--data", events, "--out", tmp_path, "--displays", 2
    )
    assert done.returncode == 0, done.stderr
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == ["event-00000.png", "event-00001.png"]
    assert all(
        p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 20_000 for p in pictures
    )
    assert "neutrino iou" in done.stdout and str(tmp_path / "labels.h5") in done.stdout


def test_data_without_truth_are_labelled_too(events, checkpoint, tmp_path):
    import h5py

    blind = tmp_path / "blind.h5"
    with h5py.File(events) as source, h5py.File(blind, "w") as target:
        source.copy("Events", target)
        source.copy("Data/sparse2d_sbndwire_group", target.create_group("Data"))
    made = predict(checkpoint, blind, tmp_path / "out", truth=False, displays=1, device="cpu")
    assert made.metrics == {} and len(made.displays) == 1
    with pytest.raises(ValueError, match="no such group"):
        predict(checkpoint, blind, tmp_path / "out", device="cpu")


def test_generate_writes_what_train_and_display_read(tmp_path):
    file, picture = tmp_path / "events.h5", tmp_path / "event.png"
    done = fullres("generate", file, "--events", 2, "--image-size", "64x96", "--seed", 3)
    assert done.returncode == 0 and str(file) in done.stdout
    assert len(EventFile(file, size=(64, 96))) == 2
    done = fullres("display", file, picture, "--event", -1)
    assert done.returncode == 0 and is_picture(picture), done.stderr
    again = fullres("generate", file, "--events", 2)
    assert again.returncode == 1 and str(file) in again.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--synthetic", "--lr", "-1"], "want lr > 0; got -1.0"),
        (["train", "--data", "nowhere.h5"], r"no event file .*nowhere\.h5"),
        (["train", "--config", "nowhere.yaml"], r"nowhere\.yaml: not a readable YAML file"),
        (
            ["train", "--synthetic", "--resume", "nowhere.ckpt"],
            r"nowhere\.ckpt: no such checkpoint",
        ),
        (
            ["predict", "--checkpoint", "nowhere.ckpt", "--data", "x.h5", "--out", "x"],
            r"nowhere\.ckpt: no such checkpoint",
        ),
        (["bench", "speed"], "want benchmarks from .*; got speed"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(words, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fullres", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing was left behind"
