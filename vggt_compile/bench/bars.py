"""Stacked bars: where the time of each variant goes, one panel for each frame count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vggt_compile.bench.parts import PARTS

COLUMNS = 3


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a picture of the rows that have `parts`, seconds by part; nothing where none has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if "parts" in row]
    if not rows:
        return
    counts = sorted({row["frames"] for row in rows})
    columns, lines = min(COLUMNS, len(counts)), -(-len(counts) // COLUMNS)
    figure = Figure(figsize=(5.0 * columns + 1.5, 3.6 * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(counts) :]:
        axis.set_visible(False)
    for axis, count in zip(axes.flat, counts, strict=False):
        panel(axis, [row for row in rows if row["frames"] == count])
        axis.set_title(f"{count} frames", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)
    figure.savefig(path, format="png")


def panel(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """One bar for each variant, the first on top."""
    names = [row["variant"] for row in rows]
    start = [0.0] * len(rows)
    for index, part in enumerate(PARTS):
        widths = [row["parts"].get(part, 0.0) for row in rows]
        axis.barh(names, widths, left=start, color=f"C{index}", label=part, height=0.7)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds on the GPU", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", alpha=0.25)
