"""What the committed benchmarks say of a recipe, in one line; nothing where it was not measured.

They lie in `docs/benchmarks` of a checkout and do not come with an installed package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vggt_compile.errors import PlanError
from vggt_compile.plan import Plan
from vggt_compile.recipes import Recipe

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
TIMES = ("recipes.json", "sparse.json", "model.json")
ACCURACIES = ("accuracy.json", "plans/accuracy.json")


def measured(recipe: Recipe, folder: Path = FOLDER) -> list[str]:
    """Speed at the most frames that dense was timed at too, and accuracy at the most frames, for each model."""
    return [*_speed(recipe, folder), *_accuracy(recipe, folder)]


def _speed(recipe: Recipe, folder: Path) -> list[str]:
    """Of the first file that has it; one run's times are not set against another's."""
    lines: list[str] = []
    for name in TIMES:
        found = _read(folder / name)
        plans = found.get("settings", {}).get("plans", {})
        names = {recipe.name, *(given for given, plan in plans.items() if _is(plan, recipe.plan))} - {"dense"}
        seconds = {(row["variant"], row["frames"]): row.get("warm_s") for row in found.get("warm", [])}
        pairs = {
            frames: (seconds.get(("dense", frames)), own)
            for (variant, frames), own in seconds.items()
            if variant in names
        }
        both = {frames: (dense, own) for frames, (dense, own) in pairs.items() if dense and own}
        if both:
            dense, own = both[most := max(both)]
            lines.append(f"{found['machine']['gpu']}, {most} frames: {dense / own:.2f} times as fast as dense")
            break
    return lines


def _accuracy(recipe: Recipe, folder: Path) -> list[str]:
    best: dict[str, tuple[int, str]] = {}
    for entry in (entry for name in ACCURACIES for entry in _read(folder / name).get("entries", [])):
        names = {name for name, plan in entry["plans"].items() if entry["form"] == "plans" and _is(plan, recipe.plan)}
        for row in entry["rows"]:
            change = row["difference"].get("AUC@30")
            if row["plan"] in names - {"dense"} and row["scene"] == "all scenes" and change is not None:
                of = f"{entry['model']}, {entry['frames']} frames, {row['count']} {entry['settings']['source']} scenes"
                line = f"{of}: AUC@30 {change[0]:+.1f} against dense"
                best[entry["model"]] = max(best.get(entry["model"], (0, "")), (entry["frames"], line))
    return [line for _, line in best.values()]


def _is(written: dict, plan: Plan) -> bool:
    """Whether a plan of a file is this one; plans in the words of another version are not."""
    try:
        return Plan.read(written) == plan
    except PlanError:
        return False


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
