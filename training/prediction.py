"""Labels and pictures from a trained network."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..events import EventFile, EventWriter
from ..events.display import draw_event
from .checkpoint import load
from .config import TrainConfig
from .metrics import SegmentationMetrics
from .module import build_model

LABELS = "labels.h5"


@dataclass(frozen=True)
class Prediction:
    """What a prediction made: the file of labels, the pictures, and the metrics with truth."""

    labels: Path
    displays: list[Path]
    metrics: dict[str, float]  # empty without truth


def load_model(checkpoint: str | Path) -> tuple[torch.nn.Module, TrainConfig]:
    """Return the network of a checkpoint in evaluation mode, on the CPU, and its run's options.

    Raises FileNotFoundError or ValueError, naming the file, where there is no such checkpoint.
    """
    contents = load(checkpoint)
    config = TrainConfig.from_dict(contents["config"], source=str(checkpoint))
    model = build_model(config)
    model.load_state_dict(contents["state_dict"])
    return model.eval(), config


def predict(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    truth: bool = True,
    displays: int = 10,
    device: str | None = None,
    precision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """Label every pixel of a file's events with the network of a checkpoint.

    Writes out/labels.h5, in the layout and with the pixel ids of the data, and out/event-NNNNN.png
    for the first events. The network sees the image size that it was trained at; pixels outside,
    such as the rows that 1260 x 2048 leaves out, are labelled background.

    Args:
        checkpoint: of `fullres train`; its charge options apply to the data.
        data: event file.
        out: folder, made if need be; an older labels.h5 in it is replaced.
        truth: whether the data have labels to compare with.
        displays: how many events to draw, from the first on.
        device: as in torch; None takes a GPU if there is one.
        precision: "fp32", "bf16" or "fp16"; None takes the run's.
        progress: called with (events done, events) after each.

    Raises:
        FileNotFoundError, ValueError: checkpoint or data are missing, damaged or do not fit.
    """
    if displays < 0:
        raise ValueError(f"want displays >= 0; got {displays}")
    model, config = load_model(checkpoint)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    precision = precision or config.precision
    if precision not in dtypes:
        raise ValueError(f"want precision from {', '.join(dtypes)}; got {precision!r}")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("want a GPU for precision fp16; a CPU computes in fp32 or bf16")
    model = model.to(device)
    events = EventFile(data, size=config.size, labels=truth)
    scaled = EventFile(
        data,
        size=config.size,
        labels=False,
        clip=config.clip_charge,
        log_unit=1.0 if config.log_charge else None,
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    metrics = SegmentationMetrics().to(device)
    pictures = []
    with EventWriter(out / LABELS, charge_group=None, overwrite=True) as writer:
        for index in range(len(events)):
            event = events[index]
            image = scaled[index]["image"][None].to(device)
            if config.channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            with (
                torch.inference_mode(),
                torch.autocast(device.type, dtypes[precision], enabled=precision != "fp32"),
            ):
                logits = model(image)
            labels = event.get("labels")
            if labels is not None:
                metrics.update(logits, labels[None].to(device))
            predicted = torch.cat([plane.argmax(1) for plane in logits]).to(torch.uint8).cpu()
            rows, columns = events.shape(index)
            outside = (0, columns - config.size[1], 0, rows - config.size[0])
            writer.write(
                None, torch.nn.functional.pad(predicted, outside), event_id=event["event_id"]
            )
            if index < displays:
                picture = out / f"event-{index:05d}.png"
                draw_event(
                    event["image"],
                    labels,
                    predicted,
                    path=picture,
                    title=f"{Path(data).name}, event {index}",
                    event_id=event["event_id"].tolist(),
                )
                pictures.append(picture)
            if progress is not None:
                progress(index + 1, len(events))
    values = {name: float(value) for name, value in metrics.compute().items()} if truth else {}
    return Prediction(out / LABELS, pictures, values)
