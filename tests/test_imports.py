"""Imports form the drawn graph: arrows point down, and nothing reaches up or sideways.

Checked from the source, so imports inside functions count; those under TYPE_CHECKING do not.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx as nx
import pytest

import vggt_compile

ROOT = Path(__file__).parents[1]

# A unit may import what it points at, and whatever can be reached from there. A unit is a module or a package of ours;
# a dotted name is a module with arrows of its own. `root` is the lazy names of the package itself.
DRAWING = """
    __main__ → cli
    cli → root artifact bench analysis scenes models
    root → backend dry_run once artifact auto families.trace
    bench → root artifact journal metrics scenes models datasets ops
    auto → dry_run journal metrics models
    analysis → root metrics
    artifact → recipes rewrite caches garbage families.trace attentions
    attentions → graph ops
    dry_run → backend
    once → backend kept
    kept →
    backend → breaks densities probes handouts recipes rewrite caches garbage families.trace graph attentions
    caches → sources
    garbage →
    breaks → report families.shim graph
    recipes → plan published recommended rules
    recommended → published
    rules → published
    rewrite → graph plan provider report observe lower rows unmet passes.lift_attention
    provider → graph ops
    lower → graph ops
    rows → graph report
    unmet → plan report registry
    observe → graph plan report
    sources → registry
    passes → registry provider graph ops
    passes.lift_attention → graph
    families → registry
    graph → registry
    plan → registry
    registry → site errors
    densities → report handouts
    probes → report handouts
    handouts →
    journal → errors
    measures → registry ops
    report → growth
    growth → errors
    published →
    ops →
    datasets → models errors
    metrics →
    scenes →
    models →
    families.trace → families.shims
    families.shims → families.rotary families.dense_heads families.rebuild
    families.rotary → families.shim families.forms ops
    families.dense_heads → families.shim families.forms
    families.shim →
    families.forms → families.frame_loop ops
    families.frame_loop →
    families.rebuild →
    site →
    errors →
"""
# `passes.lift_attention` reads what the driver looks for: it is a matcher and offers no choice, so no registry between.


def drawn(drawing: str) -> nx.DiGraph:
    graph: nx.DiGraph = nx.DiGraph()
    for line in filter(str.strip, drawing.splitlines()):
        unit, _, below = line.partition("→")
        graph.add_node(unit.strip())
        graph.add_edges_from((unit.strip(), other) for other in below.split())
    return graph


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name, links followed."""
    found = {}
    for place, _, names in os.walk(package, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(place, name)
                dotted = path.relative_to(package.parent).with_suffix("").as_posix().replace("/", ".")
                found[dotted.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, object], homes: Mapping[str, str]) -> Iterator[str]:
    """Modules of the package that a module imports; `homes` are the lazy names of the package's root."""
    root = name.partition(".")[0]
    for node in _running(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == root)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            if source.partition(".")[0] != root:
                continue
            for alias in node.names:
                full = f"{source}.{alias.name}"
                if full in known:
                    yield full
                elif source == root and alias.name in homes:
                    yield f"{root}.{homes[alias.name]}"
                elif source != root or alias.name != "__version__":
                    yield source


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from (inner for child in node.orelse for inner in (child, *_running(child)))
            continue
        yield node
        yield from _running(node)


def unit(module: str, drawing: nx.DiGraph) -> str:
    parts = module.split(".")[1:]
    dotted = ".".join(parts[:2])
    return dotted if dotted in drawing else parts[0] if parts else "root"


def violations(package: Path, drawing: nx.DiGraph, homes: Mapping[str, str] | None = None) -> list[str]:
    """Arrows that are not drawn, undrawn units, and cycles between modules, in words."""
    known = modules(package)
    arrows = nx.DiGraph()
    arrows.add_nodes_from(known)
    for name, path in known.items():
        arrows.add_edges_from((name, other) for other in imports(name, path, known, homes or {}) if other != name)
    found = [f"{unit(name, drawing)} is not drawn" for name in known if unit(name, drawing) not in drawing]
    allowed = nx.transitive_closure(drawing, reflexive=True)
    for name, other in arrows.edges:
        above, below = unit(name, drawing), unit(other, drawing)
        if above in drawing and not allowed.has_edge(above, below):
            found.append(f"{name} imports {other}: no way down from {above} to {below}")
    return found + [f"cycle: {' → '.join(cycle)}" for cycle in nx.simple_cycles(arrows)]


def test_drawing_has_no_cycle() -> None:
    assert nx.is_directed_acyclic_graph(drawn(DRAWING))


def test_imports_follow_the_drawing() -> None:
    assert violations(ROOT / "vggt_compile", drawn(DRAWING), vggt_compile._HOMES) == []


@pytest.mark.parametrize(
    ("above", "below"),
    [
        ("rewrite", "families"),  # reached through the registry only
        ("rewrite", "backend"),
        ("passes", "rewrite"),
        ("families", "passes"),
        ("registry", "plan"),
        ("models", "backend"),
        ("scenes", "models"),
        ("metrics", "models"),
        ("datasets", "scenes"),
        ("site", "graph"),
    ],
)
def test_drawing_forbids(above: str, below: str) -> None:
    assert not nx.has_path(drawn(DRAWING), above, below)


SMALL = drawn("top → middle\nmiddle → bottom\nbottom →\nroot → top")


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("bottom", "import pkg.top", "pkg.bottom imports pkg.top: no way down from bottom to top"),
        ("bottom", "from pkg import top", "pkg.bottom imports pkg.top: no way down from bottom to top"),
        ("bottom", "from pkg.top import name", "pkg.bottom imports pkg.top: no way down from bottom to top"),
        ("bottom", "from . import top", "pkg.bottom imports pkg.top: no way down from bottom to top"),
        ("bottom", "from .top import name", "pkg.bottom imports pkg.top: no way down from bottom to top"),
        ("bottom", "from pkg import lazy", "pkg.bottom imports pkg.top: no way down from bottom to top"),
        ("bottom", "import pkg", "pkg.bottom imports pkg: no way down from bottom to root"),
        ("bottom", "def f():\n    import pkg.top", "pkg.bottom imports pkg.top: no way down from bottom to top"),
        ("middle.inner", "from ..top import name", "pkg.middle.inner imports pkg.top: no way down from middle to top"),
        ("middle", "import pkg.middle.inner", "cycle: pkg.middle → pkg.middle.inner"),
        ("stranger", "", "stranger is not drawn"),
    ],
)
def test_checker_reports_an_arrow_against_the_order(module: str, line: str, complaint: str, tmp_path: Path) -> None:
    package = _small_package(tmp_path)
    assert violations(package, SMALL, {"lazy": "top"}) == []
    files = modules(package) | {"pkg.stranger": package / "stranger.py"}
    with files[f"pkg.{module}"].open("a") as file:
        file.write(f"\n{line}\n")
    found = violations(package, SMALL, {"lazy": "top"})
    assert any(set(complaint.split()) == set(entry.split()) for entry in found), found


def test_checker_sees_no_arrow_in_imports_for_types(tmp_path: Path) -> None:
    package = _small_package(tmp_path)
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.top import name\n"
    (package / "bottom.py").write_text(text)
    assert violations(package, SMALL) == []
    (package / "bottom.py").write_text(text + "else:\n    from pkg.top import name\n")
    assert violations(package, SMALL) != []


def _small_package(folder: Path) -> Path:
    texts = {
        "__init__": "",
        "top": "from pkg import bottom\nfrom pkg.middle import name\nfrom pkg import __version__\n",
        "middle/__init__": "",
        "middle/inner": "import pkg.bottom\nimport pkg.middle\n",
        "bottom": "import os\n",
    }
    for name, text in texts.items():
        path = folder / "pkg" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "pkg"
