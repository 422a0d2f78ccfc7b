"""The search for the largest batch that trains: its answers, and that failures cost their own."""

import contextlib
import json
import os
import threading
import time
from dataclasses import replace

import pytest
import torch

from fullres.bench import largest, record, steps

ROW = {
    "network": "small", "provider": "eager bf16", "image": "3x8x8", "memory_gib": 1.0, "batch": 9,
    "peak_gib": 0.95, "next_peak_gib": 1.05, "failed": "",
}  # fmt: skip
NEVER = float("inf")


def cell(provider="eager bf16", gib=1.0, network="small"):
    return largest.Cell(network, provider, (3, 8, 8), int(gib * 2**30), "cpu")


def fits(batch):
    """What an attempt finds that fits, of a tenth of a GiB an image."""
    return {
        "outcome": "fits", "peak": batch * 2**30 // 10, "reserved": None, "used": None,
        "retries": 0, "step_s": 0.5, "steps": 2, "predicted_peak": None, "stale": False,
    }  # fmt: skip


def below(limit, tried):
    def attempt(cell, batch, until):
        tried.append(batch)
        return fits(batch) if batch <= limit else {"outcome": "memory", "why": "", "stale": False}

    return attempt


def last(cell, counted, attempt, row=None, until=NEVER):
    *_, found = largest.largest(cell, row or cell.blank(), counted, attempt, until)
    return found


@pytest.mark.parametrize("start", [0, 1, 5, 8, 9, 10, 23])
@pytest.mark.parametrize("limit", [0, 1, 2, 8, 9, 10, 11, 40])
def test_the_answer_is_the_largest_that_fits_wherever_it_begins(start, limit):
    tried = []
    found = last(cell(), [{**ROW, "batch": start}], below(limit, tried))
    assert (found["batch"], found["next_batch"]) == (limit, limit + 1)
    assert not found["failed"] and found["attempts"] == len(tried) == len({*tried})
    if start in (limit, limit + 1) and start and limit:  # foretold, or one less
        assert len(tried) == 2
    if limit:
        assert found["peak_gib"] == pytest.approx(limit / 10)
        assert found["images_per_s"] == limit / 0.5
    else:
        assert found["peak_gib"] is None


def test_predictions_lie_beside_what_was_measured():
    found = last(cell(), [ROW], below(8, []))
    assert (found["predicted_batch"], found["batch"]) == (9, 8)
    assert found["predicted_peak_gib"] == pytest.approx(0.95 - 0.1)  # of that very batch
    ours = last(cell(steps.OURS), [], lambda *_: {**fits(1), "predicted_peak": 2**29}
                if _[1] == 1 else {"outcome": "memory"})  # fmt: skip
    assert ours["predicted_batch"] is None and ours["predicted_peak_gib"] == 0.5


def test_other_memories_are_foretold_along_a_line():
    assert largest.foretell([ROW], cell(gib=1.34)).batch == 12
    assert largest.foretell([ROW], cell(gib=0.5)).batch == 4
    assert largest.foretell([{**ROW, "batch": 0, "peak_gib": None}], cell()).batch == 0
    assert largest.foretell([{**ROW, "failed": "why"}], cell()).batch is None
    ours = [{**ROW, "provider": steps.OURS, "peak_gib": 0.9999, "next_peak_gib": 1.0}]
    assert largest.foretell(ours, cell(steps.OURS, 2.0)) == (20, None)
    full = {**ROW, "provider": "torch.compile, budget 1.0, bf16"}
    assert largest.foretell([full], cell("torch.compile, bf16")).batch == 9


def test_the_recorded_table_foretells_every_cell(tmp_path):
    rows = largest.recorded(tmp_path)
    for network in steps.PUBLISHED:
        for provider in largest.NAMES:
            found = [
                largest.foretell(
                    rows, largest.Cell(network, provider, steps.IMAGE, int(gib * 2**30), "cuda")
                ).batch
                for gib in (40, 79.1, 80, 139.8, 141)
            ]
            assert found == sorted(found) and found[-1] > 0
    (tmp_path / "batches.json").write_text(json.dumps({"rows": [ROW]}))
    assert largest.recorded(tmp_path) == [ROW]


def test_a_failure_is_said_and_what_was_found_stays():
    def attempt(cell, batch, until):
        if batch == 10:
            return {"outcome": "failed", "why": "running: its process died", "stale": True}
        return fits(batch)

    found = last(cell(), [ROW], attempt)
    assert found["failed"] == "batch 10: running: its process died"
    assert found["batch"] == 9 and found["next_batch"] is None and found["attempts"] == 2


def test_out_of_time_it_says_how_far_it_got_and_goes_on_there():
    tried = []

    def attempt(cell, batch, until):
        if len(tried) == 2:
            raise largest.UnfinishedError
        return below(5, tried)(cell, batch, until)

    stopped = last(cell(), [ROW], attempt)
    assert tried == [9, 8] and stopped["next_batch"] == 8 and stopped["batch"] is None
    assert stopped["failed"] == f"not finished {record.NOT_FINISHED}"
    del tried[:]
    found = last(cell(), [ROW], below(5, tried), stopped)
    assert found["batch"] == 5 and not found["failed"] and max(tried) < 8
    assert found["attempts"] == 2 + len(tried)
    late = last(cell(), [ROW], below(5, tried), until=time.time() - 1)
    assert late["failed"] == record.NOT_BEGUN and late["batch"] is None


# What runs in the worker in these tests: it travels by name.


def crash(cell, batch, ready):
    ready()
    os._exit(1)


def hang(cell, batch, ready):
    ready()
    time.sleep(60)


def raises(cell, batch, ready):
    raise ValueError("no such network")


def test_a_crash_and_a_hang_end_as_failures_and_free_the_device(monkeypatch):
    turn = threading.Lock()
    monkeypatch.setattr(largest, "RUNNING", 1.0)
    trial = largest.Attempts(turn)
    for work, why in (
        (crash, "its process died"),
        (hang, "running took more than 1 s"),
        (raises, "ValueError: no such network"),
    ):
        monkeypatch.setattr(largest, "attempt", work)
        found = trial(cell(), 1, NEVER)
        assert found["outcome"] == "failed" and why in found["why"]
        assert not turn.locked()
    monkeypatch.setattr(largest, "attempt", hang)
    for seconds in (0.1, 4.0):  # while it gets ready, while it waits for its turn
        with pytest.raises(largest.UnfinishedError):
            trial(cell(), 1, time.time() + seconds)
        turn.acquire(blocking=False)
    trial.end()


def test_on_a_card_the_allocator_is_asked_and_held_to_the_memory(monkeypatch):
    class Card:
        total_memory = 4 * 2**30

    state = {"limit": None, "reserved": 2**30}
    for name, result in {
        "get_device_properties": lambda: Card,
        "set_per_process_memory_fraction": lambda share: state.update(limit=share),
        "reset_peak_memory_stats": lambda: None, "synchronize": lambda: None,
        "max_memory_allocated": lambda: 2**29, "mem_get_info": lambda: (2**30, 4 * 2**30),
        "max_memory_reserved": lambda: state["reserved"],
        "memory_stats": lambda: {"num_alloc_retries": 3},
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, result)

    def provider(*args, device, ready, **options):
        assert device == "cuda" and state["limit"] is None  # nothing is on the device before
        ready()
        return steps.PROVIDERS["eager float32"](*args, device="cpu", **options)

    monkeypatch.setitem(steps.PROVIDERS, "eager bf16", provider)
    place, told = replace(cell(), device="cuda", image=(3, 16, 16)), []
    found = largest.attempt(place, 2, lambda: told.append(state["limit"]))
    assert found["outcome"] == "fits" and told == [None] and state["limit"] == 0.25
    assert (found["peak"], found["reserved"], found["used"]) == (2**29, 2**30, 3 * 2**30)
    assert found["retries"] == 3 and found["steps"] == 2 and found["step_s"] > 0
    state |= {"limit": None, "reserved": 2**30 + 1}  # an allocator that does not mind its limit
    assert largest.attempt(place, 2, lambda: None)["outcome"] == "memory"


def test_a_cards_cells_come_by_importance_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    class Card:
        total_memory = int(79.1 * 2**30)  # of an 80 GB card: no 80 GiB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "card")
    monkeypatch.setattr(largest, "Behind", lambda calls: contextlib.nullcontext())
    monkeypatch.setattr(record, "_commit", lambda: "abc")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    tried, most = [], 20

    class Attempts:
        def __init__(self, turn):
            assert "expandable_segments" in os.environ["PYTORCH_ALLOC_CONF"]

        def __call__(self, cell, batch, until):
            if len(tried) == most:
                raise largest.UnfinishedError
            tried.append(cell)
            limit = largest.foretell(largest.recorded(tmp_path), cell).batch
            return fits(batch) if batch < limit else {"outcome": "memory", "why": ""}

        def end(self):
            pass

    monkeypatch.setattr(largest, "Attempts", Attempts)
    rows = largest.run(tmp_path, workers=1)
    assert len(rows) == 3 * 7 * 2 == len({largest._key(row) for row in rows})
    assert [cell.provider for cell in tried[:6]] == [steps.OURS] * 6
    assert len(tried) == most and all(cell.memory == 40 * 2**30 for cell in tried)
    left = [row for row in rows if record.NOT_FINISHED in row["failed"]]
    done = [row for row in rows if not row["failed"]]
    assert len(left) + len(done) == len(rows) and left and done
    most = 10**6
    rows = largest.run(tmp_path, workers=1)
    assert not any(row["failed"] for row in rows)
    assert all(row["batch"] == max(0, row["predicted_batch"] - 1) for row in rows)
    compiled = [cell.provider in steps.COMPILED for cell in tried]
    assert compiled == sorted(compiled)  # last, as they take longest
    seen = {(cell.network, cell.provider, cell.memory): cell.whole for cell in tried}
    assert len(seen) == len(rows) and sum(seen.values()) == len(rows) // 2
    once = len(tried)
    assert largest.run(tmp_path, workers=1) == rows and len(tried) == once


def test_out_of_memory_is_known_from_what_is_said():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
    ):
        assert largest._failure(error)["outcome"] == "memory"
    assert largest._failure(RuntimeError("an illegal memory access"))["outcome"] == "failed"


def test_real_steps_in_processes_under_a_simulated_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record, "_commit", lambda: "abc")
    monkeypatch.setattr(largest, "environment", lambda: {"commit": "abc"})
    options = {"image": (3, 48, 64), "memories": (0.0025,)}
    names = ("fullres, bf16", "eager bf16")
    counted = {**ROW, "provider": names[0], "image": "3x48x64", "batch": 8, "memory_gib": 0.0025}
    count = largest._count_small  # of ours it takes longer than the search
    monkeypatch.setattr(
        largest,
        "_count_small",
        lambda cells: [counted, *count(c for c in cells if "eager" in c.provider)],
    )
    rows = largest.run(tmp_path, providers=names, **options)
    ours, eager = rows
    assert not ours["failed"] and not eager["failed"]
    assert ours["batch"] > eager["batch"] > 0
    for row in rows:
        assert row["next_batch"] == row["batch"] + 1
        assert row["peak_gib"] <= row["memory_gib"] and "simulated" in row["device"]
        assert row["peak_gib"] == pytest.approx(row["predicted_peak_gib"], rel=0.02)
        assert row["predicted_batch"] - row["batch"] in (0, 1)
    printed = capsys.readouterr().out
    assert "NOT RUN ON A CARD" in printed and f"{ours['batch']} (" in printed
    assert (tmp_path / "largest.png").stat().st_size > 1000
    assert [p.suffix for p in (tmp_path / "plans" / "abc").iterdir()] == [".json"]

    monkeypatch.setattr(largest, "Attempts", None)  # what is known is not tried again
    assert largest.run(tmp_path, providers=names, **options) == rows
