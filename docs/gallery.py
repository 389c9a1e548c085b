"""Draws docs/pictures/scenes.png: every trajectory in every kind of scene, the difficulties, and all textures.

python docs/gallery.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import pad

from vggt_compile.scenes import DIFFICULTIES, HELD_OUT_TEXTURES, KINDS, TRAINING_TEXTURES, TRAJECTORIES, render

PICTURE = Path(__file__).parent / "pictures" / "scenes.png"
SIZE = (93, 124)  # height and width of one view in pixels
FRAMES = 4
COLOURS = 192  # of the palette, which keeps the file small
GAP, MARGIN, HEADING = 2, 4, 16


def views(trajectory: str, kind: str, seed: int, **knobs: str) -> Tensor:
    """Some frames of a scene side by side [3, H, FRAMES · W]: neighbours, except that a rig shows one moment."""
    frames = render(seed, FRAMES, SIZE, trajectory, kind, **knobs).images[0]
    return torch.cat(list(pad(frames, (0, GAP), value=1)), -1)


def swatch(name: str) -> Tensor:
    """A scene whose surfaces all have one texture [3, H, W]."""
    return render(15, 1, SIZE, "orbit", "objects", fov=(50, 50), textures=[name]).images[0, 0]


def trajectories() -> list[tuple[str, Tensor]]:
    return [
        (f"{trajectory}, {kind}", views(trajectory, kind, seed))
        for seed, trajectory in enumerate(TRAJECTORIES, start=20)
        for kind in KINDS
    ]


def difficulties() -> list[tuple[str, Tensor]]:
    return [(f"difficulty {name}", views("wide", "indoor", 7, difficulty=name)) for name in DIFFICULTIES]


def textures() -> list[tuple[str, Tensor]]:
    training = [(name, swatch(name)) for name in TRAINING_TEXTURES]
    return training + [(f"{name} (held out)", swatch(name)) for name in HELD_OUT_TEXTURES]


def sheet(tiles: list[tuple[str, Tensor]], columns: int) -> Image.Image:
    """Labelled pictures of one size in rows."""
    height, width = tiles[0][1].shape[1] + HEADING, tiles[0][1].shape[2] + MARGIN
    page = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    draw = ImageDraw.Draw(page)
    for i, (label, tile) in enumerate(tiles):
        x, y = i % columns * width, i // columns * height
        draw.text((x + 2, y + 2), label, fill="black")
        page.paste(Image.fromarray((tile * 255).round().byte().permute(1, 2, 0).numpy()), (x, y + HEADING))
    return page


def stack(pages: Iterable[Image.Image]) -> Image.Image:
    pages = list(pages)
    whole = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), "white")
    y = 0
    for page in pages:
        whole.paste(page, (0, y))
        y += page.height
    return whole


def main() -> None:
    whole = stack([sheet(trajectories(), len(KINDS)), sheet(difficulties(), len(KINDS)), sheet(textures(), 11)])
    PICTURE.parent.mkdir(exist_ok=True)
    whole.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {whole.width} × {whole.height} pixels, {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
