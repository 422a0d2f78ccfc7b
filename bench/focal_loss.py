"""The focal losses against eager composition, torch.compile of it, torchvision and a copy's speed.

Workloads: the detector's planes (24 images of 3 classes, 1280 x 2048), planar and channels_last; a
one-stage detector's anchors (64 images, 200,000 anchors, 80 classes); and the last 1x1 convolution
with the loss of the planes, 16 features. Each provider's loss and gradient are checked against
float64 on a slice in the same process, then timed: forward, and forward with backward.

Without a GPU nothing is timed. What is printed is the least time by bytes at an H200's copy speed,
the bytes that each provider allocates beyond its inputs (counted on fake tensors, exact), and what
the compiler made of our kernels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..engine.meter import LiveBytes
from ..ops.focal_loss import softmax_focal_loss
from ..ops.linear_focal_loss import linear_focal_loss
from ..ops.sigmoid_focal_loss import sigmoid_focal_loss
from .record import NOT_BEGUN, card_answers, resumed, save, table

COPY = 4.3e12  # bytes a second of a copy on an H200, as published by those who measured it
COMPILED_FOR = ("sm_90", "sm_80", "gfx942")
FIGURES = (
    "forward_ms", "step_ms_20", "step_ms", "step_ms_80", "step_gb_per_s", "forward_of_copy",
    "step_of_copy", "peak_beyond_mib",
)  # fmt: skip
COMPILING = 60  # seconds that compiling every kernel may take
MIB = 2**20
GAMMA = 2.0


@dataclass(frozen=True)
class Workload:
    """Tensors of a loss, the providers that compute it, and the bytes that it must move.

    `make` returns leaves that ask for gradients, and the rest; a provider takes both, unpacked.
    """

    name: str
    make: Callable[[int, str], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    providers: dict[str, Callable[..., Tensor]]
    images: int
    forward_bytes: int  # an image
    step_bytes: int  # forward and backward


def eager_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean focal loss from torch operations, in float32 as under autocast."""
    log_p = logits.float().log_softmax(1).gather(1, labels.long().unsqueeze(1)).squeeze(1)
    return -((1 - log_p.exp()) ** GAMMA * log_p).mean()


def eager_sigmoid(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of torchvision's formula, in float32 as under autocast."""
    x, t = inputs.float(), targets.float()
    p = x.sigmoid()
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    loss = ce * (1 - (p * t + (1 - p) * (1 - t))) ** GAMMA
    return ((0.25 * t + 0.75 * (1 - t)) * loss).sum()


def eager_linear(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the mean focal loss of a 1x1 convolution's logits."""
    return eager_softmax(F.conv2d(features, weight), labels)


def workloads() -> list[Workload]:
    """Return the workloads, with torchvision's loss among the providers where it is installed."""
    H, W, planes, features, anchors = 1280, 2048, 24, 16, (200_000, 80)
    pixels, values = H * W, anchors[0] * anchors[1]

    def random(shape, device, last=False, deviation=1.0):
        layout = torch.channels_last if last else torch.contiguous_format
        t = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=layout)
        return t.normal_(0, deviation).requires_grad_()

    def labels(N, device):
        return torch.randint(3, (N, H, W), dtype=torch.uint8, device=device)

    def softmax_inputs(last):
        return lambda N, device: ((random((N, 3, H, W), device, last),), (labels(N, device),))

    def sigmoid_inputs(N, device):
        targets = torch.zeros((N, *anchors), dtype=torch.bfloat16, device=device)
        targets[:, ::50, 3] = 1
        return (random((N, *anchors), device),), (targets,)

    def linear_inputs(N, device):
        x, weight = (
            random((N, features, H, W), device, True),
            random((3, features, 1, 1), device, False, 0.25),
        )
        return (x, weight), (labels(N, device),)

    softmax = {"fullres": softmax_focal_loss, "eager": eager_softmax}
    sigmoid = {
        "fullres": lambda x, t: sigmoid_focal_loss(x, t, reduction="sum"),
        "eager": eager_sigmoid,
    }
    linear = {"fullres": lambda x, w, y: linear_focal_loss(x, y, w), "eager": eager_linear}
    torchvision = _torchvision()
    if torchvision is not None:
        sigmoid["torchvision"] = lambda x, t: torchvision(x, t, reduction="sum")
    return [
        Workload("planes, planar", softmax_inputs(False), softmax, planes, 7 * pixels, 20 * pixels),
        Workload(
            "planes, channels_last", softmax_inputs(True), softmax, planes, 7 * pixels, 20 * pixels
        ),
        Workload("anchors", sigmoid_inputs, sigmoid, 64, 4 * values, 10 * values),
        Workload(
            "1x1 and planes", linear_inputs, linear, planes,
            (2 * features + 1) * pixels, (6 * features + 2) * pixels,
        ),
    ]  # fmt: skip


def run(out: Path, seconds: float | None = None) -> list[dict]:
    """Run the benchmark of this machine, save focal_loss.json and .csv in out, return the rows.

    Args:
        out: the folder; on a card what an earlier run measured in it is kept.
        seconds: after which no other workload is begun on a card, and nothing is compiled without.

    Raises:
        SystemExit: a result of ours was wrong; all rows are saved.
    """
    if torch.cuda.is_available():
        rows = _measure(workloads(), out, seconds)
        ours = [row for row in rows if row["provider"] == "fullres"]
        if any(row["wrong"] not in ("", NOT_BEGUN) for row in ours):
            raise SystemExit("focal losses: a result of ours was WRONG, or there was none")
        return rows
    print("Focal losses: NOT RUN ON A CARD. There is no GPU here, so nothing was timed, and no")
    print("provider's result was checked on a device.")
    print("Bytes beyond the inputs, counted on fake tensors, and the roof at 4.3 TB/s:\n")
    rows = [_predicted(w, name) for w in workloads() for name in w.providers]
    print(table(rows))
    save("focal_loss", rows, out)
    if seconds is None or seconds > COMPILING:
        compiled = _compiled()
        print("\nWhat the compiler made of the kernels (no card is needed for that):\n")
        print(table(compiled))
        save("focal_loss_compiled", compiled, out)
    return rows


def _predicted(workload: Workload, provider: str) -> dict:
    """Return a provider's bytes, and the least time of the workload."""
    with FakeTensorMode(), LiveBytes() as live:
        leaves, rest = workload.make(workload.images, "cpu")
        inputs = live.now
        live.timeline.clear()
        loss = workload.providers[provider](*leaves, *rest)
        stored = live.now - inputs
        torch.autograd.grad(loss, leaves)
    gradients = sum(t.numel() * t.itemsize for t in leaves)
    return {
        "workload": workload.name,
        "provider": provider,
        "roof_forward_ms": workload.images * workload.forward_bytes / COPY * 1e3,
        "roof_step_ms": workload.images * workload.step_bytes / COPY * 1e3,
        "inputs_mib": inputs / MIB,
        "stored_mib": stored / MIB,
        "gradients_mib": gradients / MIB,
        "peak_beyond_mib": (live.peak - inputs) / MIB,
        "measured": "not run on a card",
    }


def _compiled() -> list[dict]:
    from ..kernels import aot
    from ..kernels.focal_loss import softmax_focal_loss_variant as softmax
    from ..kernels.linear_focal_loss import linear_focal_loss_variant as linear
    from ..kernels.sigmoid_focal_loss import sigmoid_focal_loss_variant as sigmoid

    rows = []
    for target in COMPILED_FOR:
        products = "ieee" if target == "gfx942" else "tf32"
        for backward in (False, True):
            for name, variant in {
                "planes, planar": softmax("bf16", 3, backward=backward),
                "planes, channels_last": softmax("bf16", 3, backward=backward, channels_last=True),
                "anchors": sigmoid("bf16", backward=backward),
                "1x1 and planes": linear("bf16", 16, 3, backward=backward, products=products),
            }.items():
                rows.append({"workload": name, **aot.report(variant, target).row()})
    return rows


def _measure(workloads: Sequence[Workload], out: Path, seconds: float | None) -> list[dict]:
    begun = time.monotonic()
    roof = _copy_speed()
    print(f"Copy measured: {roof / 1e12:.2f} TB/s\n")
    rows = [row for row in resumed("focal_loss", out) if row["wrong"] != NOT_BEGUN]
    done, longest = {row["workload"] for row in rows}, 0.0
    for workload in workloads:
        if workload.name in done:
            continue
        spent = time.monotonic() - begun
        late = seconds is not None and spent + longest > seconds
        if late or not card_answers():
            N, found = workload.images, dict.fromkeys(workload.providers, _failed(NOT_BEGUN))
        else:
            N, found = _found(workload, roof)
        rows += [
            {"workload": workload.name, "images": N, "provider": name, **figures}
            | {"it_over_fullres": _ratio(figures, found["fullres"])}
            for name, figures in found.items()
        ]
        save("focal_loss", rows, out)
        longest = max(longest, time.monotonic() - begun - spent)
    print(table(rows))
    return rows


def _found(workload: Workload, roof: float) -> tuple[int, dict[str, dict]]:
    """Return how many images there were, and each provider's figures."""
    providers = dict(workload.providers)
    providers["compile"] = torch.compile(providers["eager"])
    N, found = workload.images, {}
    try:
        torch.cuda.empty_cache()
        # The largest batch of which the hungriest provider's float32 temporaries fit.
        leaves, rest = workload.make(1, "cuda")
        image = sum(t.numel() * t.itemsize for t in (*leaves, *rest))
        N = max(1, min(N, torch.cuda.mem_get_info()[0] // (24 * image)))
        torch.manual_seed(1)
        leaves, rest = workload.make(N, "cuda")
        wanted = _checked(workload, leaves, rest)
    except Exception as error:  # one workload's: the others are measured all the same
        return N, dict.fromkeys(providers, _failed(f"{type(error).__name__}: {error}"))
    for name, call in providers.items():
        try:
            found[name] = _timed(call, leaves, rest, wanted, workload, N, roof)
        except Exception as error:  # one provider's
            found[name] = _failed(f"{type(error).__name__}: {error}")
    return N, found


def _ratio(it: dict, ours: dict) -> float | str:
    """Return how many times as long it takes; "" for no time, WRONG where a result is."""
    if it["step_ms"] is None or ours["step_ms"] is None:
        return ""
    return "WRONG" if it["wrong"] or ours["wrong"] else it["step_ms"] / ours["step_ms"]


def _failed(how: str) -> dict:
    return {"wrong": how[:300], **dict.fromkeys(FIGURES)}


def _checked(workload: Workload, leaves, rest) -> tuple[float, Tensor]:
    """Return the loss in float64, and the first image's gradient, of eager composition by images.

    Float64 of a whole batch may not fit; a mean over images of one size is the mean of theirs.
    """
    images, *shared = leaves
    N, total, gradient = len(images), 0.0, None
    share = 1.0 if workload.name == "anchors" else 1.0 / N
    for n in range(N):
        part = images[n : n + 1].detach().double().requires_grad_()
        others = [t.detach().double() for t in shared], [t[n : n + 1] for t in rest]
        loss = share * _wide(workload)(part, *others[0], *others[1])
        total += loss.item()
        if n == 0:
            (gradient,) = torch.autograd.grad(loss, part)
    return total, gradient


def _wide(workload: Workload) -> Callable[..., Tensor]:
    """Return the composition in its inputs' own float64."""

    def softmax(logits, labels):
        log_p = logits.log_softmax(1).gather(1, labels.long().unsqueeze(1)).squeeze(1)
        return -((1 - log_p.exp()) ** GAMMA * log_p).mean()

    def sigmoid(x, t):
        t = t.double()
        p_t = x.sigmoid() * t + (-x).sigmoid() * (1 - t)
        return -((0.25 * t + 0.75 * (1 - t)) * (1 - p_t) ** GAMMA * p_t.log()).sum()

    return {
        "anchors": sigmoid,
        "1x1 and planes": lambda x, w, y: softmax(F.conv2d(x, w), y),
    }.get(workload.name, softmax)


def _timed(call, leaves, rest, wanted, workload, N, roof) -> dict:
    """Return one provider's figures; the first call tunes and compiles, the second is checked."""
    from triton.testing import do_bench

    def step():
        return torch.autograd.grad(call(*leaves, *rest), leaves)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = call(*leaves, *rest)
    gradients = torch.autograd.grad(loss, leaves)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    # Logits that a convolution rounds, and gradients that are, differ by a unit of bfloat16.
    unit, (value, gradient) = torch.finfo(torch.bfloat16).eps, wanted
    agrees = abs(loss.item() - value) <= 1e-3 * abs(value)
    error = (gradients[0][:1].double() - gradient).abs()
    agrees &= bool((error <= 8 * unit * (gradient.abs() + gradient.abs().mean())).all())
    del loss, gradients, error
    forward_ms = do_bench(lambda: call(*leaves, *rest), warmup=50, rep=200, return_mode="median")
    times = torch.tensor(do_bench(step, warmup=50, rep=300, return_mode="all"))
    low, median, high = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8])).tolist()
    values = (
        *(forward_ms, low, median, high),
        N * workload.step_bytes / median / 1e6,
        N * workload.forward_bytes / roof * 1e3 / forward_ms,
        N * workload.step_bytes / roof * 1e3 / median,
        peak / MIB,
    )
    wrong = "" if agrees else "differs from float64"
    return {"wrong": wrong, **dict(zip(FIGURES, values, strict=True))}


def _copy_speed() -> float:
    """Return this card's bytes a second in a copy."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = do_bench(lambda: target.copy_(source), warmup=50, rep=200, return_mode="median")
    return 2 * source.numel() / ms * 1e3


def _torchvision() -> Callable[..., Tensor] | None:
    try:
        from torchvision.ops import sigmoid_focal_loss as theirs
    except ImportError:
        return None
    return theirs
