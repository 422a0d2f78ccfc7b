"""The command line: `fullres COMMAND --help`."""

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
            kind = Annotated[hints[option.name] | None, typer.Option(help=text)]
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
    image_size: Annotated[str, typer.Option(help="Rows x columns of a plane.")] = "1280x2048",
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
def bench(
    names: Annotated[list[str], typer.Argument(help="events, conv, memory")],
    out: Annotated[Path | None, typer.Option(help="Folder to record the results in.")] = None,
) -> None:
    """Run benchmarks, and print their tables."""
    known = ("events", "conv", "memory")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"want benchmarks from {', '.join(known)}; got {', '.join(unknown)}")
    from .bench.record import environment

    folder = out or Path("bench-results")
    console.print_json(json.dumps(environment()))
    for name in names:
        importlib.import_module(f".bench.{name}", __package__).run(folder)
    console.print(f"recorded in {folder}")


def _wrote(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
