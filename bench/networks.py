"""A whole training step: fused segments under each policy beside eager torch, checked as timed.

On a GPU whole images in bfloat16; without one a part of an image in float32 on the CPU, where the
segments run on plain torch, and where only the ratio says something.
"""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..engine import convert, fusion
from ..models import resnet50, uresnet
from .record import save, table

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a21": lambda: uresnet("a21"),
    "uresnet": lambda: uresnet("uresnet"),
    "resnet50": resnet50,
}
ROUNDS = 5


def run(out: Path) -> list[dict]:
    """Time every network's step; print a table, save it in out, return its rows."""
    gpu = torch.cuda.is_available()
    device, size = ("cuda", (1260, 2048)) if gpu else ("cpu", (320, 512))
    rows = []
    for network in NETWORKS if gpu else ["a21"]:
        rows += measure(network, size, device)
    if not gpu:
        print("There is no GPU here: a part of an image on the CPU, and not what a card would do.")
    print(table(rows))
    save("networks", rows, out)
    return rows


def measure(network: str, size: tuple[int, int], device: str, rounds: int = ROUNDS) -> list[dict]:
    """Return a row a provider; all take turns, `rounds` times after a first that is not timed."""
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device, memory_format=torch.channels_last)
    providers = {"eager": copy.deepcopy(model)}
    for policy in fusion.POLICIES:
        providers[f"fullres, {policy}"] = convert(copy.deepcopy(model), policy=policy, inplace=True)
    x = torch.randn(1, 3, *size, device=device)
    found = {name: _step(each, x) for name, each in providers.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    peaks = dict.fromkeys(providers, float("nan"))
    for _ in range(rounds):
        for name, each in providers.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            _step(each, x)
            seconds[name].append(time.perf_counter() - start)
            if device == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    exact = copy.deepcopy(model).double() if device == "cpu" else None
    truth = _step(exact, x.double()) if exact is not None else found["eager"]
    error = _gap(found["eager"], truth)
    base = statistics.median(seconds["eager"])
    rows = []
    for name, times in seconds.items():
        gap = _gap(found[name], truth)
        right = gap <= max(4 * error, 2e-2 if device == "cuda" else 1e-5)
        median = statistics.median(times)
        rows.append(
            {
                "network": network,
                "image": f"1x3x{size[0]}x{size[1]}",
                "device": device,
                "provider": name,
                "step_s": median,
                "fastest_s": min(times),
                "slowest_s": max(times),
                "peak_gib": peaks[name],
                "gradient_error": gap,
                "over_eager": median / base if right else "WRONG",
            }
        )
    return rows


def _step(model: nn.Module, x: Tensor) -> Tensor:
    """Return all gradients of one training step, in one vector."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        outputs = tree_leaves(model(x))
    sum(o.float().square().mean() if x.is_cuda else o.square().mean() for o in outputs).backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def _gap(gradients: Tensor, truth: Tensor) -> float:
    """Return how far gradients are from true ones, relative to these, as vectors."""
    return ((gradients.double() - truth.double()).norm() / truth.double().norm()).item()
