"""`make gpu`: sections of their own, boxes of time, what is kept, and what is told of failures."""

import io
import json
import sys
import tarfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fullres.bench import SECTIONS, gpu, record, summary

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture
def facts(monkeypatch):
    """What a clean checkout would say of this machine; a test changes it."""
    facts = {**record.environment(), "commit": "abc1234", "date": "2026-01-02"}
    monkeypatch.setattr(gpu, "environment", lambda: facts)
    monkeypatch.setattr(record, "environment", lambda: facts)
    return facts


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(time=lambda: clock.now, perf_counter=lambda: clock.now)
    monkeypatch.setattr(gpu, "time", fake)
    return clock


@pytest.fixture
def sections(monkeypatch, clock, facts):
    """Sections that take what `takes` says of their boxes, and come out as `outcomes` say."""
    ran, takes, outcomes = [], {}, {}

    def section(name, out, allowed):
        ran.append((name, round(allowed)))
        clock.now += takes.get(name, 1.0) * allowed
        outcome = outcomes.get(name, [gpu.PASSED])
        outcome = outcome.pop(0) if len(outcome) > 1 else outcome[0]
        left = outcome == gpu.INCOMPLETE
        return gpu._row(name, outcome, 1.0, f"3 {record.NOT_FINISHED}" if left else "fine")

    monkeypatch.setattr(gpu, "_section", section)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return SimpleNamespace(ran=ran, takes=takes, outcomes=outcomes)


def run(out, *arguments):
    return gpu.main(["--out", str(out), "--begun", "1000", *arguments])


def outcomes(out):
    rows = json.loads((out / "gpu.json").read_text())["rows"]
    return {row["section"]: row["outcome"] for row in rows}


@needs_no_gpu
def test_says_that_there_is_no_gpu_and_fails(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "NO GPU" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_the_boxes_fit_in_ten_minutes_and_are_of_modules_there_are():
    assert sum(box for _, box in SECTIONS.values()) <= gpu.SECONDS < 600
    assert gpu.LAST < min(box for _, box in SECTIONS.values())


def test_every_section_gets_its_box_and_what_others_left(sections, tmp_path):
    sections.takes |= {"tests": 0.5}
    assert run(tmp_path) == 0
    ran = dict(sections.ran)
    assert list(ran) == list(SECTIONS)
    share = (gpu.SECONDS - gpu.LAST) / sum(box for _, box in SECTIONS.values())
    assert ran["tests"] == round(200 * share)
    rest = sum(box for _, box in SECTIONS.values()) - 200
    for name in [*SECTIONS][1:]:  # in proportion to their boxes
        box = SECTIONS[name][1]
        assert abs(ran[name] - share * (box + 100 * box / rest)) < 1


def test_what_time_is_left_goes_to_what_is_incomplete(sections, tmp_path, clock):
    sections.takes |= dict.fromkeys(SECTIONS, 0.2)
    sections.outcomes |= {"kernels": [gpu.INCOMPLETE, gpu.INCOMPLETE, gpu.PASSED]}
    sections.outcomes |= {"scaling": [gpu.INCOMPLETE, gpu.PASSED]}
    assert run(tmp_path) == 0
    assert [name for name, _ in sections.ran] == [*SECTIONS, "kernels", "scaling", "kernels"]
    assert set(outcomes(tmp_path).values()) == {gpu.PASSED}
    assert clock.now <= 1000 + gpu.SECONDS


def test_there_is_an_end_to_the_rounds(sections, tmp_path):
    sections.takes |= dict.fromkeys(SECTIONS, 0.0)
    sections.outcomes |= {"kernels": [gpu.INCOMPLETE]}
    assert run(tmp_path) == 3
    assert len(sections.ran) == len(SECTIONS) + gpu.ROUNDS - 1


def test_the_call_ends_in_time_and_says_what_it_did_not_reach(sections, tmp_path, clock):
    sections.takes |= {"largest": 99.0}  # as one that cannot be stopped
    assert run(tmp_path) == 3
    found = outcomes(tmp_path)
    assert [name for name, outcome in found.items() if outcome == gpu.NOT_REACHED] == [
        "training", "convergence", "scaling",
    ]  # fmt: skip
    page = (tmp_path / summary.PAGE).read_text()
    assert page.count(f"**{gpu.NOT_REACHED}**") == 3
    # The next call begins with these.
    sections.ran.clear()
    clock.now = 1000.0
    assert run(tmp_path) == 0
    assert [name for name, _ in sections.ran] == ["training", "convergence", "scaling"]
    assert len(json.loads((tmp_path / "calls.json").read_text())["rows"]) == 2


def test_installing_counts(sections, tmp_path, clock):
    clock.now += 300
    run(tmp_path, "--only", "kernels", "--seconds", "400")
    assert sections.ran == [("kernels", 100 - gpu.LAST)]


def test_what_passed_is_not_repeated_and_what_failed_stays_shown(sections, tmp_path, facts, clock):
    sections.takes |= dict.fromkeys(SECTIONS, 0.1)
    sections.outcomes |= {"tests": [gpu.FAILED], "kernels": [gpu.TIMED_OUT, gpu.PASSED]}
    assert run(tmp_path, "--only", "tests,kernels,largest") == 1
    assert run(tmp_path, "--only", "kernels") == 0  # which is all that was asked for
    assert outcomes(tmp_path) == {"tests": "FAILED", "kernels": "passed", "largest": "passed"}
    assert "**FAILED**" in (tmp_path / summary.PAGE).read_text()
    sections.ran.clear()
    assert run(tmp_path) == 1
    names = [name for name, _ in sections.ran]
    assert names == [name for name in SECTIONS if name not in ("kernels", "largest")]
    facts["commit"] = "abd1234"
    sections.ran.clear()
    run(tmp_path)
    assert [name for name, _ in sections.ran][: len(SECTIONS)] == list(SECTIONS)


def test_page_and_archive_are_handed_over_as_they_are_to_lie(sections, tmp_path, monkeypatch):
    out, elsewhere = tmp_path / "results", tmp_path / "elsewhere" / "deep"
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (out / "compiled" / "cache").mkdir(parents=True)
    (out / "compiled" / "cache" / "kernel.cubin").write_bytes(b"x")
    (out / "tests").mkdir()
    (out / "tests" / "0.log").write_text("what pytest says")
    (out / "kernels.log").write_text("what it said")
    run(out, "--copy-to", str(elsewhere))
    assert sorted(p.name for p in elsewhere.iterdir()) == [gpu.ARCHIVE, summary.PAGE]
    with tarfile.open(elsewhere / gpu.ARCHIVE) as archive:
        names = archive.getnames()
    card = gpu.default_folder(gpu.environment()).relative_to(tmp_path).as_posix()
    assert card.startswith("bench/results/") and card.endswith("/2026-01-02-abc1234")
    inside = {name.removeprefix(f"{card}/") for name in names}
    assert {"gpu.json", "calls.csv", "device.txt", "kernels.log", "tests/0.log"} <= inside
    assert summary.PAGE in inside
    assert not any("cubin" in name or gpu.ARCHIVE in name for name in names)


def test_an_earlier_days_folder_of_the_same_commit_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    facts = {"card": "NVIDIA H200", "commit": "abc1234", "date": "2026-01-03"}
    folder = tmp_path / "bench" / "results" / "nvidia-h200"
    assert gpu.default_folder(facts) == folder / "2026-01-03-abc1234"
    (folder / "2026-01-02-abc1234").mkdir(parents=True)
    (folder / "2026-01-02-abc1234+changes").mkdir(parents=True)
    assert gpu.default_folder(facts) == folder / "2026-01-02-abc1234"


# A section


@pytest.mark.parametrize(
    "rows, status, outcome, said",
    [
        ([{"provider": "eager", "failed": ""}], 0, "passed", "1 rows"),
        ([{"provider": "eager", "failed": "no memory"}], 0, "passed", "1 failed"),
        ([{"provider": "fullres, bf16", "failed": "no memory"}], 0, "FAILED", "no memory"),
        ([{"provider": "fullres, bf16", "wrong": "dw"}], 0, "FAILED", "dw"),
        ([{"provider": "fullres", "failed": record.NOT_BEGUN}], 0, "INCOMPLETE", "1 in the"),
        ([{"provider": "eager", "wrong": record.NOT_BEGUN}], 0, "INCOMPLETE", "1 in the"),
        ([{"provider": "eager", "failed": ""}], 1, "FAILED", "the last line"),
        (None, 0, "FAILED", "saved no result"),
    ],
)
def test_a_sections_outcome_follows_from_what_it_saved(
    monkeypatch, facts, tmp_path, rows, status, outcome, said
):
    def ran(name, command, out, limit):
        (out / f"{name}.log").write_text("begun\nthe last line\n\n")
        if rows is not None:
            record.save(name, rows, out)
        return status, 1.0, False

    monkeypatch.setattr(gpu, "_run", ran)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    row = gpu._section("training", tmp_path, 10.0)
    assert row["outcome"] == outcome and said in row["detail"]


def test_results_of_an_earlier_call_are_not_taken_for_this_ones(monkeypatch, facts, tmp_path):
    record.save("training", [{"provider": "eager", "failed": ""}], tmp_path)

    def ran(name, command, out, limit):
        (out / f"{name}.log").write_text("cannot import\n")
        return 1, 1.0, False

    monkeypatch.setattr(gpu, "_run", ran)
    row = gpu._section("training", tmp_path, 10.0)
    assert row["outcome"] == "FAILED" and "cannot import" in row["detail"]


def test_a_section_that_hangs_is_stopped_with_all_that_it_began(tmp_path):
    program = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
    status, seconds, timed_out = gpu._run("hangs", ["-c", program], tmp_path, limit=2)
    assert timed_out and status != 0 and seconds < 30
    child = (tmp_path / "hangs.log").read_text().split()[0]
    state = Path(f"/proc/{child}/status")
    for _ in range(50):
        if not state.exists() or "State:\tZ" in state.read_text():  # nobody may have buried it
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} lives")


@needs_no_gpu
def test_a_failed_section_is_shown_and_costs_only_itself(capsys, monkeypatch, tmp_path):
    """Of a module that does not exist and one that does each runs in its own process."""
    monkeypatch.setitem(SECTIONS, "kernels", ("absent", 60))
    monkeypatch.setitem(SECTIONS, "scaling", ("focal_loss", 60))
    arguments = ["--smoke", "--only", "kernels,scaling", "--seconds", "60"]
    assert gpu.main([*arguments, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "NOT RUN ON A CARD" in printed
    assert "No module named 'fullres.bench.absent'" in (tmp_path / "kernels.log").read_text()
    assert outcomes(tmp_path)["kernels"] == "FAILED"
    page = (tmp_path / summary.PAGE).read_text()
    assert "# fullres: NOT RUN ON A CARD" in page and "No module named" in page
    assert (tmp_path / "focal_loss.json").exists()


# The rehearsal


def here(name, command, out, limit):
    """Run a section's program in this process."""
    flag, program, *arguments = command
    said, status, before = io.StringIO(), 0, sys.argv
    sys.argv = [flag, *arguments]
    try:
        with redirect_stdout(said), redirect_stderr(said):
            exec(program, {"__name__": "section"})
    except BaseException:
        status = 1
        said.write(traceback.format_exc())
    finally:
        sys.argv = before
    (out / f"{name}.log").write_text(said.getvalue())
    return status, 1.0, False


@needs_no_gpu
def test_a_rehearsal_runs_every_section_and_writes_its_page(monkeypatch, facts, tmp_path):
    monkeypatch.setattr(gpu, "_run", here)
    arguments = ["all", "--smoke", "--only", "kernels,focal_loss", "--seconds", "60"]
    from typer.testing import CliRunner

    from fullres.cli import app

    done = CliRunner().invoke(app, ["bench", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert set(outcomes(tmp_path).values()) == {gpu.REHEARSED}
    page = (tmp_path / summary.PAGE).read_text()
    assert "FAILED" not in page
    for name in ("kernels", "focal_loss"):
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert "NOT RUN ON A CARD" in section and "| --- |" in section


@pytest.mark.slow
@needs_no_gpu
def test_sections_without_time_say_what_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_run", here)
    monkeypatch.setattr(gpu, "GRACE", 1.0)  # all of a box
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    names = ["largest", "training", "convergence", "scaling"]
    assert gpu.main(["--smoke", "--only", ",".join(names), "--out", str(tmp_path)]) == 3
    assert outcomes(tmp_path) == dict.fromkeys(names, gpu.INCOMPLETE)
    page = (tmp_path / summary.PAGE).read_text()
    assert "FAILED" not in page
    for name in names:
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert "NOT RUN ON A CARD" in section and "not finished" in section


def test_refuses_sections_it_does_not_have(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tests,everything"])
    assert "want some of tests,kernels" in capsys.readouterr().err
