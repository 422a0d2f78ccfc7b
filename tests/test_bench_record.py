"""What a run may keep of an earlier one in the same folder, and what saving leaves behind."""

import json
import subprocess

import pytest

from fullres.bench import record

ROWS = [{"case": "a", "ms": 1.0, "failed": ""}, {"case": "b", "ms": None, "failed": "no memory"}]
CARD = {"card": "NVIDIA H200", "driver": "580.159.03", "commit": "abc1234"}


@pytest.fixture
def here(monkeypatch):
    """Facts of the machine that later calls see; a test changes them."""
    facts = {**record.environment(), **CARD}
    monkeypatch.setattr(record, "environment", lambda: dict(facts))
    return facts


def test_rows_return_as_they_were_saved(here, tmp_path):
    assert record.resumed("case", tmp_path) == []
    record.save("case", ROWS, tmp_path)
    assert record.resumed("case", tmp_path) == ROWS
    assert record.resumed("other", tmp_path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case.csv", "case.json"]


@pytest.mark.parametrize("fact", ["card", "driver", "torch", "triton", "python", "commit"])
def test_another_machine_version_or_commit_begins_anew(here, tmp_path, fact):
    record.save("case", ROWS, tmp_path)
    here[fact] = "another"
    assert record.resumed("case", tmp_path) == []


def test_command_and_date_and_beside_a_card_the_processor_may_differ(here, tmp_path):
    record.save("case", ROWS, tmp_path)
    here |= {"command": "another", "date": "2000-01-01", "processor": "another", "threads": 99}
    here |= {"driver": "580.159.04"}
    assert record.resumed("case", tmp_path) == ROWS


@pytest.mark.parametrize("fact", ["processor", "threads"])
def test_without_a_card_the_processor_counts(here, tmp_path, fact):
    here["card"] = "none"
    record.save("case", ROWS, tmp_path)
    here[fact] = "another"
    assert record.resumed("case", tmp_path) == []


def test_changed_sources_keep_nothing(here, tmp_path):
    here["commit"] = "abc1234+changes"
    record.save("case", ROWS, tmp_path)
    assert record.resumed("case", tmp_path) == []


def test_a_broken_file_keeps_nothing(here, tmp_path):
    (tmp_path / "case.json").write_text('{"environment": {"card": "NV')
    assert record.resumed("case", tmp_path) == []


def test_a_save_that_fails_leaves_what_was_there(here, tmp_path):
    record.save("case", ROWS, tmp_path)
    with pytest.raises(TypeError):
        record.save("case", [{"case": object()}], tmp_path)
    assert json.loads((tmp_path / "case.json").read_text())["rows"] == ROWS


def test_the_commit_is_the_last_that_changes_a_number(monkeypatch, tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit():
        record._commit.cache_clear()
        record._output.cache_clear()
        return record._commit()

    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text("1")
    bare = commit()
    assert bare.startswith("files-")
    (tmp_path / "code.py").write_text("2")
    assert commit() != bare
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "code")
    first = git("rev-parse", "--short", "HEAD")
    assert commit() == first
    for name in ("bench/results/none/a.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-qm", "results")
    (tmp_path / "README.md").write_text("2")
    (tmp_path / "untracked.txt").write_text("1")
    assert git("rev-parse", "--short", "HEAD") != first and commit() == first
    (tmp_path / "code.py").write_text("3")
    assert commit() == f"{first}+changes"
    monkeypatch.undo()
    commit()
