"""Plans whose segments run a few images at a time: what they compute, take, promise and refuse."""

import copy
import dataclasses
import json
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fullres.engine import InfeasibleError, Plan, convert, max_batch, meter, plan
from fullres.engine.convert import convert_whole, programs, schedule
from fullres.engine.images import part_sizes
from fullres.engine.ladder import Ladder
from fullres.engine.schedule import way_of
from fullres.ops import segment
from fullres.ops.program import Call, Stay
from fullres.training.config import TrainConfig

from .test_convert import randomised
from .test_plan import Mixed, small
from .test_schedule import Metered, loss_of, residual, scheduled, shared

SHAPE = (5, 3, 64, 96)


# Networks


def frozen() -> nn.Module:
    """A tiny ResNet whose normalisations keep their statistics."""
    model = residual()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.eval()
    return model


class Grouped(nn.Module):
    """Normalisation in groups, chunks, a gate, sizes, and a head on rows."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = torch.relu(x + self.body(x) * self.gate(x))
        left, right = self.pool(y).chunk(2, dim=1)
        z = torch.cat([right, left * 2], dim=1)
        z = F.interpolate(z, size=x.shape[-2:], mode="bilinear") + y
        return self.head(self.norm(z.view(z.size(0), z.size(1), -1).mean(-1)))


class Apart(nn.Module):
    """Two segments, the second of which is asked for its input's gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(n, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()
            )
            for n in (3, 8)
        )
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        x = self.first(x)
        for _ in range(int(x.shape[1]) // 4):
            x = self.second(x)
        return self.last(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "scc21": lambda: small("scc21"),
    "frozen": frozen,
    "grouped": Grouped,
    "apart": Apart,
}


def split(whole: nn.Module, images: int, draw: random.Random | None = None) -> None:
    """Let a network's programs run so many images at a time, under random schedules."""
    changed = {}
    for name, program in programs(whole).items():
        joined: tuple[int, ...] = ()
        if draw is not None:
            program, joined = scheduled(program, draw)
        changed[name] = program.changed(images=images, offloaded=()).joined(joined)
    schedule(whole, changed)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, gradients of the input and of parameters, and buffers."""
    x = x.clone().requires_grad_()
    out = model(x)
    outputs = out if isinstance(out, tuple) else (out,)
    found = torch.autograd.grad(loss_of(out), [x, *model.parameters()])
    return [*(each.detach() for each in outputs), *found, *model.buffers()]


def equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# What is computed


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_the_networks_in_float64(name, images, rng):
    """Five images, so that the last part has as many as the others, fewer, or one alone."""
    torch.manual_seed(0)
    model = randomised(NETWORKS[name](), rng)
    x = torch.randn(5, 3, 17, 23, generator=rng, dtype=torch.float64)
    want, whole = gradients(model, x), convert_whole(model)
    draw = random.Random(images)
    for trial in range(3):
        split(whole, images, draw if trial else None)
        for ours, theirs in zip(gradients(whole, x), want, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("name", ["frozen", "grouped"])
def test_each_image_is_computed_as_if_alone(name, rng):
    """The same bits as from images one by one, whose parameters' gradients are added up.

    These networks use each parameter once.
    """
    torch.manual_seed(0)
    model = NETWORKS[name]()
    x = torch.randn(4, 3, 17, 23, generator=rng)
    whole = convert_whole(model)
    parameters = [*whole.parameters()]

    def run(x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        x = x.clone().requires_grad_()
        out = whole(x)
        dx, *rest = torch.autograd.grad((out.sin() * out).sum(), [x, *parameters])
        return [out, dx], rest

    one_by_one = [run(x[n : n + 1]) for n in range(4)]
    split(whole, 1)
    images, sums = run(x)
    for number, got in enumerate(images):
        assert torch.equal(got, torch.cat([each[number] for each, _ in one_by_one]))
    for number, got in enumerate(sums):
        want = one_by_one[0][1][number]
        for _, each in one_by_one[1:]:
            want = want + each[number]
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_as_close_to_float64_as_without_parts(name, rng):
    """Bits differ: on a CPU, torch's convolutions depend on how many images there are.

    The errors are of the same sums in another order, so of the same size but for their luck; that
    of n terms grows as the root of n, and is at least some roundings of the largest value.
    """
    torch.manual_seed(0)
    model = NETWORKS[name]()
    x = torch.randn(5, 3, 33, 47, generator=rng)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    whole = convert_whole(model)
    plain = gradients(whole, x)
    split(whole, 2)
    for ours, theirs, true in zip(gradients(whole, x), plain, exact, strict=True):
        own, other = ((each - true).abs().max().item() for each in (ours, theirs))
        rounding = torch.finfo(torch.float32).eps * true.abs().max().item()
        assert own <= 3 * other + 4 * rounding


def test_bf16_under_autocast_is_close_to_without_parts(rng):
    torch.manual_seed(0)
    whole = convert_whole(Grouped())
    x = torch.randn(5, 3, 17, 23, generator=rng)
    found = []
    for images in (0, 2):
        split(whole, images)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(whole, x))
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype and torch.isfinite(ours).all()
        assert (ours - plain).norm() <= 2**-5 * plain.norm() + 1e-4


def test_a_sum_of_many_parts_is_not_rounded_at_each():
    """In bfloat16, 256 + 1 is 256."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(1, 2, 1), nn.PReLU(2)
            self.head = nn.Linear(2, 1)

        def forward(self, x):
            return self.head(self.act(self.conv(x)).mean((2, 3)))

    whole = convert_whole(Counting().bfloat16())
    split(whole, 1)
    whole(torch.ones(300, 1, 1, 1, dtype=torch.bfloat16)).sum().backward()
    assert whole.head.bias.grad.dtype == torch.bfloat16 and whole.head.bias.grad.item() == 300


def test_batches_of_other_sizes_than_planned(rng):
    torch.manual_seed(0)
    model = randomised(frozen(), rng)
    whole = convert_whole(model)
    split(whole, 3, random.Random(1))
    for shape in ((1, 3, 17, 23), (3, 3, 16, 9), (4, 3, 40, 24), (7, 3, 8, 8)):
        x = torch.randn(shape, generator=rng, dtype=torch.float64)
        for ours, theirs in zip(gradients(whole, x), gradients(model, x), strict=True):
            assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, theirs.abs().max().item())
    plain = convert_whole(model)
    empty = torch.zeros(0, 3, 16, 16, dtype=torch.float64)
    found = [each(empty) for each in (whole, plain)]
    assert found[0].shape == found[1].shape == (0, 5)


def test_without_gradients_the_outputs_are_the_same(rng):
    torch.manual_seed(0)
    whole = convert_whole(small("scc21"))
    split(whole, 2)
    x = torch.randn(5, 3, 16, 24, generator=rng)
    want = [out.detach() for out in whole(x)]
    with torch.no_grad():
        assert equal(list(whole(x)), want)
    with torch.inference_mode():
        assert equal(list(whole(x)), want)
    for parameter in whole.parameters():
        parameter.requires_grad_(False)
    out = whole(x)
    assert not out[0].requires_grad and equal(list(out), want)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in want)


def test_backward_runs_twice_but_not_to_the_second_order(rng):
    torch.manual_seed(0)
    whole = convert_whole(small("scc21"))
    split(whole, 2, random.Random(3))
    x = torch.randn(5, 3, 16, 24, generator=rng)
    parameters = [*whole.parameters()]
    loss = loss_of(whole(x))
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert equal(list(torch.autograd.grad(loss, parameters)), list(once))
    with pytest.raises(RuntimeError, match="again|second time"):
        torch.autograd.grad(loss, parameters)
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(loss_of(whole(x)), parameters, create_graph=True)


def test_only_what_is_asked_for_gets_gradients(rng):
    """A frozen stem, and outputs that no loss looks at; each parameter's hook runs once."""
    torch.manual_seed(0)
    model = randomised(small("scc21"), rng)
    frozen_part = model.initial_convolution
    x = torch.randn(5, 3, 16, 24, generator=rng, dtype=torch.float64)
    found, calls = [], []
    for network in (model, convert_whole(model)):
        if network is not model:
            split(network, 2)
        for parameter in frozen_part.parameters():
            parameter.requires_grad_(False)
        network.zero_grad()
        calls.clear()
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: calls.append(id(p)))
            for p in network.parameters()
            if p.requires_grad
        ]
        network(x)[1].sin().sum().backward()
        assert len(calls) == len({*calls}) > 5
        for hook in hooks:
            hook.remove()
        found.append([p.grad for p in network.parameters()])
    for theirs, ours in zip(*found, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, theirs.abs().max().item())


def test_torch_compile_and_copies_go_by_parts_too(rng):
    """Segments of a policy, whose passes are operators under torch.compile."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.LeakyReLU(), nn.Conv2d(6, 2, 1)
    )
    network = convert(model)
    ((name, program),) = programs(network).items()
    schedule(network, {name: program.changed(images=2)})
    x = torch.randn(5, 3, 12, 14, generator=rng)
    want = gradients(network, x)
    runs = []
    original = segment.parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "parts", lambda *a: runs.append(a) or original(*a))
        for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert next(iter(programs(twin).values())).images == 2
            assert equal(gradients(twin, x), want)
        assert len(runs) == 4
        compiled = torch.compile(network, backend="aot_eager")
        for ours, theirs in zip(gradients(compiled, x), want, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert len(runs) > 4


# Where it cannot be done


def test_normalisation_by_the_batch_and_mixing_calls_run_all_at_once(rng, monkeypatch):
    """Whatever a plan says: what was frozen may train again."""
    torch.manual_seed(0)
    model = randomised(residual(), rng)
    x = torch.randn(5, 3, 17, 23, generator=rng, dtype=torch.float64)
    monkeypatch.setattr(segment, "parts", lambda *a: pytest.fail("it is one part"))
    ours, theirs = convert_whole(model), copy.deepcopy(model)
    split(ours, 2)
    for got, want in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert (got - want).abs().max() <= 1e-10 * max(1, want.abs().max().item())
    torch.manual_seed(0)
    mixing = convert_whole(randomised(Mixing(), rng))
    want = gradients(mixing, x)
    split(mixing, 2)
    assert equal(gradients(mixing, x), want)


class Beside(nn.Module):
    """An image that is added to each of a batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.side = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, y):
        return self.last(torch.relu(self.conv(x) + self.side(y)))


def test_inputs_of_other_numbers_of_images_run_all_at_once(rng, monkeypatch):
    torch.manual_seed(0)
    whole = convert_whole(randomised(Beside(), rng))
    assert len(programs(whole)) == 1
    x = torch.randn(5, 3, 9, 11, generator=rng, dtype=torch.float64)
    runs, original = [], segment.parts
    monkeypatch.setattr(segment, "parts", lambda *a: runs.append(a) or original(*a))
    for y in (x[:1], x.flip(0)):
        found = []
        for images in (0, 2):
            split(whole, images)
            out = whole(x, y)
            found.append([out, *torch.autograd.grad(loss_of(out), whole.parameters())])
        for ours, plain in zip(*found, strict=True):
            assert (ours - plain).abs().max() <= 1e-10 * max(1.0, plain.abs().max().item())
        assert len(runs) == (0 if len(y) == 1 else 2)


class Mixing(nn.Module):
    """Images less their mean over the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        return self.last(x - x.mean(0, keepdim=True))


class Ranks(nn.Module):
    """A sum of two ranks: a row of each image is spread over columns, if there are as many."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        return self.last(x * x.mean((1, 2, 3)))


def test_calls_whose_ranks_tell_that_they_mix_run_all_at_once(rng):
    """Each of the two calls could be apart, and only their images' sizes tell that one is not."""
    torch.manual_seed(0)
    model = randomised(Ranks(), rng)
    x = torch.randn(6, 3, 5, 6, generator=rng, dtype=torch.float64)
    whole = convert_whole(model)
    ((_, program),) = programs(whole).items()
    assert all(step.apart for step in program.steps if isinstance(step, Call))
    want = gradients(whole, x)
    split(whole, 2)
    assert equal(gradients(whole, x), want)
    shape, options = (6, 3, 5, 6), {"dtype": torch.float32, "split_batch": True}
    assert plan(model.float(), shape, memory="1GiB", **options).segments[0].images == 0
    with pytest.raises(InfeasibleError) as caught:
        plan(model, shape, memory=1, **options)
    least = plan(model, shape, memory=caught.value.least, **options)
    assert [part.images for part in least.segments] == [0]


@pytest.mark.parametrize("make", [residual, Mixing, Mixed], ids=lambda make: make.__name__)
def test_plans_that_cannot_split_are_as_without(make):
    torch.manual_seed(0)
    model, shape = make(), (5, 3, 32, 48)
    least = []
    for option in (False, True):
        with pytest.raises(InfeasibleError) as caught:
            plan(model, shape, memory=1, dtype=torch.float32, split_batch=option)
        least.append(caught.value.least)
    assert least[0] == least[1]
    found = [
        plan(model, shape, memory=int(1.2 * least[0]), dtype=torch.float32, split_batch=option)
        for option in (False, True)
    ]
    assert found[0].as_dict() == found[1].as_dict()


# Which calls keep images apart

KEEP = {
    "gelu": F.gelu,
    "scaled": lambda x: 2 * x / 3 - 1,
    "power": lambda x: (x.square() + 1) ** 0.5,
    "mean of pixels": lambda x: x.mean((2, 3), keepdim=True),
    "sum from the end": lambda x: x.sum((-2, -1), keepdim=True) + x,
    "softmax": lambda x: torch.softmax(x, dim=1),
    "cut": lambda x: x[:, 1:, ::2, :-1],
    "cut at the end": lambda x: x[..., 1:],
    "chunks": lambda x: x.chunk(2, dim=1)[0] - x.chunk(2, 1)[1],
    "split": lambda x: torch.split(x, 2, dim=1)[1].tanh(),
    "channels of a third": lambda x: x.narrow(1, x.shape[1] // 2, x.shape[1] // 2),
    "joined": lambda x: torch.cat([x, x.flip(3)], 1),
    "stacked": lambda x: torch.stack([x, x.neg()], 2),
    "padded": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "pooled": lambda x: F.avg_pool2d(x, 2),
    "enlarged": lambda x: F.interpolate(x, size=[2 * side for side in (9, 7)], mode="nearest"),
    "enlarged to another": lambda x: F.interpolate(x[:, :, :3], size=x.shape[2:]),
    "flat": lambda x: x.flatten(1),
    "flat by sizes": lambda x: x.contiguous().view(x.shape[0], -1),
    "pixels": lambda x: x.reshape(x.size(0), x.size(1), x.size(2) * x.size(3)),
    "turned": lambda x: x.permute(0, 2, 3, 1),
    "transposed": lambda x: x.transpose(1, -1),
    "attention": lambda x: torch.softmax(x.flatten(2).transpose(1, 2) @ x.flatten(2), -1),
    "unsqueezed": lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(-1),
    "GroupNorm": nn.GroupNorm(2, 4),
    "LayerNorm": nn.LayerNorm([6, 7]),
    "Linear": nn.Linear(7, 3),
    "Softmax": nn.Softmax(dim=1),
    "Flatten": nn.Flatten(),
    "Unflatten": nn.Unflatten(1, (2, 2)),
    "ConvTranspose2d": nn.ConvTranspose2d(4, 3, 2),
    "MaxPool2d": nn.MaxPool2d(3),
    "Upsample": nn.Upsample(scale_factor=3),
    "ReflectionPad2d": nn.ReflectionPad2d(1),
    "PixelShuffle": nn.PixelShuffle(2),
    "PReLU": nn.PReLU(4),
}
MIX = {
    "mean of all": lambda x: x - x.mean(),
    "mean of images": lambda x: x - x.mean(0),
    "mean of images from the end": lambda x: x - x.mean(-4),
    "how many": lambda x: x / x.shape[0],
    "how many, by len": lambda x: x * x.size(0),
    "softmax over images": lambda x: torch.softmax(x, 0),
    "softmax of unknown dimension": lambda x: F.softmax(x.flatten(1), dim=0),
    "backwards": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(1, 0),
    "rolled flat": lambda x: x.roll(1),
    "one image": lambda x: x * x[0],
    "other images": lambda x: x * x[[2, 1, 0, 3]],
    "first images": lambda x: x[: x.shape[0] // 2],
    "chunks of images": lambda x: x.chunk(2)[0] - x.chunk(2)[1],
    "joined": lambda x: torch.cat([x, x]),
    "rows": lambda x: x.reshape(-1, 7),
    "rows by sizes": lambda x: x.reshape(x.shape[2], -1),
    "squeezed": lambda x: x.squeeze(),
    "flat": lambda x: x.flatten(),
    "turned": lambda x: x.permute(1, 0, 2, 3),
    "transposed": lambda x: x.transpose(0, 1),
    "sorted": lambda x: x.cumsum(0),
    "padded": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)).relu(),
    "doubled": lambda x: x.repeat(2, 1, 1, 1),
    "size of a slice": lambda x: x.reshape(x.shape[2:][0], -1),
    "Softmax": nn.Softmax(dim=0),
    "Flatten": nn.Flatten(0),
    "LayerNorm": nn.LayerNorm([4, 4, 6, 7]),
}


class Around(nn.Module):
    """A call between two convolutions."""

    def __init__(self, call: Callable):
        super().__init__()
        self.conv, self.call = nn.Conv2d(4, 4, 1), call

    def forward(self, x):
        return self.call(self.conv(x))


def separable(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether a network's calls are taken for ones that keep images apart."""
    ladder = Ladder(model, tuple(x.shape), lambda out: out.sum(), torch.float32, None, None,
                    split=True)  # fmt: skip
    return all(ladder._reading.parts.values())


@pytest.mark.parametrize("name", KEEP)
def test_calls_that_keep_images_apart_are_known(name):
    model, x = Around(KEEP[name]), torch.randn(4, 4, 6, 7)
    whole = convert_whole(model)
    ((_, program),) = programs(whole).items()
    assert any(isinstance(step, Call) for step in program.steps)
    assert separable(model, x)
    one_by_one = torch.cat([model(x[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(model(x), one_by_one)
    split(whole, 3)
    torch.testing.assert_close(whole(x), one_by_one)


@pytest.mark.parametrize("name", MIX)
def test_calls_that_mix_images_are_refused(name):
    model, x = Around(MIX[name]), torch.randn(4, 4, 6, 7)
    whole = convert_whole(model)
    if any(isinstance(step, Call) for p in programs(whole).values() for step in p.steps):
        assert not separable(model, x)
    split(whole, 3)
    torch.testing.assert_close(whole(x), model(x))


# What it takes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["scc21", "frozen", "apart"])
def test_simulated_peaks_are_the_metered_ones(name, dtype):
    """But for a weight's cast and gradient, norms' tables, and what a chunk shares."""
    model = NETWORKS[name]()
    metered = Metered(model, SHAPE, loss_of, dtype, None, None, split=True)
    bound = sum(p.nbytes for p in model.parameters())
    draw, peaks = random.Random(3), []
    for images in (1, 2, 4):
        views = sum(shared(metered.parts(key, images).one) for key in metered.costs)
        for trial in range(2):
            changed, outcomes = {}, {}
            for key, costs in metered.costs.items():
                program, joined = costs.program, ()
                if trial:
                    program, joined = scheduled(program, draw)
                    program = program.changed(offloaded=())
                way = metered.parts(key, images).way(way_of(costs, program, joined))
                changed[key], outcomes[key] = way.program.joined(way.joined), way.outcome
            peaks.append(metered.ran(changed))
            assert abs(metered._reading.peak(outcomes) - peaks[-1]) <= bound + views
            assert bound + views < 0.25 * peaks[-1]
    assert len({*peaks}) > 2, "parts should matter"


def test_parts_that_are_alike_are_metered_once(monkeypatch):
    model, original = small("scc21"), segment.parts
    metered = Metered(model, (9, 3, 32, 48), loss_of, torch.float32, None, None, split=True)
    for images in (1, 2):
        changed = {key: costs.program.changed(images=images, again=((0, 20),))
                   for key, costs in metered.costs.items()}  # fmt: skip
        found = metered.ran(changed)
        with monkeypatch.context() as patch:
            patch.setattr(segment, "parts", lambda count, size, fake: original(count, size))
            assert metered.ran(changed) == found


def test_part_sizes_are_powers_of_two_below_the_batch():
    assert [part_sizes(n) for n in (0, 1, 2, 3, 4, 5, 9)] == [
        [], [], [1], [1, 2], [1, 2], [1, 2, 4], [1, 2, 4, 8],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ladders() -> tuple[Ladder, Ladder]:
    """The plans of one step, without and with parts."""
    return tuple(
        Ladder(small("scc21"), SHAPE, None, torch.float32, None, torch.optim.AdamW, split=option)
        for option in (False, True)
    )


def test_more_memory_is_never_slower_nor_is_the_choice(ladders):
    plain, parted = ladders
    least, times, ways = parted.least().peak, [], set()
    for share in (1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 5.0, 10.0, 100.0):
        rung = parted.within(int(share * least))
        assert rung.peak == rung.report.peak <= share * least
        other = plain.within(int(share * least))
        assert other is None or other.seconds >= rung.seconds
        times.append(rung.seconds)
        ways |= {way.program.images for way in rung.ways.values()}
    assert times == sorted(times, reverse=True) and len({*times}) > 4
    assert {0, 1} < ways, "parts of several sizes, and none"
    assert parted.within(least - 1) is None
    assert times[-1] == parted.fastest == plain.fastest


@pytest.fixture(scope="module")
def planned() -> Plan:
    """A plan that needs parts: of a quarter of the memory that suffices without them."""
    shape = (32, *SHAPE[1:])
    with pytest.raises(InfeasibleError) as caught:
        plan(small("scc21"), shape, memory=1, dtype=torch.float32)
    return plan(
        small("scc21"), shape, memory=caught.value.least // 2, dtype=torch.float32,
        split_batch=True,
    )  # fmt: skip


def test_a_large_batch_takes_far_less_and_as_much_as_is_promised(planned):
    assert [part.images > 0 for part in planned.segments] == [True]
    report = meter(
        convert(small("scc21"), plan=planned), planned.input_shape, optimizer=torch.optim.AdamW,
        hold_output=False,
    )  # fmt: skip
    assert report.peak == planned.peak_bytes <= planned.memory
    assert report.stored == planned.report.stored
    real = meter(
        convert(small("scc21"), plan=planned), planned.input_shape, optimizer=torch.optim.AdamW,
        hold_output=False, device="cpu",
    )  # fmt: skip
    assert real.stored == planned.report.stored


@pytest.mark.parametrize("name", ["grouped", "apart", "frozen"])
def test_other_networks_take_what_is_promised_too(name):
    """Those of torch's own operators, of several segments, and of norms."""
    options = {"dtype": torch.bfloat16, "split_batch": True}
    with pytest.raises(InfeasibleError) as caught:
        plan(NETWORKS[name](), (9, 3, 96, 128), memory=1, **options)
    found = plan(NETWORKS[name](), (9, 3, 96, 128), memory=caught.value.least, **options)
    assert any(part.images for part in found.segments)
    report = meter(
        convert(NETWORKS[name](), plan=found), found.input_shape, optimizer=torch.optim.AdamW,
        autocast=torch.bfloat16, hold_output=False,
    )  # fmt: skip
    assert report.peak == found.peak_bytes <= found.memory


def test_memory_grows_with_what_enters_and_leaves_alone():
    """Per image: inputs, three planes of five logits, and their gradients, in float32."""
    least = []
    for batch in (16, 32):
        shape, options = (batch, *SHAPE[1:]), (None, torch.float32, None, None)
        found = Ladder(small("scc21"), shape, *options, split=True, least=True)
        least.append(found.least().peak)
    classes = small("scc21").config.classes
    pixels = 4 * SHAPE[2] * SHAPE[3]
    assert (least[1] - least[0]) / 16 <= (3 + 2 * 3 * classes) * pixels


def test_five_steps_are_close_to_those_without(planned):
    model = small("scc21")
    plain = plan(model, SHAPE, memory="1GiB", dtype=torch.float32)
    losses = []
    for each in (plain, planned):
        network = convert(copy.deepcopy(model), plan=each)
        steps = torch.optim.SGD(network.parameters(), 1e-2)
        torch.manual_seed(1)
        losses.append([])
        for _ in range(5):
            loss = loss_of(network(torch.randn(SHAPE)))
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len({*losses[1]}) == 5


def test_the_largest_batch_fits_and_one_more_does_not():
    model, options = frozen(), {"dtype": torch.float32}
    budget = plan(model, (6, 3, 32, 48), memory="1GiB", **options).peak_bytes
    alone = max_batch(model, (3, 32, 48), memory=budget, **options)
    found = max_batch(model, (3, 32, 48), memory=budget, split_batch=True, **options)
    assert found > 2 * alone > 0
    options["split_batch"] = True
    assert plan(model, (found, 3, 32, 48), memory=budget, **options).peak_bytes <= budget
    with pytest.raises(InfeasibleError):
        plan(model, (found + 1, 3, 32, 48), memory=budget, **options)


def test_host_memory_beside_it(ladders):
    """Segments that run by parts hold nothing that could wait there."""
    _, parted = ladders
    alone, beside = parted.least(), parted.least(2**40)
    assert beside.peak <= alone.peak
    for rung in (alone, beside):
        for way in rung.ways.values():
            assert not (way.program.images and way.program.offloaded)
    for share in (1.0, 1.5, 2.5):
        found = parted.within(int(share * alone.peak), 2**40)
        assert found.seconds <= parted.within(int(share * alone.peak)).seconds


# Files, tables, bad input


def test_a_plan_is_read_as_it_was_written(planned, tmp_path):
    path = planned.save(tmp_path / "plan.json")
    read = Plan.load(path)
    assert read == planned and str(read) == str(planned)
    (program,) = programs(convert(small("scc21"), plan=read)).values()
    assert program.images == planned.segments[0].images > 0
    raw = json.loads(path.read_text())
    for wrong in (-1, True, 1.5, "2", None):
        raw["segments"][0]["images"] = wrong
        path.write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=r"path: want a file that Plan\.save wrote.*images"):
            Plan.load(path)
    del raw["segments"][0]["images"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"path: want a file that Plan\.save wrote"):
        Plan.load(path)


def test_the_table_says_how_many_at_a_time(planned):
    (part,) = planned.segments
    how = "image by image, " if part.images == 1 else f"{part.images} images at a time, "
    assert all(row.policy.startswith(how) and row.stored == 0 for row in part.rows)
    text = str(planned)
    assert how in text and "of a part at once" in text
    made = sum(row.again for row in part.rows)
    assert 0 < made < planned.seconds * (1 - 1 / planned.time_ratio)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="split_batch: want True or False, got 'yes'"):
        plan(small("scc21"), SHAPE, split_batch="yes")
    ((_, program),) = programs(convert_whole(small("scc21"))).items()
    needs = [False] * program.inputs + [True] * program.parameters
    with pytest.raises(ValueError, match="images: want a number of images"):
        program.changed(images=-1).schedule(needs)
    steps = len(program.steps)
    stay = Stay(program.steps[2].out, steps, steps)
    with pytest.raises(ValueError, match="images: want a number of images"):
        program.changed(images=1, offloaded=(stay,)).schedule(needs)


# The command line and the trainer


def test_the_command_line_splits(fullres):
    network = (
        "filters=2,depth=1,level_blocks=1,deepest_blocks=1,deepest_channels=8,deepest_kernel=3"
    )
    arguments = (
        "plan", "--preset", "scc21", "--network", network, "--image-size", "48x64", "--json",
        "--batch-size", 8, "--memory",
    )  # fmt: skip
    error = fullres(*arguments, "10KiB")[2]
    least = float(error.split("at least ")[1].split(" MiB")[0])
    code, out, _ = fullres(*arguments, f"{0.8 * least} MiB", "--split-batch")
    assert code == 0 and json.loads(out)["segments"][0]["images"] > 0


def test_the_trainer_wants_memory_beside_it():
    with pytest.raises(ValueError, match="want memory beside split_batch; got none"):
        TrainConfig(synthetic=True, split_batch=True)
    config = TrainConfig(synthetic=True, split_batch=True, memory="1GiB")
    assert dataclasses.asdict(config)["split_batch"] is True


# On a card


@pytest.mark.gpu
def test_a_card_takes_what_was_predicted_and_computes_the_same():
    """Gradients in bfloat16 are those of the plan without parts, but for their last bits."""
    shape = (12, 3, 256, 384)
    plain = plan(small("scc21"), shape, memory="8GiB", criterion=loss_of)
    with pytest.raises(InfeasibleError) as caught:
        plan(small("scc21"), shape, memory=1, criterion=loss_of)
    options = {"criterion": loss_of, "split_batch": True}
    parted = plan(small("scc21"), shape, memory=int(0.85 * caught.value.least), **options)
    assert all(part.images for part in parted.segments)
    generator = torch.Generator("cuda").manual_seed(1)
    x, found = torch.randn(shape, device="cuda", generator=generator), []
    for each in (plain, parted):
        model = convert(small("scc21"), plan=each).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for step in range(3):
            if step == 2:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                # Input, parameters, gradients and state are part of what is promised.
                before -= x.nbytes + 4 * sum(p.nbytes for p in model.parameters())
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(model(x))
            loss.backward()
            if step == 0:
                found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
            optimizer.step()
            del loss
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= 1.1 * each.peak_bytes + 32 * 2**20  # workspaces come on top
        del model, optimizer
    for ours, other in zip(*found, strict=True):
        assert (ours - other).norm() <= 2**-6 * other.norm() + 1e-6
