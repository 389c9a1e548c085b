"""What every reader returns: where the images are, and the cameras that took them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vggt_compile.errors import BadInput

RIGID = 1e-2
"""How far a rotation's columns may be from orthonormal; published poses are rounded to a few digits."""


@dataclass(frozen=True)
class PosedImages:
    """S images with known cameras, in the order of the video or of the names."""

    images: tuple[Path, ...]
    """Files that exist."""
    extrinsics: Tensor
    """`[S, 3, 4]` in double precision, world → camera, OpenCV axes, in the dataset's unit (metres, unless COLMAP's)."""
    intrinsics: Tensor | None = None
    """`[S, 3, 3]` in double precision, in the files' pixels, pixel centres at +0.5; None where the layout has none."""
    sizes: tuple[tuple[int, int], ...] | None = None
    """(H, W) of the images that the intrinsics are for."""
    depths: tuple[Path, ...] | None = None
    """16-bit depth images that exist, one for each image."""
    depth_unit: float = 1.0
    """Metres that a depth image's 1 stands for."""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, frames: Iterable[int]) -> PosedImages:
        """The frames with these numbers, in this order."""
        chosen = list(frames)
        return PosedImages(
            tuple(self.images[i] for i in chosen),
            self.extrinsics[chosen],
            None if self.intrinsics is None else self.intrinsics[chosen],
            None if self.sizes is None else tuple(self.sizes[i] for i in chosen),
            None if self.depths is None else tuple(self.depths[i] for i in chosen),
            self.depth_unit,
        )


def invert(rotation: Tensor, translation: Tensor) -> Tensor:
    """Camera → world rotations `[..., 3, 3]` and translations `[..., 3]` as extrinsics `[..., 3, 4]`."""
    return torch.cat((rotation.mT, -rotation.mT @ translation[..., None]), dim=-1)


def is_rotation(matrix: Tensor) -> bool:
    """Whether `[3, 3]` is a rotation up to the rounding of published poses."""
    product = matrix @ matrix.mT - torch.eye(3, dtype=matrix.dtype)
    return bool(product.abs().max() < RIGID) and bool(torch.linalg.det(matrix) > 0)


def existing(path: Path, where: object, fix: str) -> Path:
    """The path of a file that is there, or BadInput that says what asked for it."""
    if not path.is_file():
        raise BadInput(f"{where}: no file {path}; {fix}")
    return path
