"""COLMAP's text model: cameras.txt and images.txt, beside a folder of images.

https://colmap.github.io/format.html#text-format
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from vggt_compile.datasets.posed import PosedImages, existing
from vggt_compile.datasets.rows import Row, is_comment, read_lines, read_rows, rotation
from vggt_compile.errors import BadInput

PARAMETERS = {"SIMPLE_PINHOLE": "f cx cy", "PINHOLE": "fx fy cx cy", "SIMPLE_RADIAL": "f cx cy k"}
"""Camera models without distortion, and SIMPLE_RADIAL where its k is 0."""
PLACES = (".", "sparse/0", "sparse", "sparse/txt")
UNDISTORT = "`colmap image_undistorter` makes images and a model without distortion"

Camera = tuple[Tensor, tuple[int, int]]
"""Intrinsics `[3, 3]` and the images' (H, W)."""


def read_colmap(path: str | Path, images: str | Path | None = None, poses: str | Path | None = None) -> PosedImages:
    """The registered images of a model, in natural order of their names.

    Args:
        path: the folder of a project.
        images: the folder of the images, by default `images` of the project.
        poses: the folder of cameras.txt and images.txt, by default the project or its `sparse/0`, `sparse`.

    The unit of length is the model's own, which is arbitrary unless it was georeferenced.

    Raises:
        BadInput: a file is missing, a row is not as the format has it, or a camera has distortion.
    """
    model = find_model(Path(poses or path)) or Path(poses or path)
    folder = Path(images) if images else Path(path, "images")
    cameras = read_cameras(model / "cameras.txt")
    rows = sorted(image_rows(model / "images.txt"), key=lambda row: natural(row.words[9]))
    extrinsics, found = [], []
    for row in rows:
        qw, qx, qy, qz, *translation = row.numbers(1, 8)
        turn = rotation(row, (qx, qy, qz, qw))
        extrinsics.append(torch.cat((turn, turn.new_tensor(translation)[:, None]), dim=-1))
        if row.whole(8) not in cameras:
            raise BadInput(
                f"{row}: camera {row.words[8]} is not in {model / 'cameras.txt'}; export both files together"
            )
        found.append(cameras[row.whole(8)])
    fix = "name the folder of the images: images=…"
    return PosedImages(
        tuple(existing(folder / row.words[9], row, fix) for row in rows),
        torch.stack(extrinsics),
        torch.stack([intrinsics for intrinsics, _ in found]),
        tuple(size for _, size in found),
    )


def find_model(folder: Path) -> Path | None:
    """Where below a folder COLMAP's text files are, if anywhere."""
    if folder.name == "images.txt":
        return folder.parent
    return next((folder / place for place in PLACES if (folder / place / "images.txt").is_file()), None)


def read_cameras(path: Path) -> dict[int, Camera]:
    """Cameras by their id."""
    return {row.whole(0): camera(row) for row in read_rows(path, "rows of: CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]")}


def camera(row: Row) -> Camera:
    """The intrinsics of one row of cameras.txt; COLMAP's pixel centres are at +0.5, too."""
    model = row.words[1] if len(row.words) > 1 else ""
    if model not in PARAMETERS:
        raise BadInput(f"{row}: camera model {model!r} is not one of {', '.join(PARAMETERS)}; {UNDISTORT}")
    row.expect(f"CAMERA_ID MODEL WIDTH HEIGHT {PARAMETERS[model]}")
    values = dict(zip(PARAMETERS[model].split(), row.numbers(4, len(row.words)), strict=True))
    if values.get("k"):
        raise BadInput(f"{row}: radial distortion k = {values['k']} is not 0; {UNDISTORT}")
    fx, fy = (values.get(name, values.get("f")) for name in ("fx", "fy"))
    matrix = [[fx, 0, values["cx"]], [0, fy, values["cy"]], [0, 0, 1]]
    return torch.tensor(matrix, dtype=torch.float64), (row.whole(3), row.whole(2))


def image_rows(path: Path) -> list[Row]:
    """The first of each image's two lines; the second, its points, may be empty."""
    lines = iter(enumerate(read_lines(path, "two lines for each image"), 1))
    rows = []
    for number, line in lines:
        if not is_comment(line):
            row = Row(path, number, tuple(line.strip().split(maxsplit=9)))
            rows.append(row.expect("IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"))
            next(lines, None)
    if not rows:
        raise BadInput(f"{path}: no images; the model is empty, so register images first")
    return rows


def natural(name: str) -> list[str | int]:
    """A sort key that reads numbers as numbers: words at even places, numbers at odd ones."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]
