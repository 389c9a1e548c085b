"""A folder of images as one tensor, or an error that says which file is wrong and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vggt_compile.cli.options import nearest_size
from vggt_compile.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vggt_compile.bench.accuracy.cases import Geometry

Size = tuple[int, int]
"""Height and width in pixels."""
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm"))
TRAINED_SIDE = 518
"""Longest side that VGGT and π³ were trained with, in pixels."""
SHOWN = 4


@dataclass(frozen=True)
class Frames:
    """Images `[1, S, 3, H, W]` in 0..1, their names, what was done to get them, and the truth, on the CPU, if known."""

    images: Tensor
    names: list[str]
    notes: list[str] = field(default_factory=list)
    truth: Geometry | None = None


def load_folder(
    folder: str | Path,
    patch: int,
    *,
    limit: int | None = None,
    size: Size | None = None,
    resize: bool = False,
) -> Frames:
    """The images of a folder in natural order of their names.

    Args:
        patch: both sides must be multiples of it.
        limit: take the first so many.
        size: (H, W) that all must have, or are resized to.
        resize: resize to `size`, or without it to the nearest multiple of the patch.

    Raises:
        BadInput: no such folder, fewer than two images, an unreadable one, sizes that differ or do not fit.
    """
    paths, notes = find(Path(folder))
    if limit is not None and len(paths) > limit:
        notes.append(f"took the first {limit} of {len(paths)} images")
        paths = paths[:limit]
    opened = [read(path) for path in paths]
    target = fit([path.name for path in paths], [(i.height, i.width) for i in opened], patch, size, resize)
    changed = [i for i in opened if (i.height, i.width) != target]
    if changed:
        notes.append(f"resized {len(changed)} images from {_text(changed[0])} to {target[0]}×{target[1]}")
    return Frames(stack(opened, target), [path.name for path in paths], notes)


def find(folder: Path) -> tuple[list[Path], list[str]]:
    """Image files in natural order, and a note on those that were left out."""
    if not folder.is_dir():
        raise BadInput(f"--images {folder}: no such folder")
    files = [path for path in folder.iterdir() if path.is_file()]
    paths = sorted((p for p in files if p.suffix.lower() in SUFFIXES), key=natural)
    others = sorted(p.name for p in files if p.suffix.lower() not in SUFFIXES)
    if len(paths) < 2:
        found = f"one image ({paths[0].name})" if paths else "no images"
        raise BadInput(f"--images {folder}: {found}, but it takes two or more ({', '.join(sorted(SUFFIXES))})")
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    return paths, [f"ignored what is no image: {', '.join(others[:SHOWN])}{more}"] if others else []


def natural(path: Path) -> list[tuple[bool, int, str]]:
    """A sort key that reads numbers as numbers: 2.png before 10.png."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def read(path: Path) -> Image:
    """One image, upright by its EXIF orientation, as RGB: transparent pixels over white, 16 bits down to 8."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise BadInput("reading images needs Pillow: pip install 'vggt_compile[demo]'") from error
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read the image {path}: {error}") from error


def fit(
    names: Sequence[str],
    sizes: Sequence[Size],
    patch: int,
    wanted: Size | None,
    resize: bool,
) -> Size:
    """The size (H, W) that all images get; BadInput where that needs a resize which was not asked for."""
    first = sizes[0]
    odd = next((i for i, size in enumerate(sizes) if size != first), None)
    if odd is not None and not (resize and wanted):
        height, width = wanted or nearest_size(_trained(first), patch)
        raise BadInput(
            f"images of different sizes: {names[0]} is {first[0]}×{first[1]} (height × width), {names[odd]} is "
            f"{sizes[odd][0]}×{sizes[odd][1]}; `--size {height} {width} --resize` makes them equal"
        )
    target = wanted or nearest_size(first, patch)
    if first != target and not resize:
        raise BadInput(_does_not_fit(names[0], first, target, patch, wanted))
    return target


def _does_not_fit(name: str, size: Size, target: Size, patch: int, wanted: Size | None) -> str:
    why = f"not the --size {target[0]} {target[1]}" if wanted else f"no multiple of the {patch} px patch"
    line = f"{name} is {size[0]}×{size[1]} (height × width), {why}; --resize would make it {target[0]}×{target[1]}"
    if wanted or max(size) <= TRAINED_SIDE:
        return line
    height, width = nearest_size(_trained(size), patch)
    return f"{line}, and the models' own scale is `--size {height} {width} --resize`"


def _trained(size: Size) -> Size:
    scale = min(1.0, TRAINED_SIDE / max(size))
    return round(size[0] * scale), round(size[1] * scale)


def _text(image: Image) -> str:
    return f"{image.height}×{image.width}"


def stack(images: Sequence[Image], size: Size) -> Tensor:
    """`[1, S, 3, H, W]` in 0..1, bicubic where a size differs."""
    import numpy
    import torch
    from PIL.Image import Resampling

    height, width = size
    fitted = [i if i.size == (width, height) else i.resize((width, height), Resampling.BICUBIC) for i in images]
    pixels = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in fitted]))
    return pixels.permute(0, 3, 1, 2)[None].float() / 255
