"""The demo's picture: inputs, depth dense and rewritten, their difference, and the scene from above."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vggt_compile.cli.bird import draw_scene
from vggt_compile.cli.compare import camera_centres, quantities
from vggt_compile.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from vggt_compile.cli.experiment import Result

COLUMNS = 6
"""Frames that are shown at most, spread over all."""
CAPTION = "random weights: the geometry means nothing, and the differences are not those of a trained model"
PANEL = 4.8
"""Width in inches of the panel with the camera paths."""


def check_installed() -> None:
    missing = [name for name in ("matplotlib", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"the demo needs {' and '.join(missing)}: pip install 'vggt_compile[demo]'")


def draw(result: Result, path: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images = result.frames.images[0].cpu()
    count, height, width = len(images), *images.shape[-2:]
    columns = torch.linspace(0, count - 1, min(COLUMNS, count)).round().long().tolist()
    tile_height = min(2.2, 1.9 * height / width)
    tile_width = tile_height * width / height
    size = (len(columns) * tile_width + 1.6 + PANEL, 4 * (tile_height + 0.12) + 1.3)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(size[0] - PANEL, PANEL), squeeze=False)[0]
    _grid(left, result, images, columns)
    _side(right, result, (height, width))
    figure.suptitle(_title(result), fontsize=11)
    figure.savefig(path, format="png")


def _title(result: Result) -> str:
    count, _, height, width = result.frames.images.shape[1:]
    speed = result.runs[0].warm_s / result.runs[-1].warm_s
    left = result.report.attention_left()
    weights = "" if result.subject.weights else f"\n{CAPTION}"
    return (
        f"{result.subject.name}, plan {result.plan.name!r}, {count} frames of {height}×{width}, {result.dtype}: "
        f"{1 - left:.0%} of the attention FLOPs saved, {speed:.2f}× the speed of eager dense{weights}"
    )


def _grid(figure: SubFigure, result: Result, images: Tensor, columns: list[int]) -> None:
    dense, rewritten = (quantities(run.output).get("depth") for run in (result.runs[0], result.runs[-1]))
    axes = figure.subplots(4, len(columns), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.imshow(images[column].permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_title(result.frames.names[column][-24:], fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0, 0].set_ylabel("input", fontsize=10)
    if dense is None or rewritten is None:
        return
    dense, rewritten = dense[0, columns].float(), rewritten[0, columns].float()
    gap = (rewritten - dense).abs()
    low, high = _range(dense)
    shared = {"vmin": low, "vmax": high, "cmap": "viridis"}
    _row(axes[1], dense, "depth\ndense", shared)
    shown = _row(axes[2], rewritten, "depth\nrewritten", shared)
    figure.colorbar(shown, ax=axes[1:3, :], aspect=28, pad=0.01).set_label("depth", fontsize=9)
    shown = _row(axes[3], gap, "|difference|", {"vmin": 0, "vmax": max(_range(gap)[1], 1e-12), "cmap": "magma"})
    figure.colorbar(shown, ax=axes[3, :], aspect=14, pad=0.01).set_label("|difference|", fontsize=9)


def _row(axes: Any, maps: Tensor, label: str, style: dict[str, Any]) -> Any:
    shown = [axis.imshow(image.numpy(), **style) for axis, image in zip(axes, maps, strict=True)]
    axes[0].set_ylabel(label, fontsize=10)
    return shown[0]


def _range(values: Tensor) -> tuple[float, float]:
    """From the 1st to the 99th percentile of what is finite, so that one stray pixel does not take all the colours."""
    finite = values[values.isfinite()].flatten()
    finite = finite[:: max(1, len(finite) // 2**20)]
    if not len(finite):
        return 0.0, 1.0
    low, high = torch.quantile(finite, torch.tensor([0.01, 0.99])).tolist()
    return (low, high) if high > low else (low, low + 1e-6 * max(1.0, abs(low)))


def _side(figure: SubFigure | Figure, result: Result, size: tuple[int, int]) -> None:
    """The scene from above, and under it what deviates by how much."""
    above, below = figure.subplots(2, 1, height_ratios=(3, 1.6))
    judged = {result.runs[0].name, result.runs[-1].name} <= result.scores.keys()
    if judged:
        draw_scene(above, result)
    else:
        _paths(above, result, size)
    lines = ["relative error against eager dense"]
    for name, found in result.deviations[result.runs[-1].name].items():
        lines.append(f"{name:<11}{found.relative:>9.1e}")
    if judged:
        lines += ["", f"{'true scene':<11}{'dense':>9}{'rewritten':>11}"]
        dense, rewritten = result.scores[result.runs[0].name], result.scores[result.runs[-1].name]
        lines += [f"{name:<11}{dense[name]:>9.3g}{rewritten[name]:>11.3g}" for name in dense]
    below.axis("off")
    below.text(0.0, 0.95, "\n".join(lines), family="monospace", fontsize=9, va="top", transform=below.transAxes)


def _paths(axis: Axes, result: Result, size: tuple[int, int]) -> None:
    axis.set_title("camera paths from above", fontsize=10)
    styles = (("dense", "o-", "tab:blue", 7, 0.55), ("rewritten", "x--", "tab:red", 6, 1.0))
    for run, (label, style, colour, width, alpha) in zip((result.runs[0], result.runs[-1]), styles, strict=True):
        centres = camera_centres(run.output, size)
        if centres is None:
            axis.text(0.5, 0.5, "no cameras", ha="center", transform=axis.transAxes)
            return
        x, _, z = centres[0].float().unbind(-1)
        axis.plot(x.numpy(), z.numpy(), style, color=colour, label=label, markersize=width, alpha=alpha)
        if label == "dense":
            first = float(x[0]), float(z[0])
            axis.annotate("first", first, xytext=(-8, 9), textcoords="offset points", fontsize=8, ha="center")
    axis.set_xlabel("x, to the right", fontsize=9)
    axis.set_ylabel("z, forward", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.margins(0.12)
    axis.set_aspect("equal", adjustable="datalim")
    axis.legend(fontsize=8, loc="best")
