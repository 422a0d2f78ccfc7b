import pytest
import torch

from fullres.bench import gpu, record

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@needs_no_gpu
def test_says_that_there_is_no_gpu_and_fails(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "NO GPU" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@needs_no_gpu
def test_a_failed_section_is_shown_and_costs_only_itself(capsys, monkeypatch, tmp_path):
    """Of two benchmarks that do not exist each fails in its own process; the rehearsal goes on."""
    monkeypatch.setattr(gpu, "BENCHMARKS", {"absent_a": (60, {}), "absent_b": (60, {})})
    arguments = ["--smoke", "--only", "absent_a,absent_b", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 2
    assert "NOT RUN ON A CARD" in printed
    assert "No module named 'fullres.bench.absent_a'" in (tmp_path / "absent_a.log").read_text()
    assert (tmp_path / "gpu.json").exists()


def test_a_section_that_hangs_is_stopped(tmp_path):
    command = ["-c", "print('begun', flush=True); import time; time.sleep(600)"]
    status, seconds, timed_out = gpu._run("hangs", command, tmp_path, limit=1)
    assert timed_out and status != 0 and seconds < 60
    assert gpu._row("hangs", False, seconds, timed_out, "")["outcome"] == "TIMED OUT"
    assert (tmp_path / "hangs.log").read_text().startswith("begun")


def test_a_run_fits_in_ten_minutes():
    assert gpu.TESTS_LIMIT + sum(limit for limit, _ in gpu.BENCHMARKS.values()) <= 600
    assert all(options.get("seconds", 0) < limit for limit, options in gpu.BENCHMARKS.values())


@pytest.mark.parametrize("command", [[], ["--only", "kernels"]], ids=["the rest", "what is named"])
def test_what_passed_is_not_repeated(monkeypatch, tmp_path, command):
    """As on a card, with sections that note that they ran."""
    ran = []

    def section(name: str, outcome: str) -> dict:
        ran.append(name)
        return {"section": name, "outcome": outcome, "seconds": 0.0, "detail": ""}

    facts = {**gpu.environment(), "commit": "abc"}
    monkeypatch.setattr(gpu, "environment", lambda: facts)
    monkeypatch.setattr(record, "environment", lambda: facts)
    monkeypatch.setattr(gpu, "BENCHMARKS", {"kernels": (1, {}), "memory": (1, {})})
    monkeypatch.setattr(gpu, "_tests", lambda out: section("tests", "FAILED"))
    monkeypatch.setattr(gpu, "_benchmark", lambda name, out: section(name, "passed"))
    arguments = ["--smoke", "--out", str(tmp_path), *command]
    assert gpu.main(["--smoke", "--out", str(tmp_path), "--only", "tests,kernels"]) == 1
    assert gpu.main(arguments) == (0 if command else 1)
    assert ran[2:] == (["kernels"] if command else ["tests", "memory"])
    ran.clear()
    facts["commit"] = "abd"
    gpu.main(arguments)
    assert ran == (["kernels"] if command else ["tests", "kernels", "memory"])


def test_refuses_sections_it_does_not_have(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tests,everything"])
    assert "want some of tests,kernels" in capsys.readouterr().err
