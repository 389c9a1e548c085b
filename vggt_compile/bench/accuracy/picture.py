"""Two pictures of a record: accuracy over attention FLOPs, and what each layer matters."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vggt_compile.bench.accuracy.page import kinds, scenes, without
from vggt_compile.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRIC = "AUC@30"
COLUMNS = 3
"""Panels side by side."""
APART = 3.8
"""Places of the horizontal axis between the names of two plans."""
LETTER = 0.0155
"""Share of a panel's height that a letter of an upright name takes."""
Entry = Mapping[str, Any]


class Order(NamedTuple):
    """Kinds of scene of all panels, so that each has one colour throughout."""

    kinds: tuple[str, ...]

    def colour(self, scene: str) -> str:
        return f"C{self.kinds.index(scene)}"

    def beside(self, scene: str) -> float:
        """How far from the middle a kind of scene is drawn, in places, so that none hides another."""
        return self.kinds.index(scene) - (len(self.kinds) - 1) / 2


def check_installed() -> None:
    """BadInput before minutes of work where the pictures could not be drawn after them."""
    missing = [name for name in ("matplotlib", "numpy", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"the accuracy bench needs {' and '.join(missing)}: pip install 'vggt_compile[demo]'")


def draw(record: Mapping[str, Any], folder: Path) -> None:
    """Write accuracy.png and layers.png, as far as the record has entries for them."""
    for form, name, panel in (("plans", "accuracy.png", trade), ("layers", "layers.png", bars)):
        # One plan alone has nothing beside it to compare with.
        entries = [entry for entry in record["entries"] if entry["form"] == form and len(entry["plans"]) > 1]
        if entries:
            grid(entries, panel).savefig(folder / name, format="png")


def grid(entries: Sequence[Entry], panel: Any) -> Figure:
    """A panel for each model and frame count."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = Order(tuple(dict.fromkeys(scene for entry in entries for scene in kinds(entry["rows"]))))
    columns, rows = min(COLUMNS, len(entries)), -(-len(entries) // COLUMNS)
    width, height = (5.2, 5.2) if panel is trade else (7.0, 3.9)
    figure = Figure(figsize=(width * columns + 1.6, height * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=panel is trade)
    for axis in axes.flat[len(entries) :]:
        axis.set_visible(False)
    for axis, entry in zip(axes.flat, entries, strict=False):
        axis.set_title(f"{entry['model']}, {entry['frames']} frames", fontsize=10)
        panel(axis, entry, order)
    legend(figure, axes)
    return figure


def legend(figure: Figure, axes: Any) -> None:
    """One legend for all panels, at the right."""
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        handles=list(found.values()), labels=list(found), loc="outside right upper", fontsize=9, frameon=False
    )


def trade(axis: Axes, entry: Entry, order: Order) -> None:
    """Accuracy over FLOPs: a dot for each plan, a line along the plans that no other one beats at both."""
    rows = entry["rows"]
    named: dict[str, float] = {}
    for scene in kinds(rows):
        found = [row for row in rows if row["scene"] == scene and METRIC in row["truth"]]
        colour, shift = order.colour(scene), 0.5 * order.beside(scene)
        points = [(100 * row["attention_left"] + shift, row["truth"][METRIC]) for row in found]
        front = pareto([(x, mean) for x, (mean, _, _) in points])
        axis.plot([x for x, _ in front], [y for _, y in front], color=colour, linewidth=1.4, label=scene)
        for row, (x, (mean, low, high)) in zip(found, points, strict=True):
            best = (x, mean) in front
            if best and low is not None:
                axis.plot((x, x), (low, high), color=colour, linewidth=1.2, alpha=0.5)
            axis.plot(x, mean, "o", color=colour, markersize=5 if best else 3, alpha=1 if best else 0.4)
            if best:
                named.setdefault(row["plan"], x - shift)
    name(axis, named)
    axis.set_xlabel("attention FLOPs left, %", fontsize=9)
    axis.set_ylabel(f"{METRIC}, %", fontsize=9)
    axis.set(xlim=(0, 105), ylim=(0, max(room(named), axis.get_ylim()[1])))  # all panels share it
    axis.set_yticks(range(0, 101, 20))
    axis.grid(alpha=0.25)


def name(axis: Axes, plans: Mapping[str, float]) -> None:
    """Write each plan's name over its place on the horizontal axis, side by side where places are close."""
    last = float("-inf")
    for plan, x in sorted(plans.items(), key=lambda item: item[1]):
        last = max(x, last + APART)
        axis.plot((x, last), (90, 99), color="0.7", linewidth=0.6)
        axis.text(last, 100, plan, rotation=90, fontsize=8, ha="center", va="bottom")


def room(names: Iterable[str]) -> float:
    """Upper end of a vertical axis that has the longest name between 100 and itself."""
    return max(140.0, 100 / (1 - LETTER * max(map(len, names), default=0)))


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of points (cost, value) that no cheaper or equally dear one reaches, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def bars(axis: Axes, entry: Entry, order: Order) -> None:
    """AUC@30 lost by each plan over all scenes with its interval, and a dot for each kind of scene."""
    rows = [row for row in without(entry["rows"], "dense") if METRIC in row["difference"]]
    whole, plans = scenes(rows)[-1], [name for name in entry["plans"] if name != "dense"]
    for row in rows:
        x, (mean, low, high) = plans.index(row["plan"]), row["difference"][METRIC]
        if row["scene"] == whole:
            axis.bar(x, -mean, width=0.7, color="0.78" if row["plan"].startswith("layer") else "0.55", zorder=1)
            if low is not None:
                axis.plot((x, x), (-low, -high), color="0.25", linewidth=1.6, zorder=2)
    for scene in kinds(rows):
        dots = [(plans.index(row["plan"]), -row["difference"][METRIC][0]) for row in rows if row["scene"] == scene]
        xs, ys = zip(*dots, strict=True)
        places, colour = [x + 0.12 * order.beside(scene) for x in xs], order.colour(scene)
        axis.plot(places, ys, "o", color=colour, markersize=4, label=scene, zorder=3)
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set_xticks(range(len(plans)), [name.removeprefix("layer ") for name in plans], fontsize=9)
    axis.set_xlabel("global layer that sees its frame only; bars over all scenes, dots by kind", fontsize=9)
    axis.set_ylabel(f"{METRIC} lost, points", fontsize=9)
    axis.grid(axis="y", alpha=0.25)
