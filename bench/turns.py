"""Work in a process beside this one, of which one at a time has its turn on the device.

Much of what a step needs takes long without the device: importing, planning, compiling. So work is
handed a function `ready`, and calls it when it is about to use the device for itself; it returns
when it is its turn, which lasts until the work is done. `take` runs work so, in a `Worker`.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

from .worker import FailedError, Worker, leave_with

Work = Callable[..., Any]  # its last argument is `ready`


class UnfinishedError(Exception):
    """The time allowed for all is over."""


class HungError(Exception):
    """Something took longer than it may; the message is what a failed column says."""


def take(
    worker: Worker,
    turn: threading.Lock,
    work: Work,
    *args: Any,
    getting_ready: float,
    running: float,
    until: float,
    after: Callable[[Any], None] = lambda result: None,
) -> Any:
    """Return work(*args, ready), which runs in the worker's process.

    Args:
        worker: the process.
        turn: the lock of the device, held while the work uses it.
        work: a function of a module.
        args: what it takes.
        getting_ready: seconds that it may take until it waits for the device.
        running: seconds from then on.
        until: the time.time() at which it is stopped in any case.
        after: called with the result while it is still its turn.

    Raises:
        UnfinishedError: the time was over.
        HungError: it took longer than it may; the process is gone.
        FailedError: it raised something, or its process died; the process is gone.
    """
    done, result = ask(worker, "getting ready", getting_ready, until, _prepare, work, args)
    if done:
        return result
    if not turn.acquire(timeout=max(0.0, min(until - time.time(), 1e6))):
        raise UnfinishedError
    try:
        result = ask(worker, "running", running, until, _finish)
        after(result)
        return result
    finally:
        turn.release()


class Behind:
    """Calls that a process makes one after another meanwhile; a context, which ends it."""

    def __init__(self, calls: Sequence[tuple]):
        """Begin; each call is a function of a module and what it takes."""
        context = get_context("spawn")
        self._ended = [context.Event() for _ in calls]
        self._process = None
        if calls:
            self._process = context.Process(
                target=_one_by_one, args=(os.getpid(), list(calls), self._ended), daemon=True
            )
            self._process.start()

    def ended(self, number: int, until: float = 0.0) -> bool:
        """Return whether a call has ended, having waited for it until a time.time() at most.

        All have, where the process has died.
        """
        while not self._ended[number].is_set() and self._process.is_alive():
            if time.time() >= until:
                return False
            self._ended[number].wait(max(0.0, min(until - time.time(), 0.2)))
        return True

    def __enter__(self) -> "Behind":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what is running, and begin nothing else."""
        if self._process is not None:
            self._process.kill()
            self._process.join(10.0)


def _one_by_one(parent: int, calls: list[tuple], ended: list[Any]) -> None:
    leave_with(parent)
    for (work, *args), event in zip(calls, ended, strict=True):
        try:
            work(*args)
        except Exception:  # whoever needs it will meet the same
            traceback.print_exc()
        event.set()


def ask(worker: Worker, what: str, limit: float, until: float, work: Callable, *args: Any) -> Any:
    """Return work(*args) of the worker; raises as `take`."""
    end = time.time() + limit
    try:
        return worker(work, *args, until=min(end, until))
    except TimeoutError:
        if until <= end:
            raise UnfinishedError from None
        raise HungError(f"{what} took more than {limit:g} s") from None


# In the process


class _Waiting(threading.Thread):
    """Work that waits for its turn."""

    def __init__(self, work: Work, args: tuple):
        """Take what is to be done."""
        super().__init__(daemon=True)
        self.work, self.args = work, args
        self.waits, self.turn = threading.Event(), threading.Event()
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Do it."""
        try:
            self.result = self.work(*self.args, self.ready)
        except Exception as error:
            self.error = error
        finally:
            self.done = True
            self.waits.set()

    def ready(self) -> None:
        """Wait for the turn."""
        if not self.turn.is_set():
            self.waits.set()
            self.turn.wait()

    def ended(self) -> Any:
        """Return the result, or raise what the work has raised."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.result


_waiting: _Waiting | None = None


def _prepare(work: Work, args: tuple) -> tuple[bool, Any]:
    """Begin; return whether the work is done without the device, and its result."""
    global _waiting
    _waiting = _Waiting(work, args)
    _waiting.start()
    _waiting.waits.wait()
    return (True, _ended()) if _waiting.done else (False, None)


def _finish() -> Any:
    _waiting.turn.set()
    return _ended()


def _ended() -> Any:
    global _waiting
    ended, _waiting = _waiting, None
    return ended.ended()


__all__ = ["Behind", "FailedError", "HungError", "UnfinishedError", "ask", "take"]
