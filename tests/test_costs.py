"""The times by which a planner weighs recomputation: bytes and FLOP of what really runs."""

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fullres import convert
from fullres.bench.kernels import network_rows
from fullres.bench.layers import H200, collect
from fullres.engine import cards, costs
from fullres.engine.cards import HARDWARE, hardware
from fullres.engine.costs import Pass, offload_time, step_times, step_work
from fullres.models import UResNetConfig, resnet50, uresnet
from fullres.ops import segment
from fullres.ops.dispatch import VARIABLE
from fullres.ops.fuse import resampled_size
from fullres.ops.program import Call, Conv, Norm, Program, Source, Term, Write

pytest.importorskip("triton")  # which kernels run depends on their configurations

N, H, W = 8, 1280, 2048
T = N * 16 * H * W * 2  # bytes of one image of 16 channels
SAME = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
POINT = SAME | {"padding": (0, 0)}


def size(channels: int, shrunk: int = 1) -> list[int]:
    return [N, channels, H // shrunk, W // shrunk]


def leaky(slot: int, norm: int | None, residual: Term | None = None, **options) -> Source:
    return Source(Term(slot, norm), residual, "leaky_relu", **options)


def work(steps, norms, sizes, weights, needs=None, inputs=1, dtype=torch.bfloat16, batch=None):
    """Return the passes of a program whose last slot is its output; weights come first."""
    parameters = 2 * len(weights)
    program = Program(inputs, parameters, tuple(steps), tuple(norms), (max(sizes),))
    shapes = {2 * number: shape for number, shape in enumerate(weights)}
    needs = [False] * inputs + [True] * parameters if needs is None else needs
    return step_work(program, sizes, shapes, dtype, needs, batch)


def moved(passes: list[Pass]) -> list[int]:
    """Return the bytes of all passes over images."""
    return [p.bytes for p in passes if p.bytes]


# By hand


def layers(**options):
    """A convolution of the image, a layer 16 -> 16 behind it, and what its norm makes, written."""
    steps = [
        Conv((Source(Term(0)),), 0, 1, out=1, **SAME),
        Conv((leaky(1, 0),), 2, 3, out=2, **SAME),
        Write(leaky(2, 1), 3),
    ]
    sizes = {0: size(16), 1: size(16), 2: size(16), 3: size(16)}
    return work(steps, [Norm(1), Norm(2)], sizes, [(16, 16, 3, 3)] * 2, **options)


def test_a_3x3_layer_by_hand():
    w = 16 * 16 * 9
    first, layer, write = layers()
    product = 2 * N * H * W * 16 * 16 * 9
    assert layer.again == [Pass(2 * T + 2 * w, product)]
    # Its moments come in parts, which are merged and make a norm.
    assert layer.forward == [*layer.again, Pass(0, launches=2)]
    # The write's gradient comes as g, to be read with y; x is read; g_prev is written, and dw.
    assert moved(layer.backward) == [4 * T + (2 + 4) * w]
    assert [p.flop for p in layer.backward if p.bytes] == [2 * product]
    assert sum(p.launches for p in layer.backward) == 1 + 1 + 3  # coefficients; dw, db and sums
    # Nobody asks for the image's gradient.
    assert first.forward == layer.forward
    assert moved(first.backward) == [3 * T + 4 * w]
    assert [p.flop for p in first.backward if p.bytes] == [product]
    # Nothing is normalised behind the last.
    assert write.forward == write.again == [Pass(2 * T)]
    assert write.backward == [Pass(3 * T, launches=2)]


def test_seconds_are_the_slower_of_the_two_roofs():
    card = HARDWARE["h200"]
    steps = (Conv((Source(Term(0)),), 0, None, out=1, **SAME),)
    program = Program(1, 2, steps, (), (1,))
    for channels, roof in (16, "bytes"), (512, "flop"):
        sizes = {0: size(channels, 8), 1: size(channels, 8)}
        shapes = {0: (channels, channels, 3, 3)}
        needs = [False, True, False]
        (found,) = step_times(program, sizes, shapes, torch.bfloat16, card, needs)
        x = prod(sizes[0])
        seconds = {
            "bytes": (2 * x + 9 * channels**2) * 2 / 4.3e12,
            "flop": 2 * x * 9 * channels / 790e12,
        }
        assert roof == max(seconds, key=seconds.get)
        assert found.forward == found.again == pytest.approx(seconds[roof] + 4e-6)
        # dw is the product alone, and its parts are added up.
        both = (2 * x * 2 + 9 * channels**2 * 4) / 4.3e12, seconds["flop"]
        assert found.backward == pytest.approx(max(both) + 2 * 4e-6)


def test_a_wide_1x1_is_two_passes():
    steps = [
        Conv((Source(Term(0)),), 0, None, out=1, **POINT),
        Conv((leaky(1, 0),), 2, None, out=2, **POINT),
        Write(leaky(2, 1), 3),
    ]
    sizes = {0: size(16), 1: size(16), 2: size(256), 3: size(256)}
    weights = [(16, 16, 1, 1), (256, 16, 1, 1)]
    layer = work(steps, [Norm(1), Norm(2)], sizes, weights)[1]
    w, product = 256 * 16, 2 * N * H * W * 256 * 16
    assert layer.again == [Pass(17 * T + 2 * w, product)]
    # dgrad reads g, y and x and writes g_prev; wgrad reads g, y and x.
    assert moved(layer.backward) == [34 * T + 2 * w, 33 * T + 4 * w]
    assert [p.flop for p in layer.backward if p.bytes] == [product, product]


def test_strides_and_groups_count_what_they_multiply():
    conv = Conv((Source(Term(0)),), 0, None, (2, 2), (1, 1), (1, 1), 4, out=1)
    sizes = {0: size(16), 1: size(32, 2)}
    (found,) = work([conv], [], sizes, [(32, 4, 3, 3)], [True, True, False])
    product = 2 * N * (H // 2) * (W // 2) * 32 * 4 * 9
    assert [p.flop for p in found.forward] == [product]
    assert [p.flop for p in found.backward] == [product, product]
    assert moved(found.forward) == [T + T // 2 + 32 * 4 * 9 * 2]


def block(**options):
    """A residual block: two layers, and their sum with what went in, written."""
    steps = [
        Conv((Source(Term(0)),), 0, None, out=1, **SAME),
        Conv((leaky(1, 0),), 2, None, out=2, **SAME),
        Write(leaky(2, 1, Term(0)), 3),
    ]
    sizes = {slot: size(16) for slot in range(4)}
    return work(steps, [Norm(1), Norm(2)], sizes, [(16, 16, 3, 3)] * 2, **options)


def test_a_residual_sum_by_hand():
    first, _, write = block(needs=[True] * 5)
    assert write.again == [Pass(3 * T)]
    assert write.backward == [Pass(4 * T, launches=2)]  # dz and both terms; g, which both are given
    # What comes back through the block is added to what went past it.
    w = 16 * 16 * 9
    assert moved(first.backward) == [4 * T + 6 * w, 3 * T]
    first, _, write = block(needs=[False] + [True] * 4)
    assert write.backward == [Pass(4 * T, launches=2)]
    assert moved(first.backward) == [3 * T + 4 * w]


def test_a_spread_residual_is_copied_and_its_gradient_summed():
    steps = [Write(Source(Term(0), Term(1)), 2)]
    sizes = {0: size(16), 1: [N, 16, 1, 1], 2: size(16)}
    (write,) = work(steps, [], sizes, [], [True, True], inputs=2)
    assert moved(write.forward) == [4 * T]
    # Without act and norm nothing but dz is read.
    assert moved(write.backward) == [2 * T, T + N * 16 * 2]


def test_what_a_convolution_keeps_is_written_and_its_gradient_added():
    steps = [
        Conv((Source(Term(0)),), 0, None, out=1, **SAME),
        Conv((leaky(1, 0),), 2, None, out=2, keep=3, **SAME),
        Write(leaky(2, 1, Term(3)), 4),
    ]
    sizes = {slot: size(16) for slot in range(5)}
    _, layer, _ = work(steps, [Norm(1), Norm(2)], sizes, [(16, 16, 3, 3)] * 2)
    w = 16 * 16 * 9
    assert moved(layer.again) == [3 * T + 2 * w]
    assert moved(layer.backward) == [5 * T + 6 * w]
    # Where it strides, what it keeps is written before, and read.
    steps[1] = replace(steps[1], stride=(2, 2))
    strided = sizes | {2: size(16, 2), 4: size(16, 2)}
    steps[2] = Write(leaky(2, 1), 4)
    _, layer, _ = work(steps, [Norm(1), Norm(2)], strided, [(16, 16, 3, 3)] * 2)
    assert moved(layer.again) == [2 * T, T + T // 4 + 2 * w]
    # A gradient of what it keeps alone goes through act and norm.
    sizes = {slot: size(16) for slot in range(4)}
    _, layer = work(steps[:2], [Norm(1)], sizes, [(16, 16, 3, 3)] * 2)
    assert layer.backward == [Pass(3 * T, launches=2)]


def test_two_sources_have_a_gradient_each():
    """A skip of 16 channels beside 16 of half the size, enlarged, into 32."""
    steps = [
        Conv((Source(Term(0)),), 0, None, out=2, **POINT),
        Conv((Source(Term(1)),), 2, None, out=3, **POINT),
        Conv((leaky(2, 0), leaky(3, 1, resample="up2")), 4, None, out=4, **POINT),
        Write(leaky(4, 2), 5),
    ]
    sizes = {0: size(16), 1: size(16, 2), 2: size(16), 3: size(16, 2), 4: size(32), 5: size(32)}
    weights = [(16, 16, 1, 1), (16, 16, 1, 1), (32, 32, 1, 1)]
    norms = [Norm(2), Norm(3), Norm(4)]
    joined = work(steps, norms, sizes, weights, inputs=2)[2]
    half, product = 32 * 16, 2 * N * H * W * 32 * 16
    assert joined.again == [Pass(T + T // 4 + 2 * T + 2 * 2 * half, 2 * product)]
    assert [(p.bytes, p.flop) for p in joined.backward if p.bytes] == [
        (4 * T + 2 * T + 6 * half, 2 * product),  # one pass
        (4 * T + T + 2 * half, product),  # dgrad, of the enlarged image
        (T + 2 * T // 4, 0),  # through enlarging, act and norm
        (4 * T + T // 4 + 4 * half, product),  # wgrad
    ]


def test_pooling_many_channels_is_a_pass_of_its_own():
    for channels in 32, 64:
        conv = Conv((leaky(0, None, resample="pool2"),), 0, None, out=1, **POINT)
        sizes = {0: size(channels), 1: size(channels, 2)}
        weight = (channels, channels, 1, 1)
        (found,) = work([conv], [], sizes, [weight], [True, False, False])
        t, w = prod(sizes[0]) * 2, channels**2 * 2
        pooled = [t + t // 4, t // 4 + t // 4 + w]
        assert moved(found.forward) == (pooled if channels == 64 else [t + t // 4 + w])
        # dgrad leaves the pooled gradient; the maxima are found again in x.
        assert moved(found.backward) == [t // 4 + w + t // 4, t // 4 + t + t]


def test_frozen_weights_cost_no_product():
    w = 16 * 16 * 9
    first, layer, write = layers(needs=[False, True, True, False, False])
    assert moved(layer.backward) == [4 * T + 2 * w]  # dgrad: g, y, x; g_prev
    # A bias alone: dy is written, and summed.
    first, layer, write = layers(needs=[False, False, True, False, False])
    assert moved(first.backward) == [3 * T, T]
    for passes in layers(needs=[False] * 5):
        assert not passes.backward


def test_moments_of_what_no_convolution_makes_are_a_pass():
    steps = [Write(leaky(0, 0), 1), Write(leaky(1, 1), 2)]
    sizes = {slot: size(16) for slot in range(3)}
    norms = [Norm(0), Norm(1)]
    first, second = work(steps, norms, sizes, [], [True])
    # The input's before the first step, and what that writes after it.
    assert first.forward == [Pass(2 * T), Pass(T, launches=3), Pass(T, launches=3)]
    assert first.again == [Pass(2 * T)]
    # g, then the gradient of the slot as an image, then of what it was made of.
    assert moved(second.backward) == [3 * T]
    assert moved(first.backward) == [3 * T, 3 * T, 3 * T]
    first, second = work(steps, norms, sizes, [], [True], batch=[False, False])
    assert first.forward == [Pass(2 * T), Pass(0), Pass(0)]


def test_gradients_of_an_image_that_several_read_are_added():
    w, sizes = 16 * 16 * 9, {slot: size(16) for slot in range(4)}

    def conv(first, second, norms):
        steps = [Conv((Source(Term(0)),), 0, None, out=1, **SAME), Write(leaky(1, first), 2)]
        steps.append(Write(leaky(1, second, Term(2)), 3))
        return work(steps, [Norm(1)] * norms, sizes, [(16, 16, 3, 3)])

    made, *_ = conv(0, 1, 2)
    assert made.forward[1:] == [Pass(0, launches=3)]  # merged once, for both norms
    # Through each norm, their sum, and dw of that alone.
    assert moved(made.backward) == [3 * T, 3 * T, 3 * T, 2 * T + 4 * w]
    # As it is, and through a norm.
    made, *_ = conv(None, 0, 1)
    assert moved(made.backward) == [3 * T, 3 * T, 2 * T + 4 * w]
    # Twice through one norm: added before they go through it, and read with y.
    made, second, _ = conv(0, 0, 1)
    assert moved(second.backward) == [3 * T, 3 * T]
    assert moved(made.backward) == [3 * T + 4 * w]


def test_a_norm_alone_may_ask():
    program = Program(1, 2, (Write(leaky(0, 0), 1),), (Norm(0, 0, 1),), (1,))
    needs = [False, True, True]
    (write,) = step_work(program, {0: size(16), 1: size(16)}, {}, torch.bfloat16, needs)
    assert moved(write.backward) == [3 * T]  # g, whose sums are all that is asked for


def test_calls_run_again_for_their_gradients():
    def step(linear):
        return [Call(torch.add, (0, 1), (), (), 2, linear=linear)]

    sizes = {0: size(16), 1: size(16), 2: size(16)}
    (call,) = work(step(False), [], sizes, [], [True, False], inputs=2)
    assert call.forward == [Pass(3 * T)]
    assert call.backward == [Pass(3 * T), Pass(4 * T)]
    (call,) = work(step(True), [], sizes, [], [True, True], inputs=2)
    assert call.backward == [Pass(T), Pass(3 * T)]
    (call,) = work(step(False), [], sizes, [], [False, False], inputs=2)
    assert call.backward == []


def test_without_triton_two_passes_are_counted(monkeypatch):
    def missing(*_):
        raise ImportError("triton")

    monkeypatch.setattr(costs, "takes_one_pass", missing)
    _, layer, _ = layers()
    assert len(moved(layer.backward)) == 2


def test_the_dispatch_of_this_machine_has_no_say(monkeypatch):
    before = layers()
    monkeypatch.setenv(VARIABLE, "cudnn")
    assert layers() == before


# Beside what the benchmark counts, and what runs


def test_a_layer_costs_what_the_benchmark_says():
    for layer in collect(("a21", "resnet50")):
        C, K, x = layer.channels, layer.outputs, Term(1, 0)
        source = Source(Term(0)) if layer.first else Source(x, act=layer.act)
        pairs = layer.stride, layer.padding, layer.dilation, layer.groups
        conv = Conv((source,), 2, 3, *pairs, out=2)
        last = Write(Source(Term(2, 1) if layer.norm else Term(2), act="relu"), 3)
        before = Conv((Source(Term(0)),), 0, 1, (1, 1), (0, 0), (1, 1), 1, out=1)
        image, after = [8, C, layer.height, layer.width], [8, K, *layer.output_size]
        norms = [Norm(1), Norm(2)] if layer.norm else [Norm(1)]
        weights = [(C, C, 1, 1), layer.geometry.weight_shape]
        sizes = {0: image, 1: image, 2: after, 3: after}
        found = work([before, conv, last], norms, sizes, weights)[1]
        one = layer.one_pass(8)
        names = ("wgrad",) if layer.first else ("backward",) if one else ("dgrad", "wgrad")
        dw = prod(layer.geometry.weight_shape) * 2  # which the benchmark counts in 16 bits
        assert moved(found.forward) == [layer.bytes("forward", 8)], layer
        passes = [p for p in found.backward if p.bytes]
        wanted = [layer.bytes(name, 8) + dw * (name != "dgrad") for name in names]
        assert [p.bytes for p in passes] == wanted, layer
        assert [p.flop for p in passes] == [layer.flop(name, 8) for name in names], layer


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def programs(model, image, dtype=torch.bfloat16) -> list[tuple]:
    """Return of each segment that runs what `step_work` takes, the bytes that its two passes move,
    and the steps that backward made again.
    """
    found = []
    moved_by = Counter()
    remade: dict[int, list[int]] = {}

    class Moved(TorchDispatchMode):
        """Counts what our operators, and sums of images, read and write."""

        def __init__(self, pass_, name):
            super().__init__()
            self.key, self.sizes = (id(pass_), name), pass_.sizes

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            name = function.name()
            ours = name.startswith("fullres::")
            tensors = [t for t in tree_leaves((args, results)) if isinstance(t, torch.Tensor)]
            images = [t for t in tensors if t.dim() == 4]
            if name.startswith(("aten::add", "aten::sum")):  # of images, not of weights
                ours = bool(images) and list(images[0].shape) in self.sizes.values()
            values = sum(map(nbytes, images)) if ours else 0
            first = {"fullres::prologue_backward": 2, "fullres::conv2d_dgrad": 5}.get(name)
            if first is not None:
                x, _, residual, _, act, _, resample = args[first : first + 7]
                if act == "none" and resample != "pool2" and not args[-1]:  # nobody reads the terms
                    values -= sum(nbytes(t) for t in (x, residual) if t is not None)
                if first == 5 and resample != "none":  # dz, between its two kernels
                    N, C, H, W = args[4]
                    dz = N * C * prod(resampled_size(H, W, resample)) * args[0].element_size()
                    values += 2 * dz
            moved_by[self.key] += values
            return results

    def metered(function, name):
        def call(pass_, *args):
            with Moved(pass_, name):
                return function(pass_, *args)

        return call

    def forward(pass_, tensors, *rest):
        made = real["_forward"](pass_, tensors, *rest)
        program = pass_.program
        shapes = {
            step.weight: tensors[program.inputs + step.weight].shape
            for step in program.steps
            if isinstance(step, Conv)
        }
        found.append((pass_, program, made.sizes, shapes, dtype, pass_.needs))
        return made

    def execute(pass_, step, *args, first=False):
        if not first:
            remade.setdefault(id(pass_), []).append(pass_.program.steps.index(step))
        return real["_execute"](pass_, step, *args, first=first)

    real = {name: getattr(segment, name) for name in ("_forward", "_backward", "_execute")}
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype):
        patch.setattr(segment, "_forward", metered(forward, "forward"))
        patch.setattr(segment, "_backward", metered(real["_backward"], "backward"))
        patch.setattr(segment, "_execute", execute)
        outputs = tree_leaves(model(image))
        sum(o.float().sum() for o in outputs).backward()
    return [
        (arguments, *(moved_by[id(pass_), name] for name in ("forward", "backward")), again)
        for pass_, *arguments in found
        for again in [remade.get(id(pass_), [])]
    ]


SMALL = {"filters": 4, "depth": 2, "deepest_blocks": 1, "deepest_channels": 8, "final_blocks": 1}
NETWORKS = {
    "uresnet": lambda: uresnet(UResNetConfig(**SMALL)),
    "sum": lambda: uresnet(UResNetConfig(**SMALL, residual=False, join="sum")),
    "resnet": resnet50,
}


@pytest.mark.parametrize("frozen", ["nothing", "norms", "half"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_are_those_of_the_operators_that_run(name, frozen, monkeypatch):
    """One pass stands for both gradients here, as one operator does."""
    monkeypatch.setattr(costs, "takes_one_pass", lambda *_: True)
    with FakeTensorMode():
        model = convert(NETWORKS[name](), inplace=True)
        for number, parameter in enumerate(model.parameters()):
            convolution = parameter.dim() == 4
            frozen_now = not convolution if frozen == "norms" else convolution and number % 4 < 2
            parameter.requires_grad_(frozen == "nothing" or not frozen_now)
        found = programs(model, torch.empty(2, 3, 64, 64))
    assert found
    for arguments, forward, backward, remade in found:
        assert not any(isinstance(step, Call) for step in arguments[0].steps)
        steps = step_work(*arguments)
        assert sum(sum(moved(each.forward)) for each in steps) == forward
        again = sum(sum(moved(steps[number].again)) for number in remade)
        assert again + sum(sum(moved(each.backward)) for each in steps) == backward


@pytest.fixture(scope="module")
def full_size():
    with FakeTensorMode():
        model = convert(uresnet("uresnet"), inplace=True)
        return [arguments for arguments, *_ in programs(model, torch.empty(8, 3, 1280, 2048))]


def test_a_network_takes_more_than_its_convolutions_and_less_than_torch(full_size):
    """The benchmark leaves out residual sums, pooling, enlarging, what is kept, and launches."""
    totals = [0.0, 0.0]
    flop = 0
    for program, sizes, shapes, dtype, needs in full_size:
        for time in step_times(program, sizes, shapes, dtype, H200, needs):
            assert time.forward >= time.again > 0
            totals[0] += time.forward
            totals[1] += time.backward
        for passes in step_work(program, sizes, shapes, dtype, needs):
            flop += sum(p.flop for p in passes.forward)
    (row,) = network_rows(collect(["uresnet"]))
    assert row["roof_ms"] < sum(totals) * 1e3 < row["compile_ms"]
    assert 1.5 < totals[1] / totals[0] < 2.5
    # Published, but for 1x1 convolutions that run before an enlargement here.
    assert flop == pytest.approx(8 * 1.29e12, rel=0.02)


def test_more_images_take_longer(full_size):
    for program, sizes, shapes, dtype, needs in full_size:
        before = 0.0
        for batch in 1, 2, 3, 4, 8, 16, 32:
            scaled = {slot: [batch, *rest] for slot, (_, *rest) in sizes.items()}
            times = step_times(program, scaled, shapes, dtype, H200, needs)
            total = sum(time.forward + time.backward for time in times)
            assert total > before
            before = total


# Cards


def test_an_unknown_card_names_the_known():
    with pytest.raises(ValueError, match=r"hardware: want one of h200, h100.*, got 'h300'"):
        hardware("h300")


def test_a_product_has_the_rate_of_its_dtype(monkeypatch):
    card, old = HARDWARE["a100-40"], HARDWARE["v100-16"]
    assert card.product_of(torch.bfloat16) == card.product_of(torch.float16) == 0.8 * 312e12
    monkeypatch.setattr(cards, "tf32_allowed", lambda: False)
    assert card.product_of(torch.float32) == 0.8 * 19.5e12
    monkeypatch.setattr(cards, "tf32_allowed", lambda: True)
    assert card.product_of(torch.float32) == 0.8 * 156e12
    assert old.product_of(torch.float32) == 0.8 * 15.7e12
    with pytest.raises(ValueError, match=r"dtype: want .*, got torch.float64"):
        card.product_of(torch.float64)


def test_cards_are_plausible():
    for name, card in HARDWARE.items():
        assert 15 * 2**30 < card.memory < 193 * 2**30, name
        # A card's own memory is faster than the host's, and 16 bits than 32.
        assert 10 * card.host < card.copy, name
        assert card.product >= 2 * (card.product_tf32 or 0) * 0.98, name
        assert card.product > card.product_float32 > 10e12, name
    assert HARDWARE["h200"].copy == 4.3e12 and HARDWARE["h200"].product == 790e12


@pytest.mark.parametrize(
    "device, gib, known",
    [
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
        ("NVIDIA H100 NVL", 93.1, "h100-nvl"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 79.1, "a100-80"),
        ("Tesla V100-SXM2-16GB", 15.8, "v100-16"),
        ("Tesla V100-PCIE-32GB", 31.7, "v100-32"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA GeForce RTX 3090", 23.7, "rtx3090"),
        ("AMD Instinct MI300X", 192.0, "mi300x"),
        ("NVIDIA GH200 480GB", 95.0, None),
        ("NVIDIA RTX A1000", 8.0, None),
    ],
)
def test_the_present_card_is_known_by_name_and_memory(monkeypatch, device, gib, known):
    class Properties:
        name, total_memory = device, int(gib * 2**30)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
    found = hardware()
    assert found.memory == Properties.total_memory
    assert (found.copy, found.product) == (
        HARDWARE[known or "h200"].copy,
        HARDWARE[known or "h200"].product,
    )
    assert found.name == (device if known else f"{device}, at an H200's rates")


def test_without_a_card_it_is_an_h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware() is HARDWARE["h200"]


def test_offloading_goes_at_the_rate_of_the_bus():
    card = HARDWARE["a100-40"]
    assert offload_time(2**30, card) == pytest.approx(2**30 / (0.8 * 31.5e9) + 4e-6)
