"""The benchmark of scaling: its fits, what it predicts, where things end, and a run cut short."""

import json
import math
import time
import weakref
from concurrent.futures import Future
from dataclasses import replace
from unittest import mock

import pytest
import torch

from fullres.bench import batches, record, scaling, steps
from fullres.bench.scaling import Point
from fullres.bench.steps import GIB, Network
from fullres.bench.worker import FailedError
from fullres.engine.cards import HARDWARE
from fullres.models import UResNetConfig, uresnet

H200 = HARDWARE["h200"]
CONFIG = UResNetConfig(
    filters=2, depth=1, level_blocks=1, deepest_blocks=1, deepest_channels=4, final_blocks=1,
    residual=True, planes=3,
)  # fmt: skip
EAGER = Point("tiny", "eager bf16", (24, 40), 1, None)
PLANNED = replace(EAGER, provider="fullres, bf16")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    network = Network(lambda: uresnet(CONFIG), steps.pixel_labels, steps.pixel_loss)
    monkeypatch.setitem(steps.NETWORKS, "tiny", network)
    return network


@pytest.fixture
def committed(monkeypatch):
    """As in a checkout without changes, whose rows may be kept."""
    facts = record.environment() | {"commit": "abc"}
    monkeypatch.setattr(record, "environment", lambda: facts)


# Fits


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
def test_a_power_is_found(power):
    assert scaling.fit([(x, 3 * x**power) for x in (1, 10, 40, 1000)]) == pytest.approx(power)


def test_two_sizes_are_no_fit():
    assert scaling.fit([(1, 1), (2, 2), (2, 2.1)]) is None


def rows_of(points, **columns):
    rows = [scaling._row(point) | {"failed": ""} for point in points]
    for row in rows:
        row |= {name: value(row["pixels"]) for name, value in columns.items()}
    return rows


def test_growth_with_images_and_with_batches_is_fitted_apart():
    points = [p for p in scaling.points(gpu=False) if p.network == "a21" and p.device is None]
    rows = rows_of(points, predicted_peak_gib=lambda n: n * 1e-6, step_s=lambda n: 1e-9 * n**1.5)
    for row in rows:
        if row["batch"] > 1:
            row["predicted_peak_gib"] = row["batch"] ** 2
    found = {(r["provider"], r["axis"]): r for r in scaling.fits(rows)}
    assert len(found) == 6
    for (_, axis), row in found.items():
        assert row["step_exponent"] == pytest.approx(1.5) and row["peak_exponent"] is None
        if axis == "image":
            assert row["predicted_peak_exponent"] == pytest.approx(1)
        else:
            assert row["predicted_peak_exponent"] > 1.2
    assert found["eager bf16", "batch"]["step_points"] == 6
    assert found["eager bf16", "image"]["step_points"] == 5


def test_bytes_that_the_memory_limited_are_not_fitted_and_the_end_is_named():
    points = [Point("a21", "fullres, bf16", (n, n), 1, None) for n in (50, 100, 200, 400, 800, 900)]
    rows = rows_of(points, predicted_peak_gib=lambda n: min(n, 40000), step_s=lambda n: n)
    for row, ratio in zip(rows, (1, 1, 1, 1.3, None, None), strict=True):
        row["time_ratio"] = ratio
    for row in rows[4:]:
        row |= {"ends": "no plan", "predicted_peak_gib": None, "step_s": None}
    (found,) = scaling.fits(rows)
    assert found["predicted_peak_exponent"] == pytest.approx(1)
    assert (found["predicted_peak_points"], found["step_points"]) == (3, 4)
    assert found["ends"] == "1 x 3x800x800"


# What is predicted


def test_points_come_from_small_to_large():
    for gpu in (True, False):
        wanted = scaling.points(gpu)
        assert len(set(wanted)) == len(wanted)
        for n, point in enumerate(wanted):
            for other in wanted[:n]:
                alike = replace(other, image=point.image) == point or (
                    replace(other, batch=point.batch) == point
                )
                assert not alike or other.pixels < point.pixels
    assert {p.device for p in scaling.points(True)} == {"cuda"}
    assert {p.device for p in scaling.points(False)} == {"cpu", None}


@pytest.mark.parametrize("batch", [1, 3])
def test_eager_is_predicted_as_in_the_table_of_batches(tiny, tmp_path, batch):
    found = scaling.predict(replace(EAGER, batch=batch), None, H200, tmp_path)
    peak = round(found["predicted_peak_gib"] * GIB)
    assert batches.PROVIDERS["eager bf16"](tiny, (3, 24, 40))(peak)[:2] == (batch, peak)
    assert 0 < found["predicted_stored_gib"] < found["predicted_peak_gib"]


def test_ours_are_predicted_with_less_and_by_the_plan_that_runs(tmp_path):
    eager = scaling.predict(EAGER, None, H200, tmp_path)["predicted_peak_gib"]
    keep = scaling.predict(replace(EAGER, provider="fullres, keep, bf16"), None, H200, tmp_path)[
        "predicted_peak_gib"
    ]
    assert keep < 0.8 * eager
    budget = int(0.8 * keep * GIB)
    found = scaling.predict(PLANNED, budget, H200, tmp_path)
    assert found["predicted_peak_gib"] * GIB <= budget and found["time_ratio"] > 1
    plan = scaling._plan(PLANNED, None, H200, tmp_path)  # no other is made
    assert plan.peak_bytes == found["predicted_peak_gib"] * GIB and plan.memory == budget


def test_where_predictions_end_is_said(tmp_path):
    found = scaling.predict(PLANNED, 1024, H200, tmp_path)
    assert found["ends"].startswith("no plan") and "predicted_peak_gib" not in found
    small = replace(H200, memory=1024)
    assert "over an NVIDIA H200" in scaling.predict(EAGER, None, small, tmp_path)["ends"]
    on_card = replace(EAGER, device="cuda")
    assert scaling.predict(on_card, None, small, tmp_path)["ends"] == ""  # where it is tried
    broken = replace(EAGER, network="absent")
    with pytest.raises(KeyError):
        scaling.predict(broken, None, H200, tmp_path)


# What is measured


@pytest.fixture
def card(monkeypatch):
    """A card whose steps run on the CPU and whose allocator says what it is told."""
    said = mock.Mock(spec_set=("memory_allocated", "max_memory_allocated"))
    said.memory_allocated.return_value, said.max_memory_allocated.return_value = GIB, 3 * GIB
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, getattr(said, name))
    for name, provider in list(steps.PROVIDERS.items()):

        def on_cpu(*args, device, provider=provider, **options):
            assert device == "cuda"
            return provider(*args, device="cpu", **options)

        monkeypatch.setitem(steps.PROVIDERS, name, on_cpu)


@pytest.mark.parametrize("provider", ["eager bf16", "fullres, keep, bf16", "fullres, bf16"])
def test_steps_are_timed_and_their_memory_read(card, tmp_path, provider):
    point = replace(EAGER, provider=provider, device="cuda", batch=2)
    scaling.predict(point, None, H200, tmp_path)
    found = scaling._measured(point, tmp_path)
    assert 0 < found["fastest_s"] <= found["step_s"] <= found["slowest_s"]
    assert found["peak_gib"] == 2 and set(found) <= set(scaling._row(EAGER))
    assert torch.cuda.synchronize.call_count == scaling.STEPS
    assert torch.cuda.reset_peak_memory_stats.call_count == 1
    assert torch.cuda.empty_cache.called


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
    ],
    ids=["torch", "a library", "a bug"],
)
def test_too_little_memory_is_an_end_and_anything_else_a_failure(
    card, monkeypatch, tmp_path, error, ends
):
    monkeypatch.setitem(steps.PROVIDERS, "eager bf16", mock.Mock(side_effect=error))
    point = replace(EAGER, device="cuda")
    if ends:
        assert scaling._measured(point, tmp_path)["ends"].startswith("out of memory")
    else:
        with pytest.raises(RuntimeError, match="illegal"):
            scaling._measured(point, tmp_path)
    assert torch.cuda.empty_cache.called


def test_what_did_not_fit_is_freed_before_the_next(card, monkeypatch, tmp_path):
    class Large:
        def __init__(self):
            self.itself = self  # as modules and their hooks know each other

        def run(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

    alive = []

    def provider(*_, **__):
        step = Large()
        alive.append(weakref.ref(step))
        return step

    monkeypatch.setitem(steps.PROVIDERS, "eager bf16", provider)
    freed = mock.Mock(side_effect=lambda: alive.append(alive[0]()))
    monkeypatch.setattr(torch.cuda, "empty_cache", freed)
    assert scaling._measured(replace(EAGER, device="cuda"), tmp_path)["ends"]
    assert alive[1] is None


def test_a_loss_that_is_not_finite_is_a_failure(card, monkeypatch, tmp_path, tiny):
    bad = replace(tiny, loss=lambda out, labels: tiny.loss(out, labels) * math.nan)
    monkeypatch.setitem(steps.NETWORKS, "tiny", bad)
    with pytest.raises(FloatingPointError, match="nan"):
        scaling._measured(replace(EAGER, device="cuda"), tmp_path)


def test_each_outcome_has_its_row_and_an_end_spares_the_larger(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    images = [(24, 40), (48, 80), (96, 160)]
    points = [replace(EAGER, image=image, device="cuda") for image in images]
    more = replace(points[1], batch=2)
    elsewhere = replace(points[0], batch=9)  # as many pixels as what did not fit, another way
    ours = [replace(point, provider="fullres, keep, bf16") for point in points]
    outcomes = {
        points[0]: {"step_s": 1.0, "peak_gib": 2.0},
        points[1]: {"ends": "out of memory: so much"},
        elsewhere: {"step_s": 9.0},
        ours[0]: FailedError("its process died"),
        ours[1]: TimeoutError(),
        ours[2]: {"step_s": 3.0},
    }

    def worker(work, point, folder, until):
        assert work is scaling._measured
        if isinstance(outcomes[point], Exception):
            raise outcomes[point]
        return outcomes[point]

    rows = {point: scaling._row(point) for point in (*points, more, elsewhere, *ours, PLANNED)}
    kept = scaling._Table(tmp_path, rows)

    def settle(point, values):
        future = Future()
        future.set_result(values)
        scaling._settle(kept, point, future, worker, tmp_path, time.time() + 50)

    for point in rows:
        settle(point, {"predicted_peak_gib": 1.0, "ends": ""})
    assert rows[points[0]]["step_s"] == 1.0 and rows[points[0]]["failed"] == ""
    assert rows[points[1]]["ends"] == "out of memory: so much"
    for spared in (points[2], more):
        assert rows[spared]["ends"] == "out of memory already at 1 x 3x48x80"
        assert rows[spared]["predicted_peak_gib"] == 1.0 and rows[spared]["failed"] == ""
    assert rows[elsewhere]["step_s"] == 9.0
    assert rows[ours[0]]["failed"] == "its process died"
    assert record.NOT_FINISHED in rows[ours[1]]["failed"]
    assert rows[ours[2]]["step_s"] == 3.0  # a failure spares nothing
    assert rows[PLANNED]["failed"] == "" and rows[PLANNED]["step_s"] is None  # has no device
    kept.rows[ours[1]]["failed"] = ""
    future = Future()
    future.set_result({"ends": ""})
    scaling._settle(kept, ours[1], future, worker, tmp_path, math.inf)
    assert rows[ours[1]]["failed"] == "took over 60 s"  # where there was time left
    settle(ours[0], {"failed": "cannot be counted"})
    assert rows[ours[0]]["failed"] == "cannot be counted"
    assert json.loads((tmp_path / "scaling.json").read_text())["rows"]


# A whole run, in processes of its own


def test_a_run_is_recorded_drawn_and_kept(committed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling.os, "cpu_count", lambda: 1)  # each process takes seconds to start
    wanted = [
        Point("a21", "fullres, keep, float32", (64, 96), 1, "cpu"),
        Point("a21", "eager bf16", (1260, 2048), 64, None),
    ]
    rows = scaling.run(tmp_path, seconds=0, wanted=wanted)
    assert all(row["failed"] == record.NOT_BEGUN for row in rows)
    rows = scaling.run(tmp_path, wanted=wanted)
    assert [row["provider"] for row in rows] == [point.provider for point in wanted]
    ran, counted = rows
    assert (ran["device"], counted["device"]) == ("cpu", scaling.NOWHERE)
    assert ran["step_s"] > 0 and ran["peak_gib"] is None and 0.1 < ran["predicted_peak_gib"] < 0.2
    assert counted["step_s"] is None and 280 < counted["predicted_peak_gib"] < 290
    assert counted["ends"].startswith("over an NVIDIA H200") and not ran["ends"]
    assert not any(row["failed"] for row in rows)
    assert json.loads((tmp_path / "scaling.json").read_text())["rows"] == rows
    assert len(json.loads((tmp_path / "scaling_fits.json").read_text())["rows"]) == 2
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    assert not (tmp_path / "scaling.work").exists()
    assert "NOT RUN ON A CARD" in capsys.readouterr().out
    assert scaling.run(tmp_path, seconds=0, wanted=wanted) == rows


def test_points_that_failed_wait_for_the_others(monkeypatch, tmp_path):
    """What hangs in each call must not be all that a call does."""
    points = [replace(EAGER, batch=n) for n in (1, 2, 3)]
    rows = {point: scaling._row(point) for point in points}
    rows[points[0]]["failed"] = "its process died"
    asked = []

    class Pool:
        _processes = None

        def __init__(self, *_, **__):
            pass

        def submit(self, work, point, *_):
            asked.append(point)
            future = Future()
            future.set_result({"ends": ""})
            return future

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(scaling, "ProcessPoolExecutor", Pool)
    scaling._fill(scaling._Table(tmp_path, rows), tmp_path / "work", H200, math.inf)
    assert asked == [points[1], points[2], points[0]]
    assert not any(row["failed"] for row in rows.values())


def test_a_network_that_cannot_be_counted_is_a_failure_of_its_own(monkeypatch, tmp_path):
    def build():
        raise RuntimeError("no such network")

    network = Network(build, steps.pixel_labels, steps.pixel_loss)
    monkeypatch.setitem(steps.NETWORKS, "tiny", network)
    found = scaling.predict(EAGER, None, H200, tmp_path)
    assert found == {"failed": "RuntimeError: no such network"}
