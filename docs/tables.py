"""The tables of these pages come from the registry: a page marks the place, this script writes what belongs there.

python docs/tables.py            # writes them
python docs/tables.py --check    # exits with 1 and names the pages whose tables are old
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from vggt_compile import registry
from vggt_compile.bench.measured import Change, largest, speeds
from vggt_compile.bench.model import MODELS
from vggt_compile.recipes import DEFAULT, recipes

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/passes.md", "docs/recipes.md", "docs/architecture.md", "docs/collapse.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def github(rows: list[tuple[str, ...]], *headers: str) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True) + "\n"


def recipe_table() -> str:
    rows = [
        (f"`{r.name}`{' (default)' * (r.name == DEFAULT)}", r.summary, r.published, r.source)
        for r in recipes().values()
    ]
    return github(rows, "recipe", "what it does", "what its source reports", "source")


def speed_table() -> str:
    """How many times as fast as dense each recipe is, as far as the committed benchmarks have it."""
    counts = {"vggt": (16, 32, 100, 200, 300, 500, 800, 1000), "pi3": (16, 32, 100, 200, 300, 500, 800, 1000)}
    columns = [(model, n) for model, several in counts.items() for n in several]
    rows = []
    for recipe in recipes().values():
        ratios = {model: speeds(recipe, model)[1] for model in ("vggt", "pi3")}
        if any(ratios.values()):
            times = (f"{ratios[model][n]:.2f}×" if n in ratios[model] else "" for model, n in columns)
            rows.append((f"`{recipe.name}`", *times))
    return github(rows, "recipe", *(f"{MODELS[model]}, {n}" for model, n in columns))


def accuracy_table() -> str:
    """What each recipe costs the small models in AUC@30, of the entry with the most scenes."""
    columns = [(model, n) for model in ("pi3-small", "vggt-small") for n in (32, 64)]
    rows = []
    for recipe in recipes().values():
        found = largest(recipe)
        if any(place in found for place in columns):
            lost = (lost_points(found[place]) if place in found else "" for place in columns)
            shares = [found[place].flops for place in columns if place in found]
            rows.append((f"`{recipe.name}`", f"{shares[0]:.0%}" if shares[0] else "", *lost))
    return github(rows, "recipe", "FLOPs left", *(f"{model}, {n}" for model, n in columns))


def lost_points(change: Change) -> str:
    mean, low, high = change.points
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] ({change.scenes})"


def recipe_plans() -> str:
    """Each recipe as the JSON that one could write by hand."""
    parts = []
    for recipe in recipes().values():
        plan = {key: part for key, part in recipe.plan.to_json().items() if part}
        parts.append(f"`{recipe.name}`:\n\n```json\n{json.dumps(plan, indent=2)}\n```\n")
    return "\n".join(parts)


def method_table() -> str:
    rows = []
    for axis in registry.AXES:
        found = [m for m in registry.methods() if m.axis == axis and m.run.__module__.startswith("vggt_compile.")]
        rows += [(axis, f"`{m.name}`", parameters(m), m.summary, home(m.run)) for m in found]
        if not found:
            rows.append((axis, "", "", "none yet", ""))
    return github(rows, "axis", "method", "parameters", "what it does", "code")


def measure_table() -> str:
    rows = [
        (
            f"`{m.name}`",
            "<br>".join(f"`{name}`" for name in m.quantities),
            parameters(m),
            m.summary,
            measure_home(m.run),
        )
        for m in registry.measures()
        if m.run.__module__.startswith("vggt_compile.")
    ]
    return github(rows, "measure", "quantities", "parameters", "what it is", "definition")


def parameters(method: registry.Optioned) -> str:
    return "<br>".join(f"`{p.name}: {values(p.annotation)}{default(p)}`" for p in method.parameters.values()) or "none"


def default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f" = {json.dumps(parameter.default)}"


def values(annotation: Any) -> str:
    """What a parameter may be, as one would say it: `0 … 1`, `"mean" or "max"`, `int`."""
    kind, of = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is typing.Annotated:
        return str(of[1])
    if kind is typing.Literal:
        return " or ".join(map(json.dumps, of))
    if kind is tuple:
        return f"[{', '.join(map(values, of))}]"
    return str(annotation.__name__)


def home(function: Callable) -> str:
    path = Path(inspect.getsourcefile(function) or "").name
    return f"[passes/{path}](../passes/{path})"


def region_table() -> str:
    rows = [(f"`{entry.name}`", entry.summary, home(entry.run)) for entry in registry.regions()]
    return github(rows, "pass", "what it does", "code")


def measure_home(function: Callable) -> str:
    path = Path(inspect.getsourcefile(function) or "").name
    return f"[{path}](../vggt_compile/measures/{path})"


def family_table() -> str:
    rows = []
    for family in registry.families():
        module = sys.modules[family.place.__module__]
        if module.__name__.startswith("vggt_compile."):
            law = " ".join((module.__doc__ or "").partition("\n\n")[0].split())
            rows.append((f"`{family.name}`", "" if family.special is None else str(family.special), law))
    return github(sorted(rows), "family", "special tokens", "its trunk")


TABLES = {
    "recipes": recipe_table,
    "speeds": speed_table,
    "accuracy": accuracy_table,
    "plans": recipe_plans,
    "methods": method_table,
    "regions": region_table,
    "measures": measure_table,
    "families": family_table,
}


def filled(page: str) -> str:
    """A page with every marked table as the registry has it now."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is old")
    check = parser.parse_args().check
    pages = {ROOT / name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    old = {path: filled(text) for path, text in pages.items() if filled(text) != text}
    for path, text in old.items():
        print(f"{'old' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
