"""The picture of a roofline: how fast layers run, by how much they compute for each byte."""

from collections.abc import Sequence
from pathlib import Path

from ..engine.cards import Hardware


def draw(
    path: Path, rates: Hardware, points: dict[str, Sequence[tuple[float, float]]], title: str
) -> None:
    """Write a PNG of points (FLOP a byte, TFLOP/s), a series a name, under the rates' roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    across = [x for series in points.values() for x, _ in series]
    ridge = rates.product / rates.copy
    low, high = min([*across, ridge]) / 2, max([*across, ridge]) * 2
    roof = [(x, min(x * rates.copy, rates.product) / 1e12) for x in (low, ridge, high)]
    axes.plot(*zip(*roof, strict=True), color="black", linewidth=1, label=f"roof: {rates.name}")
    for marker, (name, series) in zip("osD^vPX*", points.items(), strict=False):
        if series:
            axes.scatter(*zip(*series, strict=True), s=18, marker=marker, label=name, alpha=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        xlabel="FLOP a byte, of the least bytes",
        ylabel="TFLOP/s",
        title=title,
    )
    axes.legend(fontsize=8)
    axes.grid(which="both", linewidth=0.3)
    figure.savefig(path, dpi=150)
