"""Pictures of events, legible although 99 pixels of 100 are empty.

A panel shows the maximum over the pixels that fall on one of its own, never their mean, and
widens what it shows by one: a single hot pixel of a whole image stays visible.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .dataset import CLASSES, PLANES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinct for colour-blind readers, and in print: grey, blue, vermilion; purple for what is false.
CLASS_COLOURS = ("#b4b4b4", "#0072b2", "#e8590c")
ERRORS = ("correct", "cosmic / background confused", "falsely neutrino", "missed neutrino")
ERROR_COLOURS = ("#c8c8c8", "#0072b2", "#b5179e", "#e8590c")
PLANE_NAMES = ("plane 0, wires at +60°", "plane 1, wires at −60°", "plane 2, vertical wires")

_PANEL = (640, 1024)  # most pixels of a panel
_EMPTY = "#10101c"  # of charge panels


def _array(name: str, value, like: np.ndarray | None = None) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.ndim != 3 or array.shape[0] != PLANES:
        raise ValueError(f"{name}: want [{PLANES}, H, W], got {list(array.shape)}")
    if like is not None and array.shape != like.shape:
        raise ValueError(f"{name}: want {list(like.shape)} as image, got {list(array.shape)}")
    return array


def _pooled(plane: np.ndarray, widen: bool) -> np.ndarray:
    """Return the maxima of plane [H, W] over blocks, at most a panel of them, each widened."""
    factors = [-(-n // limit) for n, limit in zip(plane.shape, _PANEL, strict=True)]
    padding = [(0, -n % f) for n, f in zip(plane.shape, factors, strict=True)]
    blocks = np.pad(plane, padding)
    blocks = blocks.reshape(
        blocks.shape[0] // factors[0], factors[0], blocks.shape[1] // factors[1], factors[1]
    ).max(axis=(1, 3))
    if widen:
        for axis in (0, 1):
            edges = [(1, 0) if k == axis else (0, 0) for k in (0, 1)]
            before = np.pad(blocks, edges)[tuple(slice(0, n) for n in blocks.shape)]
            blocks = np.maximum(blocks, before)
    return blocks


def _iou(prediction: np.ndarray, labels: np.ndarray, label: int) -> float:
    both = ((prediction == label) & (labels == label)).sum()
    either = ((prediction == label) | (labels == label)).sum()
    return both / either if either else float("nan")


def _errors(labels: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return an index into ERRORS for each pixel, uint8; the worse an error, the higher."""
    wrong = labels != prediction
    return np.select(
        [wrong & (labels == 2), wrong & (prediction == 2), wrong], [3, 2, 1], 0
    ).astype(np.uint8)


def _window(mask: np.ndarray) -> tuple[slice, list[slice]] | None:
    """Return the rows, shared, and the columns of each plane around the marked pixels."""
    if not mask.any():
        return None

    def around(positions: np.ndarray, size: int, least: int) -> slice:
        low, high = np.percentile(positions, (2, 98))
        margin = 0.15 * (high - low) + 8
        half = min(max((high - low) / 2 + margin, least / 2), size / 2)
        centre = min(max((low + high) / 2, half), size - half)
        return slice(int(centre - half), int(np.ceil(centre + half)))

    _, rows, columns = mask.shape
    span = around(np.nonzero(mask)[1], rows, min(160, rows))
    spans = []
    for plane in mask:
        at = np.nonzero(plane)[1]
        at = at if len(at) else np.array([columns / 2])
        spans.append(around(at, columns, min(256, columns)))
    return span, spans


def draw_event(
    image: torch.Tensor | np.ndarray,
    labels: torch.Tensor | np.ndarray | None = None,
    prediction: torch.Tensor | np.ndarray | None = None,
    path: str | os.PathLike | None = None,
    *,
    title: str | None = None,
    event_id: Sequence[int] | None = None,
    zoom: bool = False,
) -> "Figure":
    """Return a figure of one event: a row of panels for each plane, charge first.

    Then follow, as far as they are given, truth, prediction and, with both, the errors, whose
    titles have the intersection over union of cosmic and neutrino pixels of the plane.

    Args:
        image: Charge [3, H, W]; what is not positive is drawn as empty.
        labels: True classes 0, 1, 2, [3, H, W].
        prediction: Predicted classes, alike.
        path: Where to save the figure, as a PNG or by what its suffix says; None does not.
        title: Heading; "event" by default.
        event_id: Run, subrun and event, added to the heading unless they are -1.
        zoom: Whether to add columns around the neutrino of labels, or else of prediction, where
            there is one.

    Returns:
        A matplotlib Figure on an Agg canvas; pyplot and its state are not involved.

    Raises:
        ValueError: The arrays are not of one shape [3, H, W].
    """
    # Here, and not above: the rest of the room works without matplotlib.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    image = _array("image", image)
    labels = None if labels is None else _array("labels", labels, image)
    prediction = None if prediction is None else _array("prediction", prediction, image)
    _, rows, columns = image.shape

    # What each column shows, as integers: 0 is empty, so class c is drawn as c + 1.
    occupied = image > 0

    def drawn(classes: np.ndarray) -> np.ndarray:
        return np.where(occupied | (classes > 0), classes.astype(np.uint8) + 1, 0)

    kinds: list[tuple[str, np.ndarray]] = [("charge", np.where(occupied, image, 0))]
    if labels is not None:
        kinds.append(("truth", drawn(labels)))
    if prediction is not None:
        kinds.append(("prediction", drawn(prediction)))
    if labels is not None and prediction is not None:
        shown = occupied | (labels > 0) | (prediction > 0)
        kinds.append(("errors", np.where(shown, _errors(labels, prediction) + 1, 0)))
    window = None
    if zoom and (labels is not None or prediction is not None):
        window = _window((labels if labels is not None else prediction) == 2)
    panels = [(name, values, False) for name, values in kinds]
    if window is not None:
        panels += [(name, values, True) for name, values in (kinds[0], kinds[-1])]

    positive = image[occupied]
    low = float(positive.min()) if len(positive) else 1.0
    high = max(float(np.percentile(positive, 99.8)) if len(positive) else 2.0, 2 * low)
    inferno = colormaps["inferno"](np.linspace(0.3, 1.0, 256))
    charge_map = LinearSegmentedColormap.from_list("charge", inferno).with_extremes(under=_EMPTY)
    styles = {
        "charge": {"cmap": charge_map, "norm": LogNorm(low, high)},
        "errors": {"cmap": ListedColormap(("white", *ERROR_COLOURS)), "vmin": -0.5, "vmax": 4.5},
    }
    classes = {"cmap": ListedColormap(("white", *CLASS_COLOURS)), "vmin": -0.5, "vmax": 3.5}

    width, height = 6.4, 6.4 * _PANEL[0] / _PANEL[1]
    figure = Figure(figsize=(width * len(panels) + 0.9, (height + 0.45) * PLANES + 1.2), dpi=160)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    axes = figure.subplots(PLANES, len(panels), squeeze=False)
    for plane in range(PLANES):
        for k, (name, values, zoomed) in enumerate(panels):
            ax = axes[plane, k]
            span, wires = slice(0, rows), slice(0, columns)
            if zoomed:
                span, wires = window[0], window[1][plane]
            picture = _pooled(values[plane][span, wires], widen=not zoomed)
            if name == "charge":
                # Below the smallest charge there is only emptiness, which has its own colour.
                picture = np.where(picture > 0, np.maximum(picture, low), low / 2)
            mappable = ax.imshow(
                picture,
                extent=(wires.start, wires.stop, span.stop, span.start),
                aspect="auto",
                interpolation="nearest",
                **styles.get(name, classes),
            )
            ax.set_title(f"neutrino, {name}" if zoomed else name, fontsize=12, loc="left")
            if name == "errors" and not zoomed:
                score = (_iou(prediction[plane], labels[plane], label) for label in (1, 2))
                text = "IoU  cosmic {:.3f}   neutrino {:.3f}".format(*score)
                ax.set_title(text.replace("nan", "none"), fontsize=11, loc="right")
            if k == 0:
                ax.set_title(PLANE_NAMES[plane], fontsize=12, loc="right")
            ax.set_xlabel("wire", fontsize=10)
            if k == 0 or zoomed:
                ax.set_ylabel("time tick", fontsize=10)
            ax.tick_params(labelsize=9, labelleft=k == 0 or zoomed)
            if window is not None and not zoomed:
                corner = (window[1][plane].start, window[0].start)
                sizes = (window[1][plane].stop - corner[0], window[0].stop - corner[1])
                colour = "white" if name == "charge" else "black"
                frame = Rectangle(corner, *sizes, fill=False, ec=colour, lw=0.8, ls=(0, (4, 3)))
                ax.add_patch(frame)
            if k == 0:
                bar = figure.colorbar(mappable, ax=ax, pad=0.015, fraction=0.05, extend="max")
                bar.set_label("charge", fontsize=10)
                bar.ax.tick_params(labelsize=9)

    heading = title or "event"
    if event_id is not None and any(int(n) != -1 for n in event_id):
        heading += "   run {}, subrun {}, event {}".format(*(int(n) for n in event_id))
    figure.suptitle(heading, fontsize=15, x=0.01, ha="left")
    keys = []
    if len(kinds) > 1:
        keys += [Patch(color=c, label=n) for c, n in zip(CLASS_COLOURS, CLASSES, strict=True)]
    if kinds[-1][0] == "errors":
        keys += [Patch(color="none", label="   errors:")]
        keys += [Patch(color=c, label=n) for c, n in zip(ERROR_COLOURS, ERRORS, strict=True)]
    if keys:
        figure.legend(
            handles=keys, loc="outside lower center", ncols=len(keys), fontsize=12, frameon=False
        )
    if path is not None:
        figure.savefig(path)
    return figure
