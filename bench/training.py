"""How fast whole training steps run, ours beside others', and where their time goes.

A job is a network and a batch. In a process of its own its providers take turns, each on the same
images: a turn is a step that is not timed and some that are, back to back. At an equal batch all
are timed: at one image, and at the largest batch that eager bf16 holds. At its own largest batch
each is, by `largest.json` where that is, else as was foretold; in 40 GiB, and on the whole card.
Compiled steps have processes of their own, which compile beside each other.

Loss and gradients are checked in the same job, against eager float32 without TF32 (checkpointed, so
that it holds as much): of the job's batch, and of one image where that is our own largest. In bf16
a deep network's first gradients are mostly rounding, whoever computes them; its last are not. So
each parameter's gradient is compared with how far off eager bf16 has it. A ratio is printed only of
results that are not further off, as `wrong_by` has it.

The roof is our plan's time without a limit of memory, by bytes and FLOP at the card's rates
(`engine/costs.py`): of the network's convolutions and what is between them, every tensor read and
written as rarely as our kernels can. It is the same for all providers.

Kernels take a tuner's choice. For that all their configurations are compiled, which takes minutes
on all cores; it is done at the lowest priority while others are timed, and ours wait for it.

Without a GPU a small network's float32 steps run on the CPU, where only the ratios say something.
"""

import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..engine import Plan
from .largest import ALLOCATOR, COMPILING, NO_MEMORY, Cell, foretell, recorded
from .record import NOT_BEGUN, environment, resumed, save, table
from .steps import (
    COMPILED,
    GIB,
    IMAGE,
    NETWORKS,
    OURS,
    PROVIDERS,
    PUBLISHED,
    SMALL,
    Step,
    compile_all,
    exact_products,
    kept_plan,
    quick_tuning,
)
from .turns import Behind, FailedError, HungError, UnfinishedError, ask, take
from .worker import Worker, reason

ONE, EQUAL, OWN = "one image", "equal batch", "largest batch"
MEMORY = 40  # GiB, beside the whole card
BASE = "eager bf16"
ORDER = ("a21", *(name for name in PUBLISHED if name != "a21"))  # whose kernels are soon compiled
NAMES = (OURS, BASE, "checkpoint each block, bf16", "eager float32", *COMPILED)
FEWER = 2  # images less than were said to fit, at most
ROUNDS, MOST = 5, 20  # turns of a provider, steps of a turn
TURN, SHORT = 0.6, 0.1  # seconds of a turn, on a card and without one
CALL = 90  # seconds that a check, a turn or a profile may take
ENOUGH = 12.0  # seconds of steps, after which a provider has no other turn
FEW = 16  # values of a parameter whose gradient is not compared
FLOOR = 0.01  # of a gradient, which it may be off where the base is less
SHOWN = 15  # kernels of a profile; the rest is one row
WITHOUT = {  # a GPU
    "image": (3, 160, 256),
    "networks": (SMALL,),
    "base": "eager float32",
    "providers": (
        "eager float32", "checkpoint each block, float32", "fullres, float32",
        "fullres, keep, float32", "fullres, closing, float32", "fullres, series, float32",
    ),
}  # fmt: skip
COLUMNS = (
    "network", "setting", "memory_gib", "provider", "image", "batch", "step_s", "step_s_20",
    "step_s_80", "repeats", "images_per_s", "over_eager", "peak_gib", "roof_s", "of_roof",
    "loss_error", "gradient_error", "checked_images", "wrong", "device", "failed",
)  # fmt: skip


PRINTED = (
    "network", "setting", "memory_gib", "provider", "batch", "step_s", "step_s_20", "step_s_80",
    "images_per_s", "over_eager", "of_roof", "peak_gib", "gradient_error", "wrong", "failed",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Providers that are timed together.

    Attributes:
        network: a name in `NETWORKS`.
        setting: ONE, EQUAL or OWN.
        batch: images.
        memory: bytes that plans are made for; with OWN the most that may be used.
        providers: names in `PROVIDERS`.
        image: [C, H, W].
        device: "cuda" or "cpu".
        whole: whether the memory is all that the card has.
        base: the provider that others are compared with.
        plans: the folder of our plans; None to make each anew.
    """

    network: str
    setting: str
    batch: int
    memory: int | None
    providers: tuple[str, ...]
    image: tuple[int, ...]
    device: str
    whole: bool = False
    base: str = BASE
    plans: Path | None = None

    @property
    def checked(self) -> int:
        """How many images the check looks at."""
        return 1 if self.setting == OWN else self.batch

    def blank(self, provider: str) -> dict:
        """Return a row that knows nothing but whose it is."""
        device = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return dict.fromkeys(COLUMNS) | {
            "network": self.network,
            "setting": self.setting,
            "memory_gib": None if self.memory is None else round(self.memory / GIB, 4),
            "provider": provider,
            "image": "x".join(map(str, self.image)),
            "batch": self.batch,
            "wrong": "",
            "device": device,
            "failed": NOT_BEGUN,
        }


KEY = ("network", "setting", "memory_gib", "provider", "image", "device")


# In the job's process


@dataclass
class _Bench:
    """What lies there between calls."""

    job: Job
    steps: dict[str, Step] = field(default_factory=dict)
    batch: tuple[Tensor, Tensor] | None = None  # which all steps share
    truth: tuple[float, Tensor] | None = None
    theirs: tuple[float, Tensor] | None = None  # the base's errors: of the loss, of each parameter
    seconds: dict[str, float] = field(default_factory=dict)  # of a step, roughly


_bench: _Bench | None = None


def begin(job: Job, ready: Callable[[], None]) -> None:
    """Compute the job's true loss and gradients."""
    global _bench
    ready()
    _bench = _Bench(job)
    make = {"device": job.device, "seed": 0}
    if job.device == "cuda":
        if job.setting == OWN:
            whole = torch.cuda.get_device_properties().total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory / whole))
        name = "checkpoint each block, float32"
    else:
        name = "eager float32"
    step = PROVIDERS[name](NETWORKS[job.network], job.image, job.checked, **make)
    with exact_products():
        _bench.truth = (step if job.device == "cuda" else step.double()).gradients()
    del step
    _free()
    step = PROVIDERS[job.base](NETWORKS[job.network], job.image, job.checked, **make)
    _bench.theirs = _errors(step, job.checked)[:2]
    del step
    _free()
    torch.backends.cudnn.benchmark = True


def add(provider: str, ready: Callable[[], None]) -> dict[str, Any]:
    """Make a provider's step, check it, and run it until nothing is tuned or compiled any more.

    Returns how far its loss and its gradients are from the truth, relative to that; or how it
    failed.
    """
    try:
        return _added(provider, ready)
    except Exception as error:
        _bench.steps.pop(provider, None)
        failed = reason(error)
    _free()
    return {"failed": failed}


def _ours(provider: str) -> bool:
    return provider.startswith("fullres")


def _added(provider: str, ready: Callable[[], None]) -> dict[str, Any]:
    job = _bench.job
    step = PROVIDERS[provider](
        NETWORKS[job.network], job.image, job.batch, device=job.device, ready=ready,
        plan=_plan(job, provider),
    )  # fmt: skip
    if _bench.batch is None:
        _bench.batch = step.images, step.labels
    step.images, step.labels = _bench.batch
    _free()
    with quick_tuning():  # of an image: what is chosen does not depend on how many follow
        if _ours(provider) and job.device == "cuda":
            step.backward(1)
        found: dict[str, Any] = {"loss_error": None, "gradient_error": None}
        if provider not in COMPILED or job.checked == job.batch:  # else it would compile again
            loss, parameters, found["gradient_error"] = _errors(step, job.checked)
            found |= {"loss_error": loss, "wrong": wrong_by((loss, parameters), _bench.theirs)}
        step.run().item()
    before = time.perf_counter()
    step.run().item()
    _bench.seconds[provider] = time.perf_counter() - before
    if step.plan is not None and job.device == "cuda":
        found["roof_s"] = step.plan.seconds / step.plan.time_ratio
    _bench.steps[provider] = step
    _free()
    return found


def turn(provider: str, seconds: float) -> dict[str, Any]:
    """Return the seconds of steps and their peak of memory.

    The first step is not timed, where another provider's was the last.
    """
    step, cuda = _bench.steps[provider], _bench.job.device == "cuda"
    try:
        if len(_bench.steps) > 1:
            step.run().item()
        count = max(1, min(MOST, int(seconds / _bench.seconds[provider])))
        peak = None
        if cuda:
            others = torch.cuda.memory_allocated() - _own(step)
            torch.cuda.reset_peak_memory_stats()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            marks[0].record()
            for mark in marks[1:]:
                step.run()
                mark.record()
            torch.cuda.synchronize()
            times = [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
            peak = torch.cuda.max_memory_allocated() - others
        else:
            times = []
            for _ in range(count):
                before = time.perf_counter()
                step.run().item()
                times.append(time.perf_counter() - before)
        return {"times": times, "peak": peak}
    except Exception as error:
        _bench.steps.pop(provider)
        failed = reason(error)
    del step
    _free()
    return {"failed": failed}


def profiled(provider: str) -> list[dict]:
    """Return a row a kernel of one step, the longest first, the last of all others; ms and share.

    Without a GPU a row an operator.
    """
    step, cuda = _bench.steps[provider], _bench.job.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        step.run().item()
    found = []
    for event in seen.key_averages():
        if cuda and event.device_type == torch.autograd.DeviceType.CPU:
            continue  # an operator, whose kernels are counted by themselves
        if getattr(event, "is_user_annotation", False):
            continue  # a span of others
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0:
            found.append((event.key, event.count, spent / 1e3))
    found.sort(key=lambda each: -each[2])
    total = sum(ms for *_, ms in found)
    rest = found[SHOWN:]
    shown = found[:SHOWN]
    if rest:
        calls, ms = (sum(each[n] for each in rest) for n in (1, 2))
        shown.append((f"{len(rest)} others", calls, ms))
    return [
        {"kernel": name[:160], "calls": calls, "ms": ms, "share": ms / total}
        for name, calls, ms in shown
    ]


def _plan(job: Job, provider: str) -> Plan | None:
    """Return the plan that a provider runs by, if it is one that does."""
    dtype = {OURS: torch.bfloat16, "fullres, float32": torch.float32}.get(provider)
    if dtype is None:
        return None
    return kept_plan(job.network, job.image, job.batch, job.memory, job.plans, dtype)


def _errors(step: Step, images: int) -> tuple[float, Tensor, float]:
    """Return how far off a step is, relative to the truth: its loss, each parameter, all of them.

    Parameters are compared as vectors; those of fewer than `FEW` values are left out, which may be
    right by chance, or have no gradient but rounding.
    """
    loss, found = step.gradients(images)
    true_loss, truth = _bench.truth
    sizes = [p.numel() for p in step.model.parameters() if p.requires_grad]
    error = found.double() - truth.double()
    each = [
        (e.norm() / t.norm().clamp(min=1e-30)).item()
        for e, t in zip(error.split(sizes), truth.double().split(sizes), strict=True)
        if len(e) >= FEW
    ]
    whole = (error.norm() / truth.double().norm()).item()
    return abs(loss - true_loss) / max(abs(true_loss), 1e-30), torch.tensor(each).double(), whole


def wrong_by(ours: tuple[float, Tensor], theirs: tuple[float, Tensor]) -> str:
    """Return how much further off a loss and gradients are than the base's; "" if they may be so.

    A loss may be four times as far off, or a hundredth; of ten parameters nine twice, or FLOOR,
    and the tenth four times. Where both round alike, nine of ten are within 1.2.
    """
    said = []
    allowed = max(4 * theirs[0], 1e-2)
    if not ours[0] <= allowed:  # NaN is not
        said.append(f"the loss is off by {ours[0]:.2g} of it, allowed {allowed:.2g}")
    ratios = ours[1] / theirs[1].clamp(min=FLOOR)
    for share, most in ((0.9, 2.0), (1.0, 4.0)):
        found = torch.quantile(ratios, share).item()
        if not found <= most:
            said.append(f"gradients are off by {found:.2g} times what eager's are, allowed {most}")
            break
    return "; ".join(said)


def _own(step: Step) -> int:
    """Return the bytes that a step holds between its runs."""
    tensors = [*step.model.parameters(), *step.model.buffers(), step.images, step.labels]
    tensors += [p.grad for p in step.model.parameters() if p.grad is not None]
    for state in step.optimizer.state.values():
        tensors += [t for t in state.values() if isinstance(t, Tensor) and t.is_cuda]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# Beside it


class Timing:
    """What is known of the providers of jobs: rows, and the kernels of some steps."""

    def __init__(self, out: Path, jobs: Sequence[Job], until: float, rounds: int, seconds: float):
        """Take up what an earlier call has left."""
        self.out, self.until, self.rounds, self.seconds = out, until, rounds, seconds
        self.turn, self.saving = threading.Lock(), threading.Lock()
        self.jobs = {_key(job.blank(p)): job for job in jobs for p in job.providers}
        self.rows = {_key(job.blank(p)): job.blank(p) for job in jobs for p in job.providers}
        for row in resumed("training", out):
            job = self.jobs.get(_key(row))
            if job and _settled(row) and (job.setting == OWN or row["batch"] == job.batch):
                self.rows[_key(row)] = row
        measured = {_key(row) for row in self.rows.values() if not row["failed"]}
        self.kernels = [row for row in resumed("training_kernels", out) if _key(row) in measured]
        self.save()

    def save(self) -> None:
        """Save what is known."""
        with self.saving:
            save("training", self.table(), self.out)
            save("training_kernels", self.kernels, self.out)

    def table(self) -> list[dict]:
        """Return all rows, that of the base's largest batch too, which is the equal one."""
        found = judged([*self.rows.values()], self.jobs)
        both = {(row["network"], row["memory_gib"]) for row in found if row["setting"] == OWN}
        return found + [
            {**row, "setting": OWN}
            for row in found
            if row["setting"] == EQUAL
            and row["provider"] == self.jobs[_key(row)].base
            and (row["network"], row["memory_gib"]) in both
        ]

    def left(self, job: Job) -> list[str]:
        """Return the providers of a job that are not timed yet."""
        return [p for p in job.providers if not _settled(self.rows[_key(job.blank(p))])]

    def row(self, job: Job, provider: str) -> dict:
        """Return a provider's row."""
        return self.rows[_key(job.blank(provider))]

    def put(self, job: Job, provider: str, **columns: Any) -> None:
        """Change a provider's row."""
        self.row(job, provider).update(columns)

    def run(self, job: Job, providers: Sequence[str]) -> None:
        """Time these providers of a job, as long as there is time."""
        left, fewer = list(providers), 0
        while left and time.time() < self.until:
            with Worker() as worker:
                try:
                    self.call(worker, begin, job)
                except (FailedError, HungError) as error:
                    for provider in left:
                        self.put(job, provider, failed=f"reference: {error}"[:300])
                    break
                except UnfinishedError:
                    break
                left = self.together(worker, job, left)
            tight = [p for p in providers if NO_MEMORY.search(self.row(job, p)["failed"])]
            if tight and len(providers) > 1:  # what others hold between their turns was too much
                for provider in tight:
                    self.run(job, [provider])
            elif tight and job.setting == OWN and fewer < FEWER and job.batch > 1:
                fewer += 1  # what fits in kernels' first configuration need not fit in others
                job, left = replace(job, batch=job.batch - 1), list(providers)
            self.save()

    def call(self, worker: Worker, work: Callable, *args: Any, limit: float = CALL) -> Any:
        """Return what work does in the process, when it is its turn."""
        return take(
            worker, self.turn, work, *args, getting_ready=limit, running=CALL, until=self.until
        )

    def measured(self, worker: Worker, work: Callable, *args: Any) -> Any:
        """Return what work does in the process, in its main thread, while it has the device."""
        if not self.turn.acquire(timeout=max(0.0, min(self.until - time.time(), 1e6))):
            raise UnfinishedError
        try:
            return ask(worker, work.__name__, CALL, self.until, work, *args)
        finally:
            self.turn.release()

    def together(self, worker: Worker, job: Job, providers: Sequence[str]) -> list[str]:
        """Let providers take turns; return those that a death of the process left without any."""
        times: dict[str, list[float]] = {}
        peaks: dict[str, int | None] = {}
        left = list(providers)
        try:
            for provider in providers:
                limit = COMPILING if provider in COMPILED else CALL
                left.remove(provider)
                if self.noted(job, provider, self.call(worker, add, provider, limit=limit)):
                    times[provider] = []
            for _ in range(self.rounds):
                for provider in [*times]:
                    if sum(times[provider]) > ENOUGH:
                        continue
                    found = self.measured(worker, turn, provider, self.seconds)
                    if "failed" in found:
                        self.put(job, provider, failed=found["failed"])
                        del times[provider]
                        continue
                    times[provider] += found["times"]
                    peaks[provider] = found["peak"]
            for provider in (OURS, "fullres, float32", job.base):
                if provider in times and job.setting != OWN:
                    self.profile(worker, job, provider)
        except UnfinishedError:
            left = []
        except (FailedError, HungError) as error:
            self.put(job, provider, failed=str(error)[:300])
            if provider in times and len(times[provider]) == 0:
                del times[provider]
            left += [p for p in times if not times[p]]
        for provider, seconds in times.items():
            if seconds:
                self.put(job, provider, failed="", **_figures(job, seconds, peaks[provider]))
        return left

    def noted(self, job: Job, provider: str, found: dict[str, Any]) -> bool:
        """Take down what `add` found; return whether the step runs."""
        if "failed" in found:
            self.put(job, provider, failed=found["failed"])
            return False
        checked = None if found["gradient_error"] is None else job.checked
        self.put(job, provider, batch=job.batch, checked_images=checked, **found)
        return True

    def profile(self, worker: Worker, job: Job, provider: str) -> None:
        """Take down where the time of a step goes."""
        blank = job.blank(provider)
        row = {name: blank[name] for name in (*KEY, "batch")}
        found = self.measured(worker, profiled, provider)
        self.kernels = [each for each in self.kernels if _key(each) != _key(row)]
        self.kernels += [{**row, **each} for each in found]


def _settled(row: dict) -> bool:
    """Return whether another attempt would find nothing else."""
    return not row["failed"] or bool(NO_MEMORY.search(row["failed"]))


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def _figures(job: Job, seconds: Sequence[float], peak: int | None) -> dict[str, Any]:
    """Return the columns of a step's times."""
    low, median, high = torch.quantile(
        torch.tensor(seconds, dtype=torch.float64),
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64),
    ).tolist()
    return {
        "step_s": median,
        "step_s_20": low,
        "step_s_80": high,
        "repeats": len(seconds),
        "images_per_s": job.batch / median,
        "peak_gib": None if peak is None else peak / GIB,
    }


def judged(rows: list[dict], jobs: dict[tuple, Job]) -> list[dict]:
    """Return rows with what follows from others: whether they are right, ratios, and the roof."""
    known = {_key(row): row for row in rows}

    def other(row: dict, **of: Any) -> dict | None:
        return known.get(_key({**row, **of}))

    def same(row: dict, **of: Any) -> dict | None:
        return other(row, setting=EQUAL, **of) or other(row, setting=ONE, **of)

    for row in rows:
        job = jobs[_key(row)]
        base = other(row, provider=job.base) or same(row, provider=job.base)
        if row["step_s"] is None:
            continue
        if row["gradient_error"] is None:  # the code is the same for another size, in the same run
            equal = same(row) if row["provider"] in COMPILED else None
            seen = equal is not None and equal["gradient_error"] is not None
            row["wrong"] = equal["wrong"] if seen else "not checked"
            row["checked_images"] = equal["checked_images"] if seen else None
        row["over_eager"] = _ratio(row, base)
        if roof := _roof(row, rows):
            row |= {"roof_s": roof, "of_roof": roof / row["step_s"]}
    return rows


def _roof(row: dict, rows: Sequence[dict]) -> float | None:
    """Return the roof of a row's batch: that of the nearest batch of ours, by image."""
    found = [
        (abs(each["batch"] - row["batch"]), each["roof_s"] / each["batch"])
        for each in rows
        if each["network"] == row["network"] and each["provider"] == OURS and each["roof_s"]
    ]
    return min(found)[1] * row["batch"] if found else None


def _ratio(row: dict, base: dict | None) -> float | str | None:
    """Return how many images a row trains while the base trains one."""
    if base is None or base["images_per_s"] is None or base["failed"]:
        return None
    wrong = row["wrong"] or (base["wrong"] if base is not row else "")
    return "WRONG" if wrong else row["images_per_s"] / base["images_per_s"]


# All jobs


def run(
    out: Path,
    seconds: float | None = None,
    networks: Sequence[str] | None = None,
    image: Sequence[int] | None = None,
    rounds: int = ROUNDS,
) -> list[dict]:
    """Time every job; print a table, save it, its kernels and a picture in out, return its rows.

    Called again with the same out, commit and card it goes on where it stopped.

    Args:
        out: the folder of the results; batches come from its largest.json where that is.
        seconds: after which it stops; rows say what is not begun.
        networks: some of `steps.NETWORKS`; None for `PUBLISHED`, without a GPU for a small one.
        image: [C, H, W].
        rounds: turns of each provider.
    """
    until = float("inf") if seconds is None else time.time() + seconds
    gpu = torch.cuda.is_available()
    if not gpu:
        print("Training steps: NOT RUN ON A CARD. There is no GPU here: a small network's float32")
        print("steps on the CPU, of which only the ratios say something.\n")
    networks = tuple(networks or (ORDER if gpu else WITHOUT["networks"]))
    image = tuple(image or (IMAGE if gpu else WITHOUT["image"]))
    commit, work = str(environment()["commit"]), (out / "compiled").resolve()
    plans = None if "+changes" in commit else (out / "plans" / commit).resolve()
    jobs = _jobs(out, networks, image, plans) if gpu else _small_jobs(networks, image, plans)
    timing = Timing(out, jobs, until, rounds, TURN if gpu else SHORT)
    if gpu:
        os.environ.setdefault("TRITON_CACHE_DIR", str(work / "cache"))
    ours = [job for job in jobs if gpu and plans and {OURS} & {*timing.left(job)}]
    planning = [
        (kept_plan, job.network, image, job.batch, job.memory, plans) for job in ours
    ]  # fmt: skip
    building = [(compile_all, network, image, work) for network in networks if gpu]
    with mock.patch.dict(os.environ, ALLOCATOR), Behind(planning), Behind(building) as built:

        def begin(job: Job, wait: bool) -> None:
            left = timing.left(job)
            if gpu and any(map(_ours, left)):
                number = networks.index(job.network)
                if not built.ended(number, until if wait else 0.0):
                    left = [p for p in left if not _ours(p)]
            if job.base in job.providers and left and job.base not in left:
                left.insert(0, job.base)  # with whom they are compared takes turns with them
            timing.run(job, left)

        plain = [job for job in jobs if not {*job.providers} & {*COMPILED}]
        for job in plain:
            begin(job, wait=False)
        with ThreadPoolExecutor(len(COMPILED)) as pool:  # torch compiles, beside whoever is timed
            others = pool.map(partial(begin, wait=False), [j for j in jobs if j not in plain])
            for job in plain:  # ours wait until all their configurations are compiled
                begin(job, wait=True)
            list(others)  # which raises what a thread has raised
    timing.save()
    rows = timing.table()
    print(table([{name: row[name] for name in PRINTED} for row in rows]))
    for line in bottlenecks(timing.kernels):
        print(line)
    draw(out / "training.png", rows)
    return rows


def _jobs(
    out: Path, networks: Sequence[str], image: tuple[int, ...], plans: Path | None
) -> list[Job]:
    """Return the jobs of a card, the most telling first."""
    whole = torch.cuda.get_device_properties().total_memory
    limits = [*([MEMORY * GIB] if MEMORY * GIB < whole else []), whole]
    counted, measured = recorded(out), resumed("largest", out)

    def batch(network: str, provider: str, limit: int) -> int:
        cell = Cell(network, provider, image, limit, "cuda")
        for row in measured:
            same = all(row[k] == cell.blank()[k] for k in ("network", "provider", "memory_gib"))
            if same and not row["failed"]:
                return row["batch"]
        return foretell(counted, cell).batch or 0

    plain = tuple(name for name in NAMES if name not in COMPILED)
    jobs: list[Job] = []
    for limit in limits:
        make = partial(
            Job, memory=limit, image=image, device="cuda", whole=limit == whole, plans=plans
        )
        most = {(n, p): batch(n, p, limit) for n in networks for p in NAMES}
        # The largest batch of eager bf16 is the equal batch, which may be of one image.
        own = [(n, p) for p in NAMES for n in networks if most[n, p] and p != BASE]
        for providers in (plain, *((name,) for name in COMPILED)):
            if limit == limits[0]:
                jobs += [
                    make(n, ONE, 1, providers=providers) for n in networks if most[n, BASE] > 1
                ]
            for n in networks:
                size = most[n, BASE]
                # A card that holds no more than its own memory need not be asked again.
                able = tuple(p for p in providers if limit != whole or most[n, p] >= size)
                jobs += [make(n, EQUAL, size, providers=able)] if size and able else []
            jobs += [make(n, OWN, most[n, p], providers=(p,)) for n, p in own if p in providers]
    return jobs


def _small_jobs(networks: Sequence[str], image: tuple[int, ...], plans: Path | None) -> list[Job]:
    """Return jobs for the CPU."""
    options = {"image": image, "device": "cpu", "base": WITHOUT["base"], "plans": plans}
    return [
        Job(network, setting, batch, None, WITHOUT["providers"], **options)
        for network in networks
        for setting, batch in ((ONE, 1), (EQUAL, 2))
    ]


def bottlenecks(kernels: Sequence[dict]) -> list[str]:
    """Return a line a profile: in which kernels most of a step's time goes."""
    groups: dict[tuple, list[dict]] = {}
    for row in kernels:
        groups.setdefault(
            (row["network"], row["provider"], row["setting"], row["batch"]), []
        ).append(row)
    lines = []
    for (network, provider, setting, batch), rows in groups.items():
        first = ", ".join(f"{r['kernel'][:60]} {100 * r['share']:.0f} %" for r in rows[:3])
        total = sum(r["ms"] for r in rows)
        images = "1 image" if batch == 1 else f"{batch} images"
        lines.append(
            f"{network}, {provider}, {setting}, {images}: {total:.3g} ms, of which {first}"
        )
    return lines


def draw(path: Path, rows: Sequence[dict]) -> None:
    """Write a PNG of images a second, a panel a network and setting, a bar a provider."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows))
    settings = list(dict.fromkeys((row["setting"], row["memory_gib"]) for row in rows))
    size = 4.2 * len(settings), 2.4 * len(networks) + 1
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(networks), len(settings), squeeze=False)
    for line, network in zip(panels, networks, strict=True):
        for axes, (setting, memory) in zip(line, settings, strict=True):
            here = [
                r for r in rows
                if (r["network"], r["setting"], r["memory_gib"]) == (network, setting, memory)
            ]  # fmt: skip
            right = [r for r in here if r["step_s"] is not None]
            places = range(len(here))
            axes.barh(
                places,
                [r["images_per_s"] or 0 for r in here],
                color=["tab:red" if r["wrong"] else "tab:blue" for r in here],
            )
            for place, r in zip(places, here, strict=True):
                if r in right:
                    low, high = r["batch"] / r["step_s_80"], r["batch"] / r["step_s_20"]
                    axes.plot([low, high], [place, place], color="black", linewidth=1)
            axes.set(yticks=places, xlabel="images a second")
            axes.set_yticklabels([f"{r['provider']}, {r['batch']}" for r in here], fontsize=6)
            axes.set_title(
                f"{network}, {setting}{f', {memory:g} GiB' if memory else ''}", fontsize=8
            )
            axes.invert_yaxis()
    figure.suptitle(
        f"Training steps on {rows[0]['device']}, {rows[0]['image']}; in red what is WRONG",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
