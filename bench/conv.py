"""conv2d forward against cuDNN in channels_last, and both against what the card can do.

With a GPU: times, after the results were checked in the same process. Without one nothing is timed:
the roofs are printed as predictions, with what the compiler made of the kernel for three devices.
"""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from ..ops.conv import conv2d
from .record import save, table

# C, K, R, H, W: the layers at the published network's two highest resolutions, its stem and head.
SHAPES = [
    (16, 16, 3, 1280, 2048),
    (32, 32, 3, 1280, 2048),
    (64, 64, 3, 1280, 2048),
    (16, 32, 1, 1280, 2048),
    (32, 16, 1, 1280, 2048),
    (3, 16, 3, 1280, 2048),
    (32, 32, 3, 640, 1024),
    (64, 64, 3, 640, 1024),
    (128, 128, 3, 320, 512),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COMPILED_FOR = ("sm_90", "sm_80", "gfx942")
# Measured on an H200 by its owners: bytes a second of a copy, FLOP a second of a bfloat16 product.
H200 = {"copy": 4.3e12, "bf16": 790e12, "fp16": 790e12, "fp32": 67e12}
MIB = 2**20


def run(out: Path) -> list[dict]:
    """Run the benchmark of this machine, save conv.json and .csv in out, return the rows."""
    if torch.cuda.is_available():
        rows = _measure(out)
    else:
        print("conv2d forward: NOT RUN ON A CARD. There is no GPU here, so nothing was timed.")
        print("Predicted roofs, at an H200's 4.3 TB/s copy and 790 TFLOP/s of bfloat16:\n")
        rows = [
            {**_work(N=8, shape=shape, dtype="bf16", roof=H200), "measured": "not run on a card"}
            for shape in SHAPES
        ]
        print(table(rows))
        compiled = _compiled()
        print("\nWhat the compiler made of the kernel (no card is needed for that):\n")
        print(table(compiled))
        save("conv_compiled", compiled, out)
    save("conv", rows, out)
    return rows


def _work(N: int, shape: tuple[int, ...], dtype: str, roof: dict[str, float]) -> dict:
    """Return a shape's least work and the least time that takes."""
    C, K, R, H, W = shape
    size = DTYPES[dtype].itemsize
    data = (N * H * W * (C + K) + K * C * R * R) * size
    flop = 2 * N * H * W * C * K * R * R
    times = {"memory": data / roof["copy"] * 1e3, "arithmetic": flop / roof[dtype] * 1e3}
    bound = max(times, key=times.get)
    return {
        "layer": f"{R}x{R} {C}->{K}",
        "image": f"{N}x{H}x{W}",
        "dtype": dtype,
        "moves_gb": data / 1e9,
        "computes_tflop": flop / 1e12,
        "bound_by": bound,
        "roof_ms": times[bound],
    }


def _compiled() -> list[dict]:
    from ..kernels import aot
    from ..kernels.conv import CONFIGS, ROWS_CONFIGS, conv2d_fwd_variant

    rows = []
    for C, K, R in dict.fromkeys(shape[:3] for shape in SHAPES):
        for target in COMPILED_FOR:
            for configs in (CONFIGS, ROWS_CONFIGS) if R == 3 and C <= 32 else (CONFIGS,):
                # Every configuration for the card that we tune on, the portable one for others.
                for i, config in enumerate(configs if target == "sm_90" else configs[:1]):
                    variant = conv2d_fwd_variant("bf16", C, K, R, bias=False, config=config)
                    row = aot.report(variant, target).row()
                    layer = {"layer": f"{R}x{R} {C}->{K}", "kernel": row.pop("kernel")}
                    rows.append({**layer, "config": i, **row})
    return rows


def _measure(out: Path) -> list[dict]:
    from ..kernels.conv import conv2d_fwd_kernel, conv2d_fwd_kernel_for, conv2d_fwd_rows_kernel

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # float32 means IEEE, on both sides
    roof = _roof()
    print(
        f"Roof measured: copy {roof['copy'] / 1e12:.2f} TB/s; products "
        + ", ".join(f"{name} {roof[name] / 1e12:.0f}" for name in DTYPES)
        + " TFLOP/s\n"
    )
    rows, tuned = [], []
    cases = [(shape, "bf16") for shape in SHAPES] + [(SHAPES[0], "fp16"), (SHAPES[0], "fp32")]
    for shape, dtype in cases:
        C, K, R, H, W = shape
        N = _batch(shape, DTYPES[dtype])
        work = _work(N, shape, dtype, roof)
        x, weight = _inputs(N, shape, DTYPES[dtype])
        measured = {}
        for provider, call in _providers(x, weight, R // 2).items():
            measured[provider] = _time(call, x, weight, R // 2, work)
        kernel = conv2d_fwd_kernel_for(C, K, R, DTYPES[dtype].itemsize)
        best = f"{kernel.base_fn.__name__}: {kernel.best_config}"
        for provider, figures in measured.items():
            correct = measured["fullres"]["agrees"] and figures["agrees"]
            ratio = measured["cudnn"]["ms"] / figures["ms"] if correct else "WRONG"
            config = best if provider == "fullres" else ""
            rows.append(
                {**work, "provider": provider, **figures, "cudnn_over_it": ratio, "config": config}
            )
        # Each configuration of each kernel that can do it, also where the other is preferred.
        rows_too = R == 3 and C <= 32 and dtype != "fp32"
        kernels = [conv2d_fwd_kernel, *([conv2d_fwd_rows_kernel] if rows_too else [])]
        for kernel, config in [(k, c) for k in kernels for c in k.configs]:
            call = _providers(x, weight, R // 2)["fullres"]
            ms = _time_pinned(kernel, config, call)
            name = f"{kernel.base_fn.__name__}: {config}"
            tuned.append({**work, "config": name, "ms": ms, "of_roof": work["roof_ms"] / ms})
        del x, weight, call
        torch.cuda.empty_cache()
    print(table([{k: v for k, v in row.items() if k != "config"} for row in rows]))
    save("conv_configs", tuned, out)
    if not all(row["agrees"] for row in rows if row["provider"] == "fullres"):
        save("conv", rows, out)
        raise SystemExit("conv2d forward: a result was WRONG")
    return rows


def _providers(x, weight, padding) -> dict[str, Callable[[], torch.Tensor]]:
    return {
        "fullres": lambda: conv2d(x, weight, padding=padding),
        "cudnn": lambda: F.conv2d(x, weight, padding=padding),
    }


def _inputs(N: int, shape: tuple[int, ...], dtype: torch.dtype):
    C, K, R, H, W = shape
    rng = torch.Generator("cuda").manual_seed(1)
    image = torch.empty(N, C, H, W, dtype=dtype, device="cuda", memory_format=torch.channels_last)
    weight = torch.empty(K, C, R, R, dtype=dtype, device="cuda", memory_format=torch.channels_last)
    weight.normal_(0, (C * R * R) ** -0.5, generator=rng)
    return image.normal_(generator=rng), weight


def _batch(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the largest batch up to 8 of which four times input and output fit."""
    C, K, _, H, W = shape
    image = (C + K) * H * W * dtype.itemsize
    return max(1, min(8, torch.cuda.mem_get_info()[0] // (4 * image)))


def _time(call, x, weight, padding, work) -> dict:
    """Return one provider's figures; the first call tunes, the second is checked and metered."""
    from triton.testing import do_bench

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    agrees = _agrees(y, x, weight, padding)
    del y
    times = torch.tensor(do_bench(call, warmup=50, rep=300, return_mode="all"))
    low, median, high = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {
        "agrees": agrees,
        "ms": median,
        "ms_20_80": f"{low:.4g}..{high:.4g}",
        "tflop_per_s": work["computes_tflop"] / median * 1e3,
        "gb_per_s": work["moves_gb"] / median * 1e3,
        "of_roof": work["roof_ms"] / median,
        "peak_mib": peak / MIB,
    }


def _time_pinned(kernel, config, call) -> float:
    """Return a configuration's median milliseconds; infinite where it does not fit the card."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    from ..kernels import conv
    from ..kernels._tune import pinned

    with (
        mock.patch.object(conv, "conv2d_fwd_kernel_for", return_value=kernel),
        pinned(kernel, config),
    ):
        try:
            return do_bench(call, warmup=25, rep=100, return_mode="median")
        except OutOfResources:
            return float("inf")


def _agrees(y, x, weight, padding) -> bool:
    """Return whether rows of the first and last image agree with float64, as tests/ allow it.

    That is four deviations of a float32 sum's error, and one unit of the dtype for rounding.
    """
    eps = torch.finfo(torch.float32).eps
    R, H = weight.shape[-1], x.shape[2]
    for n in (0, x.shape[0] - 1):
        for h in (0, H // 2, H - 1):
            strip = F.pad(x[n : n + 1], (padding,) * 4)[:, :, h : h + R].double()
            want = F.conv2d(strip, weight.double())
            spread = F.conv2d(strip**2, weight.double() ** 2).sqrt()
            allowed = 4 * eps * weight[0].numel() ** 0.5 * spread
            allowed += torch.finfo(y.dtype).eps * want.abs()
            if not bool(((y[n : n + 1, :, h : h + 1].double() - want).abs() <= allowed).all()):
                return False
    return True


def _roof() -> dict[str, float]:
    """Return this card's bytes a second in a copy, and FLOP a second in large products."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = do_bench(lambda: target.copy_(source), warmup=50, rep=200, return_mode="median")
    roof = {"copy": 2 * source.numel() / ms * 1e3}
    for name, dtype in DTYPES.items():
        n = 4096 if dtype == torch.float32 else 8192
        a = torch.randn(n, n, device="cuda").to(dtype)
        ms = do_bench(lambda a=a: a @ a, warmup=50, rep=200, return_mode="median")
        roof[name] = 2 * n**3 / ms * 1e3
    return roof
