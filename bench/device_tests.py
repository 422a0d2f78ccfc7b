"""The tests marked `gpu`: what passed is kept, and what is left runs in the next call.

Most of their time is compiling, so several processes share them, each a pytest with this module as
its plugin. A test that kills its process, hangs, or leaves the card's context unusable costs itself
alone: its process begins again behind it.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from .record import NOT_BEGUN, ROOT, card_answers, resumed, save, table

HANGS = 120  # seconds after which a test is given up
LEAVING = 10  # seconds that a process may take to its end when the card is lost to it
GRACE = 0.08  # of the seconds allowed, beyond them: for the tests that run then
LARGE = "past_two_to_the_31"  # in the names of tests that take up to 21 GiB: one process has them
GIB = 2**30


def run(
    out: Path,
    seconds: float | None = None,
    tests: Path = ROOT / "tests",
    workers: int | None = None,
) -> list[dict]:
    """Run what has not passed yet; save tests.json and .csv in out, return a row a test.

    Args:
        out: the folder; its `tests` gets each process's log.
        seconds: begin no test after that long.
        tests: file or folder of the tests.
        workers: processes; None takes as many as the cores and the card's memory suffice for.

    Raises:
        SystemExit: when a test failed, or on a card none has passed; the rows are saved.
    """
    until = float("inf") if seconds is None else time.time() + seconds
    end = until + GRACE * (seconds or 0)
    kept = [row for row in resumed("tests", out) if row["outcome"] == "passed"]
    folder = out / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kept.json").write_text(json.dumps([row["test"] for row in kept]))
    count = workers or _processes()
    pool = [Worker(number, count, folder, tests, until, end) for number in range(count)]
    rows, saved = kept, time.time()
    try:
        while any([worker.goes_on() for worker in pool]):
            time.sleep(0.1)
            if time.time() > saved + 10:
                save("tests", [*kept, *_rows(pool)], out)
                saved = time.time()
    finally:
        for worker in pool:
            worker.stop()
        rows = [*kept, *_rows(pool)]
        save("tests", rows, out)
    print(table(by_file(rows)))
    failed = [row for row in rows if row["outcome"] == "failed"]
    for row in failed:
        print(f"FAILED {row['test']}: {row['failed']}")
    passed = sum(row["outcome"] == "passed" for row in rows)
    if failed:
        raise SystemExit(f"{len(failed)} tests failed, {passed} passed")
    if torch.cuda.is_available() and not passed:
        raise SystemExit("no test passed, so nothing is proved")
    return rows


def by_file(rows: list[dict]) -> list[dict]:
    """Return a row a file: how many of its tests came out how, and their seconds."""
    files: dict[str, dict] = {}
    for row in rows:
        name = row["test"].split("::")[0]
        empty = {"file": name, "passed": 0, "failed": 0, "skipped": 0, "left": 0, "seconds": 0.0}
        line = files.setdefault(name, empty)
        line[row["outcome"]] += 1
        line["seconds"] = round(line["seconds"] + row["seconds"], 1)
    return sorted(files.values(), key=lambda line: line["file"])


@dataclass
class Worker:
    """A pytest process with a share of the tests, begun again whenever a test has ended it."""

    number: int
    count: int
    folder: Path
    tests: Path
    until: float  # when no test begins any more
    end: float  # when those that run are stopped
    process: subprocess.Popen | None = None
    left: dict[str, None] = field(default_factory=dict)  # of the share, what has not come out
    rows: list[dict] = field(default_factory=list)
    begun: tuple[str, float] | None = None  # the test that runs, and since when
    read: int = 0  # bytes of the journal
    lost: float = 0.0  # since when the process stops because the card did
    over: bool = False

    @property
    def journal(self) -> Path:
        """The file into which the plugin writes what happens."""
        return self.folder / f"{self.number}.jsonl"

    @property
    def unknown(self) -> str:
        """What stands for the share until the process has collected it."""
        return f"all of process {self.number}"

    def goes_on(self) -> bool:
        """Look after the process; return whether there is something to wait for."""
        if self.over:
            return False
        if self.process is None:
            self.journal.unlink(missing_ok=True)
            self.left = {self.unknown: None}
            self._start()
        status = self.process.poll()  # before reading: then what it wrote last is there
        self._listen()
        now = time.time()
        if status is None:
            if self.begun and now > self.begun[1] + HANGS:
                self.process.kill()
                self.process.wait()
                self._listen()
                if self.begun:
                    self._fail(f"ran for more than {HANGS} s, and was stopped")
                return self._again()
            if self.lost and now > self.lost + LEAVING:
                self.process.kill()
                self.process.wait()
                return self._again()
            if now > self.end:
                self.stop()
            return not self.over
        if self.unknown in self.left:
            self.begun = self.unknown, now
        if self.begun:
            self._fail(f"its process ended with status {status}: see tests/{self.number}.log")
            return self._again()
        return self._again() if self.lost else self.stop()

    def stop(self) -> bool:
        """End the process; return False."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
            self._listen()
        self.over = True
        return False

    def _again(self) -> bool:
        if not self.left or time.time() > self.until:
            return self.stop()
        self._start()
        return True

    def _start(self) -> None:
        self.lost = 0.0
        plugin = ["-p", "fullres.bench.device_tests", "--share", f"{self.number}/{self.count}"]
        plugin += ["--journal", str(self.journal), "--until", str(self.until)]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "--tb=short"]
        command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", *plugin]
        # Every process compiles on a core of its own.
        one = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        surroundings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | one
        with open(self.folder / f"{self.number}.log", "a") as log:
            self.process = subprocess.Popen(
                [*command, str(self.tests)], cwd=ROOT, env=surroundings, stdout=log, stderr=log
            )

    def _fail(self, how: str) -> None:
        test, since = self.begun
        self._came_out(result(test, "failed", time.time() - since, failed=how))

    def _came_out(self, found: dict) -> None:
        self.rows.append(found)
        self.left.pop(found["test"], None)
        self.begun = None

    def _listen(self) -> None:
        """Take what the plugin has written since the last time."""
        if not self.journal.exists():
            return
        with open(self.journal, "rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.read += len(line)
                said = json.loads(line)
                if "share" in said:
                    self.left = dict.fromkeys(said["share"])
                elif "begun" in said:
                    self.begun = said["begun"], time.time()
                elif "lost" in said:
                    self.lost = time.time()
                else:
                    self._came_out(said)


def result(test: str, outcome: str, seconds: float, failed: str = "", skipped: str = "") -> dict:
    """Return a test's row."""
    return {
        "test": test,
        "outcome": outcome,
        "seconds": round(seconds, 2),
        "failed": failed,
        "skipped": skipped,
    }


def _rows(pool: list[Worker]) -> list[dict]:
    rows = [found for worker in pool for found in worker.rows]
    left = [result(test, "left", 0.0, failed=NOT_BEGUN) for worker in pool for test in worker.left]
    return sorted([*rows, *left], key=lambda found: found["test"])


def _processes() -> int:
    if not torch.cuda.is_available():
        return 1
    memory = torch.cuda.get_device_properties(0).total_memory
    cores = len(os.sched_getaffinity(0))
    return max(1, min(12, cores - 2, int((memory - 24 * GIB) / (3 * GIB))))


# What pytest calls, in the processes


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tell pytest the options that Worker gives it."""
    parser.addoption("--share", help="NUMBER/COUNT of the processes")
    parser.addoption("--journal", help="file to write what happens into")
    parser.addoption("--until", type=float, help="time.time() after which no test begins")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the journal."""
    config.pluginmanager.register(Journal(config))


class Journal:
    """Chooses a process's tests; writes down which begins and how it comes out."""

    def __init__(self, config: pytest.Config):
        """Read what earlier processes have done."""
        options = config.option
        self.number, self.count = map(int, options.share.split("/"))
        self.path, self.until = Path(options.journal), options.until
        self.kept = {*json.loads((self.path.parent / "kept.json").read_text())}
        self.mine: set[str] = set()  # what this process's forerunners have begun
        if self.path.exists():
            lines = map(json.loads, self.path.read_text().splitlines())
            self.mine = {said["begun"] for said in lines if "begun" in said}
        self.reports: list[pytest.TestReport] = []
        self.session: pytest.Session | None = None

    def _write(self, **said: object) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(said) + "\n")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Remember whom to stop."""
        self.session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write down a file that cannot be collected; every process meets it, the first tells."""
        if report.failed and self.number == 0:
            self._write(**result(report.nodeid, "failed", 0.0, failed=_last_line(report)))

    @pytest.hookimpl(trylast=True)  # when those without the mark are gone
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave this process its share of what has not passed."""
        todo = [item for item in items if item.nodeid not in self.kept]
        small = [item for item in todo if LARGE not in item.nodeid]
        share = small[self.number :: self.count]
        if self.number == 0:
            share = [item for item in todo if LARGE in item.nodeid] + share
        share = [item for item in share if item.nodeid not in self.mine]
        self._write(share=[item.nodeid for item in share])
        items[:] = share if time.time() < self.until else []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write down what begins."""
        self.reports = []
        self._write(begun=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what is said of set-up, call and tear-down."""
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write down how it came out; stop where nothing more may or can run."""
        failed = [report for report in self.reports if report.failed]
        skipped = [report for report in self.reports if report.skipped]
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        seconds = sum(report.duration for report in self.reports)
        how, why = map("; ".join, ([_last_line(r) for r in each] for each in (failed, skipped)))
        self._write(**result(nodeid, outcome, seconds, how, why))
        if failed and not card_answers():
            self._write(lost=nodeid)
            self.session.shouldstop = "the card's context is lost"
        elif time.time() >= self.until:
            self.session.shouldstop = "out of time"


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    text = crash.message if crash else str(report.longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return (lines[0] if crash else lines[-1])[:300]
