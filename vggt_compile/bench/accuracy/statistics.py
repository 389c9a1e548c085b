"""Means over scenes, and how far they might be off with other scenes: percentile bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vggt_compile.bench.accuracy.score import METRICS

RESAMPLES = 2000
SEED = 0
POOLED = "all scenes"
"""The name under which the scenes of every kind are taken together."""

Interval = tuple[float, float | None, float | None]
"""Mean, and the lower and upper end of its 95 % interval, None where one scene tells none."""


def interval(values: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    """The mean of one number a scene, and the middle 95 % of the means of resamples with replacement.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no scene to average over")
    sample = torch.tensor(values, dtype=torch.float64)
    if len(values) == 1:
        return sample.item(), None, None
    drawn = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(SEED))
    ends = torch.quantile(sample[drawn].mean(-1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return sample.mean().item(), *ends.tolist()


def summaries(rows: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One JSON-ready summary for each plan in each kind of scene, and in all of them, in the order of the rows.

    `truth` and `baseline` hold intervals of the metrics against the true geometry and against the baseline's output;
    `difference` those of plan minus baseline, both against the truth, scene by scene.
    """
    scenes, plans = _distinct(rows, "scene"), _distinct(rows, "plan")
    groups = [(scene, [row for row in rows if row["scene"] == scene]) for scene in scenes]
    if len(scenes) > 1:
        groups.append((POOLED, list(rows)))
    return [
        {"scene": scene, "plan": plan} | _summary([row for row in group if row["plan"] == plan], base)
        for scene, group in groups
        for base in [{_place(row): row for row in group if row["plan"] == baseline}]
        for plan in plans
    ]


def _summary(rows: Sequence[Mapping[str, Any]], base: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    sound = [row for row in rows if "failed" not in row]
    pairs = [(row["truth"], base[_place(row)]["truth"]) for row in sound if "failed" not in base[_place(row)]]
    steps = [{name: ours[name] - theirs[name] for name in ours if name in theirs} for ours, theirs in pairs]
    return {
        "count": len(sound),
        "failed": len(rows) - len(sound),
        "attention_left": sum(row["attention_left"] for row in rows) / len(rows),
        "rewritten": rows[0]["rewritten"],
        "truth": _intervals([row["truth"] for row in sound]),
        "baseline": _intervals([row["baseline"] for row in sound]),
        "difference": _intervals(steps),
    }


def _intervals(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    columns = {name: [row[name] for row in rows if name in row] for name in METRICS}
    return {name: [_rounded(x) for x in interval(values)] for name, values in columns.items() if values}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _place(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["scene"], row["seed"]


def _distinct(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))
