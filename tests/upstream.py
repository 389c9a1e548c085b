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
from torch._dynamo.symbolic_convert import _import_module

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
def importable(name: str) -> Iterator[None]:
    """Within the block, one checkout is importable; same-named packages of the others are put aside meanwhile.

    The block must last as long as the model is traced: Dynamo imports the modules of the code that it inlines.
    """
    root = str(checkout(name))
    aside = _pop_packages()
    sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path.remove(root)
        _pop_packages()
        sys.modules.update(aside)


@contextlib.contextmanager
def imported(name: str, *names: str) -> Iterator[list[ModuleType]]:
    """Modules of one checkout, usable within the block."""
    with importable(name):
        yield modules(*names)


def modules(*names: str) -> list[ModuleType]:
    """Import modules of the checkout in use; a missing third-party package is a skip that names it."""
    try:
        return [importlib.import_module(name) for name in names]
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in PACKAGES:
            raise
        pytest.skip(f"{names[0]} needs the package {error.name}: pip install {error.name}")


def _pop_packages() -> dict[str, ModuleType]:
    _forget_modules()
    names = [m for m in sys.modules if m.split(".")[0] in PACKAGES]
    return {m: sys.modules.pop(m) for m in names}


def _forget_modules() -> None:
    """Dynamo keeps modules by name, in a cache and in the globals where compiles began; ours change under a name."""
    _import_module.cache_clear()
    aliases = tuple(f"__import_{package}_dot_" for package in PACKAGES)
    for module in list(sys.modules.values()):
        for name in [n for n in getattr(module, "__dict__", ()) if n.startswith(aliases)]:
            delattr(module, name)
