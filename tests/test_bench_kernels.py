"""The kernel benchmark: which layers, how much work, and does it notice a wrong result?"""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fullres.bench import kernels, record
from fullres.bench.case import Case, wrong
from fullres.bench.layers import H200, NETWORKS, PASSES, Layer, collect
from fullres.bench.providers import dispatched, providers
from fullres.ops import dispatch

pytest.importorskip("triton")

FULL = Layer(16, 16, (3, 3), 1280, 2048, "leaky_relu", padding=(1, 1), bias=True)
TINY = {
    "3x3": Layer(8, 12, (3, 3), 13, 9, "leaky_relu", padding=(1, 1), bias=True),
    "first": Layer(3, 8, (7, 7), 21, 17, "relu", stride=(2, 2), padding=(3, 3), first=True),
    "last": Layer(16, 3, (1, 1), 9, 11, "leaky_relu", bias=True, norm=False),
    "1x1 over rows that nobody reads": Layer(8, 8, (1, 1), 9, 11, "relu", stride=(2, 2)),
    "3x3 stride 2": Layer(8, 8, (3, 3), 9, 12, "relu", stride=(2, 2), padding=(1, 1)),
    "groups": Layer(8, 12, (3, 3), 9, 8, "relu", dilation=(2, 2), padding=(2, 2), groups=4),
}


@pytest.fixture(scope="module")
def layers():
    return collect()


def test_every_convolution_of_the_networks_is_there(layers):
    assert layers[FULL] == {"uresnet": 54, "polaris": 18}
    assert next(iter(layers)) == FULL  # what takes most time comes first
    counts = sum(layers.values(), Counter())
    assert counts["resnet50"] == 53
    # Three planes through 18 + 2 convolutions a level and the stem, 6 + 1 in the last; the deepest.
    assert counts["uresnet"] == 3 * (6 * (2 * 4 + 3) + 1 + 10 + 1) + 12
    assert len({layer.name for layer in layers}) == len(layers)


def test_a_layer_knows_its_place(layers):
    first = {layer.name for layer in layers if layer.first}
    assert first == {
        "5x5 1->16 at 1280x2048 first",  # filled up to a multiple of 64 rows by the network itself
        "5x5 1->8 at 1280x2048 first",
        "7x7 3->64 /2 at 1260x2048 first",
    }
    last = {layer.name for layer in layers if not layer.norm}
    assert last == {"1x1 16->3 at 1280x2048 last", "1x1 8->3 at 1280x2048 last"}
    stem = next(layer for layer in layers if layer.channels == 3)
    assert stem.passes == ("forward", "wgrad", "layer") and FULL.passes == PASSES
    assert stem.output_size == (630, 1024)


def test_work_is_what_the_networks_are_published_with(layers):
    def total(network, work):
        return sum(uses[network] * work(layer) for layer, uses in layers.items())

    forward = {name: total(name, lambda x: x.flop("forward", 1)) / 1e12 for name in NETWORKS}
    assert forward["uresnet"] == pytest.approx(1.29, abs=0.005)
    assert forward["a21"] == pytest.approx(0.127, abs=0.0005)
    assert forward["polaris"] == pytest.approx(0.53, abs=0.005)
    assert forward["resnet50"] == pytest.approx(0.422, abs=0.0005)  # 4.1 GFLOP at 224 x 224, twice


def test_bytes_and_flop_of_a_layer_by_hand():
    T, w = 8 * 16 * 1280 * 2048 * 2, 16 * 16 * 9 * 2
    passes = {name: FULL.bytes(name, 8) for name in PASSES}
    assert passes == {
        "forward": 2 * T + w,
        "dgrad": 4 * T + w,
        "wgrad": 3 * T + w,
        "backward": 4 * T + 2 * w,
        "layer": 6 * T + 3 * w,
    }
    assert FULL.flop("layer", 8) == 3 * FULL.flop("forward", 8) == 3 * 72 * 2 * T
    assert FULL.roof("layer", 8, H200) == pytest.approx(6 * T / 4.3e12, rel=1e-3)
    assert FULL.bound("forward", 8, H200) == "memory"
    wide = Layer(256, 256, (3, 3), 79, 128, "relu", padding=(1, 1))
    assert wide.bound("forward", 8, H200) == "arithmetic"
    assert wide.roof("wgrad", 8, H200) == wide.flop("wgrad", 8) / 790e12
    # Eager: 7 passes forward, 8 and both products backward.
    assert FULL.torch_predicted("layer", 8, H200, merged=False) == pytest.approx(19 * T / 4.3e12)
    assert FULL.torch_predicted("layer", 8, H200, merged=True) == pytest.approx(16 * T / 4.3e12)


def test_predictions_are_never_faster_than_the_roof(layers):
    for layer in layers:
        for name in layer.passes:
            assert layer.predicted(name, 8, H200) >= layer.roof(name, 8, H200) > 0
    # Nine taps' tiles written and read, at 128 bytes a clock from each of 132 processors.
    shared = 2 * 9 * 8 * 16 * 1280 * 2048 * 2 / (132 * 128 * 1.7e9)
    assert FULL.predicted("forward", 8, H200) == pytest.approx(shared)


@pytest.fixture(scope="module", params=TINY)
def case(request):
    return Case(TINY[request.param], 2, torch.bfloat16, "cpu")


def calls_of(case) -> list:
    found = providers(case, compiled=False)
    assert set(found) == {"triton", "composed", "cudnn", "eager"}
    every = [call for calls in found.values() for call in calls.values()]
    return [*every, dispatched(case)]


def test_every_provider_computes_the_same_layer(case):
    for call in calls_of(case):
        results = call()
        assert results and wrong(case, results) == []


def test_a_wrong_result_is_noticed(case):
    """One value is off by half a deviation, where the check looks, or is not a number."""
    for call in calls_of(case):
        results = call()
        for name, result in results.items():
            # A bias before a normalisation has no gradient: what is there is rounding.
            off = 4.0 if name == "db" else result.float().std() / 2
            for value in off, float("nan"):
                broken = result.clone()
                broken[(0,) * result.dim()] += value
                found = wrong(case, {**results, name: broken})
                assert name in found
                # Others only where they are made of it.
                assert {*found} <= {name, *{"y": ["norm"], "g_prev": ["sums_prev"]}.get(name, [])}


def test_a_forgotten_tap_is_noticed():
    layer = TINY["3x3"]
    case = Case(layer, 2, torch.bfloat16, "cpu")
    results = providers(case, compiled=False)["cudnn"]["forward"]()
    case.weight[:, :, 0, 0] = 0
    assert wrong(case, results) == ["y"]


def test_float32_is_held_to_float32():
    case = Case(TINY["3x3"], 1, torch.float32, "cpu")
    results = dispatched(case)()
    assert wrong(case, results) == []
    rounded = {name: t.bfloat16().float() for name, t in results.items()}
    assert {*wrong(case, rounded)} == {*results} - {"db"}  # which is rounding alone


def timed(layer, provider, pass_, ms, wrong="") -> dict:
    return {"layer": layer.name, "pass": pass_, "provider": provider, "ms": ms, "wrong": wrong}


def test_a_ratio_needs_two_right_results():
    rows = [
        timed(FULL, "fullres", "layer", 1.0),
        timed(FULL, "eager", "layer", 3.0),
        timed(FULL, "compile", "layer", 2.0, wrong="dw"),
        timed(FULL, "triton", "dgrad", 1.0, wrong="g_prev"),
        timed(FULL, "cudnn", "dgrad", 1.0),
    ]
    ratios = [
        [row[f"over_{name}"] for name in ("eager", "compile", "cudnn")]
        for row in kernels.with_ratios(rows)
    ]
    assert ratios[0] == [3.0, "WRONG", ""]
    assert ratios[3] == ["", "", "WRONG"] and ratios[4] == ["", "", 1.0]


def test_the_dispatch_table_comes_from_the_times(monkeypatch, tmp_path):
    half = Layer(16, 16, (3, 3), 640, 1024, "leaky_relu", padding=(1, 1), bias=True)
    other = Layer(64, 64, (3, 3), 160, 256, "leaky_relu", padding=(1, 1), bias=True)
    rows = [
        timed(FULL, "triton", "forward", 1.0),
        timed(FULL, "composed", "forward", 1.5),
        timed(half, "triton", "forward", 0.9),  # slower, but less than it gains at full size
        timed(half, "composed", "forward", 0.5),
        timed(FULL, "triton", "dgrad", 2.0),
        timed(FULL, "composed", "dgrad", 1.0),
        timed(FULL, "triton", "wgrad", 1.0),
        timed(FULL, "triton", "backward", 2.5),
        timed(other, "triton", "forward", 2.0),
        timed(other, "composed", "forward", 1.0),
        timed(other, "triton", "wgrad", 2.0, wrong="dw"),
        timed(other, "composed", "wgrad", 1.0),
    ]
    path = tmp_path / "card.csv"
    dispatch.write_table(path, kernels.table_times(rows, [FULL, half, other]))
    shapes = {pass_: FULL.shape(pass_, torch.bfloat16) for pass_ in PASSES}
    slow = other.shape("forward", torch.bfloat16)
    assert dispatch.read_table(path) == {
        shapes["forward"]: (1.9, 2.0),
        shapes["dgrad"]: (2.0, 1.0),
        shapes["backward"]: (2.5, 2.0),  # against the better dgrad and the only wgrad
        slow: (2.0, 1.0),
    }
    monkeypatch.setenv(dispatch.VARIABLE, str(path))
    cpu = torch.device("cpu")
    assert dispatch.implementation(shapes["forward"], cpu) == "triton"
    assert dispatch.implementation(shapes["backward"], cpu) == "two_pass"
    assert dispatch.implementation(slow, cpu) == "cudnn"


def test_without_a_gpu_it_says_what_it_did_not_measure(monkeypatch, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("about machines without a GPU")
    compiled = {"kernel": "k", "variant": "C=16", "registers": 40, "spill_bytes": 0}
    compiled |= {"shared_bytes": 0, "wgmma": 1, "mma_sync": 0, "excess": ""}
    asked = []
    monkeypatch.setattr(kernels, "compile_rows", lambda *a: asked.append(a) or [compiled])
    rows = kernels.run(tmp_path)
    said = capsys.readouterr().out
    assert "NOT RUN ON A CARD" in said and "no result checked" in said
    assert {row["measured"] for row in rows} == {"not run on a card"}
    assert not any("agrees" in row or "ms" in row for row in rows)
    assert [name for (layer,), *_ in asked for name in [layer.name]] == list(kernels.COMPILED)
    saved = json.loads((tmp_path / "kernels.json").read_text())
    assert saved["rows"] == rows and (tmp_path / "kernels.csv").exists()
    assert (tmp_path / "kernels_compiled.json").exists()
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_what_our_passes_launch_is_what_is_compiled(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "fullres.kernels.launches.build", lambda found, *_: seen.extend(found) or []
    )
    # Of few pixels one pass leaves more partial sums behind than the second pass reads.
    kernels.compile_rows([replace(TINY["3x3"], height=64, width=64)], 1, "sm_90", tmp_path)
    names = {launch.kernel.split(":")[1] for launch in seen}
    for ours in ("conv2d_fwd", "conv2d_dgrad", "conv2d_wgrad", "conv2d_backward", "batch_norm"):
        assert any(name.startswith(ours) for name in names)
    assert {"prologue_kernel", "moments_kernel", "gradient_kernel"} <= names  # beside cuDNN
    assert all("*fp64" not in launch.label for launch in seen)


def test_a_call_that_fails_costs_only_itself():
    def broken():
        raise ValueError("too large")

    figures = kernels._figures(None, broken, {})
    assert figures["wrong"] == "ValueError: too large" and figures["ms"] is None


@pytest.fixture
def card(monkeypatch):
    """As a card would, on the CPU: all but the clock is the benchmark's own; ours take 1 ms."""

    def figures(case, call, work):
        ms = 1.0 if "norm" in (results := call()) else 2.0
        names = ("ms_20", "ms_80", "tflop_per_s", "gb_per_s", "of_roof", "peak_mib")
        return {"wrong": ", ".join(wrong(case, results)), "ms": ms, **dict.fromkeys(names, 1.0)}

    facts = {**record.environment(), "commit": "abc"}
    layers = {TINY[name]: Counter(net=1) for name in ("3x3", "first", "last")}
    for name, value in {
        "_figures": figures, "_batch": lambda layer: 2, "_target": lambda: None, "DEVICE": "cpu",
        "_rates": lambda: H200,
    }.items():  # fmt: skip
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(record, "environment", lambda: facts)
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    for name in ("benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    monkeypatch.setenv("TRITON_CACHE_DIR", "as it was")
    return layers, facts


def test_a_run_on_a_card_measures_saves_and_decides(card, tmp_path, capsys):
    layers, _ = card
    rows = kernels._measure(layers, tmp_path, None)
    said = capsys.readouterr().out
    assert "NOT MEASURED" not in said and "WRONG" not in said
    assert {(row["layer"], row["provider"]) for row in rows} == {
        (layer.name, provider)
        for layer in layers
        for provider in (*kernels.OURS, *kernels.BASELINES)
    }
    whole = {r["layer"]: r for r in rows if r["provider"] == "fullres"}
    assert whole[TINY["3x3"].name]["over_eager"] == 2.0
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == rows
    table = dispatch.read_table(tmp_path / dispatch.table_name(H200.name))
    assert TINY["3x3"].shape("forward", torch.bfloat16) in table
    assert (tmp_path / "roofline.png").exists()


def test_a_run_that_was_cut_short_goes_on(card, monkeypatch, tmp_path, capsys):
    layers, facts = card
    first, *others = layers
    assert kernels._measure(layers, tmp_path, -1.0) == []
    assert "NOT MEASURED" in capsys.readouterr().out
    left = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [(row["layer"], row["wrong"]) for row in left] == [
        (layer.name, record.NOT_BEGUN) for layer in layers
    ]
    before = kernels._measure({first: layers[first]}, tmp_path, None)
    measured = []
    real = kernels._measured
    monkeypatch.setattr(
        kernels, "_measured", lambda layer, *a: measured.append(layer) or real(layer, *a)
    )
    rows = kernels._measure(layers, tmp_path, None)
    assert measured == others and rows[: len(before)] == before
    facts["commit"] = "abd"
    kernels._measure(layers, tmp_path, None)
    assert measured[2:] == list(layers)


def test_a_wrong_result_of_ours_fails_the_run_once_it_is_saved(card, monkeypatch, tmp_path):
    layers, _ = card
    figures = kernels._figures
    monkeypatch.setattr(kernels, "_figures", lambda *a: {**figures(*a), "wrong": "dw"})
    with pytest.raises(SystemExit, match="WRONG"):
        kernels._measure(layers, tmp_path, None)
    assert (tmp_path / "kernels.json").exists()


def test_a_layer_that_fails_costs_itself_and_one_that_never_ended_comes_last(
    card, monkeypatch, tmp_path
):
    layers, _ = card
    first, second, third = layers
    real, begun = kernels._measured, []

    def measured(layer, *arguments):
        begun.append(layer)
        saved = json.loads((tmp_path / "kernels.json").read_text())["rows"]
        stopped = [row["layer"] for row in saved if row["wrong"] == kernels.STOPPED]
        assert layer.name in stopped and first.name in stopped
        if layer == first and len(begun) == 1:
            raise KeyboardInterrupt  # as if it never ended
        if layer == second:
            raise ValueError("no memory for the reference")
        return real(layer, *arguments)

    monkeypatch.setattr(kernels, "_measured", measured)
    with pytest.raises(KeyboardInterrupt):
        kernels._measure(layers, tmp_path, None)
    with pytest.raises(SystemExit, match="no memory for the reference"):
        kernels._measure(layers, tmp_path, None)
    assert begun == [first, second, third, first]
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["wrong"] for row in rows if row["layer"] == second.name] == [
        "ValueError: no memory for the reference"
    ]
    assert {row["layer"] for row in rows if not row["wrong"]} == {first.name, third.name}


def test_a_card_that_is_lost_ends_the_run_behind_its_layer(card, monkeypatch, tmp_path):
    layers, _ = card
    monkeypatch.setattr(kernels, "card_answers", lambda: False)
    kernels._measure(layers, tmp_path, None)
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    left = [row["layer"] for row in rows if row["wrong"] == record.NOT_BEGUN]
    assert left == [layer.name for layer in layers][1:]
