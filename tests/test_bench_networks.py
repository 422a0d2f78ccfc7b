"""The benchmark of whole steps prints a ratio for right results alone."""

import pytest

from fullres.bench import networks
from fullres.models import PRESETS, UResNetConfig, uresnet

NUMBERS = {"filters": 2, "depth": 1, "deepest_blocks": 1, "deepest_channels": 4, "final_blocks": 0}


@pytest.fixture
def small(monkeypatch):
    config = UResNetConfig(**NUMBERS, residual=False, join="sum")
    assert PRESETS["a21"].join == config.join
    monkeypatch.setitem(networks.NETWORKS, "a21", lambda: uresnet(config))


def test_every_provider_is_right_and_has_a_ratio(small):
    rows = networks.measure("a21", (8, 12), "cpu", rounds=1)
    assert [row["provider"] for row in rows] == [
        "eager", "fullres, keep", "fullres, closing", "fullres, series",
    ]  # fmt: skip
    assert all(isinstance(row["over_eager"], float) for row in rows)


def test_a_wrong_gradient_has_no_ratio(small, monkeypatch):
    step = networks._step

    def wrong(model, x):
        gradients = step(model, x)
        return gradients * 1.01 if "Fused" in type(model).__name__ else gradients

    monkeypatch.setattr(networks, "_step", wrong)
    rows = networks.measure("a21", (8, 12), "cpu", rounds=1)
    assert rows[0]["over_eager"] == 1
    assert {row["over_eager"] for row in rows[1:]} == {"WRONG"}
