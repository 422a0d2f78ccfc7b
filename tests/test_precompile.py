import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from fullres.engine.precompile import precompile, record_launches, training_step
from fullres.kernels import aot, launches
from fullres.kernels.conv import ROWS_CONFIGS
from fullres.ops.conv import conv2d
from fullres.ops.pointwise import moments

SIZE = (2, 16, 1260, 2048)


class Net(torch.nn.Module):
    """Two equal convolutions and one that differs."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.empty(16, 16, size, size) for size in (3, 3, 1))

    def forward(self, x):
        for weight in self.weights:
            x = conv2d(x, weight, padding="same")
        return x


STEP = training_step(Net, SIZE, torch.bfloat16)


def files(folder: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_each_variant_of_a_step_is_recorded_once(target):
    found = record_launches(STEP, target)
    assert len(set(found)) == len(found) > len(ROWS_CONFIGS)  # in all configurations
    rows = [x for x in found if x.kernel.endswith(":conv2d_fwd_rows_kernel")]
    assert {x.target for x in rows} == {target}
    forward = [x for x in rows if "R=3" in x.label]
    assert all("*bf16" in x.label for x in forward)  # autocast's type, not the weights'


def test_recording_leaves_no_trace():
    before = launches.JITFunction.run, launches.Autotuner.run, triton.knobs.runtime.jit_cache_hook
    record_launches(STEP, "sm_90")
    assert (
        launches.JITFunction.run,
        launches.Autotuner.run,
        triton.knobs.runtime.jit_cache_hook,
    ) == before


def test_sizes_beyond_amds_buffer_instructions_are_a_variant_of_their_own():
    def step(batch):
        def run():
            x = torch.empty(batch, 16, 1280, 2048, dtype=torch.float16)
            conv2d(
                x.contiguous(memory_format=torch.channels_last), torch.empty(16, 16, 1, 1).half()
            )

        return run

    small, large = (record_launches(step(batch), "gfx942") for batch in (1, 40))
    assert {*small}.isdisjoint(large)
    small, large = (record_launches(step(batch), "sm_90") for batch in (1, 40))
    assert {*small} == {*large}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with what one convolution needs on sm_80, and its rows."""
    out = tmp_path_factory.mktemp("with space") / "a:b"
    return out, precompile(one_convolution, ["sm_80"], out)


def one_convolution():
    x = torch.empty(1, 16, 64, 64, dtype=torch.float16)
    weight = torch.empty(16, 16, 3, 3, dtype=torch.float16)
    conv2d(x.contiguous(memory_format=torch.channels_last), weight, padding=1)


def test_every_variant_is_compiled_and_looked_at(built):
    out, rows = built
    assert len(rows) == len(record_launches(one_convolution, "sm_80"))
    for row in rows:
        assert row["target"] == "sm_80"
        assert row["spill_bytes"] == 0 and row["mma_sync"] > 0
        assert 0 < row["shared_bytes"] <= aot.SHARED_LIMIT["sm_80"]


def test_only_what_changed_is_compiled_again(built):
    out, rows = built
    before = files(out)
    assert precompile(one_convolution, ["sm_80"], out) == rows
    assert files(out / "cache") == {p: t for p, t in before.items() if "/cache/" in p}
    assert files(out / "reports") == {p: t for p, t in before.items() if "/reports/" in p}

    gone = sorted((out / "reports").iterdir())[0]
    gone.unlink()
    seen = []
    assert precompile(one_convolution, ["sm_80"], out, lambda *count: seen.append(count)) == rows
    assert seen == [(1, 1)]
    after = files(out / "reports")
    assert {p for p, t in after.items() if before[p] != t} == {str(gone)}


def test_a_process_with_the_cache_compiles_nothing(built):
    # What triton does to launch, on real tensors, up to the launch itself, which needs a device.
    program = """
from unittest import mock
import torch, triton
from fullres.engine.fakes import DevicePath
from fullres.kernels import launches
from fullres.ops.conv import conv2d

hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
run = launches.JITFunction.run

def launch(self, *args, grid, warmup, **kwargs):
    return run(self, *args, grid=grid, warmup=True, **kwargs)

def tune(self, *args, **kwargs):
    for self.best_config in self.every_config:
        self.fn.run(*args, **kwargs, **self.best_config.all_kwargs())

x = torch.empty(1, 16, 64, 64, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
weight = torch.empty(16, 16, 3, 3, dtype=torch.float16)
with (
    launches.posing_as("sm_80"),
    mock.patch.object(launches.JITFunction, "run", launch),
    mock.patch.object(launches.Autotuner, "run", tune),
    DevicePath(),
):
    conv2d(x, weight, padding=1)
print(len(hits), all(hits))
"""
    out, rows = built
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_CACHE_DIR": str(out / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(len(rows)), "True"]


def test_what_does_not_compile_is_named(tmp_path):
    (launch, *_) = record_launches(one_convolution, "sm_80")
    broken = json.loads(launch.description)
    broken["signature"] = {k: "nonsense" for k in broken["signature"]}
    launch = launches.Launch(launch.kernel, launch.target, json.dumps(broken))
    with pytest.raises(RuntimeError, match="nonsense"):
        launches.build([launch], tmp_path)


def report(spill_bytes: int = 0, shared_bytes: int = 0) -> aot.Report:
    return aot.Report("kernel", "gfx942", 4, shared_bytes, spill_bytes=spill_bytes)


def launch_of(C: int, BLOCK: int, tuned: str) -> launches.Launch:
    description = {
        "signature": {"x_ptr": "*bf16", "C": "constexpr", "BLOCK": "constexpr"},
        "constant_keys": [[1], [2]],
        "constant_vals": [C, BLOCK],
        "options": {"num_warps": BLOCK // 16, "num_stages": 2},
    }
    return launches.Launch("module:kernel", "gfx942", json.dumps(description), tuned)


def test_a_variant_beyond_a_limit_needs_a_reason(monkeypatch):
    limit = aot.SHARED_LIMIT["gfx942"]
    assert aot.excess(report(aot.SPILL_LIMIT, limit)) == {}
    beyond = report(aot.SPILL_LIMIT + 1, limit + 1)
    assert aot.excess(beyond) == {"spill_bytes": aot.SPILL_LIMIT + 1, "shared_bytes": limit + 1}
    known = aot.Excuse("kernel", "gfx942", "spill_bytes", 100, r"C=16\b", "because")
    monkeypatch.setattr(aot, "EXCUSES", [known])
    assert aot.excuse(beyond, "C=16 BLOCK=64", "spill_bytes") == "because"
    assert aot.excuse(report(101), "C=16 BLOCK=64", "spill_bytes") == ""
    assert aot.excuse(beyond, "C=160 BLOCK=64", "spill_bytes") == ""
    assert aot.excuse(beyond, "C=16 BLOCK=64", "shared_bytes") == ""
    (row,) = launches.judged([(launch_of(16, 64, ""), beyond)])
    assert row["excuse"] == ""  # a reason for one of two is none
    (row,) = launches.judged([(launch_of(16, 64, ""), report(100))])
    assert (row["excess"], row["excuse"]) == ("spill_bytes 100", "because")


def test_a_configuration_too_large_for_a_device_is_the_tuners_to_pass_over():
    large, small = report(shared_bytes=10**6), report(shared_bytes=10)
    tuned = [(launch_of(16, 64, "BLOCK"), large), (launch_of(16, 32, "BLOCK"), small)]
    rows = launches.judged(tuned)
    assert "tuner" in rows[0]["excuse"] and rows[1]["excess"] == rows[1]["excuse"] == ""
    # Not where nothing fits, where the one that fits is for another layer, or nothing is tuned.
    assert launches.judged(tuned[:1])[0]["excuse"] == ""
    assert launches.judged([tuned[0], (launch_of(32, 32, "BLOCK"), small)])[0]["excuse"] == ""
    untuned = [(launch_of(16, 64, ""), large), (launch_of(16, 32, ""), small)]
    assert launches.judged(untuned)[0]["excuse"] == ""


def test_what_a_tuner_chose_is_recorded():
    found = record_launches(one_convolution, "sm_90")
    assert {launch.tuned for launch in found} != {""}
    assert len({launch.problem for launch in found}) == 1 < len(found)


def test_operators_that_call_others_of_ours_are_followed():
    @torch.library.custom_op("fullres::test_calls_another", mutates_args=(), device_types="cpu")
    def outer(y: torch.Tensor) -> torch.Tensor:
        return moments(y)

    outer.register_kernel("cuda")(moments)
    found = record_launches(lambda: outer(torch.empty(1, 16, 64, 64)), "sm_90")
    assert "moments_kernel" in {launch.kernel.split(":")[1] for launch in found}


def test_a_step_may_bring_its_loss():
    seen = []

    def criterion(out):
        seen.append(out.shape)
        return out.float().square().mean()

    record_launches(training_step(Net, SIZE, torch.bfloat16, criterion), "sm_90")
    assert seen == [SIZE]


def test_unknown_targets_are_named(tmp_path):
    with pytest.raises(ValueError, match="sm_70"):
        precompile(one_convolution, ["sm_80", "sm_70"], tmp_path)
    assert not list(tmp_path.iterdir())
