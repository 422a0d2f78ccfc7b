"""SyncBatchNorm on two ranks against one BatchNorm of the whole batch, and alone.

Run as a script, this file is one rank of the two-process test.
"""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fullres.ops import batch_norm
from fullres.ops.batch_norm import SyncBatchNorm

CHANNELS = 4
SPLITS = {"equal": (2, 2), "uneven": (1, 3), "one rank empty": (4, 0), "first empty": (0, 4)}
OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "frozen weight": {},
    "frozen input": {},
}
INPUTS = {
    "float64": (torch.float64, 0.0),
    "float64 far from zero": (torch.float64, 1e4),
    "float32 far from zero": (torch.float32, 1e4),
    "bfloat16": (torch.bfloat16, 0.0),
    "channels last": (torch.float64, 0.0),
    "1d": (torch.float64, 0.0),
}
CASES = [
    *((split, option, "float64") for split, option in itertools.product(SPLITS, OPTIONS)),
    *(
        (split, "default", name)
        for split in ("uneven", "first empty")
        for name in INPUTS
        if name != "float64"
    ),
]


def arrays(name, shape=(4, CHANNELS, 5, 6)):
    """Two batches with upstream gradients, [2, N, C, H, W] each."""
    dtype, mean = INPUTS.get(name, (torch.float64, 0.0))
    rng = torch.Generator().manual_seed(11)
    x, dy = torch.randn(2, 2, *shape, generator=rng, dtype=torch.float64)
    x = x * torch.tensor([1.0, 2.0, 0.5, 1.0])[:, None, None] + mean
    if name == "1d":
        return x[..., 0, 0].contiguous(), dy[..., 0, 0].contiguous()
    return x.to(dtype), dy.to(dtype)


def layer(make, option, dtype):
    # Under bfloat16 parameters stay float32, as autocast has them.
    dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    norm = make(CHANNELS, dtype=dtype, **OPTIONS[option])
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.5, -0.5, 0.0, 1.0]))
            norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 3.0]))
        norm.weight.requires_grad_(option != "frozen weight")
    return norm


def steps(norm, option, name, own=slice(None), dtype=None):
    """Two training steps on a rank's share of the batches, then an evaluation."""
    results = {"y": [], "dx": []}
    for x, dy in zip(*arrays(name), strict=True):
        x, dy = x[own].to(dtype or x.dtype), dy[own].to(dtype or dy.dtype)
        if name == "channels last":
            x = x.to(memory_format=torch.channels_last)
        x = x.requires_grad_(option != "frozen input")
        y = norm(x)
        if y.requires_grad:
            (y * dy).sum().backward()
        assert y.dtype == x.dtype and y.stride() == x.stride()
        results["y"].append(y.detach())
        results["dx"].append(x.grad)
    results["gradients"] = [p.grad for p in norm.parameters()]
    results["buffers"] = dict(norm.named_buffers())
    norm.eval()
    if norm.running_mean is not None:
        results["evaluated"] = [norm(x).detach()]
    return results


def rank_main(rank: int, folder: Path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    both = dist.new_group([0, 1])
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    calls = []
    for name in ("all_gather", "all_reduce"):
        original = getattr(dist, name)

        def counted(*args, name=name, original=original, group=None):
            calls.append((name, group is both))
            return original(*args, group=group)

        setattr(dist, name, counted)
    results = {}
    for split, option, name in CASES:
        n = SPLITS[split]
        own = slice(0, n[0]) if rank == 0 else slice(n[0], sum(n))
        norm = layer(SyncBatchNorm, option, INPUTS[name][0])
        norm.process_group = both
        calls.clear()
        results[split, option, name] = steps(norm, option, name, own) | {"calls": list(calls)}
    calls.clear()
    results["alone"] = steps(SyncBatchNorm(CHANNELS, process_group=alone).double(), "default", "")
    results["empty"] = steps(SyncBatchNorm(CHANNELS).double(), "default", "", slice(0, 0))
    results["calls"] = list(calls)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()  # a rank that leaves early can take the other with it
    dist.destroy_process_group()


@pytest.mark.parametrize(("split", "option", "name"), CASES)
def test_two_ranks_normalise_as_one_with_the_whole_batch(two_ranks, split, option, name):
    """Outputs, gradients, running statistics and evaluation, after two steps."""
    a, b = (ranks[split, option, name] for ranks in two_ranks)
    dtype, mean = INPUTS[name]
    make = torch.nn.BatchNorm1d if name == "1d" else torch.nn.BatchNorm2d
    whole = steps(layer(make, option, torch.float64), option, name, dtype=torch.float64)
    tolerance = _tolerance(dtype, mean)
    for key in ("y", "dx", "evaluated"):
        for ours, theirs, wanted in zip(*(r.get(key, []) for r in (a, b, whole)), strict=True):
            if wanted is None:
                assert ours is theirs is None
                continue
            torch.testing.assert_close(torch.cat([ours, theirs]).double(), wanted, **tolerance)
    for ours, theirs, wanted in zip(*(r["gradients"] for r in (a, b, whole)), strict=True):
        if wanted is None:
            assert ours is theirs is None
            continue
        # Sums over 120 pixels of two batches.
        summed = {"rtol": tolerance["rtol"], "atol": 240 * tolerance["atol"]}
        torch.testing.assert_close((ours + theirs).double(), wanted, **summed)
    assert a["buffers"].keys() == whole["buffers"].keys()
    for key, wanted in whole["buffers"].items():
        assert torch.equal(a["buffers"][key], b["buffers"][key])
        relative = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            a["buffers"][key].to(wanted.dtype), wanted, rtol=relative, atol=1e-12
        )


def _tolerance(dtype, mean):
    if dtype == torch.float64:  # of a mean of 1e4 float64 holds 12 digits after the point
        return {"rtol": 1e-12, "atol": 1e-12 * max(1.0, mean)}
    if dtype == torch.bfloat16:  # one rounding of the result
        return {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    # x and the mean are rounded to steps of 2^-10 at 1e4, up to half a step each, times rstd * w.
    return {"rtol": 1e-3, "atol": mean * torch.finfo(dtype).eps * 3}


@pytest.mark.parametrize(("split", "option", "name"), CASES)
def test_all_ranks_communicate_alike_and_least(two_ranks, split, option, name):
    a, b = (ranks[split, option, name]["calls"] for ranks in two_ranks)
    backward = [] if option == "frozen input" else [("all_reduce", True)]
    assert a == b == 2 * [("all_gather", True), *backward]  # and nothing in evaluation


def test_alone_in_its_group_a_rank_normalises_alone(two_ranks):
    norm = torch.nn.BatchNorm2d(CHANNELS).double()
    wanted = steps(norm, "default", "")
    for ranks in two_ranks:
        torch.testing.assert_close(ranks["alone"], wanted, rtol=1e-12, atol=1e-14)
        assert len(ranks["calls"]) == 4  # those of the empty batches that follow


def test_a_global_batch_without_pixels_leaves_the_statistics(two_ranks):
    for ranks in two_ranks:
        buffers = ranks["empty"]["buffers"]
        assert torch.equal(buffers["running_mean"], torch.zeros(CHANNELS).double())
        assert torch.equal(buffers["running_var"], torch.ones(CHANNELS).double())
        assert buffers["num_batches_tracked"] == 2
        assert not any(g.any() for g in ranks["empty"]["gradients"])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["float64", "bfloat16", "1d"])
def test_without_other_ranks_it_is_torch_s_batch_norm_bit_by_bit(option, name):
    make = torch.nn.BatchNorm1d if name == "1d" else torch.nn.BatchNorm2d
    dtype = INPUTS[name][0]
    got = steps(layer(SyncBatchNorm, option, dtype), option, name)
    wanted = steps(layer(make, option, dtype), option, name)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_parts_of_a_batch_are_joined_as_ranks_are(rng, monkeypatch):
    x = torch.randn(5, 3, 4, 4, generator=rng, dtype=torch.float64) + 1e4
    count, mean, m2 = batch_norm._local_moments(x)
    monkeypatch.setattr(batch_norm, "PART_ELEMENTS", 2 * 3 * 4 * 4)
    assert len(list(batch_norm._parts(x))) == 3
    torch.testing.assert_close(batch_norm._local_moments(x), (count, mean, m2))
    assert count == 80
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(m2, x.var((0, 2, 3), correction=0) * 80)


def test_counts_beyond_float32_are_exact():
    count = torch.tensor([[2.0**24], [1.0]], dtype=torch.float64)
    zeros = torch.zeros(2, 1, dtype=torch.float64)
    assert batch_norm._merge(count, zeros, zeros)[0] == 2**24 + 1


def network():
    shared = torch.nn.BatchNorm2d(4)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1),
        shared,
        torch.nn.Sequential(torch.nn.BatchNorm3d(5, eps=0.1, momentum=None), torch.nn.ReLU()),
        torch.nn.BatchNorm1d(6, affine=False).eval(),
        torch.nn.SyncBatchNorm(7, track_running_stats=False),
        shared,
    )


def test_conversion_replaces_each_batch_norm_and_keeps_its_state():
    model = network()
    state, parameters = model.state_dict(), list(model.parameters())
    buffers = list(model.buffers())
    originals = [model[1], model[2][0], model[3], model[4]]
    group = object()
    assert SyncBatchNorm.convert_sync_batchnorm(model, group) is model
    converted = [model[1], model[2][0], model[3], model[4]]
    for old, new in zip(originals, converted, strict=True):
        assert type(new) is SyncBatchNorm and new.process_group is group
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            assert getattr(new, name) == getattr(old, name)
        assert new.training == old.training
    assert model[5] is model[1]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert model.state_dict().keys() == state.keys()
    network().load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(state, strict=True)


def test_conversion_of_a_batch_norm_itself_returns_the_new_one():
    norm = torch.nn.BatchNorm2d(3)
    new = SyncBatchNorm.convert_sync_batchnorm(norm)
    assert type(new) is SyncBatchNorm and new.weight is norm.weight


def test_arguments_are_those_of_torch():
    theirs, ours = torch.nn.SyncBatchNorm(4, 1e-3, None), SyncBatchNorm(4, 1e-3, None)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    assert SyncBatchNorm(2, dtype=torch.float64).weight.dtype == torch.float64
    assert not isinstance(ours, torch.nn.SyncBatchNorm)  # which DDP refuses on a CPU


def test_backward_has_no_second_derivative(rng):
    """Without ranks the layer is torch's; this is the synchronised path's function."""
    x = torch.randn(2, 3, 4, generator=rng, requires_grad=True)
    statistics = torch.tensor(8.0), torch.zeros(3), torch.ones(3)
    y = batch_norm._Normalise.apply(x, None, None, *statistics, None)
    with pytest.raises(RuntimeError, match="Normalise has no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_wrong_inputs_are_named():
    norm = SyncBatchNorm(3)
    for x in (torch.zeros(3), torch.zeros(2, 4, 5, 5), torch.zeros(2, 3, 5, 5).long()):
        with pytest.raises(ValueError, match=r"x must be \[N, 3, ...\]"):
            norm(x)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.zeros(1, 3, 1, 1))


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
