"""A run's curves as numbers and as a picture, from what it logged for TensorBoard."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLDER = "curves"
PICTURE = "curves.png"
_SHOWN = ("non_background_accuracy", "cosmic_iou", "neutrino_iou")


def read_curves(run: str | Path) -> dict[str, dict[int, float]]:
    """Return, by name, the value at each optimizer step; of a step written twice the newest.

    Names are such as training/loss, training/images_per_second and validation/neutrino_iou. Raises
    FileNotFoundError where the folder of a run holds no curves.
    """
    folder = Path(run) / FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no curves of a run")
    curves: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=_age):
        logged = EventAccumulator(str(file), size_guidance={"scalars": 0})
        logged.Reload()
        for name in logged.Tags()["scalars"]:
            points = {p.step: p.value for p in logged.Scalars(name)}
            if "/" in name and points:
                first = min(points)  # what a run logged beyond the checkpoint that it went on from
                before = {k: v for k, v in curves.get(name, {}).items() if k < first}
                curves[name] = before | points
    return curves


def _age(file: Path) -> tuple[int, int]:
    """Return when a file of events was begun, in seconds, and its number in its process.

    By their names alone the tenth file of a second would come before the ninth.
    """
    parts = file.name.split(".")
    return int(parts[3]), int(parts[-1])


def draw_curves(run: str | Path) -> Path:
    """Draw the loss and the validation of a run's folder into it; return the picture's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_curves(run)
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    loss, scores = figure.subplots(1, 2)
    for name, style in (("training/loss", "-"), ("validation/loss", "o-")):
        if name in curves:
            loss.plot(*zip(*curves[name].items(), strict=True), style, label=name.split("/")[0])
    loss.set(xlabel="optimizer step", ylabel="loss")
    loss.legend(frameon=False)
    for name in _SHOWN:
        points = curves.get(f"validation/{name}")
        if points:
            scores.plot(*zip(*points.items(), strict=True), "o-", label=name.replace("_", " "))
    scores.set(xlabel="optimizer step", ylabel="validation", ylim=(0, 1))
    if scores.lines:
        scores.legend(frameon=False)
    for axes in (loss, scores):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    path = Path(run) / PICTURE
    figure.savefig(path)
    return path
