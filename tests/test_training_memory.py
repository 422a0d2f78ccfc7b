"""Training for a budget of memory: the same losses, the plan kept, the prediction checked."""

import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from fullres import Plan, plan
from fullres.engine.convert import conversions, programs
from fullres.engine.plan import InfeasibleError
from fullres.training import memory, run
from fullres.training.callbacks import MemoryCheck
from fullres.training.checkpoint import load
from fullres.training.config import TrainConfig
from fullres.training.curves import read_curves
from fullres.training.module import SegmentationModule, build_network, build_optimizer
from fullres.training.prediction import load_model
from fullres.training.run import train

TINY = "filters=4,depth=2,level_blocks=1,deepest_blocks=1,deepest_channels=8,deepest_kernel=3"
LOOSE = "1GiB"


def options(out: Path, **changes) -> dict:
    return {
        "synthetic": True,
        "events": 5,
        "image_size": "64x96",
        "preset": "a21",
        "network": TINY,
        "steps": 3,
        "workers": 0,
        "device": "cpu",
        "memory": LOOSE,
        "out": str(out),
        **changes,
    }


def planned(config: TrainConfig, **changes) -> tuple[TrainConfig, Plan]:
    network, optimizer = partial(build_network, config), partial(build_optimizer, config)
    return memory.plan_run(config, network, optimizer, accelerator="cpu", **changes)


def least(config: TrainConfig) -> int:
    with pytest.raises(InfeasibleError) as error:
        planned(dataclasses.replace(config, memory="1"))
    return error.value.least


def losses(folder: Path) -> list[float]:
    curve = read_curves(folder)["training/loss"]
    return [curve[step] for step in sorted(curve)]


@pytest.fixture(scope="module")
def loose(tmp_path_factory) -> Path:
    """A run of three steps with more memory than it needs."""
    out = tmp_path_factory.mktemp("loose")
    train(TrainConfig(**options(out, batch_size=2)))
    return out


# The same computation


def test_losses_do_not_depend_on_the_budget(loose, tmp_path, capsys, monkeypatch):
    trained, module = [], run.SegmentationModule
    monkeypatch.setattr(
        run, "SegmentationModule", lambda c, model, n: trained.append(model) or module(c, model, n)
    )
    tight = least(TrainConfig(**options(tmp_path, batch_size=2)))
    train(TrainConfig(**options(tmp_path, batch_size=2, memory=str(tight))))
    plans = [Plan.load(folder / memory.PLAN) for folder in (loose, tmp_path)]
    assert plans[1].peak_bytes <= tight < plans[0].peak_bytes
    assert plans[1].time_ratio > plans[0].time_ratio == 1
    assert any(part.again for part in plans[1].segments)
    running = programs(trained[0])
    assert all(running[part.name].again == part.again for part in plans[1].segments)
    assert losses(loose) == losses(tmp_path) and len(losses(loose)) == 3
    a, b = (load(folder / "last.ckpt")["state_dict"] for folder in (loose, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert capsys.readouterr().out.splitlines()[0] == memory.summary(plans[1])


def test_maps_that_wait_in_host_memory_change_no_loss(loose, tmp_path, capsys):
    config = TrainConfig(**options(tmp_path, batch_size=2, host_memory="1GiB"))
    for share in (1.2, 1.4, 1.7, 2.0):
        tight = dataclasses.replace(config, memory=str(int(share * least(config))))
        if planned(tight)[1].host_bytes:
            break
    train(tight)
    found = Plan.load(tmp_path / memory.PLAN)
    assert 0 < found.host_bytes < 2**30 and found.peak_bytes <= found.memory
    assert f"{memory._gib(found.host_bytes)} of the host's" in capsys.readouterr().out
    assert losses(tmp_path) == losses(loose)


def test_plan_is_that_of_the_trainers_step(tmp_path):
    config = TrainConfig(
        **options(tmp_path, batch_size=3, loss="even", precision="bf16", optimizer="sgd")
    )
    _, found = planned(config)
    labels = 3 * 3 * 64 * 96
    want = plan(
        build_network(config),
        (3, 3, 64, 96),
        criterion=memory.pixel_criterion("even"),
        memory=LOOSE,
        dtype=torch.bfloat16,
        optimizer="momentum",
        reserve=labels,
    )
    assert (found.reserve, found.dtype, found.optimizer) == (labels, torch.bfloat16, "sgd")
    assert found.peak_bytes == want.peak_bytes and found.segments == want.segments
    assert found.report.optimizer == found.report.parameters  # the momentum


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"processes": 2}])
def test_gradients_that_outlast_the_step_are_reserved(changes, tmp_path):
    config = TrainConfig(**options(tmp_path, accumulate=changes.pop("accumulate", 1)))
    _, found = planned(config, **changes)
    assert found.reserve == 3 * 64 * 96 + found.report.parameters


def test_batch_normalisation_over_processes_is_planned(tmp_path):
    one = dataclasses.replace(TrainConfig(**options(tmp_path)), batch_size=2)
    every = dataclasses.replace(one, sync_batch_norm=True)
    assert planned(every)[1].peak_bytes == planned(one)[1].peak_bytes


def test_two_processes_train_as_one_with_the_whole_batch(loose, tmp_path):
    settings = options(tmp_path, sync_batch_norm=True)
    settings["memory"] = str(2 * least(TrainConfig(**settings)))
    words = ["--synthetic"]
    for name, value in settings.items():
        if name not in ("synthetic", "sync_batch_norm"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "fullres", "train", *words, "--sync-batch-norm"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("memory: ") == 1
    assert losses(tmp_path) == pytest.approx(losses(loose), rel=1e-3)


# The largest batch


def test_batch_size_auto_is_the_largest_that_fits(tmp_path):
    config = TrainConfig(**options(tmp_path, memory="8MiB", batch_size="auto", steps=1))
    train(config)
    chosen = yaml.safe_load((tmp_path / "config.yaml").read_text())["batch_size"]
    found = Plan.load(tmp_path / memory.PLAN)
    assert chosen == found.input_shape[0] > 1
    assert found.peak_bytes <= found.memory == 8 * 2**20
    with pytest.raises(InfeasibleError):
        planned(dataclasses.replace(config, batch_size=chosen + 1))
    train(dataclasses.replace(config, steps=2), resume="auto")  # the same batch, without a search
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["batch_size"] == chosen


def test_budget_is_what_the_device_has_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", {"SC_AVPHYS_PAGES": 5000, "SC_PAGE_SIZE": 4096}.get)
    assert memory.free_memory("cpu") == int(0.8 * 5000 * 4096)
    found = planned(TrainConfig(**options(tmp_path, memory="auto")))[1]
    assert found.memory == int(0.8 * 5000 * 4096)
    monkeypatch.setattr(memory.os, "sysconf", lambda name: -1)
    with pytest.raises(ValueError, match="memory: want bytes on this system"):
        memory.free_memory("cpu")


# Going on


@pytest.fixture
def plans(monkeypatch) -> list:
    """The plans that are made, rather than read."""
    made, step = [], memory.plan_step

    def noted(*args, **kwargs):
        made.append(step(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(memory, "plan_step", noted)
    return made


def test_resumed_run_uses_the_saved_plan(loose, tmp_path, plans, monkeypatch):
    settings = options(tmp_path, batch_size=2)
    step = SegmentationModule.training_step

    def deadly(self, batch, batch_idx):
        if batch_idx == 2:
            raise KeyError("the run is lost")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(SegmentationModule, "training_step", deadly)
        with pytest.raises(KeyError, match="the run is lost"):
            train(TrainConfig(**settings, checkpoint_every=2))
    assert len(plans) == 1
    train(TrainConfig(**settings), resume="auto")
    assert len(plans) == 1
    assert losses(tmp_path) == losses(loose)


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({}, True),
        ({"memory": "2GiB"}, False),
        ({"memory": "auto"}, False),
        ({"batch_size": 1}, False),
        ({"loss": "even"}, False),
        ({"precision": "bf16"}, False),
        ({"host_memory": "1GiB"}, False),
    ],
)
def test_saved_plan_is_used_for_the_same_step_alone(loose, changes, kept, plans):
    before = load(loose / "last.ckpt")["config"]
    config = TrainConfig.from_dict({**before, **changes})
    _, found = planned(config, before=before)
    assert (not plans) == kept
    assert found.input_shape[0] == config.batch_size


@pytest.mark.parametrize("harm", ["cut", "another network", "another budget"])
def test_saved_plan_that_cannot_be_used_is_made_again(loose, tmp_path, harm, plans):
    before = load(loose / "last.ckpt")["config"] | {"out": str(tmp_path)}
    saved = Plan.load(loose / memory.PLAN)
    wrong = tuple(dataclasses.replace(part, signature="no") for part in saved.segments)
    dataclasses.replace(saved, segments=wrong).save(tmp_path / memory.PLAN)
    if harm == "another budget":  # that of a run which ended before a checkpoint
        dataclasses.replace(saved, memory=saved.memory - 1).save(tmp_path / memory.PLAN)
    elif harm == "cut":
        (tmp_path / memory.PLAN).write_text("{")
    _, found = planned(TrainConfig.from_dict(before), before=before)
    assert plans and (found.segments, found.memory) == (saved.segments, saved.memory)


def test_automatic_budget_keeps_a_plan_that_still_fits(loose, tmp_path, monkeypatch, plans):
    config = TrainConfig(**options(tmp_path, batch_size=2, memory="auto"))
    before, saved = config.as_dict(), Plan.load(loose / memory.PLAN)
    memory.save_plan(saved, tmp_path)
    for free, kept in ((saved.peak_bytes, True), (saved.peak_bytes - 1, False)):
        monkeypatch.setattr(memory, "free_memory", lambda accelerator, free=free: free)
        found = planned(config, before=before)[1]
        assert (not plans) == kept and found.peak_bytes <= free


def test_checkpoint_of_a_planned_run_serves_predictions(loose):
    model, config = load_model(loose / "last.ckpt")
    assert config.memory == LOOSE and next(conversions(model), None) is not None
    with torch.no_grad():
        assert all(x.isfinite().all() for x in model(torch.zeros(1, 3, 64, 96)))


# The prediction


def test_measured_peak_is_compared(loose):
    found = Plan.load(loose / memory.PLAN)
    near, far = round(1.029 * found.peak_bytes), round(0.96 * found.peak_bytes)
    assert memory.comparison(found, near).endswith("measured (+2.9%)")
    line, largest = memory.comparison(found, far), found.report.at_peak[0]
    assert "measured (-4.0%); the largest at the predicted peak: " in line
    assert f"{largest.module} ({largest.operator}) {largest.bytes / 2**20:.3g} MiB" in line


def test_second_step_of_a_gpu_is_measured_once(loose, monkeypatch, capsys):
    """The counters are stand-ins: their order is what is tested."""
    found, happened = Plan.load(loose / memory.PLAN), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: happened.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: found.peak_bytes)
    check = MemoryCheck(TrainConfig(**options(loose, accumulate=2)), found)
    trainer, module = SimpleNamespace(is_global_zero=True), SimpleNamespace()
    for kind, lines in (("cpu", 0), ("cuda", 1)):
        module.device = torch.device(kind)
        for batch in range(8):
            check.on_train_batch_end(trainer, module, None, None, batch)
            printed = capsys.readouterr().out.splitlines()
            assert len(printed) == (lines if batch == 3 else 0), (kind, batch)
    assert happened == ["reset"]


# Bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"memory": "plenty"}, "memory: want bytes, or text such as '40GiB', got 'plenty'"),
        ({"policy": "series"}, "want policy or memory, not both; got policy='series' and memory='"),
        ({"precision": "fp64"}, "want precision fp32, bf16 or fp16 beside memory; got 'fp64'"),
        ({"memory": None, "batch_size": "auto"}, "want memory beside batch_size auto; got none"),
        ({"host_memory": "some"}, "host_memory: want bytes, or text such as '40GiB', got 'some'"),
        ({"memory": None, "host_memory": "1GiB"}, "want memory beside host_memory '1GiB'; got no"),
        ({"batch_size": "many"}, "want batch_size as int or auto; got 'many'"),
        ({"batch_size": "0"}, "want batch_size >= 1; got 0"),
        ({"batch_size": True}, "want batch_size as int or auto; got True"),
    ],
)
def test_bad_option_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(options(tmp_path, **changes))


def test_number_of_the_command_line_is_a_number(tmp_path):
    assert TrainConfig(**options(tmp_path, batch_size="3")).batch_size == 3


def test_several_processes_need_a_number_to_find_the_same_batch(tmp_path):
    config = TrainConfig(**options(tmp_path, memory="auto", batch_size="auto"))
    with pytest.raises(ValueError, match="want a number of bytes beside batch_size auto"):
        planned(config, processes=2)


def test_budget_that_does_not_suffice_leaves_nothing(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="memory: want at least .* for 1 x 3 x 64 x 96"):
        train(TrainConfig(**options(out, memory="100KiB")))
    assert not out.exists()
