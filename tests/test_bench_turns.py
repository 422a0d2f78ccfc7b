"""Processes of which one has the device at a time: what runs when, and what ends it."""

import os
import threading
import time

import pytest

from fullres.bench.turns import Behind, FailedError, HungError, UnfinishedError, ask, take
from fullres.bench.worker import Worker

NEVER = float("inf")


# What runs in the other process: it travels by name.


def note(path, text, ready=lambda: None):
    with open(path, "a") as file:
        file.write(text)
    ready()
    with open(path, "a") as file:
        file.write(text.upper())
    return text


def without(value, ready):
    return value


def fail(ready):
    ready()
    raise ValueError("what is wrong")


def leave(ready):
    os._exit(1)


def sleep(seconds, ready=lambda: None):
    ready()
    time.sleep(seconds)


@pytest.fixture
def worker():
    with Worker() as process:
        yield process


def took(worker, turn, work, *args, **limits):
    limits = {"getting_ready": 30.0, "running": 30.0, "until": NEVER} | limits
    return take(worker, turn, work, *args, **limits)


def test_work_waits_for_its_turn_and_has_it_to_the_end(worker, tmp_path):
    turn, seen, path = threading.Lock(), [], tmp_path / "notes"
    turn.acquire()
    threading.Timer(0.5, lambda: (seen.append(path.read_text()), turn.release())).start()
    ask(worker, "starting", 30.0, NEVER, note, path, "-")
    found = took(worker, turn, note, path, "a", after=lambda _: seen.append(turn.locked()))
    assert found == "a" and seen == ["--a", True] and path.read_text() == "--aA"
    assert not turn.locked()
    turn.acquire()  # which what needs no device does not wait for
    assert took(worker, turn, without, 3) == 3


def test_whatever_ends_it_frees_the_device(worker):
    turn = threading.Lock()
    with pytest.raises(FailedError, match="ValueError: what is wrong"):
        took(worker, turn, fail)
    with pytest.raises(FailedError, match="died"):
        took(worker, turn, leave)
    with pytest.raises(HungError, match="running took more than 0.5 s"):
        took(worker, turn, sleep, 60, running=0.5)
    with pytest.raises(UnfinishedError):
        took(worker, turn, sleep, 60, until=time.time() + 4)
    assert not turn.locked()
    turn.acquire()
    with pytest.raises(UnfinishedError):
        took(worker, turn, sleep, 60, until=time.time() + 4)


def test_calls_behind_go_on_after_a_failure_and_end_with_the_context(tmp_path):
    calls = [(note, tmp_path / "a", "x"), (fail, print), (sleep, 60), (note, tmp_path / "b", "y")]
    with Behind(calls) as behind:
        assert behind.ended(0, time.time() + 30) and (tmp_path / "a").read_text() == "xX"
        assert behind.ended(1, time.time() + 30)
        assert not behind.ended(2, time.time() + 0.3)
    assert behind.ended(3)  # as far as it ever will
    assert not (tmp_path / "b").exists()
