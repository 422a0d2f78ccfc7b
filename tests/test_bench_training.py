"""The benchmark of training steps prints a ratio for right results alone, and keeps what it has."""

import copy
import time
from dataclasses import replace

import pytest
import torch

from fullres.bench import record, steps, training
from fullres.bench.training import EQUAL, ONE, OWN, Job
from fullres.bench.worker import FailedError

IMAGE = (3, 24, 32)
OURS = "fullres, float32"
PROVIDERS = ("eager float32", OURS)
SMALL = Job(
    steps.SMALL, EQUAL, 2, None, PROVIDERS, IMAGE, "cpu", base="eager float32"
)  # fmt: skip


def row(provider, setting=EQUAL, batch=2, seconds=1.0, gradient=1e-4, loss=1e-5, **more):
    """A row of a card that was timed."""
    job = Job("a21", setting, batch, 2**30, (provider,), IMAGE, "cpu")
    found = job.blank(provider) | {"device": "card", "failed": "", "step_s": seconds}
    found |= {"images_per_s": batch / seconds, "gradient_error": gradient, "loss_error": loss}
    return found | more


def judged(*rows):
    job = Job("a21", EQUAL, 2, 2**30, ("eager bf16",), IMAGE, "cpu")
    return training.judged([*rows], {training._key(each): job for each in rows})


def test_a_ratio_is_of_images_a_second():
    eager, ours, largest = judged(
        row("eager bf16"), row(steps.OURS, seconds=0.5),
        row(steps.OURS, OWN, batch=30, seconds=10.0),
    )  # fmt: skip
    assert (eager["over_eager"], ours["over_eager"]) == (1.0, 2.0)
    assert largest["over_eager"] == 1.5  # over eager's own largest batch, which is the equal one
    assert not ours["wrong"]


def test_a_wrong_result_has_no_ratio():
    def ratios(eager="", ours="", **more):
        found = judged(row("eager bf16", wrong=eager), row(steps.OURS, wrong=ours, **more))
        return [r["over_eager"] for r in found]

    assert ratios() == [1.0, 1.0]
    assert ratios(ours="gradients") == [1.0, "WRONG"]
    assert ratios(eager="gradients") == ["WRONG", "WRONG"]
    assert ratios(gradient=None) == [1.0, "WRONG"]  # nobody has looked


def test_results_are_wrong_where_they_are_further_off_than_the_bases():
    theirs = 1e-3, torch.logspace(-2, 0, 40).double()

    def wrong(loss=1.0, **times):
        factors = torch.ones(40).double()
        for number, factor in times.items():
            factors[int(number[1:]) :] *= factor
        return training.wrong_by((theirs[0] * loss, theirs[1] * factors), theirs)

    assert not wrong() and not wrong(loss=9.0, _0=1.9) and not wrong(_39=3.9)
    assert "the loss is off by 0.011" in wrong(loss=11.0)
    assert "off by 2.1 times" in wrong(_0=2.1)
    assert "off by 4.1 times" in wrong(_39=4.1)
    assert "nan" in wrong(loss=float("nan")) and "nan" in wrong(_39=float("nan"))
    exact = 0.0, torch.zeros(40).double()
    assert not training.wrong_by((1e-3, torch.full((40,), 0.019).double()), exact)
    assert training.wrong_by((1e-3, torch.full((40,), 0.021).double()), exact)


def test_compiled_steps_are_right_where_they_were_at_the_equal_batch():
    name = "torch.compile, bf16"
    compiled = row(name, OWN, batch=4, gradient=None)
    *_, found = judged(row("eager bf16"), row(name, checked_images=2), compiled)
    assert found["over_eager"] == 2.0 and found["checked_images"] == 2
    *_, found = judged(row("eager bf16"), row(name, wrong="gradients"), compiled)
    assert found["over_eager"] == "WRONG"
    *_, found = judged(row("eager bf16"), compiled)
    assert found["wrong"] == "not checked"


def test_the_roof_is_our_plans_by_image():
    ours, eager, other = judged(
        row(steps.OURS, seconds=0.5, roof_s=0.2), row("eager bf16", ONE, 1, seconds=1.0),
        row(steps.OURS, OWN, 30, seconds=10.0, roof_s=2.5),
    )  # fmt: skip
    assert ours["of_roof"] == pytest.approx(0.4)
    assert eager["of_roof"] == pytest.approx(0.1)
    assert other["of_roof"] == pytest.approx(0.25)


def test_bottlenecks_are_named():
    kernel = {**row(steps.OURS), "kernel": "dgrad", "calls": 3, "ms": 30.0, "share": 0.75}
    (line,) = training.bottlenecks([kernel, {**kernel, "kernel": "wgrad", "ms": 10, "share": 0.25}])
    assert line == f"a21, {steps.OURS}, {EQUAL}, 2 images: 40 ms, of which dgrad 75 %, wgrad 25 %"


def test_the_bases_largest_batch_is_the_equal_one(tmp_path):
    own = replace(SMALL, setting=OWN, batch=9, providers=(OURS,))
    timing = training.Timing(tmp_path, [SMALL, own], 0.0, 1, 0.01)
    found = {(r["provider"], r["setting"]): r["batch"] for r in timing.table()}
    assert found["eager float32", OWN] == found["eager float32", EQUAL] == 2
    assert found[OURS, OWN] == 9 and len(found) == 4


@pytest.fixture
def bench():
    """The benchmark of the small job, in this process."""
    training.begin(SMALL, lambda: None)
    yield training._bench
    training._bench = None
    torch.backends.cudnn.benchmark = False


def test_steps_are_checked_as_they_are_timed(bench, monkeypatch):
    told = []
    found = training.add(OURS, lambda: told.append(True))
    assert told == [True] and not found["wrong"]
    assert found["gradient_error"] < 0.01 and found["loss_error"] < 1e-5
    timed = training.turn(OURS, 0.01)
    assert all(seconds > 0 for seconds in timed["times"])
    gradients = steps.Step.gradients

    def wrong(self, images=None):
        loss, found = gradients(self, images)
        return loss * 1.05, found * 1.05

    monkeypatch.setattr(steps.Step, "gradients", wrong)
    found = training.add(OURS, lambda: None)
    assert found["gradient_error"] == pytest.approx(0.05, rel=0.1)
    assert "the loss" in found["wrong"] and "gradients" in found["wrong"]


def test_on_a_card_a_turn_is_timed_by_events_and_its_peak_is_its_own(bench, monkeypatch):
    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now = Event.now + 250.0

        def elapsed_time(self, other):
            return other.at - self.at

    training.add(OURS, lambda: None)
    step = bench.steps[OURS]
    own, others, above = training._own(step), 1000, 77  # bytes
    asked = []
    for name, result in {
        "Event": Event, "synchronize": lambda: asked.append("waited"),
        "memory_allocated": lambda: own + others,
        "reset_peak_memory_stats": lambda: asked.append("reset"),
        "max_memory_allocated": lambda: own + others + above,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, result)
    monkeypatch.setattr(bench, "job", replace(SMALL, device="cuda"))
    bench.seconds[OURS] = 0.25
    found = training.turn(OURS, 1.0)
    assert found == {"times": [0.25] * 4, "peak": own + above}
    assert asked == ["reset", "waited"]


def test_all_train_on_the_same_images(bench):
    for provider in PROVIDERS:
        training.add(provider, lambda: None)
    first, second = bench.steps.values()
    assert first.images is second.images and first.labels is second.labels


def test_a_failure_is_said_and_the_others_go_on(bench, monkeypatch):
    def broken(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(steps.PROVIDERS, "broken", broken)
    assert training.add("broken", lambda: None) == {"failed": "OutOfMemoryError: out of memory"}
    training.add(OURS, lambda: None)
    monkeypatch.setattr(steps.Step, "run", broken)
    assert "out of memory" in training.turn(OURS, 0.01)["failed"]
    assert OURS not in bench.steps


def test_time_is_split_by_kernel(bench):
    training.add("eager float32", lambda: None)
    kernels = training.profiled("eager float32")
    assert any("conv" in each["kernel"] for each in kernels)
    assert sum(each["share"] for each in kernels) == pytest.approx(1)
    assert kernels[:-1] == sorted(kernels[:-1], key=lambda each: -each["ms"])


class Here:
    """A worker that is no process of its own, which takes seconds to start."""

    def __call__(self, work, *args, until):
        return work(*args)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def timing(tmp_path, monkeypatch):
    """What times jobs, in this process."""
    monkeypatch.setattr(training, "Worker", Here)
    yield lambda job: training.Timing(tmp_path, [job], float("inf"), 1, 0.01)
    torch.backends.cudnn.benchmark = False


def die(provider, ready):
    """In place of training.add: ours ends the process."""
    if provider == OURS:
        raise FailedError("its process died")
    return ADD(provider, ready)


ADD = training.add


def test_a_process_that_dies_costs_its_own_row(timing, monkeypatch):
    monkeypatch.setattr(training, "add", die)
    found = timing(SMALL)
    found.run(SMALL, [OURS, "eager float32"])
    ours, eager = found.row(SMALL, OURS), found.row(SMALL, "eager float32")
    assert "died" in ours["failed"] and ours["step_s"] is None
    assert not eager["failed"] and eager["step_s"] > 0


def needs_all(provider, ready):
    """In place of training.add: ours does not fit beside another's step."""
    if provider == OURS and training._bench.steps:
        return {"failed": "OutOfMemoryError: out of memory"}
    return ADD(provider, ready)


def test_who_does_not_fit_beside_others_is_timed_alone(timing, monkeypatch):
    monkeypatch.setattr(training, "add", needs_all)
    found = timing(SMALL)
    found.run(SMALL, ["eager float32", OURS])
    assert all(not each["failed"] and each["step_s"] for each in found.rows.values())


def no_memory(provider, ready):
    """In place of training.add."""
    if training._bench.job.batch >= 4:
        return {"failed": "OutOfMemoryError: out of memory"}
    return ADD(provider, ready)


@pytest.mark.parametrize("batch, fits", [(5, 3), (7, None)])
def test_an_own_largest_batch_that_no_longer_fits_is_made_smaller(timing, monkeypatch, batch, fits):
    monkeypatch.setattr(training, "add", no_memory)
    job = replace(SMALL, setting=OWN, batch=batch, providers=(OURS,))
    found = timing(job)
    found.run(job, [OURS])
    row = found.row(job, OURS)
    if fits is None:
        assert "out of memory" in row["failed"]
    else:
        assert row["batch"] == fits and not row["failed"] and row["checked_images"] == 1
        assert row["images_per_s"] == pytest.approx(fits / row["step_s"])


def test_it_goes_on_where_time_was_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "_commit", lambda: "abc")
    monkeypatch.setattr(training, "_small_jobs", lambda *_: [SMALL])
    rows = training.run(tmp_path, seconds=0, image=IMAGE)
    assert {each["failed"] for each in rows} == {record.NOT_BEGUN}
    rows = training.run(tmp_path, image=IMAGE, rounds=1)
    assert [each["provider"] for each in rows] == [*PROVIDERS]
    for each in rows:
        assert not each["failed"] and each["device"] == "cpu" and each["checked_images"] == 2
        assert each["step_s_20"] <= each["step_s"] <= each["step_s_80"]
    assert rows[0]["over_eager"] == 1 and isinstance(rows[1]["over_eager"], float)
    printed = capsys.readouterr().out
    assert "NOT RUN ON A CARD" in printed and "of which" in printed
    for name in ("training.csv", "training.png", "training_kernels.csv"):
        assert (tmp_path / name).stat().st_size > 100
    before = copy.deepcopy(rows)
    start = time.perf_counter()
    assert training.run(tmp_path, image=IMAGE) == before  # what is timed is not timed again
    assert time.perf_counter() - start < 5


@pytest.fixture
def card(monkeypatch):
    """A card of 80 GiB, as far as it is asked what it is."""

    class Card:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "card")


class Built:
    """In place of what compiles beside the timing: done once somebody waits for it."""

    def __init__(self, calls):
        self.done = False

    def ended(self, number, until=0.0):
        self.done |= until > 0
        return self.done

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_on_a_card_ours_wait_for_their_kernels_and_take_turns_with_eager(
    card, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training, "Behind", Built)
    monkeypatch.setattr(record, "_commit", lambda: "abc")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    ran = []

    def run(self, job, providers):
        ran.append((job, tuple(providers)))
        for provider in providers:
            self.put(job, provider, failed="", step_s=1.0, images_per_s=1.0, batch=job.batch)
            self.put(job, provider, step_s_20=1.0, step_s_80=1.0, gradient_error=0.1)

    monkeypatch.setattr(training.Timing, "run", run)
    rows = training.run(tmp_path, networks=["a21"])
    assert not any(row["failed"] for row in rows)
    ours = [n for n, (_, providers) in enumerate(ran) if steps.OURS in providers]
    plain = [n for n, (job, p) in enumerate(ran) if p and not {*p} & {*steps.COMPILED}]
    first = [n for n in plain if n not in ours]
    assert ours and max(first) < min(ours)
    for job, providers in (ran[n] for n in ours):
        assert providers == ((steps.OURS,) if job.setting == OWN else ("eager bf16", steps.OURS))
    seen = len(ran)
    assert training.run(tmp_path, networks=["a21"]) == rows
    assert not any(providers for _, providers in ran[seen:])


def test_jobs_of_a_card_take_batches_that_were_measured(card, tmp_path, monkeypatch):
    known = {"network": "a21", "provider": steps.OURS, "memory_gib": 40.0, "batch": 77}
    monkeypatch.setattr(
        training, "resumed", lambda name, out: [{**known, "failed": ""}] * (name == "largest")
    )
    jobs = training._jobs(tmp_path, training.ORDER, steps.IMAGE, None)
    (ours,) = (
        job for job in jobs
        if (job.network, job.setting, job.providers) == ("a21", OWN, (steps.OURS,))
        and not job.whole
    )  # fmt: skip
    assert ours.batch == 77 and ours.memory == 40 * 2**30
    assert {p for job in jobs for p in job.providers} == {*training.NAMES}
    equal = {(j.network, j.whole): j.batch for j in jobs if j.setting == EQUAL}
    assert equal["a21", False] == 9 and equal["a21", True] == 18  # of the recorded table
    assert equal["uresnet", False] == 1  # which is all that eager bf16 holds
    assert {j.network for j in jobs if j.setting == ONE} == {"a21", "resnet50"}
    keys = [training._key(job.blank(p)) for job in jobs for p in job.providers]
    assert len(keys) == len({*keys})
    first = jobs.index(ours)
    assert all(job.providers[0] in steps.COMPILED or not job.whole for job in jobs[:first])
