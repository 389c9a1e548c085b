"""The code that makes up methods and operators, as a hash for compile caches.

The body of a traceable operator is not part of Inductor's own cache keys: without this hash, a compile after an edit of
such a body would be answered with the numbers of the old one.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from vggt_compile import registry


def source_hash() -> str:
    """Changes with every edit of this package, and of every package that registered a method.

    Code without a file, as in a notebook, can change unseen: it gets a new hash for every compile.
    """
    digest = hashlib.sha256()
    for package in sorted(registry.packages()):
        digest.update(_package_hash(package) or uuid.uuid4().bytes)
    return digest.hexdigest()[:16]


@functools.cache
def _package_hash(package: str) -> bytes | None:
    """Hash of a package or of one module, read once: an edit does not change what this process has imported."""
    digest = hashlib.sha256()
    files = sorted(_files(sys.modules[package]))
    for name, path in files:
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.digest() if files else None


def _files(module: ModuleType) -> Iterator[tuple[str, Path]]:
    """Source files, each with a name that does not depend on where the package lies."""
    folders = {module.__name__: list(getattr(module, "__path__", ()))}
    for name in registry.BUILT_IN:  # `passes` need not lie inside our own folder: see package-dir in pyproject.toml
        if name.startswith(f"{module.__name__}.") and (spec := find_spec(name)):
            folders[name] = list(spec.submodule_search_locations or ())
    for name, places in folders.items():
        for place in places:
            yield from ((f"{name}:{path.relative_to(place).as_posix()}", path) for path in Path(place).rglob("*.py"))
    if not any(folders.values()) and getattr(module, "__file__", None):
        yield module.__name__, Path(str(module.__file__))


_package_hash(__name__.partition(".")[0])
