"""The focal losses' benchmark without a card: bytes at full size, and a file that says so."""

import json

import pytest
import torch

from fullres.bench import focal_loss, record

WORKLOADS = {w.name: w for w in focal_loss.workloads()}


@pytest.mark.parametrize("name", WORKLOADS)
def test_ours_stores_nothing_and_allocates_the_gradient_alone(name):
    ours = focal_loss._predicted(WORKLOADS[name], "fullres")
    assert ours["stored_mib"] < 0.001
    assert ours["gradients_mib"] <= ours["peak_beyond_mib"] < ours["gradients_mib"] + 0.001
    eager = focal_loss._predicted(WORKLOADS[name], "eager")
    assert eager["inputs_mib"] == ours["inputs_mib"]
    assert eager["stored_mib"] > ours["inputs_mib"]  # so the benchmark compares with something


@pytest.mark.parametrize("name", WORKLOADS)
def test_providers_agree_with_float64(name, monkeypatch):
    """What the benchmark takes for right, on the CPU and small images."""
    workload, (leaves, rest) = WORKLOADS[name], small(WORKLOADS[name])
    value, gradient = focal_loss._checked(workload, leaves, rest)
    for call in workload.providers.values():
        loss = call(*leaves, *rest)
        assert abs(loss.item() - value) <= 1e-2 * abs(value)
        got = torch.autograd.grad(loss, leaves)[0][:1].double()
        torch.testing.assert_close(got, gradient, rtol=0.1, atol=0.02 * gradient.abs().mean())


def small(workload):
    torch.manual_seed(1)
    with torch.device("meta"):
        leaves, rest = workload.make(2, "meta")
    shrunk = []
    for t in (*leaves, *rest):
        shape = [n if i < 2 or n < 100 else 20 for i, n in enumerate(t.shape)]
        if t.is_floating_point():
            shape = [min(n, 500) for n in shape]
            leaf = any(t is x for x in leaves)
            value = torch.randn(shape).mul(0.25) if leaf else torch.rand(shape).round()
            shrunk.append(value.to(torch.bfloat16).requires_grad_(leaf))
        else:
            shrunk.append(torch.randint(3, [2, 20, 20], dtype=torch.uint8))
    return shrunk[: len(leaves)], shrunk[len(leaves) :]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_it_says_that_nothing_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(focal_loss, "_compiled", lambda: [{"kernel": "not compiled here"}])
    rows = focal_loss.run(tmp_path)
    assert "NOT RUN ON A CARD" in capsys.readouterr().out
    assert {row["measured"] for row in rows} == {"not run on a card"}
    assert json.loads((tmp_path / "focal_loss.json").read_text())["rows"] == rows


def test_a_run_on_a_card_goes_on_and_shows_what_failed(tmp_path, monkeypatch):
    """As on a card: all but the device's work is the benchmark's own."""
    facts = {**record.environment(), "commit": "abc1234"}
    monkeypatch.setattr(record, "environment", lambda: facts)
    monkeypatch.setattr(focal_loss, "_copy_speed", lambda: 4e12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fine = {"wrong": "", **dict.fromkeys(focal_loss.FIGURES, 2.0)}
    slow = {**fine, "step_ms": 5.0}
    run = []

    def found(workload, roof):
        run.append(workload.name)
        ours = {**fine, "wrong": "differs from float64"} if workload.name == broken else fine
        return 1, {"fullres": ours, "eager": slow, "compile": focal_loss._failed("no memory")}

    monkeypatch.setattr(focal_loss, "_found", found)
    broken = ""
    rows = focal_loss.run(tmp_path, seconds=-1.0)
    assert run == [] and {row["wrong"] for row in rows} == {record.NOT_BEGUN}
    assert {row["it_over_fullres"] for row in rows} == {""}
    rows = focal_loss.run(tmp_path)
    assert run == list(WORKLOADS)
    assert [row["it_over_fullres"] for row in rows] == [1.0, 2.5, ""] * len(run)
    assert focal_loss.run(tmp_path) == rows and len(run) == len(WORKLOADS)
    broken, facts["commit"] = run[0], "abd1234"
    with pytest.raises(SystemExit, match="WRONG"):
        focal_loss.run(tmp_path)
    saved = json.loads((tmp_path / "focal_loss.json").read_text())["rows"]
    assert [row["it_over_fullres"] for row in saved[:3]] == ["WRONG", "WRONG", ""]
    assert len(saved) == len(rows)
