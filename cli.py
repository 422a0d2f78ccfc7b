"""The command line: `fullres COMMAND --help`."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

try:
    import rich.box
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    from .bench import BENCHMARKS, SECTIONS
    from .training.config import TrainConfig
except ModuleNotFoundError as error:
    raise SystemExit(
        f"fullres: the command line needs {error.name}: pip install 'fullres[train]'"
    ) from None

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train convolutional networks on whole, huge images.",
)
console = Console()
EXPECTED = (ValueError, OSError)  # what our own checks raise, with the reason in the message


# Options that several commands have
Model = Annotated[
    str, typer.Option(help="uresnet, resnet18, resnet34, resnet50, resnet101 or resnet152.")
]
Preset = Annotated[str, typer.Option(help="The U-ResNet's preset.")]
Numbers = Annotated[
    str, typer.Option(help="The U-ResNet's numbers other than the preset's, as for train.")
]
ImageSize = Annotated[str, typer.Option(help="Rows x columns of a plane.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Precision = Annotated[str, typer.Option(help="bf16, fp16 or fp32.")]


def main() -> None:
    """Run the command line; expected errors end it with one line and exit code 1."""
    try:
        app()
    except EXPECTED as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _options_of(config: type) -> Callable[[Callable], Callable]:
    """Give a command an option for each field of a configuration; those not named stay None.

    The decorated function is called with its own parameters and with `options`, a dictionary of
    what the user has named.
    """

    def decorate(command: Callable) -> Callable:
        own = inspect.signature(command)
        hints = typing.get_type_hints(config)
        parameters = [p for p in own.parameters.values() if p.name != "options"]
        for option in dataclasses.fields(config):
            text = option.metadata["help"]
            if option.default not in (None, "", False):
                text += f" [default: {option.default}]"
            hint = hints[option.name]
            if len({*typing.get_args(hint)} - {type(None)}) > 1 and not _is_literal(hint):
                hint = str  # the configuration reads a number or a word from it
            kind = Annotated[hint | None, typer.Option(help=text)]
            parameters.append(
                inspect.Parameter(
                    option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind
                )
            )

        @functools.wraps(command)
        def run(**values: Any) -> None:
            named = {option.name: values.pop(option.name) for option in dataclasses.fields(config)}
            command(**values, options={k: v for k, v in named.items() if v is not None})

        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__
        return run

    return decorate


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


@app.command()
@_options_of(TrainConfig)
def train(
    *,
    config: Annotated[
        Path | None, typer.Option(help="YAML of options; those on the command line win.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="'auto', the run in --out if there is one, or a checkpoint.")
    ] = None,
    options: dict[str, Any],
) -> None:
    """Train on whole images; with torchrun, on several GPUs or nodes."""
    from .training.callbacks import GIB, NonFiniteError, StoppedError
    from .training.curves import PICTURE
    from .training.run import BEST, CONFIG, LAST
    from .training.run import train as run

    if config is not None:
        options = {**TrainConfig.read_options(config), **options}
    try:
        summary = run(TrainConfig.from_dict(options, str(config or "options")), resume)
    except StoppedError as stop:
        return console.print(str(stop), highlight=False, soft_wrap=True)
    except NonFiniteError as error:
        raise ValueError(error) from None
    if int(os.environ.get("RANK", 0)) > 0:
        return None
    table = Table("", "", show_header=False, box=rich.box.SIMPLE)
    table.add_row("optimizer steps", str(summary.steps))
    table.add_row("speed", f"{summary.images_per_second:.3g} images/s")
    table.add_row("peak memory", f"{summary.peak_memory / GIB:.2f} GiB")
    if summary.loss is not None:
        table.add_row("loss of the last step", f"{summary.loss:.4g}")
    for name, value in summary.validation.items():
        if not name.startswith("plane"):
            table.add_row(f"validation {name.replace('_', ' ')}", f"{value:.4f}")
    console.print(table)
    _wrote(*(summary.folder / name for name in (LAST, BEST, CONFIG, PICTURE)))


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of fullres train.")],
    data: Annotated[Path, typer.Option(help="Event file to label.")],
    out: Annotated[Path, typer.Option(help="Folder for labels.h5 and the pictures.")],
    truth: Annotated[
        bool, typer.Option(help="Whether the data have labels to compare with.")
    ] = True,
    displays: Annotated[int, typer.Option(help="How many events to draw.")] = 10,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; else the run's.")
    ] = None,
) -> None:
    """Label a file's events; draw charge, truth, prediction and errors."""
    from .training.prediction import predict as run

    with _progress() as bar:
        task = bar.add_task("Predicting", total=None)
        made = run(
            checkpoint,
            data,
            out,
            truth=truth,
            displays=displays,
            device=device,
            precision=precision,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    table = Table("", "", show_header=False, box=rich.box.SIMPLE)
    for name, value in made.metrics.items():
        if not name.startswith("plane"):
            table.add_row(name.replace("_", " "), f"{value:.4f}")
    console.print(table)
    _wrote(made.labels, *made.displays)


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="Event file to write.")],
    events: Annotated[int, typer.Option(help="How many events.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Other seeds give other events.", min=0)] = 0,
    image_size: ImageSize = "1280x2048",
    neutrino_fraction: Annotated[
        float, typer.Option(help="Share of events with a neutrino.")
    ] = 0.9,
    overwrite: Annotated[bool, typer.Option(help="Replace a file of that name.")] = False,
) -> None:
    """Write generated events, in the layout that --data reads."""
    from .events import generate_file
    from .training.config import parse_size

    with _progress() as bar:
        task = bar.add_task("Generating", total=events)
        generate_file(
            out,
            events,
            seed,
            parse_size(image_size),
            neutrino_fraction=neutrino_fraction,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done),
        )
    _wrote(out)


@app.command()
def display(
    data: Annotated[Path, typer.Argument(help="Event file.")],
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    event: Annotated[int, typer.Option(help="Which event; -1 is the last.")] = 0,
    truth: Annotated[bool, typer.Option(help="Draw the labels too.")] = True,
) -> None:
    """Draw one event of a file."""
    from .events import EventFile
    from .events.display import draw_event

    whole = EventFile(data, size=(1, 1), labels=truth).shape(0)
    item = EventFile(data, size=whole, labels=truth)[event]
    title = f"{data.name}, event {item['index']}"
    event_id = item["event_id"].tolist()
    draw_event(item["image"], item.get("labels"), path=out, title=title, event_id=event_id)
    _wrote(out)


@app.command()
def plan(
    model: Model = "uresnet",
    preset: Preset = "uresnet",
    network: Numbers = "",
    image_size: ImageSize = "1260x2048",
    batch_size: Annotated[
        str, typer.Option(help="Images per forward pass; max: as many as the memory suffices for.")
    ] = "1",
    memory: Annotated[str, typer.Option(help="The budget, such as 40GiB or 512MiB.")] = "40GiB",
    host_memory: Annotated[
        str, typer.Option(help="Pinned memory of the host that stored maps may wait in.")
    ] = "0",
    split_batch: Annotated[
        bool,
        typer.Option(
            "--split-batch",
            help="Let a few images run at a time, where no normalisation is by the batch.",
        ),
    ] = False,
    precision: Precision = "bf16",
    hardware: Annotated[
        str | None, typer.Option(help="Card, such as h200; else the one here, or an H200.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, momentum or sgd.")] = "adamw",
    plot: Annotated[Path | None, typer.Option(help="Draw the step's memory into a file.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan, for Plan.load.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how a training step stays within a budget of memory; neither memory nor GPU is needed.

    The step of a U-ResNet includes its focal loss; that of a ResNet ends at the outputs.
    """
    import torch

    from .training.config import parse_size
    from .training.memory import DTYPES, label_bytes, pixel_criterion, plan_step

    if precision not in DTYPES:
        raise ValueError(f"want precision from {', '.join(DTYPES)}; got {precision!r}")
    if batch_size != "max" and not (batch_size.isdecimal() and int(batch_size) > 0):
        raise ValueError(f"want batch_size >= 1, or max; got {batch_size!r}")
    build, channels = _network(model, preset, network)
    size = parse_size(image_size)
    with torch.device("meta"):
        built = build()
    pixels = model == "uresnet"
    found = plan_step(
        built,
        None if batch_size == "max" else int(batch_size),
        (channels, *size),
        memory=memory,
        host_memory=host_memory,
        split_batch=split_batch,
        labels=label_bytes(1, channels, size) if pixels else 0,
        criterion=pixel_criterion() if pixels else None,
        dtype=DTYPES[precision],
        hardware=hardware,
        optimizer=optimizer,
    )
    written = [write(path) for write, path in ((found.plot, plot), (found.save, save)) if path]
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
        return
    if batch_size == "max":
        typer.echo(f"largest batch: {found.input_shape[0]}")
    typer.echo(str(found))  # wide: no console's width would do
    _wrote(*written)


@app.command()
def precompile(
    target: Annotated[
        str, typer.Option(help="Devices to compile for, with commas between.")
    ] = "sm_80,sm_90,gfx942",
    model: Model = "uresnet",
    preset: Preset = "uresnet",
    network: Numbers = "",
    image_size: ImageSize = "1260x2048",
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 1,
    precision: Precision = "bf16",
    policy: Annotated[
        str, typer.Option(help="What segments keep: keep, closing or series.")
    ] = "keep",
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan's file, which says image, batch, precision and what is kept."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the build; a second run compiles what changed.")
    ] = Path("precompiled"),
    first: Annotated[
        bool, typer.Option(help="Each kernel's first configuration alone: a look, in minutes.")
    ] = False,
    strict: Annotated[
        bool, typer.Option(help="Fail if a variant passes a limit without a stated reason.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compile every kernel of a training step ahead of time; no GPU is needed.

    The step of a U-ResNet of three classes includes its focal loss; validation is compiled, too.

    A process that trains with TRITON_CACHE_DIR=OUT/cache, and the same versions, compiles nothing.
    A table of FULLRES_DISPATCH decides here what it decides there.
    """
    import torch

    from .bench.record import table as text_table
    from .engine import Plan
    from .engine.precompile import precompile as run
    from .engine.precompile import training_step
    from .training.config import parse_network, parse_size
    from .training.memory import pixel_criterion

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision not in dtypes:
        raise ValueError(f"want precision from {', '.join(dtypes)}; got {precision!r}")
    _want_folder(out)
    build, channels = _network(model, preset, network)
    # The loss is one of three classes; a network of others is not the trainer's.
    pixels = model == "uresnet" and parse_network(preset, network).classes == 3
    shape, dtype = (batch_size, channels, *parse_size(image_size)), dtypes[precision]
    planned = None if plan is None else Plan.load(plan)
    if planned is not None:
        shape, dtype = planned.input_shape, planned.dtype
    step = training_step(
        _converted(build, policy, planned),
        shape,
        dtype,
        pixel_criterion(labelled=True) if pixels else None,
        validation=True,
    )
    with _progress(stderr=True) as bar:
        task = bar.add_task("Compiling", total=None)
        rows = run(
            step,
            target.split(","),
            out,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            first=first,
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        typer.echo(text_table([_shown(row) for row in rows]))  # wide: no console's width would do
        console.print(
            f"{len(rows)} variants. Where they are to run: TRITON_CACHE_DIR={out / 'cache'}",
            highlight=False,
            soft_wrap=True,
        )
    wrong = [row for row in rows if row["excess"] and not row["excuse"]]
    if wrong and strict:
        lines = [f"{r['kernel']} on {r['target']}: {r['excess']} ({r['variant']})" for r in wrong]
        names = "".join(f"\n  {line}" for line in lines)
        raise ValueError(f"{len(wrong)} variants pass a limit without a stated reason: {names}")


def _network(model: str, preset: str, network: str) -> tuple[Callable[[], Any], int]:
    """Return what builds a network from its options, and its image's channels."""
    from . import models
    from .training.config import parse_network

    known = [name for name in models.__all__ if name.islower()]
    if model not in known:
        raise ValueError(f"want model from {', '.join(known)}; got {model!r}")
    arguments = [parse_network(preset, network)] if model == "uresnet" else []
    if network and not arguments:
        raise ValueError(f"want network with the model uresnet; got it with {model}")
    channels = arguments[0].planes if arguments else 3
    return functools.partial(getattr(models, model), *arguments), channels


def _converted(build: Callable[[], Any], policy: str, planned: Any = None) -> Callable[[], Any]:
    """Return what builds a network and converts it, by a policy or a plan."""
    import torch

    from .engine import convert
    from .engine.fusion import POLICIES

    if planned is not None:
        with torch.device("meta"):
            convert(build(), plan=planned)  # an error if it is another network's
        return lambda: convert(build(), plan=planned, inplace=True)
    if policy not in POLICIES:
        raise ValueError(f"want policy from {', '.join(POLICIES)}; got {policy!r}")
    return lambda: convert(build(), policy=policy, inplace=True)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a compiled variant as a line of a table."""
    reason = f"{row['excess']}: {row['excuse'] or 'NO STATED REASON'}"
    return {
        "kernel": row["kernel"],
        "target": row["target"],
        "registers": row["registers"],
        "spilled_bytes": row["spill_bytes"],
        "shared_bytes": row["shared_bytes"],
        "tensor_core_instructions": sum(row[k] or 0 for k in ("wgmma", "mma_sync", "mfma")),
        "variant": row["variant"],
        "beyond_a_limit_and_why": reason if row["excess"] else "",
    }


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Some of {', '.join(BENCHMARKS)}; none: each. Or all: what make gpu runs."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to record the results in [default: bench-results].")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Of each benchmark, or of all: begin nothing after that long.", min=0),
    ] = None,
    networks: Annotated[
        str | None,
        typer.Option(help="Of benchmarks of whole steps: which, such as uresnet,a21."),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Of the same: rows x columns [default: 1260x2048].")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Of emulated: images of a step [default: 8].", min=1)
    ] = None,
    only: Annotated[str | None, typer.Option(help=f"Of all, some of {','.join(SECTIONS)}.")] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Of all, without a GPU: rehearse what runs there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run benchmarks, print their tables and record them with machine, versions and commit."""
    if names == ["all"]:
        from .bench import gpu

        given = {"--out": out, "--seconds": seconds, "--only": only}
        arguments = [str(a) for pair in given.items() if pair[1] is not None for a in pair]
        raise typer.Exit(gpu.main([*arguments, *(["--smoke"] if smoke else [])]))
    if only or smoke:
        raise ValueError("want --only and --smoke with `fullres bench all`")
    names, out = names or list(BENCHMARKS), out or Path("bench-results")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise ValueError(f"want benchmarks from {', '.join(BENCHMARKS)}; got {', '.join(unknown)}")
    _want_folder(out)
    from .bench.record import environment

    runs = {n: importlib.import_module(f".bench.{n}", __package__).run for n in names}
    options = {n: _taken(n, run, networks, image_size, batch_size) for n, run in runs.items()}
    facts, rows = environment(), {}
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        typer.echo("\n".join(f"{name}: {value}" for name, value in facts.items()))
        for name, run in runs.items():
            if "seconds" in inspect.signature(run).parameters:
                options[name]["seconds"] = seconds
            rows[name] = run(out, **options[name])
        typer.echo(f"recorded in {out}")
    if as_json:
        typer.echo(json.dumps({"environment": facts, **rows}, indent=1))


def _taken(
    name: str,
    run: Callable[..., Any],
    networks: str | None,
    image_size: str | None,
    batch_size: int | None,
) -> dict[str, Any]:
    """Return what a benchmark's run is to be given of these options: those that are not None."""
    from .training.config import parse_size

    given: dict[str, Any] = {}
    if networks is not None:
        given["networks"] = networks.split(",")
    if image_size is not None:
        given["image"] = (3, *parse_size(image_size))  # of three planes
    if batch_size is not None:
        given["batch"] = batch_size
    if unknown := sorted({*given} - {*inspect.signature(run).parameters}):
        option = {"networks": "--networks", "image": "--image-size", "batch": "--batch-size"}
        raise ValueError(f"{name}: want no {', '.join(option[key] for key in unknown)}")
    return given


def _want_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"want out as a folder; {out} is a file")


def _wrote(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _progress(stderr: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True) if stderr else console,
    )
