"""The device tests' own runner: what passed is kept, and a test that breaks things costs itself."""

import json
import textwrap

import pytest
import torch

from fullres.bench import device_tests, record

FILE = """
    import os, time
    import pytest, torch

    pytestmark = pytest.mark.gpu

    def test_passes():
        pass

    def test_fails():
        assert 1 + 1 == 3

    def test_dies():
        os.abort()

    def test_loses_the_card(monkeypatch):
        def broken():
            raise RuntimeError("an illegal memory access was encountered")

        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken
        broken()

    def test_sees_the_card():
        torch.cuda.synchronize is not None
        assert "broken" not in torch.cuda.synchronize.__name__

    def test_hangs():
        time.sleep(600)

    def test_is_skipped():
        pytest.skip("needs more memory")

    @pytest.mark.parametrize("case", range(3))
    def test_passes_past_two_to_the_31(case):
        pass
"""


@pytest.fixture
def here(monkeypatch):
    facts = {**record.environment(), "commit": "abc1234"}
    monkeypatch.setattr(record, "environment", lambda: facts)
    return facts


def written(folder, text):
    path = folder / "test_it.py"
    path.write_text(textwrap.dedent(text))
    return path


def outcomes(out):
    rows = json.loads((out / "tests.json").read_text())["rows"]
    return {row["test"].split("::")[-1].split("/")[-1]: row for row in rows}


@pytest.mark.slow
def test_a_test_that_breaks_things_costs_itself_alone(here, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(device_tests, "HANGS", 3)
    path = written(tmp_path, FILE)
    with pytest.raises(SystemExit, match="4 tests failed, 5 passed"):
        device_tests.run(tmp_path, tests=path, workers=2)
    found = outcomes(tmp_path)
    assert {name: row["outcome"] for name, row in found.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_dies": "failed",
        "test_loses_the_card": "failed",
        "test_sees_the_card": "passed",
        "test_hangs": "failed",
        "test_is_skipped": "skipped",
        **{f"test_passes_past_two_to_the_31[{case}]": "passed" for case in range(3)},
    }
    assert "1 + 1" in found["test_fails"]["failed"] or "assert" in found["test_fails"]["failed"]
    assert "status -6" in found["test_dies"]["failed"]
    assert "illegal memory access" in found["test_loses_the_card"]["failed"]
    assert "more than 3 s" in found["test_hangs"]["failed"]
    assert found["test_is_skipped"]["skipped"] == "needs more memory"
    said = capsys.readouterr().out
    assert said.count("FAILED") == 4 and "test_dies" in said

    # In the next call what passed is not repeated: it would fail by now.
    written(
        tmp_path,
        FILE.replace("        pass\n", "        raise AssertionError\n")
        .replace("1 + 1 == 3", "True")
        .replace("os.abort()", "pass")
        .replace("time.sleep(600)", "pass")
        .replace("        broken()\n", ""),
    )
    device_tests.run(tmp_path, tests=path, workers=1)
    assert [row["outcome"] for row in outcomes(tmp_path).values()].count("passed") == 9


def test_what_there_is_no_time_for_is_left_and_a_broken_file_is_shown(here, monkeypatch, tmp_path):
    monkeypatch.setattr(device_tests, "GRACE", 100.0)  # so that collecting ends
    written(tmp_path, FILE)
    (tmp_path / "test_broken.py").write_text("import a_module_that_is_absent")
    with pytest.raises(SystemExit, match="1 tests failed, 0 passed"):
        device_tests.run(tmp_path, seconds=0.5, tests=tmp_path, workers=1)
    found = outcomes(tmp_path)
    assert "a_module_that_is_absent" in found.pop("test_broken.py")["failed"]
    assert len(found) == 10
    assert {row["outcome"] for row in found.values()} == {"left"}
    assert {row["failed"] for row in found.values()} == {record.NOT_BEGUN}


def test_a_process_that_never_collected_its_tests_leaves_them(here, tmp_path):
    rows = device_tests.run(tmp_path, seconds=0, tests=written(tmp_path, FILE), workers=1)
    assert [(row["test"], row["failed"]) for row in rows] == [
        ("all of process 0", record.NOT_BEGUN)
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_ours_are_found_and_skipped_without_a_card(here, tmp_path):
    rows = device_tests.run(tmp_path, tests=record.ROOT / "tests" / "test_meter_device.py")
    assert {row["outcome"] for row in rows} == {"skipped"} and len(rows) >= 4
    assert "needs a GPU" in rows[0]["skipped"]
