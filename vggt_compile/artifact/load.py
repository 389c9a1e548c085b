"""Load an artifact: check what it says of itself, then run the entry that serves the images at hand."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vggt_compile.artifact.archive import CONSTANTS, Archive
from vggt_compile.artifact.manifest import Entry, Manifest
from vggt_compile.artifact.opened import answer, give, opened
from vggt_compile.errors import WrongImages


def load(path: str | os.PathLike[str], *, device: str | torch.device | None = None, verify: bool = True) -> Artifact:
    """An artifact, ready to be called with images.

    Args:
        path: of the file.
        device: where to run it; the artifact's own kind unless given.
        verify: compare every record with its digest, which reads the whole file.

    Raises:
        NotAnArtifact, DamagedArtifact, WrongMachine: each says in one line what is wrong.
    """
    archive = Archive(path)
    manifest = Manifest.read(archive)
    place = torch.device(device or manifest.device)
    manifest.check(path, place)
    if verify:
        archive.verify(manifest.records)
    return Artifact(archive, manifest, place)


class Artifact:
    """A loaded artifact: call it with images `[B, S, 3, H, W]` or `[S, 3, H, W]` for what the model would give.

    Entries are loaded when the first images come that they serve; the weights are in memory once.
    """

    def __init__(self, archive: Archive, manifest: Manifest, device: torch.device) -> None:
        self.manifest, self.device = manifest, device
        self._archive = archive
        self._folder = tempfile.TemporaryDirectory(prefix="vggt_compile-")
        first = manifest.entries[0]
        self._runners = {first.name: self._open(first)}
        self._weights: dict[str, Tensor] = self._runners[first.name].extract_constants_map(False)

    def __call__(self, images: Tensor) -> Any:
        """Raises WrongImages where no entry serves them."""
        images = images if images.ndim == 5 else images[None]
        entry = self.entry(images)
        runner = self._runners.get(entry.name) or self._fill(entry)
        return answer(runner, images)

    def entry(self, images: Tensor) -> Entry:
        """The entry that serves images `[B, S, 3, H, W]`."""
        if images.dtype != torch.float32:
            raise self._wrong(f"it takes float32 images, not {images.dtype}")
        if images.ndim != 5 or images.shape[2] != 3:
            raise self._wrong(f"it takes images [B, S, 3, H, W], not {tuple(images.shape)}")
        if images.device.type != self.device.type:
            raise self._wrong(f"it runs on {self.device}, and these images are on {images.device}")
        batch, frames, _, *size = images.shape
        spans = [entry.span for entry in self.manifest.entries]
        for entry in self.manifest.entries:
            if entry.span.serves(batch, frames, (size[0], size[1])):
                return entry
        sizes = sorted({span.size for span in spans})
        if tuple(size) not in sizes:
            made = ", ".join(f"{height}×{width}" for height, width in sizes)
            raise self._wrong(f"it was exported for images of {made}, not {size[0]}×{size[1]}")
        for what, number in (("frames", frames), ("batch", batch)):
            ranges = sorted({getattr(span, what) for span in spans if span.size == tuple(size)})
            if not any(low <= number <= high for low, high in ranges):
                least, greatest = ranges[0][0], max(high for _, high in ranges)
                raise self._wrong(f"it was exported for {what} from {least} to {greatest}, not {number}")
        raise self._wrong(f"no entry serves {batch} × {frames} frames of {size[0]}×{size[1]}")

    def _wrong(self, problem: str) -> WrongImages:
        return WrongImages(self._archive.path, problem)

    def _open(self, entry: Entry) -> Any:
        return opened(self._archive.extract(entry.name, Path(self._folder.name)), self.device)

    def _fill(self, entry: Entry) -> Any:
        """Open an entry and give it the weights of the first one, and what it has of its own."""
        runner = self._open(entry)
        constants = dict(self._weights)
        if entry.own_constants:
            stored = io.BytesIO(self._archive.record(CONSTANTS.format(entry.name)))
            constants |= torch.load(stored, map_location=self.device, weights_only=True)
        give(runner, constants)
        self._runners[entry.name] = runner
        return runner
