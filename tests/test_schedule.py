"""Schedules: what is counted is what runs, all give the same bits, the best are found."""

import copy
import dataclasses
import pickle
import random
from collections.abc import Iterator
from itertools import chain, combinations

import pytest
import torch
from torch import nn

import fullres
from fullres.engine import schedule as scheduling
from fullres.engine.convert import convert_whole, programs, schedule
from fullres.engine.ladder import Ladder
from fullres.engine.schedule import Costs, cheap, closing, frontier, simulate, walked, way_of
from fullres.models import PRESETS
from fullres.models.resnet import BasicBlock
from fullres.ops.program import Call, Conv, Program, Source, Stay, Term, Write

from .test_convert import PATTERNS, randomised


def unet(preset: str) -> nn.Module:
    numbers = {"filters": 4, "depth": 2, "level_blocks": 1, "deepest_blocks": 1}
    numbers |= {"deepest_channels": 8, "deepest_kernel": 3}
    numbers["final_blocks"] = min(1, PRESETS[preset].final_blocks)
    return fullres.uresnet(dataclasses.replace(PRESETS[preset], **numbers))


def residual() -> nn.Module:
    """A tiny ResNet."""
    blocks = [
        BasicBlock(i, o, s, nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
        for i, o, s in ((8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1))
    ]
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


NETWORKS = {
    "uresnet": lambda: unet("uresnet"),
    "a21": lambda: unet("a21"),
    "resnet": lambda: residual(),
    **{name: PATTERNS[name] for name in ("bottleneck", "unet", "preactivation", "squeeze_excite")},
}


def stretches(steps: int, rng: random.Random, depth: int = 0) -> list[tuple[int, int]]:
    """Random stretches of so many steps, nested up to four deep."""
    found: list[tuple[int, int]] = []
    start = 0
    while start < steps:
        stop = min(steps, start + rng.randint(1, max(2, steps // 3)))
        if rng.random() < 0.7:
            found.append((start, stop))
            if depth < 3 and stop - start > 2:
                inner = stretches(stop - start, rng, depth + 1)
                found += [(start + a, start + b) for a, b in inner]
        start = stop
    return sorted(set(found))


def stays(program: Program, rng: random.Random) -> tuple[Stay, ...]:
    """Random stays of images in host memory, of some more than one."""
    found, steps = [], len(program.steps)
    for slot, number in program.producers.items():
        if rng.random() < 0.5 and not isinstance(program.steps[number], Call):
            unread = max(number, program.last_reader.get(slot, -1)) + 1
            leaves, back = rng.randint(unread, steps), rng.randint(0, steps)
            found.append(Stay(slot, leaves, back))
            while rng.random() < 0.5 and back > 1:
                leaves = rng.randint(1, back - 1)
                back = rng.randint(0, leaves)
                found.append(Stay(slot, leaves, back))
    return tuple(sorted(found, key=lambda stay: -stay.returns))


def scheduled(program: Program, rng: random.Random) -> tuple[Program, tuple[int, ...]]:
    """A random schedule of a program, and some writes to join."""
    slots = [*program.producers]
    again = tuple(stretches(len(program.steps), rng))
    share = rng.choice((0.0, 0.3))
    changed = program.changed(
        again=again,
        dropped=tuple(s for s in slots if rng.random() < share),
        remote=tuple(s for s in slots if rng.random() < rng.choice((0.0, 0.2))),
        offloaded=stays(program, rng) if rng.random() < 0.6 else (),
    )
    edges = {edge for stretch in again for edge in stretch}
    if rng.random() < 0.5:  # else the places are where many writes cannot be joined
        edges |= {place for stay in changed.offloaded for place in stay[1:]}
    else:
        cut = {w + 1 for w in program.joinable()}
        gone = {stay.slot for stay in changed.offloaded if not cut.isdisjoint(stay[1:])}
        changed = changed.changed(
            offloaded=tuple(s for s in changed.offloaded if s.slot not in gone)
        )
    writes = sorted(w for w in program.joinable() if w + 1 not in edges)
    return changed, tuple(w for w in writes if rng.random() < 0.7)


def test_the_random_schedules_are_telling():
    program = next(iter(programs(convert_whole(unet("uresnet"))).values()))
    rng = random.Random(0)
    found = [scheduled(program, rng) for _ in range(8)]
    assert len({p.again for p, _ in found}) == 8 and any(joined for _, joined in found)
    assert any(p.dropped and p.remote for p, _ in found)
    assert any(joined and p.offloaded for p, joined in found)
    held = [p.schedule([True] * (p.inputs + p.parameters)).stays for p, _ in found]
    assert any(len({stay.slot for stay in each}) < len(each) for each in held)
    nested = [
        sum(a <= start and stop <= b for a, b in p.again)
        for p, _ in found
        for start, stop in p.again
    ]
    assert max(nested) >= 4


# What is counted is what runs


class Metered(Ladder):
    """A network read for its costs alone, and not searched."""

    def _rungs(self, least):
        return []

    def ran(self, changed: dict[str, Program]) -> int:
        """The metered peak of a step under these schedules."""
        schedule(self._reading.model, changed)
        return self._meter(self._reading.model, self.shape).peak


@pytest.mark.parametrize("preset", ["uresnet", "a21"])
def test_a_stretch_runs_each_step_once(preset):
    costs = Ladder(unet(preset), (2, 3, 16, 24), None, torch.float32, None, None).costs[
        ":segment_0"
    ]
    stop = len(costs.program.steps)
    whole = walked(costs, costs.program.changed(again=((0, stop),))).counts
    assert set(whole) == {0, 1}
    inner = walked(costs, costs.program.changed(again=((0, stop), (0, stop // 2)))).counts
    assert set(inner[: stop // 2]) == {1, 2} and set(inner[stop // 2 :]) <= {0, 1}


def loss_of(out) -> torch.Tensor:
    """One whose gradients are images, and not one number that is spread over them."""
    outputs = out if isinstance(out, tuple) else (out,)
    return sum((each.float().sin() * each).mean() for each in outputs)


def shared(costs: Costs) -> int:
    """The bytes of images of which chunks are views: `simulate` takes each for one of its own."""
    texts = [getattr(getattr(step, "function", None), "text", "") for step in costs.program.steps]
    views = [n for n, text in enumerate(texts) if "chunk" in text or "getitem" in text]
    return sum(costs.bytes[costs.program.steps[number].slots[0]] for number in views)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_simulated_peaks_are_the_metered_ones(name, dtype):
    """But for a weight's cast and gradient, norms' tables, and what a chunk shares."""
    model = NETWORKS[name]()
    metered = Metered(model, (4, 3, 256, 320), loss_of, dtype, None, None)
    bound = sum(p.nbytes for p in model.parameters())
    bound += sum(map(shared, metered.costs.values()))
    rng = random.Random(7)
    peaks = []
    for trial in range(7):
        changed, outcomes = {}, {}
        for key, costs in metered.costs.items():
            program, joined = scheduled(costs.program, rng) if trial else (costs.program, ())
            changed[key] = program.joined(joined)
            outcomes[key] = way_of(costs, program, joined).outcome
        peak = metered.ran(changed)
        peaks.append(peak)
        assert abs(metered._reading.peak(outcomes) - peak) <= bound
        assert bound < 0.12 * peak
    assert len(set(peaks)) > 1, "schedules should matter"


# The same bits under each


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The loss, all gradients and all buffers after two steps' forward and backward passes."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    losses = []
    for _ in range(2):
        loss = loss_of(model(x))
        loss.backward()
        losses.append(loss.detach())
    return [*losses, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_schedules_give_the_same_bits(name, dtype, rng):
    model = randomised(NETWORKS[name](), rng).to(dtype)
    x = torch.randn(2, 3, 16, 24, generator=rng, dtype=torch.float64).to(dtype)
    whole = convert_whole(model)
    found = programs(whole)
    want = gradients(whole, x)
    draw = random.Random(5)
    for _ in range(6):
        changed = {}
        for key, program in found.items():
            other, joined = scheduled(program, draw)
            changed[key] = other.joined(joined)
        schedule(whole, changed)
        assert equal(gradients(whole, x), want)
    if dtype == torch.float64:
        for ours, theirs in zip(want, gradients(model, x), strict=True):
            scale = max(1.0, theirs.abs().max().item())
            assert (ours - theirs).abs().max() <= 1e-10 * scale
            if not theirs.is_floating_point():
                assert torch.equal(ours, theirs)


def test_backward_runs_twice_under_nested_stretches_but_not_to_the_second_order(rng):
    whole = convert_whole(randomised(unet("a21"), rng))
    ((key, program),) = programs(whole).items()
    n = len(program.steps)
    again = ((0, n), (2, n - 2), (4, n // 2), (5, 9), (6, 8), (n // 2, n - 4))
    schedule(whole, {key: program.changed(again=again)})
    x = torch.randn(1, 3, 16, 24, generator=rng, dtype=torch.float64)
    parameters = [*whole.parameters()]
    loss = loss_of(whole(x))
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert equal(torch.autograd.grad(loss, parameters), once)
    with pytest.raises(RuntimeError, match="again|second time"):
        torch.autograd.grad(loss, parameters)
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(loss_of(whole(x)), parameters, create_graph=True)


@pytest.mark.parametrize("name", ["a21", "resnet"])
def test_a_scheduled_network_is_copied_and_pickled(name, rng):
    whole = convert_whole(randomised(NETWORKS[name](), rng))
    ((key, program),) = programs(whole).items()
    other, joined = scheduled(program, random.Random(2))
    schedule(whole, {key: other.joined(joined)})
    x = torch.randn(2, 3, 16, 24, generator=rng, dtype=torch.float64)
    want = gradients(whole, x)
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        (found,) = programs(twin).values()
        assert found.again == other.joined(joined).again != ()
        assert found.signature == other.joined(joined).signature
        assert equal(gradients(twin, x), want)


# Programs


def test_a_signature_tells_networks_apart_and_not_schedules():
    def signatures(model: nn.Module) -> list[str]:
        return [program.signature for program in programs(convert_whole(model)).values()]

    names = [*NETWORKS]
    found = [tuple(signatures(NETWORKS[name]())) for name in names]
    assert len(set(found)) == len(names)
    assert found == [tuple(signatures(NETWORKS[name]())) for name in names]
    one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3))
    two = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3, stride=2))
    three = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3, bias=False))
    assert len({*signatures(one), *signatures(two), *signatures(three)}) == 3
    (program,) = programs(convert_whole(unet("a21"))).values()
    draw = random.Random(0)
    others = [scheduled(program, draw)[0] for _ in range(5)]
    assert {other.signature for other in others} == {program.signature}


def chained(convolutions: int, writes: bool) -> Program:
    """A chain of convolutions, with activations between them, written or not.

    In the written one the last convolution reads a sum of two writes.
    """
    steps: list[Conv | Write] = []
    slot, read = 0, Source(Term(0))

    def conv(source: Source) -> None:
        nonlocal slot
        number = 2 * sum(isinstance(step, Conv) for step in steps)
        steps.append(Conv((source,), number, None, (1, 1), (1, 1), (1, 1), 1, slot := slot + 1))

    first = None
    for number in range(convolutions):
        conv(read)
        read = Source(Term(slot), act="relu")
        if writes and number < convolutions - 1:
            residual = Term(first) if first and number == convolutions - 2 else None
            steps.append(Write(Source(Term(slot), residual, act="relu"), slot := slot + 1))
            first, read = first or slot, Source(Term(slot))
    return Program(1, 2 * convolutions, tuple(steps), (), (slot,))


@pytest.mark.parametrize(
    "again", [((0, 2), (1, 3)), ((0, 3), (1, 3), (2, 4)), ((2, 2),), ((1, 5),)]
)
def test_stretches_that_do_not_nest_are_refused(again):
    program = chained(4, False).changed(again=again)
    with pytest.raises(ValueError, match="again: want stretches that nest"):
        program.schedule((False, *[True] * 8))


def test_writes_that_cannot_be_joined_are_refused():
    program = chained(3, True)  # conv, write, conv, write of a sum, conv
    assert program.joinable() == {1, 3}
    joined = program.joined([1, 3])
    assert [type(step) for step in joined.steps] == [Conv] * 3 and joined.steps[2].keep == 4
    assert program.joined([]) is program
    for wrong in ([0], [2, 3], [7]):
        with pytest.raises(ValueError, match="writes: want some that can be joined"):
            program.joined(wrong)
    apart = program.changed(again=((0, 2),))  # ends between a write and its convolution
    with pytest.raises(ValueError, match="writes: want some that can be joined"):
        apart.joined([1])
    assert apart.joined([3]).again == ((0, 2),)
    assert program.changed(again=((0, 3),)).joined([1]).again == ((0, 2),)


# The search


def random_costs(program: Program, seed: int) -> Costs:
    rng = random.Random(seed)
    slots = {slot: rng.randint(1, 20) for slot in [0, *program.producers]}
    for step in program.steps:  # an image that is written is of the size of those it is made of
        if isinstance(step, Write):
            terms = [term.slot for term in step.source.terms]
            slots[step.out] = slots[terms[0]]
            slots.update(dict.fromkeys(terms, slots[terms[0]]))
    costly = [1.0 if isinstance(step, Write) else 4.0 for step in program.steps]
    again = tuple(cost * rng.randint(1, 5) for cost in costly)
    needs = (False, *[number % 2 == 0 for number in range(program.parameters)])
    return Costs(program, needs, slots, again, again, tuple(2 * each for each in again))


def nests(start: int, stop: int, depth: int, proper: bool = False) -> Iterator[tuple]:
    """Yield all sets of stretches in a range, nested at most so deep; proper: none is all of it."""
    if start == stop or not depth:
        yield ()
        return
    yield from nests(start + 1, stop, depth)  # the first step is in none of them
    for end in range(start + 1, stop + (not proper)):
        for inner in nests(start, end, depth - 1, proper=True):
            for rest in nests(end, stop, depth):
                yield ((start, end), *inner, *rest)


def test_all_sets_of_stretches_are_listed():
    assert [len({*nests(0, n, 1)}) for n in (1, 2, 3)] == [2, 5, 13]
    assert len({*nests(0, 2, 2)}) == len([*nests(0, 2, 2)]) == 8
    assert ((0, 3), (0, 2), (2, 3)) in {*nests(0, 3, 2)}


def exhaustive(costs: Costs, depth: int) -> list[tuple[float, int]]:
    """The seconds and peaks of all schedules, each better in one than all others."""
    program, found = costs.program, set()
    slots = sorted(cheap(program) | closing(program))
    drops = [*chain.from_iterable(combinations(slots, k) for k in range(len(slots) + 1))]
    for again in nests(0, len(program.steps), depth):
        for dropped in drops:
            outcome = simulate(costs, program.changed(again=again, dropped=dropped))
            found.add((outcome.seconds, outcome.most))
    best: list[tuple[float, int]] = []
    for seconds, most in sorted(found):
        if not best or most < best[-1][1]:
            best.append((seconds, most))
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("convolutions", "writes"), [(3, False), (4, False), (5, False), (3, True)]
)
def test_the_search_finds_the_best_of_all(convolutions, writes, seed, monkeypatch):
    """Without any slack: budgets have parts of one byte, and each is looked at."""
    monkeypatch.setattr(scheduling, "LOOKS", 10**6)
    costs = random_costs(chained(convolutions, writes), seed)
    found = frontier(costs, everywhere=True)
    best = exhaustive(costs, 2)
    for seconds, most in best:
        assert min(w.outcome.seconds for w in found if w.outcome.most <= most) <= seconds
    # Ours may nest deeper, and need less; but never be faster than without a limit.
    assert found[0].outcome.seconds == best[0][0] == costs.seconds


@pytest.mark.parametrize("seed", range(4))
def test_with_a_long_skip_connection_the_search_is_near_the_best(seed, monkeypatch):
    """As fast as the best of any budget with 15 % more bytes.

    Where a range begins, a sum's two terms count as two gradients though they may share one; and a
    write that is read beyond a unit of `LEAF` parts is not dropped.
    """
    monkeypatch.setattr(scheduling, "LOOKS", 10**6)
    costs = random_costs(chained(4, True), seed)
    found = frontier(costs, everywhere=True)
    for seconds, most in exhaustive(costs, 1):
        assert min(w.outcome.seconds for w in found if w.outcome.most <= 1.15 * most) <= seconds


@pytest.mark.parametrize("name", ["uresnet", "a21", "resnet"])
def test_the_search_is_deterministic_sorted_and_true(name):
    metered = Metered(NETWORKS[name](), (4, 3, 256, 320), loss_of, torch.bfloat16, None, None)
    (costs,) = metered.costs.values()
    found, again = frontier(costs), frontier(costs)
    assert found == again and len(found) > 3
    seconds = [way.outcome.seconds for way in found]
    most = [way.outcome.most for way in found]
    assert seconds == sorted(set(seconds)) and most == sorted(set(most), reverse=True)
    assert all(way.outcome == way_of(costs, way.program, way.joined).outcome for way in found)
    # What the program's own schedule was does not matter.
    other = costs.program.changed(again=((0, 5),), dropped=(4,))
    assert frontier(dataclasses.replace(costs, program=other)) == found
