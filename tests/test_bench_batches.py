"""The table of largest batches: its search, its rows, and its model of torch.compile's memory."""

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fullres.bench import batches, compiled, steps
from fullres.engine.meter import LiveBytes
from fullres.models import UResNetConfig, uresnet

IMAGE = (2, 24, 40)
CONFIG = UResNetConfig(
    filters=2, depth=1, level_blocks=1, deepest_blocks=1, deepest_channels=4, final_blocks=1,
    residual=True, planes=2,
)  # fmt: skip
METERED = [name for name in batches.PROVIDERS if not name.startswith(("torch.compile", "fullres"))]


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 6, 3, padding=1, bias=False)

    def forward(self, x):
        return self.second(self.first(x[:, :1]).relu())


def squares(out, labels):
    return out.float().square().sum() * labels.sum()


TWO_LAYERS = steps.Network(TwoLayers, steps.image_labels, squares)


@pytest.fixture
def tiny(monkeypatch):
    network = steps.Network(lambda: uresnet(CONFIG), steps.pixel_labels, steps.pixel_loss)
    monkeypatch.setattr(batches, "NETWORKS", {"tiny": network})
    monkeypatch.setattr(batches, "PUBLISHED", ("tiny",))
    return network


def peaks(provider, network, until):
    """The peak of each batch from 1, each asked for with a memory that holds one image less."""
    find, found = batches.PROVIDERS[provider](network, IMAGE), [0]
    for batch in range(until):
        answer = find(found[-1])
        assert answer.batch == batch
        found.append(answer.next_peak)
    return found[1:]


@pytest.mark.parametrize("provider", [*METERED, "torch.compile, budget 1.0, bf16"])
def test_the_answer_is_that_of_exhaustive_search(tiny, provider):
    network = tiny if provider in METERED else TWO_LAYERS
    by_batch = peaks(provider, network, 4)
    assert by_batch == sorted(set(by_batch))
    find = batches.PROVIDERS[provider](network, IMAGE)
    for batch, peak in enumerate(by_batch[:-1], start=1):
        for memory in (peak, by_batch[batch] - 1):  # from where it fits to where one more would
            assert find(memory)[:3] == (batch, peak, by_batch[batch])
    assert find(by_batch[0] - 1)[:3] == (0, None, by_batch[0])


@pytest.mark.parametrize(
    "peak",
    [lambda n: 10 * n + 3, lambda n: n * n + 5, lambda n: 40 + n // 3 * 7 + n, lambda n: 100 + n],
    ids=["a line", "bent up", "steps", "flat"],
)
def test_search_agrees_with_trying_every_batch(peak):
    for memory in range(4, 300):
        asked = set()

        def use(batch, asked=asked):
            asked.add(batch)
            return batches.Use(peak(batch), 0)

        found = batches.largest(use, memory)
        assert found.batch == max((n for n in range(1, 300) if peak(n) <= memory), default=0)
        assert found.next_peak == peak(found.batch + 1)
        assert {found.batch, found.batch + 1} - {0} <= asked  # verified, not foretold


def test_a_line_needs_four_batches():
    asked = set()

    def use(batch):
        asked.add(batch)
        return batches.Use(7 * batch + 2, 0)

    assert batches.largest(use, 7 * 1000 + 5).batch == 1000
    assert asked == {1, 2, 1000, 1001}


def test_plans_hold_more_than_eager(tiny):
    memory = 0.002
    (ours,) = batches.measure("tiny", "fullres, bf16", IMAGE, [memory])
    (eager,) = batches.measure("tiny", "eager bf16", IMAGE, [memory])
    assert not ours["failed"] and ours["batch"] > eager["batch"] > 0
    assert ours["peak_gib"] <= memory < ours["next_peak_gib"]
    assert ours["time_ratio"] >= 1 and eager["time_ratio"] is None
    (none,) = batches.measure("tiny", "fullres, bf16", IMAGE, [1e-5])
    assert none["batch"] == 0 and none["next_peak_gib"] > 1e-5


def test_rows_are_consistent_and_recorded(tiny, tmp_path, capsys):
    memories = (0.0001, 0.002, 0.004, 0.009)
    rows = batches.run(tmp_path, providers=METERED, image=IMAGE, memories=memories, workers=1)
    assert [(row["provider"], row["memory_gib"]) for row in rows] == [
        (provider, memory) for provider in METERED for memory in memories
    ]
    for row in rows:
        if row["batch"]:
            assert row["stored_gib"] < row["peak_gib"] <= row["memory_gib"] < row["next_peak_gib"]
        else:
            assert row["peak_gib"] is None and row["next_peak_gib"] > row["memory_gib"]
        assert not row["failed"]
    for provider in METERED:
        found = [row["batch"] for row in rows if row["provider"] == provider]
        assert found == sorted(found) and found[0] == 0 < found[-1]
    largest = {row["provider"]: row["batch"] for row in rows if row["memory_gib"] == memories[-1]}
    assert largest["eager float32"] < largest["eager bf16"]
    assert largest["eager bf16"] < largest["checkpoint each block, bf16"]
    assert json.loads((tmp_path / "batches.json").read_text())["rows"] == rows
    assert (tmp_path / "batches.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "0.009 GiB" in printed and str(largest["eager bf16"]) in printed


def test_what_fails_is_shown_and_the_rest_goes_on(tiny, tmp_path, capsys, monkeypatch):
    def broken(network, image):
        def find(memory):
            raise RuntimeError("no such partition")

        return find

    monkeypatch.setitem(batches.PROVIDERS, "broken", broken)
    rows = batches.run(
        tmp_path, providers=["broken", "eager bf16"], image=IMAGE, memories=(0.01,), workers=1
    )
    assert rows[0]["failed"] == "RuntimeError: no such partition" and rows[0]["batch"] is None
    assert rows[1]["batch"] > 0
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "no such partition" in printed


def test_what_time_does_not_allow_is_said(tiny, tmp_path):
    options = {"providers": ["eager bf16"], "image": IMAGE, "memories": (0.01,), "workers": 1}
    (row,) = batches.run(tmp_path, seconds=0, **options)
    assert row["batch"] is None and "not begun" in row["failed"]
    (row,) = batches.run(tmp_path, seconds=600, **options)
    assert row["batch"] > 0


def test_labels_count_from_the_first_operator_to_the_last(tiny):
    """Held as by a training loop: a byte more a label is a byte more of the peak."""
    wide = steps.Network(tiny.build, lambda n, image: steps.pixel_labels(n, image).int(), tiny.loss)
    peak, wider = (
        batches.PROVIDERS["checkpoint each block, bf16"](each, IMAGE)(1).next_peak
        for each in (tiny, wide)
    )
    assert wider - peak == 3 * 2 * 24 * 40


def test_an_output_that_the_loss_has_read_does_not_count():
    """Of two layers at relu's backward: the map after it, its gradient, and that before it."""
    network = steps.Network(TwoLayers, steps.image_labels, lambda out, labels: out.sum())
    peak = batches.PROVIDERS["eager float32"](network, (1, 20, 30))(1).next_peak
    given = 3 * 4 * sum(WEIGHTS) + 2 * 4 + 4 * 20 * 30 + 8  # also the optimizer's counts of steps
    loss_and_its_gradient = 2 * 4
    assert peak == given + (4 + 4 + 4) * 4 * 20 * 30 + 4 * WEIGHTS[1] + loss_and_its_gradient


# torch.compile


PIXELS, WEIGHTS = 2 * 20 * 30, (4 * 9, 4 * 6 * 9)  # of two images


def two_layers(autocast):
    return compiled.compiled_step(
        TwoLayers().to("meta"),
        (2, 1, 20, 30),
        lambda: steps.image_labels(2, ()),
        squares,
        autocast=autocast,
    )


def test_stored_bytes_of_two_layers_are_those_counted_by_hand():
    """The map after relu, which serves relu too, the output, and the sum of the labels."""
    assert two_layers(None).stored == (4 + 6) * 4 * PIXELS + 8
    # Under autocast half of that, and the casts of the input and the weights.
    assert two_layers(torch.bfloat16).stored == (4 + 6 + 1) * 2 * PIXELS + 2 * sum(WEIGHTS) + 8


def test_peaks_of_two_layers_are_those_counted_by_hand():
    """At the second layer's backward, where the gradient has taken the output's place."""
    given = 3 * 4 * sum(WEIGHTS) + 4 * PIXELS + 2 * 8  # weights, their state, input, labels
    step = two_layers(None)
    assert step.peak == given + (4 + 6 + 4) * 4 * PIXELS + 4 * WEIGHTS[1]
    casts = 2 * PIXELS + 2 * sum(WEIGHTS)
    mixed = two_layers(torch.bfloat16)
    assert mixed.peak == given + casts + (4 + 6 + 4) * 2 * PIXELS + 2 * WEIGHTS[1]
    # Before it, where the square's derivative is another map beside the output, and a factor.
    assert step.peak_node_by_node == given + (4 + 6 + 6) * 4 * PIXELS + 4


@pytest.mark.parametrize("fused_peak", [10**6, 10**8], ids=["fused", "node by node"])
def test_of_two_models_the_smaller_peak_counts(monkeypatch, fused_peak):
    def peak(graph, fused, alive, held):
        return fused_peak if fused else 10**7

    monkeypatch.setattr(compiled, "_peak", peak)
    step = two_layers(None)
    assert step.peak_node_by_node - step.peak == max(0, 10**7 - fused_peak)


def test_a_smaller_budget_stores_less(tiny):
    stored = [
        compiled.compiled_step(
            tiny.build().to("meta"),
            (1, *IMAGE),
            lambda: steps.pixel_labels(1, IMAGE),
            tiny.loss,
            budget=budget,
        ).stored
        for budget in (1.0, 0.1)
    ]
    assert stored[0] > 2 * stored[1] > 0


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_node_by_node_is_what_running_the_graphs_takes(tiny, autocast):
    """Both graphs run on fake tensors, node by node, each result freed after its last reader."""
    arguments = (
        tiny.build().to("meta"), (2, *IMAGE), lambda: steps.pixel_labels(2, IMAGE), tiny.loss,
        0.5, autocast,
    )  # fmt: skip
    forward, backward, given, kept = compiled._partitioned(*arguments)
    mode, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    with mode, live:
        like = {
            node.name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            for node in forward.find_nodes(op="placeholder")
            if isinstance(value := node.meta["val"], torch.Tensor)
        }
        inputs = live.now
        results = _run(forward, dict(like))
        names = [node.name for node in kept]
        saved = dict(zip(names, results[-len(names) :], strict=True))
        first = live.peak - inputs
        del results
        live.timeline.clear()
        one = torch.ones(())
        tangent = backward.find_nodes(op="placeholder")[-1].name
        _run(backward, {**like, **saved, tangent: one}, saved)
        second = live.peak - inputs
    base = sum(compiled._sizes(given).values())
    parameters = sum(t.numel() * 4 for t in given if t.requires_grad)
    step = compiled.compiled_step(*arguments[:4], budget=0.5, autocast=autocast)
    expected = base + 2 * parameters + max(first, second)
    assert step.peak <= step.peak_node_by_node
    assert step.peak_node_by_node == pytest.approx(expected, rel=0.002)


def _run(graph, values, owned=None):
    last = {each: node for node in graph.nodes for each in node.all_input_nodes}
    for node in graph.nodes:
        if node.op == "output":
            return torch.fx.node.map_arg(list(node.args[0]), lambda n: values[n.name])
        if node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
            values[node.name] = node.target(*args, **kwargs)
            del args, kwargs
        for each in [*node.all_input_nodes, node]:
            if last.get(each) is node or each not in last:
                values.pop(each.name, None)
                if owned:
                    owned.pop(each.name, None)
    raise AssertionError("the graph has no output")
