"""The profile of a step without a card: are launches found, scaled and reported?"""

import os
import resource

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from fullres.bench import emulated, record, steps  # noqa: E402
from fullres.engine.precompile import record_launches  # noqa: E402
from fullres.kernels.emulator import EmulationError  # noqa: E402
from fullres.kernels.emulator import run as run_programs  # noqa: E402
from fullres.ops.conv import conv2d  # noqa: E402
from fullres.ops.pointwise import moments  # noqa: E402

GIB = 2**30
RAM = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.again = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))  # two alike

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        for conv in self.again:
            x = conv(x)
        return x


@pytest.fixture
def tiny(monkeypatch):
    """A network of few launches, as the benchmark knows it."""
    network = steps.Network(Tiny, steps.image_labels, lambda out, _: out.float().square().sum())
    monkeypatch.setitem(emulated.KNOWN, "tiny", network)
    return {"networks": ["tiny"], "image": (3, 20, 24), "batch": 2}


def launch_of(function, *shape):
    """The first launch of a function of a fake image in bfloat16."""

    def step():
        x = torch.empty(shape, dtype=torch.bfloat16)
        function(x.contiguous(memory_format=torch.channels_last))

    return next(iter(emulated.launches(step)))


def convolved(x):
    conv2d(x, torch.empty(16, x.shape[1], 3, 3, dtype=x.dtype), padding=1)


def total(launch, monkeypatch=None):
    """What a launch carries out: by a sample, or, given monkeypatch, by every program."""
    if monkeypatch is None:
        return emulated.emulate(launch)[0]
    with monkeypatch.context() as patch:
        patch.setattr(emulated, "INTERIOR", launch.programs)
        work, ran = emulated.emulate(launch)
    assert ran == launch.programs
    return work


def test_counts_scale_with_the_grid(monkeypatch):
    small, large = (launch_of(convolved, n, 16, 64, 512) for n in (2, 10))
    assert large.programs == 5 * small.programs > 100
    one, five = total(small, monkeypatch), total(large)
    for name, within in (("instructions", 0.03), ("wavefronts", 0.03), ("sectors", 0.1)):
        assert getattr(five, name) == pytest.approx(5 * getattr(one, name), rel=within) != 0
    assert five.flop == {kind: pytest.approx(5 * v, rel=0.03) for kind, v in one.flop.items()}
    assert large.bytes == pytest.approx(5 * small.bytes, rel=0.01)
    assert sum(one.flop.values()) >= 2 * 9 * 16 * 16 * 2 * 64 * 512


def test_a_sample_counts_what_all_programs_do(monkeypatch):
    """Of a grid with borders on all sides, where a fifth of the programs have less to do."""

    def step():
        x = torch.empty(3, 16, 70, 140, dtype=torch.bfloat16)
        weight = torch.empty(16, 16, 5, 5, dtype=x.dtype)
        conv2d(x.contiguous(memory_format=torch.channels_last), weight, padding=2)

    (launch,) = emulated.launches(step)
    assert launch.programs > 50
    some, every = total(launch), total(launch, monkeypatch)
    assert some.instructions == pytest.approx(every.instructions, rel=0.05)
    assert some.wavefronts == pytest.approx(every.wavefronts, rel=0.05)
    assert some.sectors == pytest.approx(every.sectors, rel=0.1)


@pytest.mark.parametrize("programs", [1, 2, 24, 25, 26, 100, 1024, 163_840])
def test_samples_hold_both_ends_and_each_range(programs):
    alone, others = emulated.sampled(programs)
    assert {0, programs - 1} <= {*alone} and {*alone}.isdisjoint(others)
    assert emulated.sampled(programs) == (alone, others)
    if not others:
        assert alone == [*range(programs)]
    else:
        assert all(0 < i < programs - 1 for i in others) and len(others) == emulated.INTERIOR
        wide = (programs - 2) / emulated.INTERIOR
        assert len({int(i // wide) for i in others}) > emulated.INTERIOR - 2


@pytest.mark.parametrize("columns", [5, 8, 16, 20, 32])
def test_borders_are_drawn_as_often_as_they_are_there(columns):
    """Over many grids, a column's share of the sample is its share of the programs."""
    drawn = [i % columns for rows in range(100, 900) for i in emulated.sampled(columns * rows)[1]]
    for column in (0, columns - 1):
        assert drawn.count(column) / len(drawn) == pytest.approx(1 / columns, rel=0.15)


def test_a_step_is_told_launch_by_launch(tiny, tmp_path, capsys):
    rows = emulated.run(tmp_path, **tiny)
    assert not any(row["failed"] for row in rows)
    names = {row["kernel"] for row in rows}
    assert {"conv2d_fwd_kernel", "prologue_kernel"} & names and "merge_moments_kernel" in names
    twice = [row for row in rows if row["input"] == "2x8x20x24" and row["calls"] == 2]
    assert twice and all("C=8" in row["constants"] for row in twice)
    for row in rows:
        assert row["needs_ms"] == max(row[f"{name}_ms"] for name in emulated.ROOFS) > 0
        assert row[f"{row['bound_by']}_ms"] == row["needs_ms"]
        assert 0 < row["emulated"] <= row["programs"]
    assert [row["needs_ms"] for row in rows] == sorted((r["needs_ms"] for r in rows), reverse=True)
    kernels = emulated.by_kernel(rows)
    assert sum(r["calls"] for r in kernels) == sum(r["calls"] for r in rows)
    assert sum(r["needs_ms"] for r in kernels) == pytest.approx(sum(r["needs_ms"] for r in rows))
    assert sum(r["share"] for r in kernels) == pytest.approx(1)
    printed = capsys.readouterr().out
    assert "NOT RUN ON A CARD" in printed and "tiny, 2 images of 3x20x24" in printed
    saved = [p.name for p in sorted(tmp_path.iterdir())]
    assert saved == [f"emulated{x}" for x in (".csv", ".json", "_kernels.csv", "_kernels.json")]
    assert emulated.run(tmp_path / "again", **tiny) == rows  # the same figures twice


def test_a_launch_that_fails_is_a_row_and_the_rest_goes_on(tiny, tmp_path, capsys, monkeypatch):
    def broken(kernel, *arguments):
        if kernel.name == "merge_moments_kernel":
            raise EmulationError("reads\noutside")
        run_programs(kernel, *arguments)

    monkeypatch.setattr("fullres.kernels.emulator.run", broken)
    rows = emulated.run(tmp_path, **tiny)
    failed = [row for row in rows if row["failed"]]
    assert {row["kernel"] for row in failed} == {"merge_moments_kernel"}
    assert all(row["failed"] == "EmulationError: reads outside" for row in failed)
    assert all(row["needs_ms"] is None and row["calls"] for row in failed)
    assert len(rows) > len(failed) and all(row["needs_ms"] for row in rows[len(failed) :])
    (line,) = (r for r in emulated.by_kernel(rows) if r["kernel"] == "merge_moments_kernel")
    assert line["failed"] == len(failed) and line["needs_ms"] == 0
    assert "FAILED merge_moments_kernel" in capsys.readouterr().out


def test_a_run_that_time_ends_is_gone_on_with(tiny, tmp_path, monkeypatch):
    facts = {**record.environment(), "commit": "abc1234"}
    monkeypatch.setattr(record, "environment", lambda: dict(facts))
    assert {r["failed"] for r in emulated.run(tmp_path, **tiny, seconds=0)} == {record.NOT_BEGUN}
    rows = emulated.run(tmp_path, **tiny)
    assert not any(row["failed"] for row in rows)
    monkeypatch.setattr(emulated, "emulate", lambda launch: pytest.fail("it was known"))
    assert emulated.run(tmp_path, **tiny) == rows
    with pytest.raises(ValueError, match="want some of uresnet, .*; got vgg"):
        emulated.run(tmp_path, networks=["vgg"])


@pytest.fixture
def promised():
    """Skip where a system promises no more memory than it has."""
    try:
        with open("/proc/sys/vm/overcommit_memory") as file:
            if file.read().strip() == "2":
                pytest.skip("this system is set to promise no more memory than it has")
    except OSError:
        pytest.skip("needs Linux, whose mappings need no room")


def test_memory_that_nobody_touches_takes_none(promised):
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    room = emulated.sparse(2 * RAM)
    room[-1], room[RAM] = 1, 2
    assert room[-1] == 1 and room[RAM] == 2 and room[0] == 0
    images = 2 * RAM // (16 * 1260 * 2048 * 2) + 1
    launch = launch_of(moments, images, 16, 1260, 2048)
    assert launch.bytes > 2 * RAM
    assert total(launch).sectors > 2 * RAM / 32
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    assert grown * 1024 < GIB


def test_emulating_leaves_no_trace():
    def step():
        moments(torch.empty(2, 24, 8, 8, dtype=torch.bfloat16))

    before = record_launches(step, emulated.TARGET)
    for launch in emulated.launches(step):
        emulated.emulate(launch)
    assert record_launches(step, emulated.TARGET) == before


def test_views_lie_in_one_memory_and_differ_in_no_launch():
    def step():
        whole = torch.empty(2, 64, 64, 32, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        for begin in (0, 1):  # the second image begins elsewhere, aligned alike
            conv2d(whole[begin : begin + 1], whole[begin, :8, :8, :4].reshape(8, 32, 1, 1))

    (launch,) = found = emulated.launches(step)
    assert found[launch] == 2
    repeated = emulated.Memory(0, torch.float32, (3, 5, 7), (0, 7, 1), 4)
    assert repeated.bytes == 4 * 5 * 7 and repeated.end == 4 * (4 + 5 * 7)
    assert emulated.Memory(0, torch.float32, (3, 0), (0, 1), 4).end == 0


def test_products_of_tensor_cores_are_known_by_their_opcode():
    flop = emulated.product_flop
    assert flop("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == 2 * 16 * 8 * 16
    assert flop("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16") == 2 * 16 * 128 * 16
    assert flop("wgmma.wait_group.sync.aligned") == flop("fma.rn.f32") == 0


def test_the_command_line_passes_what_a_benchmark_takes(fullres, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        emulated, "run", lambda out, networks, image, batch: asked.append((networks, image, batch))
    )
    words = "--networks", "a21,uresnet", "--image-size", "40x50", "--batch-size", 3
    code, _, err = fullres("bench", "emulated", *words, "--out", tmp_path)
    assert code == 0, err
    assert asked == [(["a21", "uresnet"], (3, 40, 50), 3)]
    code, _, err = fullres("bench", "kernels", "--batch-size", 3, "--out", tmp_path)
    assert code == 1 and "kernels: want no --batch-size" in err
