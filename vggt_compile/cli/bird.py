"""A reconstruction from above: points in the colours of the images, true and predicted cameras."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vggt_compile.cli.geometry import placed
from vggt_compile.metrics.align import camera_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vggt_compile.bench.accuracy.cases import Geometry
    from vggt_compile.cli.experiment import Result

POINTS = 40_000
CEILING = 0.6
"""Share of the points that are shown, from below: what is higher would hide the rest."""


def draw_scene(axis: Axes, result: Result) -> None:
    """Everything aligned to the true scene by its points; points are those of the rewritten run."""
    truth = result.frames.truth
    assert truth is not None
    images = result.frames.images
    dense, rewritten = (placed(run.output, images, truth) for run in (result.runs[0], result.runs[-1]))
    assert rewritten.points is not None
    _cloud(axis, rewritten.points.flatten(0, 2), images[0].cpu().permute(0, 2, 3, 1).flatten(0, 2))
    cameras: tuple[tuple[str, Geometry, dict[str, Any]], ...] = (
        ("true", truth, {"marker": "o", "s": 70, "facecolors": "none", "edgecolors": "black"}),
        ("dense", dense, {"marker": "+", "s": 60, "color": "tab:blue"}),
        ("rewritten", rewritten, {"marker": "x", "s": 40, "color": "tab:red"}),
    )
    for label, found, style in cameras:
        centres = camera_points(found.extrinsics)
        axis.scatter(centres[:, 0].numpy(), centres[:, 1].numpy(), label=label, linewidths=1.5, zorder=3, **style)
    axis.set_title("points and cameras from above", fontsize=10)
    axis.set_xlabel("x, metres", fontsize=9)
    axis.set_ylabel("y, metres", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_aspect("equal", adjustable="box")
    axis.legend(fontsize=8, loc="upper right")


def _cloud(axis: Axes, points: Tensor, colours: Tensor) -> None:
    """Points `[N, 3]` below the height under which `CEILING` of them lie, highest last."""
    step = max(1, len(points) // POINTS)
    points, colours = points[::step], colours[::step]
    height = points[:, 2]
    low = height.sort().indices[: int(CEILING * len(height))]
    inside = _spread(points[low])
    shown, tone = points[low][inside], colours[low][inside].clamp(0, 1)
    axis.scatter(shown[:, 0].numpy(), shown[:, 1].numpy(), c=tone.numpy(), s=2, linewidths=0, zorder=1)


def _spread(points: Tensor) -> Tensor:
    """Which points lie within one and a half times the box of the middle 96 %: a few strays must not set the scale."""
    bounds = torch.quantile(points[:, :2], torch.tensor([0.02, 0.98], dtype=points.dtype), dim=0)
    middle, half = bounds.mean(0), (bounds[1] - bounds[0]) * 0.75
    return ((points[:, :2] - middle).abs() < half).all(-1)
