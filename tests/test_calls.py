"""Torch's own operators inside segments: which they are, and that they compute as before."""

import copy
import random

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fullres.engine import calls
from fullres.engine.convert import convert_whole, programs, schedule
from fullres.ops.program import Call, Program

from .test_convert import PATTERNS, Block, assert_same, conv, randomised

# Which operators become steps


class Leaves(fx.Tracer):
    """Takes each part of a network for one node."""

    def is_leaf_module(self, m, module_qualified_name):
        return True


def node_of(what) -> tuple[fx.Node, dict[str, nn.Module]]:
    """The last node of a function of an image, or a module's, and the modules around it."""
    is_module = isinstance(what, nn.Module)
    model = nn.Sequential(what) if is_module else Block(lambda m, x: what(x))
    nodes = [node for node in Leaves().trace(model).nodes if node.op != "output"]
    return nodes[-1], dict(model.named_modules())


CALLS = {  # name: (function or module, whether its gradient depends on sizes alone)
    "tanh": (torch.tanh, False),
    "gelu": (F.gelu, False),
    "sigmoid method": (lambda x: x.sigmoid(), False),
    "product": (lambda x: x * x, False),
    "softmax": (lambda x: x.softmax(1), False),
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), False),
    "amax": (lambda x: x.amax((2, 3)), False),
    "sum": (lambda x: x + x, True),
    "cat": (lambda x: torch.cat([x, x], 1), True),
    "mean": (lambda x: x.mean((2, 3)), True),
    "narrow": (lambda x: x.narrow(1, 0, 2), True),
    "slice": (lambda x: x[:, 1:], True),
    "flatten": (lambda x: x.flatten(1), True),
    "permute": (lambda x: x.permute(0, 2, 3, 1), True),
    "pad": (lambda x: F.pad(x, (1, 1, 1, 1)), True),
    "avg pool": (lambda x: F.avg_pool2d(x, 2), True),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), True),
    "Linear": (nn.Linear(3, 4), False),
    "GroupNorm": (nn.GroupNorm(1, 3), False),
    "LayerNorm": (nn.LayerNorm(4), False),
    "ConvTranspose2d": (nn.ConvTranspose2d(3, 4, 2), False),
    "PReLU": (nn.PReLU(), False),
    "GELU": (nn.GELU(), False),
    "MaxPool2d": (nn.MaxPool2d(3), False),
    "Softmax2d": (nn.Softmax2d(), False),
    "AvgPool2d": (nn.AvgPool2d(2), True),
    "PixelShuffle": (nn.PixelShuffle(2), True),
    "ReflectionPad2d": (nn.ReflectionPad2d(1), True),
    "Upsample": (nn.Upsample(scale_factor=2), True),
    "Flatten": (nn.Flatten(), True),
    "Dropout": (nn.Dropout(0.5), False),
    "Dropout2d": (nn.Dropout2d(0.5), False),
    "dropout": (lambda x: F.dropout(x, 0.5), False),
}


class Own(nn.Module):
    def forward(self, x):
        return x.tanh()


NO_CALLS = {
    "in place": lambda x: x.mul_(2),
    "relu in place": lambda x: F.relu6(x, inplace=True),
    "size": lambda x: x.size(1),
    "shape": lambda x: x.shape[2] // 2,
    "chunk": lambda x: x.chunk(3, 1),
    "item": lambda x: x.sum().item(),
    "random": lambda x: torch.rand_like(x),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "BatchNorm2d": nn.BatchNorm2d(3),
    "InstanceNorm2d": nn.InstanceNorm2d(3, track_running_stats=True),
    "ReLU in place": nn.ReLU6(inplace=True),
    "Dropout in place": nn.Dropout(0.5, inplace=True),
    "RReLU": nn.RReLU(),
    "FractionalMaxPool2d": nn.FractionalMaxPool2d(2, output_ratio=0.7),
    "fractional max pool": lambda x: F.fractional_max_pool2d(x, 2, output_ratio=0.7),
    "RNN": nn.LSTM(3, 3),
    "own": Own(),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_without_effect_are_calls(name):
    what, linear = CALLS[name]
    node, modules = node_of(what)
    assert calls.is_call(node, modules) and not calls.is_inner(node)
    assert calls.is_linear(node, modules) == linear
    assert calls.is_random(node, modules) == ("rop" in name)


@pytest.mark.parametrize("name", NO_CALLS)
def test_operators_with_an_effect_or_of_unknown_code_are_none(name):
    node, modules = node_of(NO_CALLS[name])
    assert not calls.is_call(node, modules)
    assert calls.is_inner(node) == (name in ("size", "shape", "chunk"))


# Networks around them


def steps_of(program: Program) -> list[Call]:
    return [step for step in program.steps if isinstance(step, Call)]


def around(body, before: int = 4, after: int = 4, **layers) -> nn.Module:
    """Two convolutions with what is to be tested between them."""
    a = nn.Sequential(conv(3, before), nn.BatchNorm2d(before), nn.SiLU())
    return Block(lambda m, x: m.b(body(m, m.a(x))), a=a, b=conv(after, 3), **layers)


def shapes(m, y):  # arithmetic on sizes
    half = y.shape[1] // 2
    left, right = y.narrow(1, 0, half), y[:, half : half * 2]
    return torch.cat([right * (1 / y.size(2)), left - y.size(-1)], dim=1)


def chunks(m, y):
    one, two = y.chunk(2, dim=1)
    three, four = y.split([1, 3], dim=1)
    return torch.cat([two * one, four[:, :1] + three, two[:, :1]], 1)


def gate(m, y):  # an image of one pixel, spread over a larger one
    return y * torch.sigmoid(m.l(y.mean((2, 3)))).view(y.shape[0], y.shape[1], 1, 1)


def in_place(m, y):
    z = y - 0.5
    z.mul_(2)
    return F.relu6(m.r(z) + y, inplace=True)


def tokens(m, y):
    N, C, H, W = y.shape
    z = m.n(y.flatten(2).transpose(1, 2))
    return y + m.l(z).transpose(1, 2).reshape(N, C, H, W)


BETWEEN = {
    "shapes": lambda: around(shapes),
    **{name: PATTERNS[name] for name in ("squeeze_excite", "global_context", "spread_sum")},
    "chunks": lambda: around(chunks),
    "gate": lambda: around(gate, l=nn.Linear(4, 4)),
    "in_place": lambda: around(in_place, r=nn.ReLU6(inplace=True)),
    "tokens": lambda: around(tokens, n=nn.LayerNorm(4), l=nn.Linear(4, 4)),
    "linear": lambda: around(lambda m, y: m.l(y), l=nn.Linear(10, 6)),
    "group": lambda: around(lambda m, y: m.l(y) + y, l=nn.GroupNorm(2, 4)),
    "transposed": lambda: around(lambda m, y: m.l(y), l=nn.ConvTranspose2d(4, 4, 2, 2)),
    "prelu": lambda: around(lambda m, y: m.l(m.l(y) - 0.1), l=nn.PReLU(4)),  # one layer, twice
    "reflect": lambda: around(
        lambda m, y: m.l(y), l=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    ),
}


def under(model: nn.Module, seed: int) -> nn.Module:
    """The network read as a whole, with a random nested schedule; seed 0: an empty one."""
    whole = convert_whole(model)
    draw, changed = random.Random(seed), {}
    for key, program in programs(whole).items():
        n = len(program.steps)
        again = {(0, n)} if seed else set()
        for _ in range(3 if seed else 0):
            start = draw.randrange(n)
            stop = draw.randint(start + 1, n)
            if all(stop <= a or b <= start or a <= start <= stop <= b for a, b in again):
                again.add((start, stop))
        dropped = tuple(s for s in program.producers if seed and draw.random() < 0.3)
        changed[key] = program.changed(again=tuple(sorted(again)), dropped=dropped)
    schedule(whole, changed)
    return whole


def apart(model: nn.Module) -> nn.Module:
    """A network with parameters and buffers of its own."""
    return copy.deepcopy(model)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", BETWEEN)
def test_gradients_are_exact(name, seed, rng):
    model = randomised(BETWEEN[name](), rng)
    x = torch.randn(2, 3, 8, 10, generator=rng, dtype=torch.float64)
    ours = under(apart(model), seed)
    if name != "in_place":
        (program,) = programs(ours).values()
        assert steps_of(program)
    assert_same(ours, model, x, rng, steps=2, accumulate=2)
    assert_same(ours.eval(), model.eval(), x, rng)


@pytest.mark.parametrize("frozen", ["l.weight", "l.bias", "l", "a", "b"])
@pytest.mark.parametrize("name", ["tokens", "gate", "transposed", "group", "reflect"])
def test_frozen_parameters_get_no_gradient(name, frozen, rng):
    model = randomised(BETWEEN[name](), rng)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not key.startswith(frozen))
    x = torch.randn(2, 3, 8, 10, generator=rng, dtype=torch.float64)
    assert_same(under(apart(model), 1), model, x, rng)


@pytest.mark.parametrize("name", ["tokens", "gate", "transposed", "prelu", "reflect"])
def test_a_call_takes_the_parameters_of_functional_call(name, rng):
    model = randomised(BETWEEN[name](), rng)
    ours = under(apart(model), 1)
    others = {
        key: (p.detach() + torch.randn(p.shape, generator=rng).to(p)).requires_grad_()
        for key, p in model.named_parameters()
    }
    x = torch.randn(2, 3, 8, 10, generator=rng, dtype=torch.float64)
    found = []
    for network in (ours, model):
        loss = torch.func.functional_call(network, others, (x,)).sin().sum()
        found.append([loss, *torch.autograd.grad(loss, [*others.values()])])
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-10 * max(1, want.abs().max())


# Random numbers


def dropping() -> nn.Module:
    def body(m, y):
        y = F.dropout(m.d(y), 0.3, m.training) * 2
        return m.e(y) + y

    return around(body, d=nn.Dropout(0.5), e=nn.Dropout2d(0.5))


def once(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    network = copy.deepcopy(network)
    torch.manual_seed(4)
    out = network(x)
    torch.rand(3)  # whoever draws between does not matter
    out.sin().sum().backward()
    after = torch.rand(3)
    return [out.detach(), after, *(p.grad for p in network.parameters())]


def test_random_calls_draw_the_same_when_they_run_again(rng):
    model = randomised(dropping(), rng)
    x = torch.randn(2, 3, 8, 10, generator=rng, dtype=torch.float64)
    networks = [under(apart(model), seed) for seed in range(6)]
    program = programs(networks[0])[":training_0"]
    assert sum(step.random for step in steps_of(program)) == 3
    want = once(networks[0], x)
    for network in networks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(once(network, x), want, strict=True))
    evaluated = networks[1].eval()(x)
    assert (evaluated - model.eval()(x)).abs().max() < 1e-10


# Autocast


def test_a_call_runs_again_in_the_dtype_of_the_forward_pass(rng):
    def body(m, y):
        return m.l(F.gelu(y).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = randomised(around(body, l=nn.Linear(4, 4)), rng).float()
    x = torch.randn(2, 3, 8, 10, generator=rng)
    found, seen, original = [], [], F.linear
    for seed in (0, 1, 2, 3):
        network = under(apart(model), seed)
        with torch.autocast("cpu", torch.bfloat16):
            out = network(x)
        assert out.dtype == torch.bfloat16

        def linear(*args):
            made = original(*args)
            seen.append(made.dtype)
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "linear", linear)
            out.float().sin().sum().backward()
        found.append([out.detach(), *(p.grad for p in network.parameters())])
    assert len(seen) >= 4 and set(seen) == {torch.bfloat16}
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
    assert all(g.dtype == torch.float32 for g in found[0][1:])


# What stays outside


class Opaque(nn.Module):
    """Code that cannot be traced."""

    def forward(self, x):
        return x.tanh() if x.sum() > -1e9 else x


class Counting(Opaque):
    """Such a one with a buffer that it changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        x = super().forward(x)
        self.calls += 1
        return x * self.calls


OUTSIDE = {  # how many segments there are
    "opaque": (lambda: around(lambda m, y: m.o(y) + y, o=Opaque()), 2),
    "two": (lambda: around(lambda m, y: m.p(m.c(m.o(y))), o=Opaque(), p=Opaque(), c=conv(4, 4)), 3),
    "batch norm of rows": (
        lambda: around(lambda m, y: m.n(y.flatten(2)).view_as(y), n=nn.BatchNorm1d(4)), 2
    ),
    "functional batch norm": (
        lambda: around(lambda m, y: F.batch_norm(y, None, None, training=True)), 2
    ),
    "tracked instance norm": (
        lambda: around(lambda m, y: m.n(y), n=nn.InstanceNorm2d(4, track_running_stats=True)), 2
    ),
    "in place": (lambda: around(lambda m, y: m.r(y * 3), r=nn.ReLU6(inplace=True)), 2),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_no_call_parts_the_network(name, seed, rng):
    make, segments = OUTSIDE[name]
    model = randomised(make(), rng)
    ours = under(apart(model), seed)
    assert len(programs(ours)) == segments
    x = torch.randn(2, 3, 8, 10, generator=rng, dtype=torch.float64)
    assert_same(ours, model, x, rng, steps=2)
    assert_same(ours.eval(), model.eval(), x, rng)


def test_a_buffer_that_a_layer_changes_is_changed_once_a_step(rng):
    model = randomised(around(lambda m, y: m.k(y), k=Counting()), rng)
    x = torch.randn(2, 3, 8, 10, generator=rng, dtype=torch.float64)
    ours = under(apart(model), 1)
    assert_same(ours, model, x, rng, steps=3)
    assert ours.k.calls == 3
