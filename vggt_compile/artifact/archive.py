"""The file: a zip archive of uncompressed records, and digests that say whether they are what was written."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from vggt_compile.errors import DamagedArtifact, NotAnArtifact

PIECE = 2**24
"""Bytes that one thread digests at a time."""
MANIFEST = "vggt_compile/manifest.json"
CONSTANTS = "vggt_compile/constants/{}.pt"
ENTRY = "data/aotinductor/{}/"


class Archive:
    """Records of a file by name, without the folder that holds all of them. Nothing is copied until it is extracted."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                listed = zipfile.ZipFile(file).infolist()
        except OSError as error:
            raise NotAnArtifact(path, f"cannot be read: {error.strerror}") from error
        except (zipfile.BadZipFile, ValueError) as error:
            begun = self.path.stat().st_size and self._bytes[:4] == b"PK\x03\x04"
            if begun:
                raise DamagedArtifact(path, "is cut off: its end is missing; copy it again") from error
            raise NotAnArtifact(path, "is no artifact, not even a package of torch") from error
        self._records = {info.filename.partition("/")[2]: info for info in listed}

    def names(self) -> list[str]:
        return list(self._records)

    def record(self, name: str) -> memoryview:
        """The bytes of a record, as they lie in the file."""
        info = self._records[name]
        header = self._bytes[info.header_offset : info.header_offset + 30]
        whole = len(header) == 30 and header[:4] == b"PK\x03\x04" and info.compress_type == zipfile.ZIP_STORED
        skipped = sum(struct.unpack("<HH", header[26:30])) if whole else 0
        start = info.header_offset + 30 + skipped
        if not whole or start + info.file_size > len(self._bytes):
            raise DamagedArtifact(self.path, f"is damaged: the record {name} is not where it should be")
        return memoryview(self._bytes)[start : start + info.file_size]

    def verify(self, digests: Mapping[str, str]) -> None:
        """DamagedArtifact where a record is missing or is not what was written."""
        for name, wanted in digests.items():
            if name not in self._records:
                raise DamagedArtifact(self.path, f"is damaged: the record {name} is missing")
            if digest(self.record(name)) != wanted:
                raise DamagedArtifact(self.path, f"is damaged: the record {name} is not what was written")

    def extract(self, entry: str, folder: Path) -> Path:
        """The files of an entry in a folder; the path of its library."""
        prefix = ENTRY.format(entry)
        for name in self._records:
            if name.startswith(prefix):
                target = folder / entry / name.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.record(name))
        return next((folder / entry).glob("*.so"))


def digest(data: bytes | memoryview) -> str:
    """SHA-256 of the digests of its pieces, which several threads make."""
    view = memoryview(data)
    pieces = [view[start : start + PIECE] for start in range(0, len(view), PIECE)]
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def digest_of_weights(state: Mapping[str, Tensor]) -> str:
    """Names, dtypes, shapes and numbers of a state dictionary, in one hash."""

    def lines() -> Iterator[str]:
        for name, tensor in sorted(state.items()):
            numbers = tensor.detach().cpu().contiguous().flatten()
            data = numbers.view(dtype=torch.uint8).numpy().data if numbers.numel() else b""
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest(data)}"

    return hashlib.sha256("\n".join(lines()).encode()).hexdigest()
