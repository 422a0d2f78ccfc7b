"""A process beside this one that measures, so that a crash, a hang or a broken device costs little.

It stays for one call after another, since starting one takes seconds; after a failure the next call
gets a fresh one.
"""

import contextlib
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any


class FailedError(RuntimeError):
    """What was called has failed; the message is what a failed column says."""


class Worker:
    """A process that calls functions of modules, one after another; a context, which ends it."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._pool: ProcessPoolExecutor | None = None
        self._process = 0

    def __call__(self, work: Callable, *args: Any, until: float = float("inf")) -> Any:
        """Return work(*args), computed there.

        Args:
            work: a function of a module, since it travels by its name.
            args: what it takes, picklable, as its result.
            until: the time.time() at which the process is killed if it has not answered.

        Raises:
            TimeoutError: it had not answered by then.
            FailedError: work raised something, or the process died.
        """
        try:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    1, mp_context=get_context("spawn"), initializer=leave_with, initargs=_me()
                )
                self._process = self._wait(self._pool.submit(os.getpid), until)
            result, failed = self._wait(self._pool.submit(_answer, work, args), until)
        except BrokenProcessPool:
            self.end()
            raise FailedError("its process died") from None
        except BaseException:
            self.end()
            raise
        if failed:
            self.end()  # the device may be of no use to that process any more
            raise FailedError(failed)
        return result

    @staticmethod
    def _wait(future: Any, until: float) -> Any:
        rest = None if until == float("inf") else max(0.0, until - time.time())
        try:
            return future.result(rest)
        except TimeoutError:
            raise TimeoutError("it had not answered when its time was over") from None

    def end(self) -> None:
        """Kill the process, if there is one; the next call starts another."""
        if self._pool is None:
            return
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process, signal.SIGKILL)
                _wait_for_end(self._process)  # then what it held on the device is free
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool, self._process = None, 0

    def __enter__(self) -> "Worker":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.end()


def reason(error: BaseException) -> str:
    """Return what a failed column says of an error: one line of bounded length."""
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def _answer(work: Callable, args: tuple) -> tuple[Any, str]:
    """Return work(*args), or why there is none: not every exception travels between processes."""
    try:
        return work(*args), ""
    except Exception as error:
        traceback.print_exc()
        return None, reason(error)


def _wait_for_end(process: int) -> None:
    """Wait until a process has ended, for as long as a driver may take to let go of it."""
    if not hasattr(os, "pidfd_open"):  # elsewhere than on Linux
        return
    end = os.pidfd_open(process)
    try:
        select.select([end], [], [], 10.0)
    finally:
        os.close(end)


def _me() -> tuple[int]:
    return (os.getpid(),)


def leave_with(parent: int) -> None:
    """End this process when its parent has gone: it would hold the device for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
