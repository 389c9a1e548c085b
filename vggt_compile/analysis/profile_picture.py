"""The picture of `analyze MODEL`: ranks, cosine and contraction over layers, a line for each number of frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vggt_compile.analysis.profile import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    ("attention_effective_rank", "effective rank of the attention matrix"),
    ("attention_sigma_ratio", "σ2 / σ1 of the attention matrix"),
    ("entropy", "entropy of attention / log n"),
    ("token_effective_rank", "effective rank of centred tokens"),
    ("cosine", "mean cosine between tokens"),
    ("value_contraction", "contraction of values by what is run"),
)
SHARES = frozenset(("attention_sigma_ratio", "entropy", "cosine"))
"""Drawn from 0 to 1, for what matters is how far from either they are."""
LINES = ("-", "--", ":", "-.")
"""Of plans, in their order; after four they repeat."""


def draw(profiles: Sequence[Profile], title: str, path: Path) -> None:
    """Write the picture as PNG: colours are numbers of frames, kinds of lines are plans, bars are standard errors."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = sorted({profile.frames for profile in profiles})
    plans = list(dict.fromkeys(profile.plan for profile in profiles))
    shades = colormaps["viridis"]
    colours = {count: shades(0.85 * i / max(1, len(counts) - 1)) for i, count in enumerate(counts)}
    panels = [panel for panel in PANELS if any(panel[0] in profile.quantities for profile in profiles)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.1 * columns, 3.1 * rows + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (quantity, label) in zip(axes, panels, strict=False):
        for profile in profiles:
            _line(axis, profile, quantity, colours[profile.frames], LINES[plans.index(profile.plan) % len(LINES)])
        bottom, top = axis.get_ylim()
        axis.set_ylim(min(0, bottom), 1 if quantity in SHARES else top)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("global layer", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, format="png")


def _line(axis: Axes, profile: Profile, quantity: str, colour: tuple, line: str) -> None:
    points = profile.curve(quantity)
    axis.errorbar(
        list(points),
        [point.value for point in points.values()],
        yerr=[point.error for point in points.values()],
        color=colour,
        linestyle=line,
        marker="o",
        markersize=3,
        linewidth=1.5,
        elinewidth=0.8,
        label=f"{profile.plan}, {profile.frames} frames",
    )
    axis.locator_params(axis="x", integer=True)
