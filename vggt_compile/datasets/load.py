"""Posed images as tensors at a model's input size, cameras and depth along with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vggt_compile.datasets.posed import PosedImages
from vggt_compile.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

UNKNOWN = 65535
"""No depth, as 0: the largest 16-bit number is 7-Scenes' mark, and elsewhere a sensor's end of range."""


@dataclass(frozen=True)
class Frames:
    """S frames of H × W pixels; lengths in the dataset's unit, all in single precision."""

    images: Tensor
    """`[S, 3, H, W]` in 0..1."""
    extrinsics: Tensor
    """`[S, 3, 4]` world → camera."""
    intrinsics: Tensor | None
    """`[S, 3, 3]` in these pixels, pixel centres at +0.5."""
    depth: Tensor | None
    """`[S, H, W]` along the optical axis, 0 where unknown."""


def load(posed: PosedImages, size: int = 518, patch: int = 14) -> Frames:
    """All images with the longer side at `size` pixels, the other at the nearest multiple of `patch`.

    Images are resized with bicubic filtering, depth takes the nearest pixel. Both sides are stretched to fit, by less
    than half a patch, and intrinsics with them.

    Raises:
        BadInput: Pillow is missing, `size` is no multiple of `patch`, an image cannot be read or differs in size from
            the first or from what its camera is for.
    """
    if patch < 1 or size < patch or size % patch:
        near = max(1, round(size / max(1, patch))) * max(1, patch)
        raise BadInput(f"size {size} is no multiple of the {patch} px patch; the nearest is {near}")
    if not len(posed):
        raise BadInput("no frames to load")
    first = open_image(posed.images[0])
    target = fit((first.height, first.width), size, patch)
    intrinsics = None
    if posed.intrinsics is not None:
        stretch = posed.intrinsics.new_tensor((target[1] / first.width, target[0] / first.height, 1.0))
        intrinsics = (stretch[:, None] * posed.intrinsics).float()
    images = []
    for place, path in enumerate(posed.images):
        image = open_image(path)
        check_size(path, image, (first.height, first.width), str(posed.images[0]))
        if posed.sizes is not None:
            check_size(path, image, posed.sizes[place], "its camera")
        images.append(pixels(image, target))
    return Frames(
        torch.stack(images),
        posed.extrinsics.float(),
        intrinsics,
        None if posed.depths is None else torch.stack([depth(p, target, posed.depth_unit) for p in posed.depths]),
    )


def fit(size: tuple[int, int], longer: int, patch: int) -> tuple[int, int]:
    """(H, W) with the longer side at `longer`, and both multiples of the patch."""
    scale = longer / max(size)
    height, width = (max(1, round(side * scale / patch)) * patch for side in size)
    return height, width


def check_size(path: Path, image: Image, wanted: tuple[int, int], whose: str) -> None:
    """BadInput for an image that is not of the size (H, W) which it must have."""
    if (image.height, image.width) != wanted:
        raise BadInput(
            f"{path} is {image.height}×{image.width} (height × width), {whose} is {wanted[0]}×{wanted[1]}; "
            "read the images that the cameras were made for, and load those of one size together"
        )


def pillow() -> ModuleType:
    """Pillow's module of images, or BadInput that says how to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInput("reading images needs Pillow: pip install 'vggt_compile[demo]'") from error
    return Image


def open_image(path: Path) -> Image:
    """One image file, decoded; not turned by EXIF, because cameras belong to the pixels as stored."""
    Image = pillow()
    try:
        with Image.open(path) as file:
            file.load()
            return file.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read the image {path}: {error}") from error


def pixels(image: Image, size: tuple[int, int]) -> Tensor:
    """`[3, H, W]` in 0..1."""
    import numpy

    height, width = size
    colour = image.convert("RGB")
    if colour.size != (width, height):
        colour = colour.resize((width, height), pillow().Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(colour)).permute(2, 0, 1).float() / 255


def depth(path: Path, size: tuple[int, int], unit: float) -> Tensor:
    """`[H, W]` in metres, 0 where unknown."""
    import numpy

    image = open_image(path)
    if not image.mode.startswith("I"):
        raise BadInput(f"{path}: a depth image has 16 bits in one channel, this one is {image.mode}")
    raw = torch.from_numpy(numpy.array(image).astype("float64"))
    raw = torch.where((raw == UNKNOWN) | (raw < 0), 0.0, raw)
    return torch.nn.functional.interpolate(raw[None, None], size, mode="nearest-exact")[0, 0].mul(unit).float()
