"""The code that makes up methods and operators, as a hash for compile caches.

The body of a traceable operator is not part of Inductor's own cache keys: without this hash, a compile after an edit of
such a body would be answered with the numbers of the old one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import uuid
from collections.abc import Iterator
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
    folders = list(getattr(module, "__path__", ()))
    for folder in folders:
        for place, _, names in os.walk(folder, followlinks=True):  # in a checkout, `passes` is a link
            paths = (Path(place, name) for name in names if name.endswith(".py"))
            yield from ((path.relative_to(folder).as_posix(), path) for path in paths)
    if not folders and getattr(module, "__file__", None):
        yield module.__name__, Path(str(module.__file__))


_package_hash(__name__.partition(".")[0])
