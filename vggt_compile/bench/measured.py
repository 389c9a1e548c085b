"""What the committed benchmarks say of a recipe, in one line; nothing where it was not measured.

They lie in `docs/benchmarks` of a checkout and do not come with an installed package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vggt_compile.bench.model import MODELS
from vggt_compile.errors import PlanError
from vggt_compile.plan import Plan
from vggt_compile.recipes import Recipe

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
TIMES = (
    *("long.json", "short.json"),
    *("provider.json", "provider-parts.json", "sparse.json", "recommended.json", "recipes.json"),
    "hoist_keys.json",
    *("pi3-long.json", "pi3-short.json", "pi3-recommended.json", "pi3.json", "model.json"),
)
"""Newest first."""
FOLDERS = ("fast", "thinning", "published", "blocks", ".", "plans", "phase")
"""Of each `accuracy.json`; of equally many scenes those of the first count."""


class Change(NamedTuple):
    """AUC@30 less that of dense.

    Attributes:
        scenes: how many there are.
        source: of what kind they are.
        points: the mean over scenes and the ends of its 95 % interval.
        flops: share of the attention FLOPs that is left; None where the entry does not say.
    """

    model: str
    frames: int
    scenes: int
    source: str
    points: tuple[float, ...]
    flops: float | None


def measured(recipe: Recipe, folder: Path = FOLDER) -> list[str]:
    """Speed at the most frames that dense was timed at too, and accuracy at the most frames, for each model."""
    return [*_speed(recipe, folder), *_accuracy(recipe, folder)]


def speeds(recipe: Recipe, model: str = "vggt", folder: Path = FOLDER) -> tuple[str, dict[int, float]]:
    """The GPU, and how many times as fast as dense by frame count; each count is of the first file that has it."""
    gpu, ratios = "", {}
    for name in TIMES:
        found = _read(folder / name)
        settings = found.get("settings", {})
        if settings.get("model", "vggt") != model:
            continue
        seconds = {(row["variant"], row["frames"]): row.get("warm_s") for row in found.get("warm", [])}
        plans = settings.get("plans", {})
        same = {name for name, plan in plans.items() if _is(plan, recipe.plan, model)}
        names = ({recipe.name} - plans.keys() | same) - {"dense"}
        for (variant, frames), own in sorted(seconds.items()):
            if variant in names and own and (dense := seconds.get(("dense", frames))) and frames not in ratios:
                gpu, ratios[frames] = gpu or found["machine"]["gpu"], dense / own
    return gpu, ratios


def _speed(recipe: Recipe, folder: Path) -> list[str]:
    lines = []
    for model, title in MODELS.items():
        gpu, ratios = speeds(recipe, model, folder)
        if ratios:
            lines.append(f"{title}, {gpu}, {max(ratios)} frames: {ratios[max(ratios)]:.2f} times as fast as dense")
    return lines


def changes(recipe: Recipe, folder: Path = FOLDER) -> Iterator[Change]:
    """What it does to a model's accuracy over all scenes of an entry, for each model and number of frames."""
    for entry in (entry for place in FOLDERS for entry in _read(folder / place / "accuracy.json").get("entries", [])):
        names = {
            name
            for name, plan in entry["plans"].items()
            if entry["form"] == "plans" and _reads_as(plan, recipe.plan, entry["model"])
        }
        for row in entry["rows"]:
            points = row["difference"].get("AUC@30")
            if row["plan"] in names - {"dense"} and row["scene"] == "all scenes" and points is not None:
                scenes = row["count"], entry["settings"]["source"]
                yield Change(entry["model"], entry["frames"], *scenes, tuple(points), row.get("attention_left"))


def largest(recipe: Recipe, folder: Path = FOLDER) -> dict[tuple[str, int], Change]:
    """By model and number of frames the change over the most scenes."""
    found: dict[tuple[str, int], Change] = {}
    for change in changes(recipe, folder):
        place = change.model, change.frames
        if place not in found or change.scenes > found[place].scenes:
            found[place] = change
    return found


def _accuracy(recipe: Recipe, folder: Path) -> list[str]:
    best: dict[str, Change] = {}
    for change in largest(recipe, folder).values():
        if change.model not in best or change.frames > best[change.model].frames:
            best[change.model] = change
    return [
        f"{c.model}, {c.frames} frames, {c.scenes} {c.source} scenes: AUC@30 {c.points[0]:+.1f} against dense"
        for c in best.values()
    ]


def _is(written: dict, plan: Plan, model: str) -> bool:
    """Whether a plan of a file does the same to a model; plans in the words of another version are not known."""
    family, found = model.partition("-")[0], _known(written)
    return found is not None and _acts(found, family) == _acts(plan, family)


def _reads_as(written: dict, plan: Plan, model: str) -> bool:
    """Whether a plan of a file leaves out the same, whoever computes what is left."""
    family, found = model.partition("-")[0], _known(written)
    return found is not None and _left_out(found, family) == _left_out(plan, family)


def _acts(plan: Plan, family: str) -> tuple[object, ...]:
    return plan.rules_for(family), plan.min_tokens


def _left_out(plan: Plan, family: str) -> tuple[object, ...]:
    rules = tuple(rule for rule in plan.rules_for(family) if rule[1].leaves_out)
    return (rules, plan.min_tokens) if rules else ()


def _known(written: dict) -> Plan | None:
    try:
        return Plan.read(written)
    except PlanError:
        return None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
