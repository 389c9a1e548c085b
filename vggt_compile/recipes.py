"""Plans by name: our own, published methods, and whatever else a user may mean by a plan."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vggt_compile.errors import PlanError, UnknownName
from vggt_compile.plan import Plan
from vggt_compile.published import ENTRIES as PUBLISHED
from vggt_compile.recommended import ENTRIES as OWN
from vggt_compile.rules import AUTO


@dataclass(frozen=True)
class Recipe:
    """A named plan.

    Attributes:
        summary: one line for people.
        source: the paper or page that it follows.
        published: what that reports, empty where nothing is quoted.
    """

    name: str
    summary: str
    source: str
    plan: Plan
    published: str = ""


DEFAULT = "fast"
_NAMED = re.compile(r"([\w .-]+)=(.*)", re.DOTALL)


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    entries = (*PUBLISHED[:1], *OWN, AUTO, *PUBLISHED[1:])  # dense, with which all others are compared, comes first
    return {e.name: Recipe(e.name, e.summary, e.source, Plan.read(e.plan, e.name), e.figures) for e in entries}


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
