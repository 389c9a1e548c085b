"""A file in the making: beside its path until it is whole, and written while other work goes on.

Torch writes the few records that make an archive one of its own. Those of libraries follow by way of `zipfile`: 2.5 GB,
which VGGT-1B has, and their digest took it 3 seconds on a CPU, and torch's writer 14 and more.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from torch.export.pt2_archive import PT2ArchiveWriter

from vggt_compile.artifact.archive import MANIFEST, digest
from vggt_compile.artifact.manifest import Manifest


@contextmanager
def drafted(path: Path) -> Iterator[Draft]:
    """What is not finished at the end of the block leaves nothing behind; who reads the path meanwhile has what was."""
    with tempfile.TemporaryDirectory(prefix=".vggt_compile-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        with PT2ArchiveWriter(str(partial)):
            pass
        with ZipFile(partial, "a") as archive, ThreadPoolExecutor(1) as worker:
            yield Draft(path, partial, archive, worker)


class Draft:
    """Records of an archive, which is written from front to back by a thread of its own."""

    def __init__(self, path: Path, partial: Path, archive: ZipFile, worker: ThreadPoolExecutor) -> None:
        self.path, self._partial, self._zip, self._worker = path, partial, archive, worker
        self._root = archive.namelist()[0].partition("/")[0]
        self._digests: dict[str, Future[str]] = {}

    def add(self, name: str, content: bytes | Path) -> None:
        """A record, or a file as one, which must stay as it is until `finish`."""
        self._digests[name] = self._worker.submit(self._write, name, content)

    def finish(self, manifest: Manifest) -> Manifest:
        """The manifest with a digest for each record, which is in the file."""
        manifest = replace(manifest, records={name: seen.result() for name, seen in self._digests.items()})
        self._write(MANIFEST, manifest.to_json().encode())
        self._zip.close()
        os.replace(self._partial, self.path)
        return manifest

    def _write(self, name: str, content: bytes | Path) -> str:
        with _bytes(content) as data, ThreadPoolExecutor(1) as beside:
            seen = beside.submit(digest, data)
            self._zip.writestr(ZipInfo(f"{self._root}/{name}"), data)
            return seen.result()


@contextmanager
def _bytes(content: bytes | Path) -> Iterator[memoryview]:
    """Nothing is copied; an empty file cannot be mapped."""
    if isinstance(content, bytes) or not content.stat().st_size:
        yield memoryview(content if isinstance(content, bytes) else b"")
        return
    with content.open("rb") as file:
        yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
