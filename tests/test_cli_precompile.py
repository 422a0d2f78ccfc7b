"""`fullres precompile` and `fullres bench`: what they refuse, print, and leave behind."""

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import torch
import triton

from fullres import Plan, cli
from fullres.bench import kernels, memory
from fullres.engine import precompile
from fullres.kernels import aot

ROW = {
    "kernel": "conv2d_fwd_kernel", "target": "sm_90", "warps": 4, "shared_bytes": 2048,
    "registers": 100, "spill_bytes": 0, "wgmma": 8, "mma_sync": 0, "mfma": 0, "loads": 2,
    "loads_16": 2, "async_copies": 0, "stores_16": 1, "variant": "C=16", "excess": "", "excuse": "",
}  # fmt: skip
SPILLS = {**ROW, "variant": "C=64", "excess": "spill_bytes 96"}
EXCUSED = {**SPILLS, "variant": "C=32", "excuse": "rarely used values"}


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that takes no time: it returns these rows, and notes what it was asked."""
    rows, asked = [ROW, EXCUSED], []

    def compile_all(step, targets, out, progress, first):
        asked.append((step, targets, out))
        progress(1, 2)
        return rows

    monkeypatch.setattr(precompile, "precompile", compile_all)
    return rows, asked


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--precision", "fp8"], "want precision from bf16, fp16, fp32; got 'fp8'"),
        (["--model", "vgg"], "want model from resnet18, .*; got 'vgg'"),
        (["--preset", "huge"], "want preset from uresnet, .*; got 'huge'"),
        (["--network", "width=3"], "want in network one of filters, .*; got 'width=3'"),
        (["--model", "resnet50", "--network", "filters=3"], "want network with the model uresnet"),
        (["--image-size", "12"], "want image_size as ROWSxCOLUMNS"),
        (["--out", __file__], "want out as a folder"),
    ],
)
def test_precompile_refuses_before_any_work(fullres, compiled, arguments, message):
    code, out, err = fullres("precompile", *arguments)
    assert code == 1 and out == ""
    assert re.search(message, err)
    assert compiled[1] == []


def test_precompile_refuses_unknown_targets(fullres, tmp_path):
    code, out, err = fullres("precompile", "--target", "sm_90,sm_7", "--out", tmp_path / "build")
    assert code == 1 and "want some of sm_80, sm_90, gfx942; got sm_7" in err
    assert not (tmp_path / "build").exists()


TINY = "filters=4,depth=1,level_blocks=1,deepest_blocks=1,deepest_channels=8,deepest_kernel=3"
NETWORK = ("--preset", "a21", "--network", TINY, "--image-size", "32x48")


def launched(step) -> dict[str, set[str]]:
    """The variants that a step launches, by their kernels."""
    found: dict[str, set[str]] = {}
    for launch in precompile.record_launches(step, "sm_90", first=True):
        found.setdefault(launch.kernel.split(":")[1], set()).add(launch.description)
    return found


def test_precompile_knows_the_loss_and_validation(fullres, compiled, tmp_path):
    """Else a process that trains would compile them at its first step, and its first validation."""
    assert fullres("precompile", *NETWORK, "--out", tmp_path)[0] == 0
    found = launched(compiled[1][0][0])
    build, _ = cli._network("uresnet", "a21", TINY)
    alone = launched(
        precompile.training_step(cli._converted(build, "keep"), (1, 3, 32, 48), torch.bfloat16)
    )
    assert {*found} - {*alone} == {
        "softmax_focal_loss_kernel", "softmax_focal_loss_backward_kernel",
    }  # fmt: skip
    assert found["conv2d_fwd_kernel"] > alone["conv2d_fwd_kernel"]  # without moments


def test_precompile_follows_a_plan(fullres, compiled, tmp_path):
    path = tmp_path / "plan.json"
    fits = ("--batch-size", 2, "--precision", "fp16", "--memory", "1GiB", "--save", path)
    assert fullres("plan", *NETWORK, *fits)[0] == 0
    found = Plan.load(path)
    least = ("--memory", int(0.5 * found.peak_bytes))
    assert fullres("plan", *NETWORK, *fits[:-4], *least, "--save", path)[0] == 0
    tight = Plan.load(path)
    assert any(part.again for part in tight.segments)
    code, _, err = fullres("precompile", *NETWORK, "--plan", path, "--out", tmp_path)
    assert code == 0, err
    made = launched(compiled[1][0][0])
    assert {"conv2d_fwd_kernel", "softmax_focal_loss_backward_kernel"} <= {*made}
    code, _, err = fullres("precompile", "--plan", path, "--out", tmp_path)
    assert code == 1 and "plan: want one of this network" in err
    code, _, err = fullres("precompile", "--plan", __file__, "--out", tmp_path)
    assert code == 1 and "path: want a file that Plan.save wrote" in err


def test_precompile_prints_a_table(fullres, compiled, tmp_path):
    code, out, err = fullres("precompile", "--target", "sm_80,sm_90", "--out", tmp_path)
    assert code == 0
    ((_, targets, folder),) = compiled[1]
    assert (targets, folder) == (["sm_80", "sm_90"], tmp_path)
    words = " ".join(out.split())
    for word in ("conv2d_fwd_kernel", "registers", "spilled", "shared", "2 variants"):
        assert word in words
    assert f"TRITON_CACHE_DIR={tmp_path / 'cache'}" in words
    assert "NO STATED REASON" not in words


def test_precompile_prints_nothing_but_json_where_that_is_asked(fullres, compiled, tmp_path):
    code, out, err = fullres("precompile", "--json", "--out", tmp_path)
    assert code == 0
    assert json.loads(out) == [ROW, EXCUSED]
    assert "Compiling" in err


@pytest.mark.parametrize("json_too", [False, True])
def test_strict_fails_on_an_excess_without_a_reason(fullres, compiled, tmp_path, json_too):
    arguments = ["precompile", "--out", tmp_path, *(["--json"] if json_too else [])]
    assert fullres(*arguments, "--strict")[0] == 0
    compiled[0].append(SPILLS)
    code, out, _ = fullres(*arguments)
    assert code == 0 and (json_too or "NO STATED REASON" in " ".join(out.split()))
    code, out, err = fullres(*arguments, "--strict")
    assert code == 1
    assert "1 variants pass a limit without a stated reason" in err and "C=64" in err
    assert not json_too or len(json.loads(out)) == 3


@pytest.mark.slow
@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 compiles nothing")
@pytest.mark.parametrize(
    "options",
    [
        [
            "--network",
            "planes=1,filters=16,classes=16,depth=0,deepest_blocks=0,deepest_channels=16",
        ],
        ["--first"],  # the whole preset, in each kernel's first configuration
    ],
    ids=["small network", "whole preset"],
)
def test_what_a_training_step_launches_fits_the_device(options, tmp_path):
    """In a process of its own, for the card that we tune on."""
    command = ["precompile", "--strict", "--json", "--target", "sm_90", "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "fullres", *command, "--preset", "a21", *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) > 20 and {row["target"] for row in rows} == {"sm_90"}
    for row in rows:
        assert row["shared_bytes"] <= aot.SHARED_LIMIT["sm_90"]
        assert (row["spill_bytes"] or 0) <= aot.SPILL_LIMIT or row["excuse"]
    assert any(row["wgmma"] for row in rows)
    assert list((tmp_path / "cache").glob("*/*.cubin"))


def test_bench_refuses_what_it_does_not_have(fullres, tmp_path):
    code, _, err = fullres("bench", "kernels", "speed", "--out", tmp_path / "results")
    assert code == 1 and re.search("want benchmarks from kernels, .*; got speed", err)
    assert not (tmp_path / "results").exists()
    code, _, err = fullres("bench", "kernels", "--out", __file__)
    assert code == 1 and "want out as a folder" in err
    code, _, err = fullres("bench", "kernels", "--smoke", "--out", tmp_path / "results")
    assert code == 1 and "fullres bench all" in err


def test_bench_prints_nothing_but_json_where_that_is_asked(fullres, monkeypatch, tmp_path):
    asked = []

    def run(out, **options):
        print("a table for people")
        asked.append((out, options))
        return [{"ms": 1.0}]

    monkeypatch.setattr(kernels, "run", lambda out, seconds=None: run(out, seconds=seconds))
    monkeypatch.setattr(memory, "run", lambda out: run(out))
    arguments = ["bench", "kernels", "memory", "--seconds", "9", "--out", tmp_path]
    code, out, err = fullres(*arguments, "--json")
    assert code == 0 and "a table for people" in err
    assert asked == [(tmp_path, {"seconds": 9.0}), (tmp_path, {})]
    made = json.loads(out)
    assert made["kernels"] == made["memory"] == [{"ms": 1.0}] and "torch" in made["environment"]
    code, out, _ = fullres(*arguments)
    assert code == 0 and out.count("a table for people") == 2 and "recorded in" in out
