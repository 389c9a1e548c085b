"""Where the published models live: checkouts below $VGGT_COMPILE_UPSTREAM, imported in isolation.

The folder holds one checkout a model, under its repository's name: `vggt`, `Pi3`, `vggt-omega`, `Depth-Anything-3`,
`FastVGGT`. Two of them ship a package called `vggt`, so each is imported with the others' modules put aside.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

VARIABLE = "VGGT_COMPILE_UPSTREAM"
ROOTS = {"vggt": ".", "Pi3": ".", "vggt-omega": ".", "Depth-Anything-3": "src", "FastVGGT": "."}
PACKAGES = ("vggt", "pi3", "vggt_omega", "depth_anything_3", "merging")


def checkout(name: str) -> Path:
    """The import root of one published model, or a skip that says how to provide it."""
    base = os.environ.get(VARIABLE)
    if not base:
        pytest.skip(f"set {VARIABLE} to a folder that holds a checkout of {name}")
    root = Path(base) / name / ROOTS[name]
    if not root.is_dir():
        pytest.skip(f"{VARIABLE}={base} holds no checkout of {name}")
    return root


@contextlib.contextmanager
def imported(name: str, *modules: str) -> Iterator[list[ModuleType]]:
    """Import `modules` of one checkout; modules of same-named packages are restored afterwards."""
    root = str(checkout(name))
    aside = _pop_packages()
    sys.path.insert(0, root)
    try:
        for package in modules:
            _require_third_party(package)
        yield [importlib.import_module(module) for module in modules]
    finally:
        sys.path.remove(root)
        _pop_packages()
        sys.modules.update(aside)


def _pop_packages() -> dict[str, ModuleType]:
    names = [m for m in sys.modules if m.split(".")[0] in PACKAGES]
    return {m: sys.modules.pop(m) for m in names}


def _require_third_party(module: str) -> None:
    """Skip where a checkout needs a package that this environment lacks; any other import error is an error."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in PACKAGES:
            raise
        pytest.skip(f"{module} needs the package {error.name}: pip install {error.name}")
