"""A run is a function of its configuration: however it is interrupted, divided or resumed."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from fullres.models import PRESETS, UResNet
from fullres.training.callbacks import NonFiniteError
from fullres.training.checkpoint import load, save
from fullres.training.config import TrainConfig
from fullres.training.curves import read_curves
from fullres.training.data import StepBatches, open_events, training_loader
from fullres.training.module import SegmentationModule, build_model
from fullres.training.run import train

TINY = "filters=4,depth=2,level_blocks=1,deepest_blocks=1,deepest_channels=8,deepest_kernel=3"


def options(out: Path, **changes) -> dict:
    return {
        "synthetic": True,
        "events": 5,
        "image_size": "64x96",
        "preset": "a21",
        "network": TINY,
        "steps": 7,
        "workers": 0,
        "device": "cpu",
        "out": str(out),
        **changes,
    }


def curve(folder: Path, tag: str = "training/loss") -> dict[int, float]:
    return read_curves(folder)[tag]


def command(settings: dict, *more: str) -> list[str]:
    """The command line of these settings, without a run's surroundings."""
    words = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is not False:
            words += [option, str(value)]
    return [sys.executable, "-c", "from fullres.cli import main; main()", "train", *words, *more]


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load(one)["state_dict"], load(other)["state_dict"]
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A run of seven steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    train(TrainConfig(**options(out, flip=True, accumulate=2, val_split=0.4, validate_every=2)))
    return out


# The order of events


def test_all_processes_together_see_what_one_sees():
    one = list(StepBatches(7, 4, 9, seed=3))
    two = [list(StepBatches(7, 2, 9, seed=3, rank=r, world=2)) for r in range(2)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_every_event_once_an_epoch_in_another_order_each():
    where = [w for batch in StepBatches(6, 4, 6, seed=1) for w in batch]
    epochs = [[i for e, i in where if e == epoch] for epoch in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 4
    assert len(set(map(tuple, epochs))) > 1


def test_batches_after_a_resume_are_those_that_were_left():
    all_batches = list(StepBatches(5, 3, 8, seed=2))
    assert list(StepBatches(5, 3, 8, seed=2, start=5)) == all_batches[5:]


def test_workers_read_the_same_events_as_the_process_itself(tmp_path):
    batches = []
    for workers in (0, 2):
        config = TrainConfig(**options(tmp_path, flip=True, workers=workers))
        events, _ = open_events(config)
        loader = training_loader(config, events, steps=6, done=0, rank=0, world=1)
        batches.append(list(loader))
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["labels"], b["labels"])


# Resuming


@pytest.mark.parametrize("validate", [{}, {"val_split": 0.4}], ids=["plain", "validated"])
def test_a_run_that_had_ended_goes_on_for_more_steps(tmp_path, validate):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(TrainConfig(**options(whole, **validate, steps=4)))
    assert train(TrainConfig(**options(parts, **validate, steps=2))).steps == 2
    assert train(TrainConfig(**options(parts, **validate, steps=4)), "auto").steps == 4
    assert curve(parts) == curve(whole)
    assert_same_weights(parts / "last.ckpt", whole / "last.ckpt")
    assert train(TrainConfig(**options(parts, **validate, steps=4)), "auto").steps == 4


@pytest.mark.parametrize("stop", [3, 4], ids=["between validations", "at a validation"])
def test_resumed_run_takes_the_same_steps(whole_run, tmp_path, stop, monkeypatch):
    settings = options(tmp_path, flip=True, accumulate=2, val_split=0.4, validate_every=2)
    kill_at_step(monkeypatch, stop)
    with pytest.raises(Killed):
        train(TrainConfig(**settings, checkpoint_every=stop))
    monkeypatch.undo()
    assert load(tmp_path / "last.ckpt")["global_step"] == stop
    summary = train(TrainConfig(**settings), resume="auto")
    assert summary.steps == 7
    assert curve(tmp_path) == curve(whole_run)
    tag = "validation/mean_iou"
    assert curve(tmp_path, tag) == curve(whole_run, tag)
    assert sorted(curve(whole_run, tag)) == [2, 4, 6, 7]
    assert_same_weights(tmp_path / "last.ckpt", whole_run / "last.ckpt")
    assert_same_weights(tmp_path / "best.ckpt", whole_run / "best.ckpt")


class Killed(Exception):
    pass


def kill_at_step(monkeypatch, step: int) -> None:
    """End the run without warning in the step after the checkpoint."""
    training_step = SegmentationModule.training_step

    def deadly(self, batch, batch_idx):
        if self.trainer.global_step == step and batch_idx % 2 == 1:
            raise Killed
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationModule, "training_step", deadly)


def test_killed_process_resumes_exactly(tmp_path):
    settings = options(tmp_path / "killed", steps=40, checkpoint_every=3, workers=1)
    process = subprocess.Popen(command(settings))
    last = tmp_path / "killed" / "last.ckpt"
    wait_until(last.exists, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = load(last)["global_step"]
    assert 0 < done < 40 and done % 3 == 0
    subprocess.run(command(settings, "--resume", "auto"), check=True)
    settings["out"] = str(tmp_path / "whole")
    subprocess.run(command(settings), check=True)
    assert load(last)["global_step"] == 40
    assert_same_weights(last, tmp_path / "whole" / "last.ckpt")
    losses = curve(tmp_path / "whole")
    resumed = curve(tmp_path / "killed")
    assert sorted(resumed) == sorted(losses) == list(range(1, 41))
    assert resumed == losses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_signal_saves_and_exits_cleanly(tmp_path, number):
    settings = options(tmp_path, steps=100_000, checkpoint_every=100_000, workers=1)
    process = subprocess.Popen(
        command(settings), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert "step 1/" in process.stdout.readline()
    os.killpg(process.pid, number)  # as schedulers and terminals do: the readers get it too
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "stopped by a signal after optimizer step" in printed and "--resume auto" in printed
    assert load(tmp_path / "last.ckpt")["global_step"] > 0


def wait_until(condition, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, "the run ended early"
        time.sleep(0.05)
    pytest.fail("waited a minute in vain")


# Several processes


@pytest.mark.parametrize("preset", ["a21", "scc21"])
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, preset):
    # In float64, so that a wrong sum cannot pass for rounding.
    # Not Adam: a bias before a normalisation has no gradient but rounding's, and Adam scales it up.
    more = {"precision": "fp64", "optimizer": "sgd", "lr": 1e-2, "steps": 3}
    more["sync_batch_norm"] = preset == "a21"
    one = options(tmp_path / "one", preset=preset, batch_size=2, val_split=0.4, **more)
    train(TrainConfig(**one))
    two = command({**one, "batch_size": 1, "out": str(tmp_path / "two")})
    launch = [two[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, "-m", "fullres", *two[3:]], check=True, timeout=300)
    for tag in ("training/loss", "validation/loss", "validation/cosmic_iou"):
        a, b = curve(tmp_path / "one", tag), curve(tmp_path / "two", tag)
        assert a.keys() == b.keys()
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-6), tag
    a = load(tmp_path / "one" / "last.ckpt")["state_dict"]
    b = load(tmp_path / "two" / "last.ckpt")["state_dict"]
    before = build_model(TrainConfig(**one)).state_dict()
    assert a.keys() == b.keys() == before.keys()
    moved = 0.0
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-9, msg=name)
        moved = max(moved, (a[name] - before[name]).abs().max().item())
    assert moved > 1e-3


# What a run leaves


def test_checkpoint_is_the_networks_weights_and_the_options(whole_run):
    checkpoint = torch.load(whole_run / "last.ckpt", weights_only=True)
    config = TrainConfig.from_dict(checkpoint["config"])
    assert config.as_dict() == yaml.safe_load((whole_run / "config.yaml").read_text())
    numbers = dataclasses.replace(
        PRESETS["a21"],
        filters=4,
        depth=2,
        level_blocks=1,
        deepest_blocks=1,
        deepest_channels=8,
        deepest_kernel=3,
    )
    UResNet(numbers).load_state_dict(checkpoint["state_dict"], strict=True)


def test_the_runs_own_yaml_reproduces_it(whole_run, tmp_path):
    config = TrainConfig.read_options(whole_run / "config.yaml") | {"out": str(tmp_path)}
    train(TrainConfig.from_dict(config))
    assert curve(tmp_path) == curve(whole_run)


def test_best_checkpoint_is_that_of_the_best_validation(whole_run):
    scores = curve(whole_run, "validation/mean_iou")
    best = max(scores, key=lambda step: (scores[step], -step))
    assert load(whole_run / "best.ckpt")["global_step"] == best


def test_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    good = {"state_dict": {}, "config": {}, "global_step": 1}
    save(good, path)
    with pytest.raises(Exception, match="pickle"):
        save({"state_dict": lambda: None}, path)
    assert load(path) == good


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    settings = options(tmp_path, optimizer="sgd", lr=1e30, steps=50, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match=r"optimizer step \d+; .*checkpoint"):
        train(TrainConfig(**settings))
    last = tmp_path / "last.ckpt"
    if last.exists():
        for name, value in load(last)["state_dict"].items():
            assert value.isfinite().all(), name


def test_images_and_memory_are_measured(tmp_path):
    summary = train(TrainConfig(**options(tmp_path, steps=3)))
    assert summary.images_per_second > 0
    assert summary.peak_memory > 100 * 2**20
    assert set(curve(tmp_path, "training/peak_memory_gib")) == {1, 2, 3}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rate_warms_up_and_falls(tmp_path, schedule):
    train(TrainConfig(**options(tmp_path, steps=6, warmup=2, schedule=schedule, lr=3e-3)))
    rates = curve(tmp_path, "training/learning_rate")
    share = [1 / 3, 2 / 3] + [
        1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)
    ]
    assert list(rates.values()) == pytest.approx([3e-3 * s for s in share], rel=1e-5)


def test_bf16_trains_with_float32_weights(tmp_path):
    train(TrainConfig(**options(tmp_path, precision="bf16", steps=2)))
    state = load(tmp_path / "last.ckpt")["state_dict"]
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}


# Bad input, before any work is lost


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 0}, "want lr > 0; got 0.0"),
        ({"lr": "fast"}, "want lr as float; got 'fast'"),
        ({"loss": "dice"}, "want loss from focal, light, even, none, lin; got 'dice'"),
        ({"batch_size": 0}, "want batch_size >= 1; got 0"),
        ({"image_size": "1260"}, "want image_size as ROWSxCOLUMNS"),
        ({"synthetic": False}, "want data, the path of an event file, or synthetic"),
        ({"data": "events.h5"}, "want data, the path of an event file, or synthetic"),
        ({"epochs": 2}, "want steps or epochs, not both"),
        ({"val_split": 1.0}, r"want val_split in \[0, 1\)"),
        ({"speed": 3}, "unknown option speed"),
    ],
)
def test_bad_option_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(options(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preset": "vgg"}, "want preset from uresnet, a21, polaris, scc21; got 'vgg'"),
        ({"network": "width=3"}, "want in network one of filters.*got 'width=3'"),
        ({"network": "filters=many"}, "want in network filters=VALUE"),
        ({"precision": "fp16"}, "want a GPU for precision fp16"),
        ({"val_split": 0.01}, "want a val_split that leaves events on both sides"),
    ],
)
def test_run_that_cannot_work_leaves_nothing(tmp_path, changes, message):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**options(out, **changes)))
    assert not out.exists()


def test_second_run_does_not_overwrite_the_first(whole_run):
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume auto"):
        train(TrainConfig(**options(whole_run)))


def test_damaged_checkpoint_is_named(whole_run, tmp_path):
    contents = (whole_run / "last.ckpt").read_bytes()
    damaged = tmp_path / "last.ckpt"
    damaged.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(ValueError, match="last.ckpt: damaged, or no checkpoint"):
        train(TrainConfig(**options(tmp_path)), resume="auto")


def test_checkpoint_of_another_network_is_refused(whole_run, tmp_path):
    settings = options(tmp_path, network=TINY + ",final_blocks=1")
    with pytest.raises(ValueError, match="want network .*, as the run began"):
        train(TrainConfig(**settings), resume=str(whole_run / "last.ckpt"))


@pytest.mark.parametrize("policy", ["keep", "series"])
def test_fused_segments_train_as_torchs_layers_do(policy, tmp_path):
    """In float64: the same losses and weights, whatever segments keep."""
    for name in ("none", policy):
        train(TrainConfig(**options(tmp_path / name, precision="fp64", steps=3, policy=name)))
    losses = [curve(tmp_path / name) for name in ("none", policy)]
    assert losses[0].keys() == losses[1].keys()
    for step, loss in losses[0].items():
        assert math.isclose(loss, losses[1][step], rel_tol=1e-6), step
    a, b = (load(tmp_path / name / "last.ckpt")["state_dict"] for name in ("none", policy))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-6 * max(1, b[name].abs().max()), name
