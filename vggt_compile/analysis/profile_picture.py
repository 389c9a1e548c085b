"""The picture of `analyze MODEL`: rank and cosine over layers, a line for each number of frames, and predictions.

A row for each plan, a column for each quantity. Colours are numbers of frames; solid is measured, dashed is predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vggt_compile.analysis.prediction import Prediction
from vggt_compile.analysis.profile import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    ("cosine", "mean cosine of tokens"),
    ("residual_contraction", "contraction by one attention"),
    ("token_effective_rank", "effective rank of centred tokens"),
    ("attention_stable_rank", "stable rank of attention"),
    ("attention_sigma_ratio", "σ2 / σ1 of attention"),
    ("entropy", "entropy of attention / log n"),
)
SHARES = frozenset(("attention_sigma_ratio", "entropy", "cosine"))
"""Drawn from 0 to 1, for what matters is how far from either they are."""
LOGARITHMIC = frozenset(("attention_stable_rank",))


def draw(profiles: Sequence[Profile], title: str, path: Path, predictions: Sequence[Prediction] = ()) -> None:
    """Write the picture as PNG; bars are standard errors."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = sorted({profile.frames for profile in profiles})
    plans = list(dict.fromkeys(profile.plan for profile in profiles))
    shades = colormaps["viridis"]
    colours = {count: shades(0.8 * i / max(1, len(counts) - 1)) for i, count in enumerate(counts)}
    panels = [panel for panel in PANELS if any(panel[0] in profile.quantities for profile in profiles)]
    figure = Figure(figsize=(2.75 * len(panels) + 0.4, 2.3 * len(plans) + 1.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(plans), len(panels), squeeze=False, sharex=True, sharey="col")
    for row, plan in zip(axes, plans, strict=True):
        for axis, (quantity, _) in zip(row, panels, strict=True):
            for found in (one for one in predictions if one.plan == plan):
                _line(axis, found, quantity, colours[found.frames])
            for profile in (one for one in profiles if one.plan == plan):
                _line(axis, profile, quantity, colours[profile.frames])
            _scale(axis, quantity)
        row[0].set_ylabel(plan, fontsize=11)
    for axis, (_, label) in zip(axes[0], panels, strict=True):
        axis.set_title(label, fontsize=9.5)
    for axis in axes[-1]:
        axis.set_xlabel("global layer", fontsize=9)
    handles, labels = _legend(axes, bool(predictions))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=9.5, frameon=False)
    figure.suptitle(title, fontsize=11.5)
    figure.savefig(path, format="png")


def _line(axis: Axes, found: Profile | Prediction, quantity: str, colour: tuple) -> None:
    points, predicted = found.curve(quantity), isinstance(found, Prediction)
    axis.errorbar(
        list(points),
        [point.value for point in points.values()],
        yerr=None if predicted else [point.error for point in points.values()],
        color=colour,
        linestyle="--" if predicted else "-",
        marker=None if predicted else "o",
        markersize=3,
        linewidth=1.2 if predicted else 1.7,
        elinewidth=0.8,
        label="predicted" if predicted else f"{found.frames} frames, measured",
    )


def _scale(axis: Axes, quantity: str) -> None:
    if quantity in LOGARITHMIC:
        axis.set_yscale("log")
        for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")
    else:
        bottom, top = axis.get_ylim()
        axis.set_ylim(min(0, bottom), 1.02 if quantity in SHARES else top)
    axis.locator_params(axis="x", integer=True)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def _legend(axes: Iterable[Iterable[Axes]], predicted: bool) -> tuple[list, list[str]]:
    """Each number of frames once, and one dashed line for all predictions."""
    from matplotlib.lines import Line2D

    found: dict[str, object] = {}
    for axis in (axis for row in axes for axis in row):
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    found.pop("predicted", None)
    if predicted:
        found["predicted from measured steps and logits"] = Line2D([], [], color="grey", linestyle="--", linewidth=1.2)
    return list(found.values()), list(found)
