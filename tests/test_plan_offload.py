"""Plans that let maps wait in host memory: when they leave and return, bytes, seconds, bits."""

import dataclasses
import gc
import random

import pytest
import torch
from torch import nn

from fullres.engine import InfeasibleError, Plan, convert, max_batch, meter, plan
from fullres.engine.convert import programs
from fullres.engine.ladder import Ladder
from fullres.engine.offload import Leaving
from fullres.engine.schedule import Costs, Way, frontier, simulate, walked, way_of
from fullres.ops.offload import host_pool
from fullres.ops.program import Conv, Program, Source, Stay, Term

from .test_plan import five_steps, small
from .test_schedule import chained, random_costs

SHAPE = (2, 3, 128, 192)
MANY = 2**40


# When slots leave and return


def held_all(costs: Costs) -> Way:
    """The way that makes nothing again."""
    return way_of(costs, costs.program.changed(again=(), dropped=(), remote=()))


def skipping() -> Program:
    """A chain of nine convolutions; the last but one reads the first's output, too."""
    steps, read = [], Source(Term(0))
    for number in range(9):
        sources = (read, Source(Term(1))) if number == 7 else (read,)
        steps.append(Conv(sources, number, None, (1, 1), (1, 1), (1, 1), 1, number + 1))
        read = Source(Term(number + 1), act="relu")
    return Program(1, 9, tuple(steps), (), (9,))


def even_costs(program: Program, host: float) -> Costs:
    """Images of 10 bytes, steps of 1 second forward and 2 backward."""
    steps, needs = len(program.steps), (False, *[True] * program.parameters)
    slots = dict.fromkeys([0, *program.producers], 10)
    return Costs(program, needs, slots, (1.0,) * steps, (1.0,) * steps, (2.0,) * steps, host=host)


def test_copies_that_take_as_long_as_a_step_leave_at_the_next_and_return_before():
    costs = even_costs(chained(6, False), host=10.0)
    leaving = Leaving(costs, held_all(costs))
    assert leaving.slots == [1, 2, 3, 4, 5]  # the last is the output
    way = leaving.way_with(2)
    # 1 is made at 1, copied at 2, read until then; backward reads it in step 1, so when 2 is come
    # to, and before that one step of 2 seconds lies between.
    assert {*way.program.offloaded} == {Stay(1, 2, 3), Stay(2, 3, 4)}
    assert way.outcome.seconds == costs.seconds and way.outcome.host == 20
    assert way.outcome.held == leaving.way_with(0).outcome.held - 20


def test_copies_out_are_waited_for_at_the_end_of_forward_and_back_where_they_are_read():
    costs = even_costs(chained(6, False), host=1.0)  # a copy takes 10 seconds
    leaving = Leaving(costs, held_all(costs))
    way = leaving.way_with(1)  # made at 1, there at 11, forward ends at 6: 5 seconds
    assert way.outcome.seconds == costs.seconds + 5 + (10 - 8)  # of 6 steps back 4 are before it
    assert way.program.offloaded == (Stay(1, 6, 6),)
    two = leaving.way_with(2)  # there at 21; 2 is read at 6, and 1 then 10 seconds after it is back
    assert two.outcome.seconds == costs.seconds + 15 + 4 + 8


def test_what_is_read_again_much_later_leaves_meanwhile():
    costs = even_costs(skipping(), host=10.0)
    leaving = Leaving(costs, held_all(costs))
    assert leaving.slots == [2, 3, 4, 5, 6, 1, 7, 8]  # as they are free to leave
    way = leaving.way_with(6)
    # Read at 8 and at 2; steps take 2 seconds, a copy 1, and so does the one behind which it waits.
    mine = tuple(stay for stay in way.program.offloaded if stay.slot == 1)
    assert mine == (Stay(1, 8, 9), Stay(1, 7, 3))
    assert way.outcome.seconds == costs.seconds
    once = tuple(stay for stay in way.program.offloaded if stay != mine[1])
    place = walked(costs, way.program), walked(costs, way.program.changed(offloaded=once))
    assert place[0].outcome.peak <= place[1].outcome.peak
    assert place[0].outcome.host == place[1].outcome.host == 60


@pytest.mark.parametrize("seed", range(12))
def test_no_stay_could_be_longer_without_waiting(seed):
    program = chained(9, seed % 2 == 1) if seed % 3 else skipping()
    costs = random_costs(program, seed)
    rng = random.Random(seed)
    costs = dataclasses.replace(costs, host=rng.choice((0.5, 1.0, 3.0)))
    found = frontier(costs, everywhere=True)
    way = max(found, key=lambda way: (way.outcome.held, len(way.program.again)))
    leaving, waits = Leaving(costs, way), []
    for count in range(len(leaving.slots) + 1):
        offloaded = leaving.way_with(count)
        stays = offloaded.program.offloaded
        assert offloaded.outcome.host == sum(costs.bytes[s] for s in leaving.slots[:count])
        assert offloaded.outcome.held == way.outcome.held - offloaded.outcome.host
        assert offloaded.outcome.seconds >= way.outcome.seconds
        if offloaded.outcome.seconds > way.outcome.seconds:
            continue
        for number, stay in enumerate(stays):
            first = all(s.slot != stay.slot for s in stays[:number])
            others = []
            read = max(program.last_reader.get(stay.slot, -1), program.producers[stay.slot]) + 1
            if first and stay.leaves > read:
                others.append(stay._replace(leaves=stay.leaves - 1))
            if stay.returns > 0 and not way.joined and not way.program.again:
                others.append(stay._replace(returns=stay.returns - 1))
            for other in others:
                changed = (*stays[:number], other, *stays[number + 1 :])
                ran = simulate(costs, offloaded.program.changed(offloaded=changed))
                assert ran.seconds >= offloaded.outcome.seconds
                waits.append(ran.seconds > offloaded.outcome.seconds)
    # Else a copy waits for another one, or its slot is read no earlier than the next place.
    assert sum(waits) >= 0.8 * len(waits)


def test_slots_that_leave_too_early_are_refused():
    program = chained(4, False)
    for stay in (Stay(1, 1, 0), Stay(1, 5, 0), Stay(3, 0, 1)):
        with pytest.raises(ValueError, match="offloaded: want slot"):
            program.changed(offloaded=(stay,)).schedule((False, *[True] * 8))
    fine = program.changed(offloaded=(Stay(1, 2, 0), Stay(4, 4, 4), Stay(0, 1, 0)))
    schedule = fine.schedule((False, *[True] * 8))
    assert schedule.stays == (Stay(1, 2, 0),)  # inputs and outputs are others' to hold
    assert 1 not in schedule.kept and 2 in schedule.kept
    assert not fine.schedule((False,) * 9).stays


# Plans


@pytest.fixture(scope="module")
def rungs() -> Ladder:
    return Ladder(small(), SHAPE, None, torch.float32, None, torch.optim.AdamW)


def test_host_memory_makes_room(rungs):
    alone, beside = rungs.least(), rungs.least(MANY)
    assert beside.peak < alone.peak and alone.host == 0 < beside.host
    for rung in (alone, beside):
        assert rung.peak == rung.report.peak
    assert beside.report.host_peak == beside.host
    assert rungs.within(alone.peak - 1) is None
    assert rungs.within(alone.peak - 1, MANY).peak < alone.peak


def test_more_memory_of_either_is_never_slower(rungs):
    least, times = rungs.least(MANY), {}
    hosts = (0, least.host // 4, least.host // 2, least.host, MANY)
    for host in hosts:
        for share in (1.0, 1.05, 1.2, 1.5, 2.0, 3.0):
            found = rungs.within(int(share * least.peak), host)
            times[host, share] = found.seconds if found else float("inf")
            if found:
                assert found.peak <= share * least.peak and found.host <= host
    for host in hosts:
        own = [seconds for (h, _), seconds in times.items() if h == host]
        assert own == sorted(own, reverse=True)
    for share in (1.0, 1.05, 1.2, 1.5, 2.0, 3.0):
        own = [times[host, share] for host in hosts]
        assert own == sorted(own, reverse=True)
    assert times[MANY, 1.0] < times[0, 1.0] == float("inf")


@pytest.fixture(scope="module")
def hosted() -> Plan:
    """One whose network needs host memory."""
    with pytest.raises(InfeasibleError) as caught:
        plan(small(), SHAPE, memory=1, dtype=torch.float32)
    least = caught.value.least
    planned = plan(small(), SHAPE, memory=least - 1, dtype=torch.float32, host_memory="1GiB")
    assert planned.peak_bytes < least
    return planned


def test_what_is_promised_is_kept_on_the_host_too(hosted):
    report = meter(
        convert(small(), plan=hosted), SHAPE, optimizer=torch.optim.AdamW, hold_output=False
    )
    assert report.peak == hosted.peak_bytes <= hosted.memory
    assert report.host_peak == hosted.host_bytes > 0
    offloaded = [row for part in hosted.segments for row in part.rows if "offload" in row.policy]
    assert offloaded and all("on the host" in row.why for row in offloaded)
    assert "on the host" in str(hosted)


def test_a_real_step_holds_as_much_on_the_host(hosted):
    report = meter(
        convert(small(), plan=hosted), SHAPE, optimizer=torch.optim.AdamW, hold_output=False,
        device="cpu",
    )  # fmt: skip
    assert report.host_peak == hosted.host_bytes
    assert report.stored == hosted.report.stored


def test_five_steps_have_the_same_bits(hosted):
    plain = plan(small(), SHAPE, memory="1GiB", dtype=torch.float32)
    assert plain.host_bytes == 0 and plain.time_ratio == 1.0
    want, got = (five_steps(convert(small(), plan=each)) for each in (plain, hosted))
    assert got[0] == want[0]
    assert all(torch.equal(got[1][name], want[1][name]) for name in want[1])


def test_a_file_brings_the_stays_back(hosted, tmp_path):
    again = Plan.load(hosted.save(tmp_path / "plan.json"))
    assert again == hosted
    (mine,) = programs(convert(small(), plan=hosted)).values()
    (theirs,) = programs(convert(small(), plan=again)).values()
    assert mine.offloaded == theirs.offloaded != ()


def test_host_memory_comes_to_rest(hosted):
    """Also where backward does not run, or fails, or runs twice."""
    model = convert(small(), plan=hosted)
    pool = host_pool(torch.device("cpu"))
    x = torch.randn(SHAPE)

    def loss() -> torch.Tensor:
        return sum(out.square().mean() for out in model(x))

    gc.collect()
    before = pool.in_use
    held = []
    for _ in range(4):
        first = loss()
        held.append(pool.in_use)
        first.backward()
        assert pool.in_use == before
    assert len({*held}) == 1 and held[0] - before >= hosted.host_bytes
    kept = loss()
    kept.backward(retain_graph=True)
    assert pool.in_use == held[0]
    once = [p.grad.clone() for p in model.parameters()]
    kept.backward()
    assert pool.in_use == before
    assert all(not torch.equal(p.grad, g) or not g.any() for p, g in zip(
        model.parameters(), once, strict=True))  # fmt: skip
    unused = loss()
    assert pool.in_use == held[0]
    del unused, first, kept
    gc.collect()
    assert pool.in_use == before
    with torch.no_grad():
        loss()
    assert pool.in_use == before


def test_an_impossible_budget_names_both():
    with pytest.raises(InfeasibleError, match=r"at least .* MiB and 1.00 MiB of the host's for"):
        plan(small(), SHAPE, memory="10 KiB", host_memory="1MiB")
    with pytest.raises(ValueError, match="host_memory: want bytes, or text"):
        plan(small(), SHAPE, host_memory="lots")


def test_the_largest_batch_takes_both_budgets():
    model, options = small(), {"dtype": torch.float32}
    budget = 24 * plan(model, (1, *SHAPE[1:]), memory="1GiB", **options).peak_bytes
    alone = max_batch(model, SHAPE[1:], memory=budget, **options)
    host = budget // 4
    found = max_batch(model, SHAPE[1:], memory=budget, host_memory=host, **options)
    assert found > alone
    planned = plan(model, (found, *SHAPE[1:]), memory=budget, host_memory=host, **options)
    assert planned.peak_bytes <= budget and planned.host_bytes <= host
    with pytest.raises(InfeasibleError):
        plan(model, (found + 1, *SHAPE[1:]), memory=budget, host_memory=host, **options)


def test_modules_are_not_changed_by_planning():
    model: nn.Module = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan(model, SHAPE, memory="1GiB", host_memory="1GiB")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
