"""Published methods as plans: a few lines each, with their source."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vggt_compile.errors import PlanError, UnknownName
from vggt_compile.plan import Plan


@dataclass(frozen=True)
class Recipe:
    """A named plan. `source` is the paper or page that it follows, `summary` one line for people."""

    name: str
    summary: str
    source: str
    plan: Plan


DEFAULT = "g2f"
_NAMED = re.compile(r"([\w .-]+)=(.*)", re.DOTALL)


def _faster_vggt(percent: int, keep: float, cdf: float, measured: str) -> tuple[str, str, str, dict]:
    """One of the published settings, where 1 − keep is the paper's ρ and cdf its τ; it sets no upper bound."""
    return (
        f"faster_vggt-{percent}",
        f"every global layer reads blocks of keys chosen by their means; {measured} of VGGT's pairs are skipped",
        f"Faster VGGT, arXiv 2509.07120, supplement: ρ = {1 - keep:.0%}, τ = {cdf:g}",
        {
            "layers": {"*": {"blocks": {"method": "predict", "keep": keep, "cdf": cdf, "most": 1.0}}},
            "min_tokens": 20_000,  # provisional: below, choosing costs about what it saves
        },
    )


_G2F = {"scope": "frame"}


def _avggt(name: str, stride: tuple[int, int], measured: str) -> tuple[str, str, str, dict]:
    """AVGGT(σ) with σ = rows · columns of a window; VGGT keeps the frame whole that its coordinates refer to."""

    def thinned(keep_first_frame: bool) -> dict:
        keys = {"method": "grid", "stride": stride, "own_key": True, "mean_key": "one"}
        return {"keys": {**keys, "keep_first_frame": keep_first_frame}}

    rows, columns = stride
    return (
        name,
        f"`g2f`, and later global layers read one patch of each {rows}×{columns} window, a query's own, and the mean "
        f"of the others; {measured}",
        f"AVGGT, arXiv 2512.02541, σ = {rows * columns}",
        {
            "layers": {"0-37.5%": _G2F, "37.5-100%": thinned(keep_first_frame=True)},
            "families": {"pi3": {"0-55%": _G2F, "55-100%": thinned(keep_first_frame=False)}},
        },
    )


def _fastvggt() -> tuple[str, str, str, dict]:
    """FastVGGT as its code has it; VGGT keeps the frame whole that its coordinates refer to."""
    tokens = {"method": "merge", "ratio": 0.9, "cell": (2, 2), "cells": "seeded", "protect": 0.1, "metric": "input"}
    return (
        "fastvggt",
        "in every global layer two thirds of the tokens merge into similar ones; VGGT, 500 frames of ScanNet-50: "
        "Chamfer distance 0.420 → 0.411, 3.2 times as fast",
        "FastVGGT, arXiv 2509.02560",
        {
            "layers": {"*": {"tokens": {**tokens, "reference": True}}},
            "families": {"pi3": {"*": {"tokens": {**tokens, "reference": False}}}},
        },
    )


_PLANS: tuple[tuple[str, str, str, dict], ...] = (
    ("dense", "nothing is rewritten: the model in one graph, memory-lean", "the model's own paper", {}),
    (
        "g2f",
        "early global layers attend inside their frame: layers 0-8 of VGGT, the first 10 global ones of π³, "
        "as many in proportion at other depths",
        "AVGGT, arXiv 2512.02541, its first step (G2F)",
        {"layers": {"0-37.5%": _G2F}, "families": {"pi3": {"0-55%": _G2F}}},
    ),
    _avggt("avggt", (2, 2), "the same as `avggt-4`"),
    _avggt("avggt-2", (1, 2), "VGGT, 10 frames of RealEstate10K: AUC@30 88.1 → 87.8"),
    _avggt("avggt-4", (2, 2), "VGGT, 90 frames of TUM-dynamics: ATE 0.012 → 0.012, 2.1 times as fast"),
    _avggt("avggt-6", (2, 3), "between `avggt-4` and `avggt-9`"),
    _avggt("avggt-9", (3, 3), "VGGT, 800 frames of 7-Scenes: AUC@30 74.2 → 77.4, 7.9 times as fast"),
    _fastvggt(),
    _faster_vggt(25, keep=0.5, cdf=0.9, measured="25.5 %"),
    _faster_vggt(50, keep=0.5, cdf=0.7, measured="45 %"),
    _faster_vggt(75, keep=0.2, cdf=0.4, measured="74.8 %"),
)


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    return {name: Recipe(name, summary, source, Plan.read(plan, name)) for name, summary, source, plan in _PLANS}


def resolve(plan: object = None) -> Plan:
    """The plan that a user means: a Plan, a dictionary, a recipe's name, the path of a JSON file, or None (default)."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return Plan.read(plan)
    if plan is None:
        plan = DEFAULT
    if isinstance(plan, Path) or (isinstance(plan, str) and plan.endswith(".json")):
        return Plan.load(plan)
    if not isinstance(plan, str):
        raise PlanError(f"a plan is a recipe's name, the path of a JSON file, a dictionary or a Plan, not {plan!r}")
    if plan not in (known := recipes()):
        raise UnknownName("recipe", plan, known)
    return known[plan].plan


def read_named(text: str) -> tuple[str, Plan]:
    """A plan as command lines write it, with its name: a recipe, a JSON file or JSON, also as NAME=….

    Raises:
        PlanError: a plan that cannot be meant.
    """
    named = None if text.startswith("{") else _NAMED.fullmatch(text)
    name, text = (named[1].strip(), named[2].strip()) if named else (None, text)
    try:
        plan = resolve(json.loads(text) if text.startswith("{") else text)
    except json.JSONDecodeError as error:
        raise PlanError(f"{text!r} is not JSON: {error}") from error
    return name or plan.name, plan
