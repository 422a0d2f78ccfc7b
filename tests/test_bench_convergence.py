"""The benchmark of convergence: what it compares, what decides, and runs that are cut short."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import torch

from fullres.bench import convergence, record, worker
from fullres.bench.convergence import ENDS, METRICS, ORDERS, REFERENCE, Setting, judged
from fullres.bench.worker import FailedError, Worker

NETWORK = "filters=2,depth=2,level_blocks=1,deepest_blocks=1,deepest_channels=4,deepest_kernel=3"
TINY = Setting(
    (48, 64), 8, 4, 1, {"bf16": "0.48MiB", "fp32": "0.9MiB"}, NETWORK, "cpu", 0,
    options={"loss": "light", "lr": 1e-2},
)  # fmt: skip
OURS = "fullres, bf16"


@pytest.fixture
def few(monkeypatch):
    """Four of the runs, to save time."""
    names = (REFERENCE, OURS, ORDERS[0], "fullres, float32")
    monkeypatch.setattr(convergence, "RUNS", {n: convergence.RUNS[n] for n in names})
    monkeypatch.setattr(convergence, "ORDERS", ORDERS[:1])


@pytest.fixture
def committed(monkeypatch):
    """As in a checkout without changes, whose rows may be kept."""
    facts = record.environment() | {"commit": "abc"}
    monkeypatch.setattr(record, "environment", lambda: facts)


def ends(**changed):
    return dict.fromkeys(("final_loss", "held_out_loss", *METRICS), 0.5) | changed


def rows_of(**ends_by_run):
    """A row a run; the eager runs of float32 end with 0.5, 0.52 and 0.49 everywhere."""
    known = {
        name: ends(**dict.fromkeys(ENDS, value))
        for name, value in zip((REFERENCE, *ORDERS), (0.5, 0.52, 0.49), strict=True)
    }
    known |= {OURS: ends(), "fullres, float32": ends(), "eager bf16": ends()} | ends_by_run
    return [{"provider": name, "failed": "", **known[name]} for name in convergence.RUNS]


def judged_of(rows, curves=()):
    losses = {name: [4.0, 2.0, 1.0, 1.0] for name in convergence.RUNS} | dict(curves)
    return {row["provider"]: row for row in judged(rows, losses, window=2)}


def test_runs_are_trained_alike_recorded_and_kept(few, committed, tmp_path, capsys):
    rows = convergence.run(tmp_path, seconds=0, setting=TINY)
    assert all("not begun" in row["failed"] for row in rows)
    assert "not decided" in capsys.readouterr().out

    rows = convergence.run(tmp_path, setting=TINY)
    known = {row["provider"]: row for row in rows}
    exact, rounded = (known[n]["first_loss_gap"] for n in ("fullres, float32", OURS))
    assert 0 < exact < 1e-5 < rounded < 1e-2  # three computations, not one
    assert known[REFERENCE]["first_loss_gap"] == known[REFERENCE]["largest_gap"] == 0
    for row in rows:
        assert row["device"] == "cpu" and row["peak_gib"] is None and row["images_per_s"] > 0
        assert row["steps"] == 8 and not row["failed"] and row["largest_gap"] < 0.2
        assert all(0 <= row[name] <= 1 for name in METRICS)
    assert json.loads((tmp_path / "convergence.json").read_text())["rows"] == rows
    points = json.loads((tmp_path / "convergence_curves.json").read_text())["rows"]
    assert [point["step"] for point in points] == list(range(1, 9))
    last = [point[REFERENCE] for point in points[-4:]]
    assert known[REFERENCE]["final_loss"] == pytest.approx(sum(last) / 4)
    assert (tmp_path / "convergence.png").stat().st_size > 1000
    assert not (tmp_path / "convergence.work").exists()
    assert "NOT RUN ON A CARD" in capsys.readouterr().out

    assert convergence.run(tmp_path, seconds=0, setting=TINY) == rows
    other = dataclasses.replace(TINY, steps=9)
    assert all(row["failed"] for row in convergence.run(tmp_path, seconds=0, setting=other))


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path):
    setting = dataclasses.replace(TINY, steps=40)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for work in (whole, parts):
        convergence._prepare(work, setting)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    want = convergence._trained(REFERENCE, setting, whole, float("inf"))
    assert before == (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    first = convergence._trained(REFERENCE, setting, parts, time.time())
    assert 0 < first["steps"] < 40
    assert "goes on" in first["failed"] and first["final_loss"] is first["accuracy"] is None
    assert first["losses"] == want["losses"][: first["steps"]]
    rest = convergence._trained(REFERENCE, setting, parts, float("inf"))
    assert rest | {"images_per_s": 0} == want | {"images_per_s": 0}


class Here(Worker):
    """Calls in this process, which costs no time to start."""

    def __call__(self, work, *args, until):
        result, failed = worker._answer(work, args)
        if failed:
            raise FailedError(failed)
        return result


def test_a_run_that_fails_costs_only_itself(few, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(convergence, "Worker", Here)
    monkeypatch.delitem(convergence.RUNS, "fullres, float32")
    setting = dataclasses.replace(TINY, steps=2, memory={"bf16": "1KiB"})
    rows = {row["provider"]: row for row in convergence.run(tmp_path, setting=setting)}
    assert "memory: want at least" in rows[OURS]["failed"] and rows[OURS]["final_loss"] is None
    assert not rows[REFERENCE]["failed"] and not rows[ORDERS[0]]["failed"]
    assert f"{OURS}: not decided" in capsys.readouterr().out
    assert (tmp_path / "convergence.work" / "events-0.h5").exists()  # for the next call


def test_a_worker_outlives_nothing_that_it_should_not():
    with Worker() as call:
        first = call(os.getpid)
        assert call(os.getpid) == first != os.getpid()
        with pytest.raises(FailedError, match="invalid literal"):
            call(int, "word")
        second = call(os.getpid)
        assert second != first  # what has failed is not trusted again
        with pytest.raises(FailedError, match="died"):
            call(os._exit, 3)
        third = call(os.getpid)
        with pytest.raises(TimeoutError, match="not answered"):
            call(time.sleep, 60, until=time.time() + 0.2)
        fourth = call(os.getpid)
    for process in (first, second, third, fourth):
        for _ in range(100):
            if not Path(f"/proc/{process}").exists():
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"process {process} is still there")


def test_kernels_of_ours_are_compiled_ahead_in_one_configuration(monkeypatch, tmp_path):
    """As on a card, but for what the launches become."""
    from fullres.bench import steps
    from fullres.kernels import launches

    built = []
    monkeypatch.setattr(launches, "build", lambda made, out: built.append((made, out)))
    monkeypatch.setattr(steps, "compile_target", lambda: "sm_90")
    monkeypatch.setattr(os, "nice", lambda by: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    convergence._compile("fullres, float32", TINY, tmp_path)
    ((made, out),) = built
    chosen = {}
    for launch in made:
        tuned = launch.tuned.split()
        constants = (word for word in launch.label.split() if word.partition("=")[0] in tuned)
        chosen.setdefault(launch.kernel.split(":")[1], set()).add(tuple(constants))
    assert {"conv2d_fwd_kernel", "softmax_focal_loss_kernel"} <= set(chosen)
    assert all(len(configurations) == 1 for configurations in chosen.values())
    assert (out / "cache").resolve() == tmp_path / "cache"


@pytest.mark.parametrize("fails", [False, True])
def test_runs_wait_for_what_is_compiled_but_not_for_what_cannot_be(monkeypatch, tmp_path, fails):
    asked = []

    class Builder(Worker):
        def __call__(self, work, name, *_, **__):
            asked.append((work, name))
            if fails:
                raise FailedError("no compiler")

    monkeypatch.setattr(convergence, "Worker", Builder)
    card = dataclasses.replace(TINY, device="gpu")
    names = [REFERENCE, OURS, "fullres, float32"]
    with convergence._compiled_ahead(names, card, tmp_path) as compiled:
        assert compiled.wait(10)
    assert asked == [(convergence._compile, name) for name in names[1 : 2 if fails else 3]]
    for setting, chosen in ((TINY, names), (card, names[:1])):
        with convergence._compiled_ahead(chosen, setting, tmp_path) as compiled:
            assert compiled.is_set()
    assert len(asked) == (1 if fails else 2)


def test_another_order_is_another_order_of_the_same_events(tmp_path):
    from fullres.events import EventFile

    convergence._prepare(tmp_path, TINY)
    files = [EventFile(tmp_path / f"events-{n}.h5", size=TINY.image) for n in range(3)]
    names = [[tuple(event["event_id"].tolist()) for event in file] for file in files]
    assert len({tuple(each) for each in names}) == 3
    assert sorted(names[0]) == sorted(names[1]) == sorted(names[2])
    held_out = EventFile(tmp_path / "held_out.h5", size=TINY.image)
    pixels = [held_out[0]["image"], *(event["image"] for event in files[0])]
    assert not any(torch.equal(pixels[0], each) for each in pixels[1:])


def test_an_end_is_outside_where_it_is_further_off_than_orders_are_apart():
    """The spread is 0.03, from 0.49 to 0.52."""
    found = judged_of(rows_of(**{OURS: ends(held_out_loss=0.5301, neutrino_iou=0.4699)}))
    assert found[OURS]["outside_spread"] == "held_out_loss, neutrino_iou"
    found = judged_of(rows_of(**{OURS: ends(held_out_loss=0.5299, neutrino_iou=0.4701)}))
    assert found[OURS]["outside_spread"] == ""
    assert found[REFERENCE]["outside_spread"] is None  # nothing is held against itself
    said = convergence.verdict(list(found.values()))
    assert "all 5 ends are within" in said[0]
    broken = judged_of(rows_of(**{OURS: ends(final_loss=float("nan"))}))
    assert broken[OURS]["outside_spread"] == "final_loss"


def test_nothing_is_decided_while_an_order_is_missing():
    rows = rows_of()
    rows[2]["failed"] = "stopped half-way"
    found = judged_of(rows)
    assert found[OURS]["outside_spread"] is None
    assert "not decided" in convergence.verdict(list(found.values()))[0]


@pytest.mark.parametrize(("loss", "wrong"), [(4.01, False), (4.1, True), (float("nan"), True)])
def test_a_first_loss_beyond_rounding_is_wrong(loss, wrong):
    found = judged_of(rows_of(), {OURS: [loss, 2.0, 1.0, 1.0]})
    assert bool(found[OURS]["wrong"]) == wrong
    assert ("WRONG" in convergence.verdict(list(found.values()))[0]) == wrong
    exact = judged_of(rows_of(), {"fullres, float32": [4.01, 2.0, 1.0, 1.0]})
    assert exact["fullres, float32"]["wrong"]  # float32 is held to less


def test_the_largest_gap_is_of_the_smoothed_losses_after_a_first_pass():
    found = judged_of(rows_of(), {OURS: [5.0, 2.0, 1.0, 1.3]})
    assert found[OURS]["largest_gap"] == pytest.approx(1 / 6)  # of means of two, 3 and 3.5
    assert judged_of(rows_of(), {OURS: []})[OURS]["largest_gap"] is None
    assert convergence.smoothed([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
