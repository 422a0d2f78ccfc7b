"""Convolution layers, ours and torch's, at every shape of our networks: 3 x 1260 x 2048, batch 8.

With a GPU each provider of providers.py runs each pass, checked against float64 in the same
process; a ratio is printed only where both results are right. The card's dispatch table comes out
of it. Layers that take most of a network come first, each is saved when it is done, and a run of
the same commit on the same card into the same folder goes on where the last one stopped.

Without a GPU nothing is timed: what is printed are roofs, predictions at an H200's published rates
by bytes, FLOP and shared-memory traffic, and what the compiler made of our kernels.
"""

import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from ..engine.cards import Hardware, hardware
from ..engine.precompile import record_launches
from ..ops import dispatch
from .case import Case, Results, wrong
from .layers import H200, Layer, collect
from .providers import dispatched, providers
from .record import NOT_BEGUN, NOT_FINISHED, card_answers, resumed, save, table
from .roofline import draw

BATCH = 8
DTYPE = torch.bfloat16
DEVICE = "cuda"
OURS = ("triton", "composed", "fullres")
BASELINES = ("eager", "compile", "cudnn")
# Where there is no card to compile for: this target, and one layer bound by each of the two roofs.
COMPILED_FOR = "sm_90"
COMPILED = ("3x3 16->16 at 1280x2048", "3x3 64->64 at 160x256")
FIGURES = ("ms", "ms_20", "ms_80", "tflop_per_s", "gb_per_s", "of_roof", "peak_mib")
COMPILING = 120  # seconds that a layer takes two slow cores
MIB = 2**20
NEVER = float("inf")  # milliseconds of what was not measured
STOPPED = f"begun, and not ended {NOT_FINISHED}"


def run(out: Path, seconds: float | None = None) -> list[dict]:
    """Measure, or predict where there is no GPU; save kernels.json, .csv, a plot; return the rows.

    Args:
        out: the folder.
        seconds: begin no other layer where it would end later than that.
    """
    layers = collect()
    out.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        return _measure(layers, out, seconds)
    return _predict(layers, out, seconds)


def _predict(layers: dict[Layer, Counter], out: Path, seconds: float | None) -> list[dict]:
    begun = time.monotonic()
    print("Convolution layers: NOT RUN ON A CARD. There is no GPU here, so nothing was timed, of")
    print("ours, of cuDNN or of torch.compile; no memory was measured, no result checked.")
    print(f"Predicted from bytes, FLOP and shared-memory traffic at the rates of an {H200.name}:")
    print(f"{H200.copy / 1e12} TB/s, {H200.product / 1e12:.0f} TFLOP/s. Instructions and latencies")
    print("are not in it. Whole layers, forward and backward:\n")
    rows = [predicted_row(layer, uses, p) for layer, uses in layers.items() for p in layer.passes]
    save("kernels", rows, out)
    whole = [row for row in rows if row["pass"] == "layer"]
    shown = ("layer", "uses", "bound_by", "roof_ms", "predicted_ms", "eager_ms", "compile_ms")
    print(table([{k: row[k] for k in (*shown, "over_eager", "over_compile")} for row in whole]))
    print("\nAll convolution layers of a network's training step, predicted:\n")
    print(table(network_rows(layers)))
    points = {
        f"{name}, predicted": [
            (row["flop_per_byte"], row["computes_tflop"] / row[key] * 1e3) for row in whole
        ]
        for name, key in {"ours": "predicted_ms", "eager": "eager_ms"}.items()
    }
    draw(out / "roofline.png", H200, points, "Whole layers, predicted: nothing was measured")

    print(
        f"\nWhat the compiler makes of our kernels on {COMPILED_FOR}; no card is needed for that:\n"
    )
    compiled = []
    for layer in layers:
        late = seconds is not None and time.monotonic() - begun + COMPILING > seconds
        if layer.name in COMPILED and not late:
            compiled += compile_rows([layer], BATCH, COMPILED_FOR, out / "compiled")
    compiled = list({json.dumps(row): row for row in compiled}.values())  # layers share some
    shown = ("kernel", "registers", "spill_bytes", "shared_bytes", "wgmma", "mma_sync", "excess")
    print(table([{k: row[k] for k in (*shown, "variant")} for row in compiled]))
    save("kernels_compiled", compiled, out)
    return rows


def predicted_row(layer: Layer, uses: Counter, pass_: str) -> dict:
    """Return a pass's work and its predicted milliseconds at an H200's rates."""
    ours = layer.predicted(pass_, BATCH, H200) * 1e3
    torchs = dict.fromkeys(("eager_ms", "compile_ms", "over_eager", "over_compile"))
    if pass_ in ("forward", "layer"):
        for name in ("eager", "compile"):
            ms = layer.torch_predicted(pass_, BATCH, H200, merged=name == "compile") * 1e3
            torchs |= {f"{name}_ms": ms, f"over_{name}": ms / ours}
    work = _work(layer, uses, pass_, BATCH, H200)
    return {**work, "predicted_ms": ours, **torchs, "measured": "not run on a card"}


def network_rows(layers: dict[Layer, Counter]) -> list[dict]:
    """Return the predicted milliseconds of all convolution layers of each network's step."""
    columns: dict[str, Callable[[Layer], float]] = {
        "eager_ms": lambda layer: layer.torch_predicted("layer", BATCH, H200, merged=False),
        "compile_ms": lambda layer: layer.torch_predicted("layer", BATCH, H200, merged=True),
        "predicted_ms": lambda layer: layer.predicted("layer", BATCH, H200),
        "roof_ms": lambda layer: layer.roof("layer", BATCH, H200),
    }

    def total(network: str, seconds: Callable[[Layer], float]) -> float:
        return sum(uses[network] * seconds(layer) * 1e3 for layer, uses in layers.items())

    networks = dict.fromkeys(network for uses in layers.values() for network in uses)
    return [
        {"network": network} | {name: total(network, each) for name, each in columns.items()}
        for network in networks
    ]


def compile_rows(layers: Iterable[Layer], N: int, target: str, out: Path) -> list[dict]:
    """Compile what our passes of these layers launch, in parallel, into out; a row a variant."""
    from ..kernels.launches import build, judged

    def step() -> None:
        for layer in layers:
            for provider, calls in providers(Case(layer, N, DTYPE, "cpu"), compiled=False).items():
                for call in calls.values() if provider in OURS else ():
                    call()

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rcompiled {done} of {total}", end="", file=sys.stderr, flush=True)

    return judged(build(record_launches(step, target), out, progress))


def _work(layer: Layer, uses: Counter, pass_: str, N: int, rates: Hardware) -> dict:
    moved, flop = layer.bytes(pass_, N), layer.flop(pass_, N)
    return {
        "layer": layer.name,
        "uses": ", ".join(f"{name} {count}" for name, count in uses.items()),
        "batch": N,
        "dtype": str(DTYPE).removeprefix("torch."),
        "pass": pass_,
        "moves_gb": moved / 1e9,
        "computes_tflop": flop / 1e12,
        "flop_per_byte": flop / moved,
        "bound_by": layer.bound(pass_, N, rates),
        "roof_ms": layer.roof(pass_, N, rates) * 1e3,
    }


def _measure(layers: dict[Layer, Counter], out: Path, seconds: float | None) -> list[dict]:
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # references of 16-bit results are float32
    os.environ["TRITON_CACHE_DIR"] = str((out / "compiled" / "cache").resolve())
    rates = _rates()
    print(
        f"Measured: copy {rates.copy / 1e12:.2f} TB/s, product {rates.product / 1e12:.0f} TFLOP/s"
    )
    dispatch_table = out / dispatch.table_name(rates.name)
    kept = resumed("kernels", out)
    rows = [row for row in kept if row["wrong"] not in (NOT_BEGUN, STOPPED)]
    stopped = {row["layer"] for row in kept if row["wrong"] == STOPPED}  # others come first

    def decide(fresh: list[dict]) -> Path:
        dispatch.write_table(dispatch_table, table_times([*rows, *fresh], layers))
        return dispatch_table

    def keep(wrong: str, names: Iterable[str]) -> None:
        """Save the rows, and one for each of these layers, that says why it has none."""
        columns = list(rows[0]) if rows else ["layer", "pass", "provider", "wrong"]
        empty = dict.fromkeys(columns) | {"pass": "", "provider": "", "wrong": wrong}
        save("kernels", [*rows, *({**empty, "layer": name} for name in names)], out)

    begun, longest = time.monotonic(), 0.0
    for layer, uses in sorted(layers.items(), key=lambda item: item[0].name in stopped):
        if layer.name in {row["layer"] for row in rows}:
            continue
        spent = time.monotonic() - begun
        if seconds is not None and spent + longest > seconds:
            break
        stopped.add(layer.name)
        keep(STOPPED, stopped)
        try:
            fresh = _measured(layer, uses, rates, out / "compiled", decide)
        except Exception as error:  # one layer's: the others are measured all the same
            work = _work(layer, uses, "layer", BATCH, rates)
            fresh = with_ratios([{**work, "provider": "fullres", **_failed(error)}])
        print(f"\n{fresh[0]['uses']}\n{table([_shown(row) for row in fresh])}", flush=True)
        rows += fresh
        stopped.discard(layer.name)
        save("kernels", rows, out)
        if not card_answers():
            print(f"The card's context is lost: the next run goes on behind {layer.name}.")
            break
        longest = max(longest, time.monotonic() - begun - spent)

    print(f"\nWhole layers, forward and backward, as dispatched:\n\n{table(_summary(rows))}")
    done = {row["layer"] for row in rows}
    missing = [layer.name for layer in layers if layer.name not in done]
    if missing:
        print(f"\nNOT MEASURED for want of time; run it again to go on: {'; '.join(missing)}")
    keep(NOT_BEGUN, missing)
    elsewhere = [t for t in dispatch.read_table(decide([])).values() if t[0] > t[1]]
    print(f"\nDispatch table in {dispatch_table}: {len(elsewhere)} passes go elsewhere.")
    points = defaultdict(list)
    for row in rows:
        if row["pass"] == "layer" and not row["wrong"]:
            points[row["provider"]].append((row["flop_per_byte"], row["tflop_per_s"]))
    draw(out / "roofline.png", rates, points, "Whole layers, forward and backward")
    if failed := [row for row in rows if row["provider"] in OURS and row["wrong"]]:
        names = "; ".join(f"{r['layer']} {r['pass']} {r['provider']}: {r['wrong']}" for r in failed)
        raise SystemExit(f"results of ours were WRONG: {names}")
    return rows


def _measured(
    layer: Layer,
    uses: Counter,
    rates: Hardware,
    build: Path,
    decide: Callable[[list[dict]], Path],
) -> list[dict]:
    """Return a row for each provider and pass of a layer.

    build is the folder to compile in, decide returns a dispatch table that knows these rows too.
    """
    N = _batch(layer)
    if target := _target():
        compile_rows(
            [layer], N, target, build
        )  # on all cores at once; the tuner would do it on one
    torch._dynamo.reset()
    case = Case(layer, N, DTYPE, DEVICE)
    work = {pass_: _work(layer, uses, pass_, N, rates) for pass_ in layer.passes}

    def row(provider: str, pass_: str, call: Callable[[], Results]) -> dict:
        return {**work[pass_], "provider": provider, **_figures(case, call, work[pass_])}

    every = [(name, *call) for name, calls in providers(case).items() for call in calls.items()]
    rows = [row(provider, pass_, call) for provider, pass_, call in every]
    with mock.patch.dict(os.environ, {dispatch.VARIABLE: str(decide(rows))}):
        rows.append(row("fullres", "layer", dispatched(case)))
    torch.cuda.empty_cache()
    return with_ratios(rows)


def _figures(case: Case, call: Callable[[], Results], work: dict) -> dict:
    """Return a call's figures: its first run compiles and tunes, its second is checked."""
    from triton.testing import do_bench

    try:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        disagree = ", ".join(wrong(case, results))
        del results
        times = torch.tensor(do_bench(call, warmup=25, rep=100, return_mode="all"))
    except Exception as error:  # one provider's: the others are measured all the same
        return _failed(error)
    low, ms, high = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8])).tolist()
    rates = work["computes_tflop"] / ms * 1e3, work["moves_gb"] / ms * 1e3, work["roof_ms"] / ms
    figures = zip(FIGURES, (ms, low, high, *rates, peak / MIB), strict=True)
    return {"wrong": disagree, **dict(figures)}


def _failed(error: Exception) -> dict:
    return {"wrong": f"{type(error).__name__}: {error}"[:300], **dict.fromkeys(FIGURES)}


def with_ratios(rows: list[dict]) -> list[dict]:
    """Return a layer's rows with how much longer each of BASELINES takes for the same pass.

    "" where a baseline has no such pass, "WRONG" where one of the two results is not right.
    """
    known = {(row["provider"], row["pass"]): row for row in rows}

    def ratio(row: dict, baseline: str) -> float | str:
        other = known.get((baseline, row["pass"]))
        if other is None:
            return ""
        return "WRONG" if row["wrong"] or other["wrong"] else other["ms"] / row["ms"]

    return [{**row, **{f"over_{b}": ratio(row, b) for b in BASELINES}} for row in rows]


def table_times(
    rows: Iterable[dict], layers: Iterable[Layer]
) -> list[tuple[dispatch.Shape, float, float]]:
    """Return what a dispatch table holds, from rows of these layers.

    A table knows no image sizes: the times of layers that differ in nothing else are added up.
    What was not measured, or was wrong, on either side is left out.
    """
    known = {layer.name: layer for layer in layers}
    times = {(r["layer"], r["pass"], r["provider"]): r["ms"] for r in rows if not r["wrong"]}
    added: dict[dispatch.Shape, tuple[float, float]] = {}

    def best(name: str, pass_: str) -> float:
        return min(times.get((name, pass_, provider), NEVER) for provider in ("triton", "composed"))

    for name, layer in known.items():
        for pass_ in layer.passes[:-1]:
            ours = times.get((name, pass_, "triton"), NEVER)
            other = times.get((name, pass_, "composed"), NEVER)
            if pass_ == "backward":
                other = best(name, "dgrad") + best(name, "wgrad")
            if max(ours, other) < NEVER:
                shape = layer.shape(pass_, DTYPE)
                before = added.get(shape, (0.0, 0.0))
                added[shape] = before[0] + ours, before[1] + other
    return [(shape, *both) for shape, both in added.items()]


def _shown(row: dict) -> dict:
    hidden = ("uses", "dtype", "moves_gb", "computes_tflop", "flop_per_byte", "bound_by")
    return {name: value for name, value in row.items() if name not in hidden}


def _summary(rows: list[dict]) -> list[dict]:
    names = ("layer", "ms", "roof_ms", "of_roof", "peak_mib", "over_eager", "over_compile")
    return [{k: row[k] for k in names} for row in rows if row["provider"] == "fullres"]


def _batch(layer: Layer) -> int:
    """Return the largest batch up to BATCH of which ten times input and output fit."""
    return max(1, min(BATCH, torch.cuda.mem_get_info()[0] // (10 * sum(layer.images(1)))))


def _target() -> str | None:
    """Return this card's name among those that we compile for, None for another card."""
    if torch.version.hip:
        known = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
        return known if known == "gfx942" else None
    return {(8, 0): "sm_80", (9, 0): "sm_90"}.get(torch.cuda.get_device_capability())


def _rates() -> Hardware:
    """Return this card with the rates of a copy and of a large product as measured."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = do_bench(lambda: target.copy_(source), warmup=50, rep=200, return_mode="median")
    a = torch.randn(8192, 8192, device="cuda").to(DTYPE)
    product = do_bench(lambda: a @ a, warmup=50, rep=200, return_mode="median")
    rates = {"copy": 2 * source.numel() / copy * 1e3, "product": 2 * 8192**3 / product * 1e3}
    return replace(hardware(), name=torch.cuda.get_device_name(), **rates)
