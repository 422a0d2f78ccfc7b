"""Whole training steps: the networks that are measured, and who runs their steps in which way.

Every provider builds the same network from the same seed, and trains it on the same batch, which
lies on the device from the start as the optimizer's state does. A step is what a plain loop runs:
gradients set to None, forward under autocast, loss, backward, AdamW. All are in channels_last.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine import InfeasibleError, Plan, convert, plan
from ..engine.cards import Hardware
from ..engine.fusion import POLICIES
from ..models import UResNetConfig, resnet50, uresnet
from ..training.loss import SegmentationLoss
from .memory import checkpoint_blocks

IMAGE = (3, 1260, 2048)
GIB = 2**30
OCCUPIED = 0.03  # of an image's pixels are not 0; events have a few in a hundred
CLASSES = 3
SHARE = 0.97  # of the memory, that plans which are to run are made for, as with memory="auto"
UNLIMITED = 2**60  # bytes, of a plan that need not save any


@dataclass(frozen=True)
class Network:
    """A network and what it is trained with."""

    build: Callable[[], nn.Module]
    labels: Callable[[int, Sequence[int]], Tensor]  # from the batch and the image's size: all 0
    loss: Callable[[Any, Tensor], Tensor]  # from output and labels


def pixel_labels(batch: int, image: Sequence[int]) -> Tensor:
    """Return a class for each pixel of each plane, as the trainer has them."""
    return torch.zeros(batch, *image, dtype=torch.uint8)


def image_labels(batch: int, image: Sequence[int]) -> Tensor:
    """Return a class for each image."""
    return torch.zeros(batch, dtype=torch.int64)


def pixel_loss(out: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the trainer's loss."""
    return SegmentationLoss("focal")(out, labels)


_FEW = UResNetConfig(
    filters=4, depth=1, level_blocks=1, deepest_blocks=1, deepest_channels=8, deepest_kernel=3,
    final_blocks=0, residual=True,
)  # fmt: skip
SMALL = "small"  # for where there is no GPU
NETWORKS = {
    "uresnet": Network(lambda: uresnet("uresnet"), pixel_labels, pixel_loss),
    "a21": Network(lambda: uresnet("a21"), pixel_labels, pixel_loss),
    "resnet50": Network(resnet50, image_labels, F.cross_entropy),
    SMALL: Network(lambda: uresnet(_FEW), pixel_labels, pixel_loss),
}
PUBLISHED = ("uresnet", "a21", "resnet50")


def draw_batch(
    network: Network, image: Sequence[int], batch: int, device: torch.device | str, seed: int
) -> tuple[Tensor, Tensor]:
    """Return images [batch, *image], float32 in channels_last, and labels of all three classes.

    Most pixels are 0, as a detector's are; the rest decay exponentially, and where labels are of
    pixels, their class follows from their height. An image does not depend on how many follow it.
    """
    rng = torch.Generator(device).manual_seed(seed)
    images = torch.empty(batch, *image, device=device, memory_format=torch.channels_last)
    with torch.device(device):
        labels = network.labels(batch, image)
    for n in range(batch):  # one by one, so that no more than an image comes and goes
        drawn = torch.rand(image, generator=rng, device=device)
        drawn[:, 0, :2] = torch.tensor([0.25, 0.75], device=device) * OCCUPIED  # never all zeros
        hit = drawn < OCCUPIED
        images[n] = torch.where(hit, -(drawn / OCCUPIED).clamp(min=1e-6).log(), 0.0)
        labels[n] = hit * (1 + (drawn > OCCUPIED / 2).byte()) if labels.ndim > 1 else n % CLASSES
    return images, labels


class Step:
    """A training step on one batch.

    Attributes:
        model, optimizer: what is trained, and by what; the optimizer's state is there.
        images, labels: the batch.
        plan: by which the model was converted, if it was.
    """

    def __init__(
        self,
        network: Network,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        autocast: torch.dtype | None = None,
        plan: Plan | None = None,
    ):
        """Make the optimizer and its state; the model lies where images do."""
        self.network, self.model, self.plan = network, model, plan
        self.images, self.labels, self.autocast = images, labels, autocast
        self.optimizer = torch.optim.AdamW(model.parameters())
        _make_state(self.optimizer)

    def run(self) -> Tensor:
        """Return the loss of one whole step."""
        loss = self.backward()
        self.optimizer.step()
        return loss

    def backward(self, images: int | None = None) -> Tensor:
        """Return the loss of the batch, or of its first images, and leave gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._mixed():
            loss = self.network.loss(self.model(self.images[:images]), self.labels[:images])
        loss.backward()
        return loss.detach()

    def gradients(self, images: int | None = None) -> tuple[float, Tensor]:
        """Return the loss and all gradients in one vector, of the batch or its first images."""
        loss = self.backward(images)
        found = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), torch.cat(found)

    def double(self) -> "Step":
        """Make model and images float64, in which a result is exact; return self."""
        self.model.double()
        self.images = self.images.double()
        return self

    def _mixed(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.images.device.type, self.autocast)


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state, as it is before the first step, and leave the parameters."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].zero_()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 as float32 inside, and not as TF32: for results that others are held to."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


# Plans


class HeldLabels:
    """A network's loss, with labels that are made when it is called and held to the step's end."""

    def __init__(self, network: Network, image: Sequence[int]):
        """Take the network and the image's size."""
        self.network, self.image = network, image
        self.labels: Tensor | None = None

    def __call__(self, out: Any) -> Tensor:
        """Return the loss of a network's output."""
        first = out if isinstance(out, Tensor) else out[0]
        self.labels = self.network.labels(len(first), self.image)
        return self.network.loss(out, self.labels)


def make_plan(
    network: Network,
    image: Sequence[int],
    batch: int,
    memory: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    hardware: str | Hardware | None = None,
    reserve: int = 0,
) -> Plan:
    """Return the plan of a network's step within bytes of memory; None for the fastest of all.

    Raises:
        InfeasibleError: the memory does not suffice.
    """
    with torch.device("meta"):
        model = network.build()
    return plan(
        model,
        (batch, *image),
        criterion=HeldLabels(network, image),
        memory=UNLIMITED if memory is None else memory,
        dtype=dtype,
        hardware=hardware,
        reserve=reserve,
    )


def kept_plan(
    network: str,
    image: Sequence[int],
    batch: int,
    memory: int | None,
    folder: Path | None,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """Return the plan of a step that is to really run in so many bytes, kept in a folder.

    The plan is for `SHARE` of the memory, and where that does not suffice, the one that takes
    least: an allocator's rounding and workspaces need some.

    Raises:
        InfeasibleError: the memory does not suffice.
    """
    words = network, f"{batch}x{'x'.join(map(str, image))}", memory or "any", str(dtype)[6:]
    path = folder and folder / f"{'-'.join(map(str, words))}.json"
    if path and path.exists():
        return Plan.load(path)
    make = NETWORKS[network], image, batch
    try:
        found = make_plan(*make, memory and int(SHARE * memory), dtype=dtype)
    except InfeasibleError as error:
        found = make_plan(*make, min(memory, error.least), dtype=dtype)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        found.save(part)
        part.replace(path)
    return found


# Our kernels


def compile_all(network: str, image: Sequence[int], out: Path) -> None:
    """Compile all that a tuner may try in a network's steps, while nobody else needs the cores.

    Of the fastest plan and of that of least memory, for few images: how many decides nothing.
    """
    folder = out / f"{network}-all"
    if (folder / "done").exists() or not compile_target():
        return
    os.nice(19)
    make = NETWORKS[network], image, 2
    plans = [make_plan(*make)]
    try:
        make_plan(*make, 1)
    except InfeasibleError as error:
        plans.append(make_plan(*make, error.least))
    for number, each in enumerate(plans):
        compile_kernels(*make, each, folder / str(number), first=False)
    (folder / "done").touch()


def compile_kernels(
    network: Network, image: Sequence[int], batch: int, plan: Plan, out: Path, first: bool = True
) -> None:
    """Compile in parallel what a planned step launches on the present card; its memory is not used.

    Without this a step compiles one kernel after the other. What they become lies in the cache that
    TRITON_CACHE_DIR names, where other processes find it. Where that can't be, nothing is done.

    Args:
        network: of the step.
        image: [C, H, W].
        batch: images.
        plan: by which the step runs.
        out: a folder for the build, which no other process builds in.
        first: each kernel's first configuration alone, and not all that a tuner tries.
    """
    cache, target = os.environ.get("TRITON_CACHE_DIR"), compile_target()
    if not cache or not target:
        return
    from ..engine.precompile import record_launches
    from ..kernels.launches import build

    def step() -> None:
        model = convert(network.build(), plan=plan)
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        x = torch.empty(batch, *image).contiguous(memory_format=torch.channels_last)
        dtype = plan.dtype
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = network.loss(model(x), network.labels(batch, image))
        loss.backward()

    out.mkdir(parents=True, exist_ok=True)
    Path(cache).mkdir(parents=True, exist_ok=True)
    if not (out / "cache").exists():
        (out / "cache").symlink_to(Path(cache).resolve(), target_is_directory=True)
    try:
        build(record_launches(step, target, first), out)
    except Exception as error:  # then the step compiles them, or says what is wrong
        print(f"compiling kernels of {type(network).__name__}: {error}"[:500], flush=True)


def compile_target() -> str | None:
    """Return what our kernels are compiled for on the present card; None for one not known."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        known = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
        return known if known == "gfx942" else None
    return {(8, 0): "sm_80", (9, 0): "sm_90"}.get(torch.cuda.get_device_capability())


@contextmanager
def untuned() -> Iterator[None]:
    """Run each of our kernels in its first configuration inside, in every thread, untimed."""
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:  # then there are no kernels
        yield
        return

    def first(self, *args, **kwargs):
        self.best_config = self.configs[0]
        return self.fn.run(*args, **kwargs, **self.best_config.all_kwargs())

    with mock.patch.object(Autotuner, "run", first):
        yield


@contextmanager
def quick_tuning() -> Iterator[None]:
    """Let a tuner time each configuration for some 20 ms inside, and not for 125.

    A network asks it some hundred times. Only tuners that have not timed anything yet.
    """
    try:
        from triton.runtime.autotuner import Autotuner
        from triton.testing import do_bench
    except ImportError:  # then there are no kernels
        yield
        return
    with mock.patch.object(Autotuner, "do_bench", partial(do_bench, warmup=2, rep=15), create=True):
        yield


# Providers


def _nothing() -> None:
    pass


class Provider(Protocol):
    """Makes a network's step as someone would run it."""

    def __call__(
        self,
        network: Network,
        image: Sequence[int],
        batch: int,
        *,
        device: torch.device | str,
        memory: int | None = None,
        seed: int = 0,
        plan: Plan | None = None,
        ready: Callable[[], None] = _nothing,
    ) -> Step:
        """Return the step.

        Args:
            network: one of `NETWORKS`, or another.
            image: [C, H, W].
            batch: images.
            device: where it runs.
            memory: bytes that a plan is made for; None for no limit.
            seed: of the parameters and the batch.
            plan: of the step, that `make_plan` returned; None makes one, where one is needed.
            ready: called when what takes long without the device is done: planning before the
                device is touched, compiling in the step's first run, before its first kernel.
        """


def _built(network: Network, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network.build()


def _placed(model: nn.Module, device: torch.device | str) -> nn.Module:
    return model.to(device, memory_format=torch.channels_last)


def eager(
    autocast: torch.dtype | None = None,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Provider:
    """Return the provider of a network as `change` makes it, in float32 or under autocast."""

    def provider(network, image, batch, *, device, memory=None, seed=0, plan=None, ready=_nothing):
        model = change(_built(network, seed))
        ready()
        data = draw_batch(network, image, batch, device, seed)
        return Step(network, _placed(model, device), *data, autocast)

    return provider


def compiled(budget: float, autocast: torch.dtype | None = torch.bfloat16) -> Provider:
    """Return the provider of torch.compile with an activation_memory_budget."""

    def provider(network, image, batch, *, device, memory=None, seed=0, plan=None, ready=_nothing):
        settings: dict[str, Any] = {"activation_memory_budget": budget}
        from torch._functorch import config

        if hasattr(config, "force_non_lazy_backward_lowering"):
            settings["force_non_lazy_backward_lowering"] = True  # both passes before either runs

        def backend(graph, inputs):  # one of its own, so that models share no compiled code
            from torch._inductor.compile_fx import compile_fx

            with config.patch(settings):
                made = compile_fx(graph, inputs)
            ready()
            return made

        model = torch.compile(
            _placed(_built(network, seed), device), backend=backend, dynamic=False
        )
        data = draw_batch(network, image, batch, device, seed)
        return Step(network, model, *data, autocast)

    return provider


def planned(autocast: torch.dtype | None = torch.bfloat16) -> Provider:
    """Return our provider, by the plan for its memory."""

    def provider(network, image, batch, *, device, memory=None, seed=0, plan=None, ready=_nothing):
        if plan is None:
            dtype = autocast or torch.float32
            plan = make_plan(network, image, batch, memory, dtype=dtype)
        model = convert(_built(network, seed), plan=plan, inplace=True)
        ready()
        data = draw_batch(network, image, batch, device, seed)
        return Step(network, _placed(model, device), *data, autocast, plan)

    return provider


BF16 = torch.bfloat16
OURS = "fullres, bf16"
COMPILED = {
    "torch.compile, bf16": 1.0,
    "torch.compile, budget 0.5, bf16": 0.5,
    "torch.compile, budget 0.1, bf16": 0.1,
}  # the budget: a share of what is stored without one
PROVIDERS: dict[str, Provider] = {
    "eager float32": eager(),
    "eager bf16": eager(BF16),
    "checkpoint each block, bf16": eager(BF16, checkpoint_blocks),
    **{name: compiled(budget) for name, budget in COMPILED.items()},
    OURS: planned(),
    "checkpoint each block, float32": eager(None, checkpoint_blocks),
    "fullres, float32": planned(None),
    **{
        f"fullres, {policy}, {name}": eager(autocast, partial(convert, policy=policy, inplace=True))
        for name, autocast in (("bf16", BF16), ("float32", None))
        for policy in POLICIES
    },
}
