"""Converted networks are the networks they were: function, gradients, state, side effects."""

import copy
import dataclasses
import pickle
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fullres
from fullres.engine.convert import conversions, convert_whole, programs, schedule
from fullres.models import PRESETS

POLICIES = ["keep", "closing", "series"]


def small(preset, **numbers):
    """A preset's structure with few channels and levels."""
    numbers = {"filters": 3, "depth": 2, "deepest_channels": 8, "deepest_blocks": 2} | numbers
    numbers["final_blocks"] = min(2, PRESETS[preset].final_blocks)
    return fullres.uresnet(dataclasses.replace(PRESETS[preset], **numbers))


def planes(rng, N=2, H=11, W=14):
    return torch.randn(N, 3, H, W, generator=rng, dtype=torch.float64)


NETWORKS = {
    **{preset: lambda preset=preset: small(preset) for preset in PRESETS},
    "resnet18": lambda: fullres.resnet18(num_classes=5),
    "resnet50": lambda: fullres.resnet50(num_classes=5),
}


def randomised(model, rng):
    """Move every parameter off its special first value."""
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=rng).to(p)
    return model.double()


def outputs(model, x):
    out = model(x)
    return out if isinstance(out, tuple) else (out,)


def close(got, want, tolerance=1e-10):
    """To 1e-10 of the largest value, or for a gradient that is zero but for rounding, of one."""
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    assert got.shape == want.shape and got.dtype == want.dtype
    assert not want.numel() or (got - want).abs().max() <= tolerance * scale


def assert_same(ours, theirs, x, rng, steps=1, accumulate=1):
    """Outputs, gradients and buffers agree, over steps of plain gradient descent."""
    for _ in range(steps):
        for model in (ours, theirs):
            model.zero_grad()
        for part in range(accumulate):
            inputs = [(x * (1 + part)).requires_grad_() for _ in range(2)]
            out, want = outputs(ours, inputs[0]), outputs(theirs, inputs[1])
            gradients = [torch.randn(o.shape, generator=rng).to(o) for o in want]
            for a, b in zip(out, want, strict=True):
                close(a, b)
            torch.autograd.backward(out, gradients)
            torch.autograd.backward(want, gradients)
            close(inputs[0].grad, inputs[1].grad)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                close(p.grad, q.grad)
        with torch.no_grad():
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                if q.grad is not None:
                    p -= 1e-3 * p.grad
                    q -= 1e-3 * q.grad
    for (name, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert name and b.dtype == c.dtype
        close(b.double(), c.double())


WAYS = [*POLICIES, "whole"]


def converted(model, policy="keep"):
    """A converted copy that shares nothing with model; "whole" under a schedule at random."""
    model = copy.deepcopy(model)
    if policy != "whole":
        return fullres.convert(model, policy=policy)
    model, chance = convert_whole(model), random.Random(1)
    changed = {}
    for name, program in programs(model).items():
        again = stretches(0, len(program.steps), chance)
        dropped, remote = (
            tuple(slot for slot in program.producers if chance.random() < 0.2) for _ in range(2)
        )
        edges = {edge for stretch in again for edge in stretch}
        joined = [n for n in program.joinable() if n + 1 not in edges and chance.random() < 0.5]
        changed[name] = program.changed(dropped=dropped, remote=remote, again=again).joined(joined)
    schedule(model, changed)
    return model


def stretches(start, stop, chance):
    """Ranges that nest, at random."""
    found, first = set(), start
    while first < stop:
        last = min(stop, first + chance.randint(1, max(2, (stop - start) // 2)))
        if chance.random() < 0.7:
            found.add((first, last))
            if 1 < last - first < stop - start:
                found.update(stretches(first, last, chance))
        first = last
    return tuple(sorted(found))


@pytest.mark.parametrize("policy", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_function_gradients_and_statistics_are_the_networks(name, policy, rng):
    model = randomised(NETWORKS[name](), rng)
    x = planes(rng, H=33, W=40) if name.startswith("resnet") else planes(rng)
    ours = converted(model, policy=policy)
    assert list(ours.state_dict()) == list(model.state_dict())
    assert_same(ours, model, x, rng, steps=1 if name == "resnet50" else 2, accumulate=2)


def test_five_steps_move_statistics_as_eager_does(rng):
    model = randomised(small("uresnet", depth=1), rng)
    assert_same(converted(model, policy="series"), model, planes(rng), rng, steps=5, accumulate=2)


@pytest.mark.parametrize("preset", ["uresnet", "a21"])
def test_policies_give_the_same_bits_in_float32(preset, rng):
    model = randomised(small(preset), rng).float()
    x = planes(rng).float()
    found = []
    for policy in POLICIES:
        ours = converted(model, policy=policy)
        for _ in range(2):
            ours.zero_grad()
            loss = sum(o.square().mean() for o in outputs(ours, x))
            loss.backward()
            with torch.no_grad():
                for p in ours.parameters():
                    p -= 0.01 * p.grad
        found.append([loss.detach(), *ours.state_dict().values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["uresnet", "scc21", "resnet18"])
def test_evaluation_is_the_networks(name, rng):
    model = randomised(NETWORKS[name](), rng)
    x = planes(rng, H=33, W=40)
    outputs(model, x)  # running statistics that are not the first ones
    model.eval()
    assert_same(converted(model).eval(), model, x, rng)


# The patterns


class Block(nn.Module):
    """A look-alike of one pattern; `body` is its forward."""

    def __init__(self, body, **layers):
        super().__init__()
        for layer, module in layers.items():
            setattr(self, layer, module)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def conv(c, k, r=3, **options):
    return nn.Conv2d(c, k, r, padding=options.pop("padding", r // 2), **options)


def pattern_preactivation():
    def body(m, x):
        y = m.c1(F.relu(m.n1(x)))
        return x + m.c2(F.relu(m.n2(y)))

    layers = {"c1": conv(3, 6, bias=False), "n1": nn.BatchNorm2d(3)}
    return Block(body, **layers, n2=nn.BatchNorm2d(6), c2=conv(6, 3))


def pattern_bottleneck():
    def body(m, x):
        y = F.silu(m.n1(m.c1(x)))
        y = F.silu(m.n2(m.c2(y)))
        return F.silu(m.n3(m.c3(y)) + m.ns(m.cs(x)))

    layers = {f"n{i}": nn.BatchNorm2d(k) for i, k in (("1", 2), ("2", 2), ("3", 6), ("s", 6))}
    strided = conv(2, 2, stride=2), conv(3, 6, 1, stride=2)
    return Block(body, c1=conv(3, 2, 1), c2=strided[0], c3=conv(2, 6, 1), cs=strided[1], **layers)


def pattern_depthwise_separable():
    return nn.Sequential(
        conv(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
        conv(12, 12, 3, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
        conv(12, 4, 1, bias=False), nn.BatchNorm2d(4),
    )  # fmt: skip


def pattern_squeeze_excite():
    def body(m, x):
        y = F.leaky_relu(m.n(m.c(x)), 0.2)
        gate = torch.sigmoid(m.e(F.relu(m.s(y.mean((2, 3), keepdim=True)))))
        return F.relu(y * gate + y)

    return Block(body, c=conv(3, 6), n=nn.BatchNorm2d(6), s=conv(6, 2, 1), e=conv(2, 6, 1))


def pattern_global_context():
    def body(m, x):  # a sum that is spread over the image
        y = F.relu(m.n(m.c(x)))
        return y + m.g(F.adaptive_avg_pool2d(y, 1))

    return Block(body, c=conv(3, 6), n=nn.BatchNorm2d(6), g=conv(6, 6, 1))


def pattern_spread_sum():
    def body(m, x):
        y = m.n(m.c(x)) + torch.tanh(x[:1, :, :1])  # one row of one image, for all
        return F.relu(torch.tanh(y[:, :, :, :1]) + m.c(y))

    return Block(body, c=conv(3, 3), n=nn.BatchNorm2d(3))


def pattern_unet():
    def body(m, x):
        top = F.relu(m.n1(m.c1(x)))
        low = F.relu(m.n2(m.c2(F.max_pool2d(top, 2))))
        up = F.interpolate(low, scale_factor=2, mode="bilinear")
        return m.c4(F.relu(m.n3(m.c3(torch.cat([up, top], 1)))))

    layers = {f"n{i}": nn.BatchNorm2d(k) for i, k in ((1, 4), (2, 8), (3, 5))}
    return Block(body, c1=conv(3, 4), c2=conv(4, 8), c3=conv(12, 5), c4=conv(5, 2, 1), **layers)


def pattern_shared_modules():
    def body(m, x):
        for _ in range(3):
            x = F.relu(m.n(m.c(x)))
        return x

    return Block(body, c=conv(3, 3), n=nn.BatchNorm2d(3))


def pattern_conv_without_norm():
    return nn.Sequential(conv(3, 4), nn.LeakyReLU(0.3), conv(4, 4), nn.ReLU(inplace=True))


def pattern_norm_without_conv():
    return nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.BatchNorm2d(3, affine=False))


def pattern_other_norms():
    return nn.Sequential(
        conv(3, 4), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 4), nn.InstanceNorm2d(4), nn.ReLU()
    )


def pattern_in_place():
    def body(m, x):
        y = m.n(m.c(x))
        y += x
        y.mul_(2)
        z = F.relu(y, inplace=True)
        return z + m.d(y)

    return Block(body, c=conv(3, 3), n=nn.BatchNorm2d(3), d=conv(3, 3, 1))


def pattern_read_raw_and_normalised():
    def body(m, x):
        y = m.c(x)
        return F.relu(m.n(y)) + y.abs() + m.d(y)

    return Block(body, c=conv(3, 3), n=nn.BatchNorm2d(3), d=conv(3, 3, 1))


def pattern_dense():
    def body(m, x):
        for c, n in zip(m.convs, m.norms, strict=True):
            x = torch.cat([x, c(F.relu(n(x)))], 1)
        return x

    widths = range(3, 9, 2)
    norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
    return Block(body, convs=nn.ModuleList(conv(w, 2) for w in widths), norms=norms)


def pattern_odd_convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 4, (3, 1), padding="same", dilation=2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 4, padding="same"), nn.BatchNorm2d(6, momentum=None), nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), nn.SiLU(),
        nn.Conv2d(4, 4, 5, stride=(1, 2), padding="valid" if False else 2, groups=2),
    )  # fmt: skip


def pattern_odd_pooling():
    return nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1),
        nn.Upsample(scale_factor=2, mode="nearest"), conv(4, 4), nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"), conv(4, 2),
    )  # fmt: skip


def pattern_mode_dependent():
    def body(m, x):
        y = F.dropout(F.relu(m.n(m.c(x))), 0.0, m.training)
        return y * 2 if m.training else y

    return Block(body, c=conv(3, 4), n=nn.BatchNorm2d(4))


def pattern_untraceable():
    def body(m, x):
        return m.b(m.a(x)) if x.sum() > -1e9 else x

    return Block(body, a=nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()), b=conv(4, 4, 1))


PATTERNS = {k.removeprefix("pattern_"): v for k, v in globals().items() if k.startswith("pattern_")}


@pytest.mark.parametrize("policy", ["keep", "series", "whole"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_compute_as_before(pattern, policy, rng):
    model = randomised(PATTERNS[pattern](), rng)
    x = planes(rng, H=8, W=10)
    ours = converted(model, policy=policy)
    assert_same(ours, model, x, rng, steps=2)
    assert_same(ours.eval(), model.eval(), x, rng)


FUSED = {  # how many of a pattern's convolutions a segment computes; the others have a reason
    "preactivation": 2,
    "bottleneck": 4,
    "depthwise_separable": 3,
    "squeeze_excite": 3,
    "unet": 4,
    "dense": 3,
    "odd_convolutions": 2,
    "odd_pooling": 3,
    "untraceable": 1,
}


@pytest.mark.parametrize("pattern", FUSED)
def test_patterns_are_fused(pattern):
    ours = fullres.convert(PATTERNS[pattern]())
    fused = set()
    for name, part, conversion in conversions(ours):
        for target in conversion.became:
            if isinstance(part.get_submodule(target), nn.Conv2d):
                fused.add(f"{name}.{target}")
    assert len(fused) == FUSED[pattern]


KINDS = ["conv", "norm", "act", "add", "pointwise", "other", "updown", "cat", "conv", "norm"]


@st.composite
def random_networks(draw):
    """Straight code over a few live values: whatever may fuse, in any order, used any number."""
    lines = []
    live = 1
    for _ in range(draw(st.integers(3, 9))):
        kind = draw(st.sampled_from(KINDS))
        lines.append((kind, draw(st.integers(0, live - 1)), draw(st.integers(0, live - 1))))
        live += 1
    return tuple(lines)


class Straight(nn.Module):
    """The network that `lines` describe; three channels everywhere."""

    def __init__(self, lines):
        super().__init__()
        self.lines = lines
        sizes = {"conv": 3, "pointwise": 1, "updown": 1}
        self.convs = nn.ModuleDict(
            {str(i): conv(6 if k == "cat" else 3, 3, sizes.get(k, 1))
             for i, (k, _, _) in enumerate(lines) if k in (*sizes, "cat")}
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(3)  # one for all: the order of its calls shows
        self.tail = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x):
        values = [x]
        for i, (kind, first, second) in enumerate(self.lines):
            a, b = values[first], values[second]
            if kind in ("conv", "pointwise"):
                value = self.convs[str(i)](a)
            elif kind == "norm":
                value = self.norm(a)
            elif kind == "act":
                value = F.leaky_relu(a, 0.1)
            elif kind == "add":
                value = a + b
            elif kind == "cat":
                value = self.convs[str(i)](torch.cat([a, b], 1))
            elif kind == "updown":
                up = F.interpolate(F.max_pool2d(a, 2), scale_factor=2, mode="bilinear")
                value = self.convs[str(i)](up)
            else:
                value = torch.tanh(a) * b
            values.append(value)
        return self.tail(values[-1]) + values[len(values) // 2]


@settings(max_examples=100, deadline=None)
@given(lines=random_networks(), policy=st.sampled_from(WAYS))
# Calls of the shared normalisation that a segment would overtake, one of them used by nobody.
@example(lines=(("conv", 0, 0), ("norm", 0, 0), ("norm", 1, 0)), policy="keep")
@example(lines=(("conv", 0, 0), ("norm", 0, 0), ("norm", 1, 0), ("conv", 0, 0)), policy="keep")
@example(lines=(("conv", 0, 0), ("norm", 1, 0), ("conv", 1, 0), ("norm", 0, 0)), policy="keep")
def test_any_order_of_layers_computes_as_before(lines, policy):
    rng = torch.Generator().manual_seed(len(lines))
    model = randomised(Straight(lines), rng)
    assert_same(converted(model, policy=policy), model, planes(rng, H=4, W=6), rng, steps=2)


# What a module is besides its function


def test_the_model_itself_is_left_alone_and_shares_its_tensors():
    model = small("uresnet")
    kinds = [type(m) for m in model.modules()]
    ours = fullres.convert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert isinstance(ours, type(model)) and ours is not model
    assert all(p is q for p, q in zip(ours.parameters(), model.parameters(), strict=True))
    assert all(p is q for p, q in zip(ours.buffers(), model.buffers(), strict=True))
    assert fullres.convert(model, inplace=True) is model


@pytest.mark.parametrize("way", ["in place", "anew"])
def test_a_buffer_that_forward_changes_is_changed_by_running_alone(way, rng):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            if way == "in place":
                self.calls += 1
            else:
                self.calls = self.calls + 1
            return self.layers(x)

    model = Counting().double()
    ours = fullres.convert(model)
    assert model.calls == ours.calls == 0
    ours(planes(rng))
    assert ours.calls == 1
    assert any(name == "layers" for name, _, _ in conversions(ours))


def test_reverted_it_is_what_it_was(rng):
    model = small("a21")
    ours = fullres.convert(nn.Sequential(model, nn.MaxPool2d(2)))
    assert type(ours[1]) is fullres.nn.MaxPool2d
    back = fullres.revert(ours)
    assert [type(m) for m in back[0].modules()] == [type(m) for m in model.modules()]
    assert type(back[1]) is nn.MaxPool2d and type(ours[1]) is fullres.nn.MaxPool2d
    assert all(p is q for p, q in zip(back.parameters(), model.parameters(), strict=True))
    assert fullres.revert(ours, inplace=True) is ours


def test_checkpoints_pass_both_ways(rng):
    model, other = small("uresnet"), converted(small("uresnet"))
    other.load_state_dict(model.state_dict(), strict=True)
    fresh = small("uresnet")
    fresh.load_state_dict(other.state_dict(), strict=True)
    assert all(
        torch.equal(p, q) for p, q in zip(fresh.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(way, rng):
    ours = converted(small("uresnet", depth=1)).double()
    twin = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in ours.parameters()}
    x = planes(rng)
    for a, b in zip(outputs(twin, x), outputs(ours, x), strict=True):
        assert torch.equal(a, b)


def test_hooks_from_before_are_honoured(rng):
    seen = []
    model = small("uresnet").double()
    model.final_layer.blocks[0].register_forward_hook(lambda *_: seen.append("block"))
    norm = model.net_core.down_blocks.blocks[0].convolution_1.norm
    norm.register_forward_pre_hook(lambda *_: seen.append("norm"))
    ours = converted(model)
    expected = copy.deepcopy(model)
    assert_same(ours, expected, planes(rng), rng)
    # Six calls a network, of three planes each, by both networks.
    assert seen.count("block") == seen.count("norm") == 6


def test_hooks_that_would_not_run_are_refused(rng):
    ours = converted(small("uresnet"))
    hook = ours.initial_convolution.conv.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="initial_convolution.conv: .*hooks would not run"):
        ours(planes(rng).float())
    hook.remove()
    ours(planes(rng).float())


def test_refuses_what_it_cannot_convert():
    with pytest.raises(ValueError, match="policy: want one of keep, closing, series, got 'some'"):
        fullres.convert(nn.Conv2d(3, 3, 1), policy="some")
    with pytest.raises(ValueError, match="model: want a torch.nn.Module, got int"):
        fullres.convert(3)
    with pytest.raises(ValueError, match="model: want one not yet converted"):
        fullres.convert(fullres.convert(small("a21")))
    with pytest.raises(ValueError, match="model: want one that fullres.convert returned"):
        fullres.report(small("a21"))


def test_another_dtype_than_the_weights_is_refused(rng):
    with pytest.raises(ValueError, match="input: want weight's dtype torch.float32, got .*float64"):
        converted(small("a21"))(planes(rng))


def test_one_value_a_channel_is_refused_as_torch_does():
    ours = fullres.convert(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    with pytest.raises(ValueError, match="more than one value a channel"):
        ours(torch.ones(1, 1, 1, 1))


def test_report_tells_each_layer(rng):
    model = fullres.convert(
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2))
    )
    rows = {row.layer: row for row in fullres.report(model, (1, 3, 8, 8), autocast=None).rows}
    assert rows["0"].became == rows["1"].became == "segment_0"
    assert rows["2"].became == "as before"
    assert rows["3"].became == "fullres.nn.MaxPool2d"
    y, norm = 8 * 8 * 8 * 4, 4 * 8 * 4
    # Eager keeps the pool's input and int64 indices, ours one byte a place.
    assert rows["0"].after == y + norm and rows["3"].after < rows["3"].before
    total = fullres.report(model, (1, 3, 8, 8), autocast=None)
    assert total.after < total.before and "MiB before" in str(total)


def test_report_tells_what_losses_save():
    shape, pixels = (2, 3, 16, 24), 2 * 16 * 24
    for loss in (fullres.nn.SoftmaxFocalLoss(), fullres.nn.SigmoidFocalLoss()):
        found = fullres.report(loss, shape, autocast=None)
        assert found.after <= 64 < 4 * pixels < found.before  # a few sums at most
    features = fullres.report(fullres.nn.LinearFocalLoss(16, 3), (2, 16, 16, 24), autocast=None)
    assert features.after <= 64 < 3 * 4 * pixels < features.before  # logits at least
    with pytest.raises(ValueError, match="input_shape: want that of the loss's logits"):
        fullres.report(fullres.nn.SoftmaxFocalLoss())


def test_report_gives_reasons():
    model = fullres.convert(PATTERNS["odd_convolutions"]())
    reasons = {row.layer: row.why for row in fullres.report(model).rows if row.why}
    assert reasons == {"3": "padding 'same' of an even filter", "6": "padding mode reflect"}


# The rest of PyTorch


def test_autocast_computes_in_its_dtype(rng):
    model = randomised(small("uresnet", depth=1), rng).float()
    x = planes(rng, H=24, W=32).float()
    ours, exact = converted(model), copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16):
        out, eager = outputs(ours, x), outputs(copy.deepcopy(model), x)
    for a, b, c in zip(out, eager, outputs(exact, x.double()), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().mean() <= 1.5 * (b - c).abs().mean()  # no worse than torch's own
    sum(o.float().square().mean() for o in out).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_backward_outside_autocast_recomputes_in_its_dtype(rng):
    model = randomised(small("uresnet", depth=1), rng).float()
    x = planes(rng).float()
    found = []
    for policy in ("keep", "series"):
        ours = converted(model, policy=policy)
        with torch.autocast("cpu", torch.bfloat16):
            out = outputs(ours, x)
        sum(o.float().square().mean() for o in out).backward()
        found.append([p.grad for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_float16_trains_with_a_scaler(rng):
    ours = converted(randomised(small("a21", depth=1), rng).float())
    before = [p.detach().clone() for p in ours.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.float16):
        loss = sum(o.float().square().mean() for o in outputs(ours, planes(rng).float()))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # no gradient was infinite
    assert any(not torch.equal(p, q) for p, q in zip(ours.parameters(), before, strict=True))


def test_a_pass_without_gradients_moves_statistics_too(rng):
    model = randomised(small("uresnet"), rng)
    ours = converted(model)
    x = planes(rng)
    with torch.no_grad():
        outputs(ours, x), outputs(model, x)
    for b, c in zip(ours.buffers(), model.buffers(), strict=True):
        close(b.double(), c.double())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend, rng):
    model = randomised(small("uresnet", depth=1), rng)
    ours, alone = converted(model, policy="closing"), converted(model, policy="closing")
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    x = planes(rng)
    for _ in range(2):
        for m in (compiled, alone):
            sum(o.square().mean() for o in outputs(m, x)).backward()
    for p, q in zip(ours.parameters(), alone.parameters(), strict=True):
        close(p.grad, q.grad)
    for p, q in zip(ours.buffers(), alone.buffers(), strict=True):
        close(p.double(), q.double())


def test_exports_for_inference(rng):
    ours = converted(small("uresnet", depth=1)).double().eval()
    x = planes(rng)
    program = torch.export.export(ours, (x,))
    for a, b in zip(program.module()(x), ours(x), strict=True):
        close(a, b)


def test_functional_call_takes_its_parameters(rng):
    model = randomised(small("a21"), rng)
    other = {name: p * 1.1 for name, p in model.named_parameters()}
    got = torch.func.functional_call(converted(model), other, (planes(rng.manual_seed(1)),))
    want = torch.func.functional_call(model, other, (planes(rng.manual_seed(1)),))
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_parametrized_weights_are_computed(rng):
    model = small("uresnet", depth=1)
    torch.nn.utils.parametrizations.weight_norm(model.initial_convolution.conv)
    torch.nn.utils.parametrizations.spectral_norm(model.final_layer.blocks[0].convolution_1.conv)
    model = model.double().eval()  # spectral_norm moves its own state in training
    assert_same(converted(model), model, planes(rng), rng)


def test_backward_runs_twice_but_has_no_second_derivative(rng):
    ours = converted(small("uresnet", depth=1)).double()
    x = planes(rng).requires_grad_()
    loss = sum(o.square().mean() for o in outputs(ours, x))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in ours.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(ours.parameters(), once, strict=True))
    loss = sum(o.square().mean() for o in outputs(ours, x))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_anomaly_mode_finds_nothing(rng):
    ours = converted(small("uresnet", depth=1)).double()
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        sum(o.square().mean() for o in outputs(ours, planes(rng))).backward()


def test_gradients_follow_requires_grad_as_it_is_set(rng):
    model = randomised(small("uresnet", depth=1), rng)
    ours = converted(model)
    for frozen in (True, False):
        for m in (ours, model):
            m.net_core.requires_grad_(not frozen)
            m.initial_convolution.norm.requires_grad_(not frozen)
        assert_same(ours, model, planes(rng), rng)


def saved_bytes(model, x):
    """The bytes that are saved for backward, parameters and input left out, each storage once."""
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), x]}
    storages = {}

    def pack(t):
        s = t.untyped_storage()
        if s._cdata not in known:
            storages[s._cdata] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    return sum(storages.values()), out


def test_without_gradients_nothing_is_saved(rng):
    ours, x = converted(small("uresnet")), planes(rng).float()
    with torch.no_grad():
        assert saved_bytes(ours, x)[0] == 0
    with torch.inference_mode():
        outputs(ours, x)
    assert saved_bytes(ours.requires_grad_(False), x)[0] == 0


def test_frozen_layers_save_nothing(rng):
    model = nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(),
        conv(8, 2),
    )  # fmt: skip
    ours = fullres.convert(model.requires_grad_(False).eval())
    ours[6].requires_grad_(True)
    x = torch.randn(1, 3, 8, 8, generator=rng)
    y, norm = 8 * 8 * 8 * 4, 4 * 8 * 4
    # The last convolution's input is made of the output before it; the frozen norms are small.
    assert saved_bytes(ours, x)[0] == y + 2 * norm


GIB = 2**30
BYTES = {  # network, policy: stored, and the peak of a step, at most, in GiB
    ("uresnet", "keep"): (10.0, 10.6),
    ("uresnet", "closing"): (7.2, 7.8),
    ("uresnet", "series"): (2.0, 3.0),
    ("a21", "keep"): (1.45, 2.05),
    ("a21", "series"): (0.6, 1.2),
}


@pytest.mark.parametrize(("preset", "policy"), BYTES)
def test_a_whole_image_fits(preset, policy):
    with torch.device("meta"):
        model = fullres.uresnet(preset)
    shape = (1, 3, 1280, 2048)
    found = fullres.meter(fullres.convert(model, policy=policy), shape, autocast=torch.bfloat16)
    stored, peak = BYTES[preset, policy]
    assert found.stored <= stored * GIB
    assert found.peak <= peak * GIB


@pytest.mark.parametrize(("policy", "share"), [("keep", 0.85), ("closing", 0.55)])
def test_resnet50_stores_a_share_of_what_eager_does(policy, share):
    with torch.device("meta"):
        model = fullres.resnet50()
    shape = (1, 3, 1260, 2048)
    ours = fullres.meter(fullres.convert(model, policy=policy), shape, autocast=torch.bfloat16)
    eager = fullres.meter(model, shape, autocast=torch.bfloat16)
    assert ours.stored <= share * eager.stored


def test_keep_stores_raw_outputs_and_block_outputs_once(rng):
    """To the byte: two raw outputs a block, and what leaves it where another block reads that."""
    blocks = nn.Sequential(*[
        fullres.models.uresnet(PRESETS["uresnet"]).final_layer.blocks[0] for _ in range(3)
    ])  # fmt: skip
    C, H, W = 16, 8, 12
    x = torch.randn(1, C, H, W, generator=rng).contiguous(memory_format=torch.channels_last)
    image, norms = C * H * W * 4, 6 * 4 * C * 4
    for policy, images in (("keep", 3 * 2 + 2), ("closing", 3 + 2), ("series", 0)):
        found, out = saved_bytes(fullres.convert(blocks, policy=policy), x)
        assert found == images * image + norms, policy
