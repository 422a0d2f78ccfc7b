"""Does the same network, trained on the same events by torch's layers and by ours, end alike?

Each run is one of `fullres.training.train`: the same initial weights, the same whole generated
events in the same order. Trainings that differ in their last bits drift apart, whoever computes
them. What decides, therefore, is how far apart eager float32 itself ends when nothing but the order
of the events is another: a run must end no further from eager float32 than that. The loss of the
first step, before anything can drift, tells rounding from error.

Our kernels run in their first configuration, which costs no tuner's time: `training.py` is about
speed, and `kernels.py` checks what tuners choose. Three runs of eager float32 are few. One that
were a fourth would be outside their spread in three of ten comparisons: one of five ends outside
says little, most of them outside say much.
"""

import contextlib
import gc
import math
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ..events import EventWriter, SyntheticEvents, generate_file
from ..events.dataset import FILE_SIZE, PLANES, SIZE
from .record import NOT_BEGUN, NOT_FINISHED, resumed, save, table
from .steps import Network, compile_kernels, exact_products, pixel_labels, untuned
from .worker import FailedError, Worker

REFERENCE = "eager float32"
ORDERS = ("eager float32, another order", "eager float32, a third order")
# What each run has other than the rest, the most telling first: time may not suffice for all.
RUNS: dict[str, dict[str, Any]] = {
    REFERENCE: {"precision": "fp32"},
    "fullres, bf16": {"precision": "bf16", "ours": True},
    ORDERS[0]: {"precision": "fp32", "order": 1},
    ORDERS[1]: {"precision": "fp32", "order": 2},
    "fullres, float32": {"precision": "fp32", "ours": True},
    "eager bf16": {"precision": "bf16"},
}
METRICS = ("accuracy", "non_background_accuracy", "cosmic_iou", "neutrino_iou", "mean_iou")
# The ends that are compared; the other metrics follow from these or are all background.
ENDS = ("final_loss", "held_out_loss", "non_background_accuracy", "cosmic_iou", "neutrino_iou")
# By how much the first step's loss may differ from that of eager float32, which rounds as well.
FIRST_LOSS = {"fp32": 1e-4, "bf16": 1e-2}
PATIENCE = 3  # seconds beyond the box in which a run that was told to stop may end its step


@dataclass(frozen=True)
class Setting:
    """What is trained, and for how long."""

    image: tuple[int, int]
    steps: int
    events: int  # of which the smoothed loss is the mean: one pass
    held_out: int
    memory: dict[str, str]  # that ours are planned for, by precision
    network: str = ""  # numbers other than the preset's
    device: str = "gpu"
    workers: int = 4
    options: dict[str, Any] = field(default_factory=dict)  # of the trainer


TRAINING = {"loss": "light", "lr": 5e-3, "schedule": "cosine", "warmup": 10}
# Budgets below what the fastest plan takes, so that the runs make things again.
WHOLE = Setting(SIZE, 240, 60, 8, {"bf16": "1GiB", "fp32": "2GiB"}, options=TRAINING)
PART = Setting(
    (128, 192),
    30,
    15,
    4,
    {"bf16": "4MiB", "fp32": "8MiB"},
    network="filters=4,depth=3,level_blocks=1,deepest_blocks=1,deepest_channels=16,deepest_kernel=3",
    device="cpu",
    workers=0,
    options=TRAINING | {"lr": 1e-2, "warmup": 3},
)


def run(out: Path, seconds: float | None = None, setting: Setting | None = None) -> list[dict]:
    """Train every run; print tables, save them with curves and a picture in out, return the rows.

    Called again with the same out, commit and machine, runs that have ended are kept, and the one
    that was stopped goes on from its checkpoint: with the same weights, optimizer, events and
    random numbers. So it is bit for bit what an uninterrupted one is, wherever a provider computes
    the same bits twice: ours do, and cuDNN's and bilinear backward passes on a card do not.

    Args:
        out: folder of the results; `convergence.work` in it holds what is unfinished.
        seconds: after which the run under way stops behind its step.
        setting: None takes whole images on a GPU, and without one a part of an image and a small
            network on the CPU.

    Raises:
        SystemExit: the first step's loss was wrong, after all runs.
    """
    until = math.inf if seconds is None else time.time() + seconds
    if setting is None:
        setting = WHOLE if torch.cuda.is_available() else PART
    if setting.device == "cpu":
        print("NOT RUN ON A CARD: a small network and a part of an image, trained on the CPU.")
    if setting.device == "gpu":  # where the other benchmarks keep what was compiled
        os.environ.setdefault("TRITON_CACHE_DIR", str((out / "compiled" / "cache").resolve()))
    work = out / "convergence.work"
    rows = {name: _row(name, setting) for name in RUNS}
    curves: dict[str, list[float]] = {name: [] for name in RUNS}
    if kept := _kept(out, rows):
        rows = kept
        for name, losses in curves.items():
            losses += [p[name] for p in resumed("convergence_curves", out) if p[name] is not None]
    else:  # of another commit or machine, if anything
        shutil.rmtree(work, ignore_errors=True)

    def keep() -> list[dict]:
        found = judged(list(rows.values()), curves, setting.events)
        save("convergence", found, out)
        save("convergence_curves", _points(curves), out)
        return found

    keep()  # so that a call that is killed leaves rows by which its checkpoints are known
    todo = [name for name, row in rows.items() if row["failed"]]
    if todo and time.time() < until:
        _prepare(work, setting)
    with Worker() as worker, _compiled_ahead(todo, setting, work) as compiled:
        for name in todo:
            row = rows[name]
            if RUNS[name].get("ours"):
                compiled.wait(None if until == math.inf else max(0.0, until - time.time()))
            if time.time() >= until:
                continue
            try:
                found = worker(_trained, name, setting, work, until, until=until + PATIENCE)
                curves[name] = found.pop("losses")
                row |= found
            except TimeoutError:  # in its first step, which compiles and tunes, or for ever
                row["failed"] = f"no step ended {NOT_FINISHED}"
            except FailedError as error:  # it must not cost the other runs
                row["failed"] = str(error)
            keep()
    found = keep()
    _show(found, curves, setting, out)
    if not any(row["failed"] for row in found):
        shutil.rmtree(work, ignore_errors=True)
    if wrong := [f"{row['provider']}, {row['wrong']}" for row in found if row["wrong"]]:
        raise SystemExit(f"WRONG: {'; '.join(wrong)}")
    return found


def _row(name: str, setting: Setting) -> dict:
    """Return the row of a run that has not begun."""
    return {
        "provider": name,
        "device": torch.cuda.get_device_name() if setting.device == "gpu" else "cpu",
        "network": f"a21 {setting.network}".strip(),
        "image": "x".join(map(str, (PLANES, *setting.image))),
        "of_steps": setting.steps,
        "steps": 0,
        **dict.fromkeys(("final_loss", "held_out_loss", *METRICS)),
        **dict.fromkeys(("images_per_s", "peak_gib", "first_loss_gap", "largest_gap")),
        "outside_spread": None,
        "wrong": "",
        "failed": NOT_BEGUN,
    }


def _kept(out: Path, rows: dict[str, dict]) -> dict[str, dict]:
    """Return the rows of an earlier call, by run, if they are of these very runs."""
    what = ("device", "network", "image", "of_steps")
    kept = {row["provider"]: row for row in resumed("convergence", out)}
    if list(kept) != list(rows) or any(kept[n][k] != rows[n][k] for n in rows for k in what):
        return {}
    return kept


# Beside the runs that need no kernels of ours: compiling those


@contextmanager
def _compiled_ahead(
    names: Sequence[str], setting: Setting, work: Path
) -> Iterator[threading.Event]:
    """Compile what ours among these runs launch, beside what happens inside; yield when that is.

    One after the other, as a run would compile them itself, they take longer than the run.
    """
    done, names = threading.Event(), [name for name in names if RUNS[name].get("ours")]
    if setting.device != "gpu" or not names:
        done.set()
        yield done
        return

    def compile_all() -> None:
        # Where something is wrong, the run that needs it will say so.
        with contextlib.suppress(Exception), builder:
            for name in names:
                builder(_compile, name, setting, work)
        done.set()

    builder = Worker()
    threading.Thread(target=compile_all, daemon=True).start()
    try:
        yield done
    finally:
        builder.end()


def _compile(name: str, setting: Setting, work: Path) -> None:
    """Compile the kernels of a run's step, each in the one configuration that runs."""
    from ..training import SegmentationLoss, TrainConfig
    from ..training.memory import plan_run
    from ..training.module import build_network, build_optimizer

    os.nice(19)  # below who feeds the device
    config = TrainConfig(**_options(name, setting, work), out=str(work / "nowhere"))
    network = partial(build_network, config)
    config, plan = plan_run(
        config, network, partial(build_optimizer, config), accelerator=setting.device
    )
    # Of fake tensors, which a module cannot be cast to another memory format of.
    network = partial(build_network, replace(config, channels_last=False))
    whole = Network(network, pixel_labels, SegmentationLoss(config.loss))
    build = work / "build" / _slug(name)
    compile_kernels(whole, (PLANES, *setting.image), config.batch_size, plan, build)


# In the worker: one run


def _trained(name: str, setting: Setting, work: Path, until: float) -> dict:
    """Train a run, or what is left of it; return its losses and what its row gets."""
    from ..training import TrainConfig, train
    from ..training.callbacks import StoppedError
    from ..training.curves import read_curves

    gpu = setting.device == "gpu"
    if gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    folder, stopped = work / _slug(name), ""
    config = TrainConfig(**_options(name, setting, work), out=str(folder))
    with exact_products(), _stopped_at(until), untuned():  # eager float32 is to be float32
        try:
            train(config, resume="auto")
        except StoppedError:
            stopped = f"not finished {NOT_FINISHED}; the next call goes on"
    curves = read_curves(folder)
    losses = _values(curves, "training/loss")
    ends = {name: _values(curves, f"validation/{name}") for name in ("loss", *METRICS)}
    ends = {name: None if stopped else values[-1] for name, values in ends.items()}
    return {
        "losses": losses,
        "steps": len(losses),
        "final_loss": None if stopped else smoothed(losses, setting.events)[-1],
        "held_out_loss": ends.pop("loss"),
        **ends,
        "images_per_s": statistics.median(_values(curves, "training/images_per_second") or [0.0]),
        "peak_gib": max(_values(curves, "training/peak_memory_gib")) if gpu else None,
        "failed": stopped,
    }


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def _options(name: str, setting: Setting, work: Path) -> dict[str, Any]:
    """Return a run's options as TrainConfig has them, all but its folder."""
    own = RUNS[name]
    options = {
        "data": str(work / f"events-{own.get('order', 0)}.h5"),
        "val_data": str(work / "held_out.h5"),
        "image_size": "x".join(map(str, setting.image)),
        "preset": "a21",
        "network": setting.network,
        "precision": own["precision"],
        "steps": setting.steps,
        "device": setting.device,
        "workers": setting.workers,
        "checkpoint_every": max(1, setting.steps // 4),
        **setting.options,
    }
    if own.get("ours"):
        options["memory"] = setting.memory[own["precision"]]
    return options


@contextmanager
def _stopped_at(until: float) -> Iterator[None]:
    """Tell the training inside to stop behind its step once it is time, as a scheduler does."""
    over = threading.Event()

    def tell() -> None:
        if until < math.inf and not over.wait(max(0.0, until - time.time())):
            while not over.wait(0.2):  # again and again, for the run may not listen yet
                os.kill(os.getpid(), signal.SIGUSR1)

    # Before the run listens, and after, a signal must not end the process.
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
        signal.signal(signal.SIGUSR1, before)


def _values(curves: dict[str, dict[int, float]], name: str) -> list[float]:
    return [value for _, value in sorted(curves.get(name, {}).items())]


# What the runs train on


def _prepare(work: Path, setting: Setting) -> None:
    """Write the events, in each order that a run has them in, and those held out, once."""
    if (work / "complete").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n")  # checkpoints are no results
    size = FILE_SIZE if setting.image == SIZE else setting.image
    generate_file(work / "held_out.h5", setting.held_out, seed=1, size=size, overwrite=True)
    source = SyntheticEvents(setting.events, 0, size)
    events = [source.pixels(n) for n in range(setting.events)]
    for order in {options.get("order", 0) for options in RUNS.values()}:
        places = list(range(setting.events))
        if order:  # of the places in the file: which place comes when is the same for all runs
            places = torch.randperm(
                setting.events, generator=torch.Generator().manual_seed(order)
            ).tolist()
        with EventWriter(work / f"events-{order}.h5", overwrite=True) as writer:
            for place in places:
                writer.write_pixels(events[place], size)
    (work / "complete").touch()


# What it shows


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Return at each step the mean loss of the last `window` steps, or of as many as there are."""
    return [statistics.fmean(losses[max(0, n - window) : n]) for n in range(1, len(losses) + 1)]


def judged(rows: Sequence[dict], curves: dict[str, Sequence[float]], window: int) -> list[dict]:
    """Return the rows with what they are beside eager float32.

        first_loss_gap  relative difference of the first step's loss, for runs of the same order
        largest_gap     the largest relative difference of the smoothed losses, from the end of the
                        first pass on
        wrong           that the first loss is further off than rounding is
        outside_spread  which ends are further from eager float32's than its runs in three orders
                        are apart; "" for none; None while one of these is missing

    Args:
        rows: of all runs.
        curves: their losses, by run.
        window: steps of a pass over the events.
    """
    known = {row["provider"]: row for row in rows}
    base, spread = curves[REFERENCE], spreads([known[name] for name in (REFERENCE, *ORDERS)])
    result = []
    for row in rows:
        name, fresh = row["provider"], dict(row)
        losses, own = curves[name], RUNS[name]
        fresh |= {"first_loss_gap": None, "wrong": "", "outside_spread": None}
        if base and losses and not own.get("order"):
            gap = abs(losses[0] - base[0]) / abs(base[0])
            fresh["first_loss_gap"] = gap
            if not gap <= FIRST_LOSS[own["precision"]]:  # NaN is not either
                fresh["wrong"] = f"first loss {losses[0]:.6g}, want {base[0]:.6g}"
        pairs = zip(smoothed(base, window), smoothed(losses, window), strict=False)
        gaps = [abs(b - a) / abs(a) for a, b in list(pairs)[window - 1 :]]
        fresh["largest_gap"] = max(gaps, default=None)
        if spread and not row["failed"] and name not in (REFERENCE, *ORDERS):
            fresh["outside_spread"] = ", ".join(
                end for end in ENDS if not abs(row[end] - known[REFERENCE][end]) <= spread[end]
            )
        result.append(fresh)
    return result


def spreads(rows: Sequence[dict]) -> dict[str, float]:
    """Return for each end how far apart the rows are at most; nothing while one has not ended."""
    if any(row["failed"] for row in rows):
        return {}
    return {end: max(abs(a[end] - b[end]) for a, b in combinations(rows, 2)) for end in ENDS}


def verdict(rows: Sequence[dict]) -> list[str]:
    """Return a sentence on each run that is held against eager float32's spread."""
    lines = []
    for row in rows:
        name = row["provider"]
        if name in (REFERENCE, *ORDERS):
            continue
        if row["wrong"]:
            lines.append(f"{name}: WRONG, {row['wrong']}")
        elif row["outside_spread"] is None:
            lines.append(f"{name}: not decided, {row['failed'] or 'eager float32 has not ended'}")
        elif not row["outside_spread"]:
            lines.append(f"{name}: all {len(ENDS)} ends are within eager float32's own spread")
        else:
            count = len(row["outside_spread"].split(", "))
            lines.append(
                f"{name}: {count} of {len(ENDS)} ends are outside eager float32's own spread: "
                f"{row['outside_spread']}"
            )
    return lines


def _points(curves: dict[str, Sequence[float]]) -> list[dict]:
    """Return a row a step, with each run's loss."""
    steps = max(map(len, curves.values()))
    return [
        {"step": n + 1} | {name: c[n] if n < len(c) else None for name, c in curves.items()}
        for n in range(steps)
    ]


def _show(
    rows: Sequence[dict], curves: dict[str, Sequence[float]], setting: Setting, out: Path
) -> None:
    same = ("device", "network", "image", "of_steps", "accuracy", "mean_iou", "outside_spread")
    first = rows[0]
    print(f"{first['network']}, {first['image']}, {first['of_steps']} steps, {first['device']}\n")
    print(table([{k: v for k, v in row.items() if k not in same} for row in rows]))
    known = {row["provider"]: row for row in rows}
    if spread := spreads([known[name] for name in (REFERENCE, *ORDERS)]):
        others = [row for row in rows if row["outside_spread"] is not None]
        print("\nHow far runs end from eager float32, beside its own spread over three orders:\n")
        print(
            table(
                [
                    {"end": end, REFERENCE: known[REFERENCE][end], "spread": spread[end]}
                    | {row["provider"]: row[end] - known[REFERENCE][end] for row in others}
                    for end in ENDS
                ]
            )
        )
    print("\n" + "\n".join(verdict(rows)))
    draw(out / "convergence.png", curves, rows, setting.events)


def draw(path: Path, curves: dict[str, Sequence[float]], rows: Sequence[dict], window: int) -> None:
    """Write a PNG of the smoothed losses overlaid, and of how far they are from eager float32's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    losses, gaps = figure.subplots(1, 2)
    base = smoothed(curves[REFERENCE], window)
    for number, (name, curve) in enumerate(curves.items()):
        line = smoothed(curve, window)
        if not line:
            continue
        look = {"color": f"C{number}", "linewidth": 1.2, "label": name}
        if RUNS[name].get("order"):
            look |= {"color": "0.6", "linestyle": ":" if RUNS[name]["order"] == 1 else "--"}
        steps = range(1, len(line) + 1)
        losses.plot(steps, line, **look)
        if name == REFERENCE:
            losses.plot(steps, curve, color=look["color"], linewidth=0.3, alpha=0.7)
        else:
            gap = [abs(b - a) / abs(a) for a, b in zip(base, line, strict=False)]
            gaps.plot(range(1, len(gap) + 1), gap, **look)
    row = rows[0]
    losses.set(
        xlabel="step", ylabel=f"loss, mean of {window} steps", yscale="log",
        title=f"{row['network'][:30]}, {row['image']}, {row['device']}",
    )  # fmt: skip
    gaps.set(xlabel="step", ylabel="relative gap to eager float32", title="of the smoothed losses")
    if gaps.lines:
        gaps.set_yscale("log")
    for axes in (losses, gaps):
        axes.grid(linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if losses.lines:
        losses.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
