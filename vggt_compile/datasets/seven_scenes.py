"""7-Scenes: frame-000000.color.png, .depth.png (millimetres, 65535 where unknown) and .pose.txt (camera → world).

https://www.microsoft.com/en-us/research/project/rgb-d-dataset-7-scenes/
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vggt_compile.datasets.posed import PosedImages, existing, invert, is_rotation
from vggt_compile.datasets.rows import read_rows
from vggt_compile.errors import BadInput

COLOUR, DEPTH, POSE = ".color.png", ".depth.png", ".pose.txt"
DEPTH_UNIT = 1 / 1000


def read_seven_scenes(
    path: str | Path, images: str | Path | None = None, poses: str | Path | None = None
) -> PosedImages:
    """All frames of one sequence folder, with depth if the first one has it.

    Args:
        path: the folder of a sequence, such as `chess/seq-01`.
        images: the folder of the colour and depth images, by default the same.
        poses: the folder of the poses, by default the same.

    The layout has no intrinsics: the dataset's page gives one focal length for all of it. The published depth is of a
    second lens, not registered to the colour images.

    Raises:
        BadInput: a frame lacks a file, or a pose is not a rigid 4 × 4 matrix.
    """
    folder = Path(images or path)
    colours = sorted(folder.glob(f"*{COLOUR}"))
    if not colours:
        raise BadInput(f"{folder}: no frame-000000{COLOUR} and the like; name the folder of one sequence (seq-01)")
    extrinsics = [read_pose(Path(poses or path, stem(colour) + POSE), colour) for colour in colours]
    wanted = [colour.with_name(stem(colour) + DEPTH) for colour in colours]
    depths = None
    if wanted[0].is_file():
        fix = "unpack it again, or remove every depth"
        depths = tuple(existing(path, colour, fix) for path, colour in zip(wanted, colours, strict=True))
    return PosedImages(tuple(colours), torch.stack(extrinsics), depths=depths, depth_unit=DEPTH_UNIT)


def stem(colour: Path) -> str:
    return colour.name.removesuffix(COLOUR)


def read_pose(path: Path, colour: Path) -> Tensor:
    """Extrinsics `[3, 4]` of a file with four rows of a camera → world matrix."""
    existing(path, colour, "unpack it again, or remove the frame")
    rows = [row.expect("r1 r2 r3 t") for row in read_rows(path, "a 4 × 4 matrix, camera to world")]
    if len(rows) != 4:
        raise BadInput(f"{path}: expected 4 rows of a 4 × 4 matrix, found {len(rows)}")
    matrix = torch.tensor([row.numbers(0, 4) for row in rows], dtype=torch.float64)
    if not is_rotation(matrix[:3, :3]) or matrix[3].tolist() != [0, 0, 0, 1]:
        raise BadInput(f"{path}: not a rigid transform (a rotation, a translation, and 0 0 0 1); remove the frame")
    return invert(matrix[:3, :3], matrix[:3, 3])
