"""The picture of `analyze blocks`: where attention lies, which blocks are read, and what that covers, by layer."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vggt_compile.analysis.blocks import Blocks, LayerBlocks
from vggt_compile.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 8
"""Layers that are shown at most, spread over all."""
STYLES = {"best": ("0.35", "--"), "predicted": ("tab:blue", "-"), "random": ("tab:orange", ":")}


def check_installed() -> None:
    """BadInput before the work where its picture could not be drawn."""
    missing = [name for name in ("matplotlib", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"analyze needs {' and '.join(missing)}: pip install 'vggt_compile[demo]'")


def draw(layers: Sequence[LayerBlocks], blocks: Blocks, title: str, path: Path, head: int | None = None) -> None:
    """Write the picture as PNG: maps of one head, or of the mean over heads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = torch.linspace(0, len(layers) - 1, min(COLUMNS, len(layers))).round().long().tolist()
    shown = [layers[index] for index in chosen]
    figure = Figure(figsize=(2.15 * len(shown) + 1.7, 9.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, len(shown), squeeze=False)
    for row, name in zip(axes, ("mass", "kept", "best"), strict=False):
        _maps(figure, row, shown, name, blocks, head)
    for axis, layer in zip(axes[3], shown, strict=True):
        _curves(axis, layer, blocks.keep)
    for axis, layer in zip(axes[0], shown, strict=True):
        axis.set_title(f"layer {layer.layer}", fontsize=10)
    for axis, label in zip(axes[:, 0], ("attention to patches", "read by predict", "the best blocks"), strict=False):
        axis.set_ylabel(f"{label}\nqueries, by frame", fontsize=9)
    for axis in axes[2]:
        axis.set_xlabel("keys, by frame", fontsize=9)
    axes[3, 0].set_ylabel("attention covered, %", fontsize=9)
    for axis in axes[3, 1:]:
        axis.set_yticklabels([])
    axes[3, 0].legend(fontsize=8, loc="lower right", handlelength=1.6, borderpad=0.3)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, format="png")


def _maps(
    figure: Figure, axes: Any, layers: Sequence[LayerBlocks], name: str, blocks: Blocks, head: int | None
) -> None:
    """One map of each layer in a row, and their colour bar."""
    from matplotlib.colors import LogNorm

    style: dict[str, Any] = {"cmap": "Blues", "vmin": 0, "vmax": 1}
    label = "share of heads that read it" if head is None else "read"
    if name == "mass":
        style, label = {"cmap": "magma", "norm": LogNorm(0.1, 10, clip=True)}, "times the mean"
    for axis, layer in zip(axes, layers, strict=True):
        values = _of_head(getattr(layer, name), head)
        values = values / values.mean() if name == "mass" else values
        image = axis.imshow(values.numpy(), aspect="auto", interpolation="nearest", **style)
        _frames(axis, layer, blocks)
    bar = figure.colorbar(image, ax=axes, aspect=18, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _of_head(maps: Tensor, head: int | None) -> Tensor:
    return maps.mean(0) if head is None else maps[head]


def _frames(axis: Axes, layer: LayerBlocks, blocks: Blocks) -> None:
    """Lines and numbers of frames; blocks are counted in patches, so one may lie in two frames."""
    every = -(-layer.frames // 8)  # more numbers than eight would run into each other
    for side, size, line in ((axis.yaxis, blocks.q_block, axis.axhline), (axis.xaxis, blocks.k_block, axis.axvline)):
        width = layer.patches / size
        for frame in range(1, layer.frames):
            line(frame * width - 0.5, color="0.6", linewidth=0.5)
        numbers = range(0, layer.frames, every)
        side.set_ticks([(frame + 0.5) * width - 0.5 for frame in numbers], labels=list(map(str, numbers)))
    axis.tick_params(labelsize=7, length=0, pad=2)


def _curves(axis: Axes, layer: LayerBlocks, keep: float) -> None:
    """What the first blocks cover, over how many they are."""
    for name, ranked in (("best", layer.mass), ("predicted", layer.scores)):
        curve = 100 * layer.curve(ranked)
        colour, line = STYLES[name]
        axis.plot(torch.linspace(0, 100, len(curve)).numpy(), curve.numpy(), line, color=colour, label=name, lw=1.6)
    colour, line = STYLES["random"]
    axis.plot((0, 100), (0, 100), line, color=colour, label="random", lw=1.6)
    axis.axvline(100 * keep, color="0.8", linewidth=1, zorder=0)
    covered = 100 * layer.covered(layer.kept)
    axis.plot(100 * keep, covered, "o", color=STYLES["predicted"][0], markersize=4)
    axis.annotate(f"{covered:.0f} %", (100 * keep, covered), (5, -9), textcoords="offset points", fontsize=8)
    axis.set(xlim=(0, 100), ylim=(0, 100))
    axis.set_xlabel("blocks read, %", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
