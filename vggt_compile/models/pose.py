"""Between VGGT's pose encoding and pinhole cameras.

An encoding holds nine numbers: translation (3), rotation as a quaternion x, y, z, w (4), and the vertical and the
horizontal field of view in radians (2). Cameras follow OpenCV: x right, y down, z forward, world to camera, with the
principal point in the middle of the image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cameras(NamedTuple):
    """World-to-camera transforms [R | t] and the matrices that project to pixels."""

    extrinsics: Tensor
    """`[..., 3, 4]`, translation in the scene's unit."""
    intrinsics: Tensor
    """`[..., 3, 3]`, in pixels."""


def decode_pose(encoding: Tensor, image_size: tuple[int, int]) -> Cameras:
    """Encodings `[..., 9]` of images of `image_size` = (H, W) pixels → cameras. Quaternions need not be unit."""
    height, width = image_size
    translation, quaternion, fov = encoding.split((3, 4, 2), dim=-1)
    extrinsics = torch.cat((quaternion_to_matrix(quaternion), translation[..., None]), dim=-1)
    half_size = fov.new_tensor((height / 2, width / 2))
    focal_y, focal_x = (half_size / (fov / 2).tan()).unbind(-1)
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    rows = (focal_x, zero, one * (width / 2)), (zero, focal_y, one * (height / 2)), (zero, zero, one)
    return Cameras(extrinsics, torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2))


def encode_pose(cameras: Cameras, image_size: tuple[int, int]) -> Tensor:
    """Cameras of images of `image_size` = (H, W) pixels → encodings `[..., 9]`, quaternions with w ≥ 0.

    The inverse of `decode_pose` for cameras whose principal point is the middle; another one is not kept.
    """
    height, width = image_size
    focal_x, focal_y = cameras.intrinsics[..., 0, 0], cameras.intrinsics[..., 1, 1]
    fov = 2 * torch.stack(((height / 2 / focal_y).atan(), (width / 2 / focal_x).atan()), dim=-1)
    rotation, translation = cameras.extrinsics[..., :3], cameras.extrinsics[..., 3]
    return torch.cat((translation, matrix_to_quaternion(rotation), fov), dim=-1)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Quaternions (x, y, z, w) of any length but 0, `[..., 4]`, as rotations `[..., 3, 3]`."""
    x, y, z, w = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Rotations `[..., 3, 3]` as unit quaternions (x, y, z, w) with w ≥ 0, `[..., 4]`.

    The matrix 4·q·qᵀ is linear in the rotation and each of its rows is a multiple of q. The row with the largest
    diagonal entry is the longest, hence the one that loses no digits when it is normalised.
    """
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    outer = (
        (1 + a - e - i, b + d, c + g, h - f),
        (b + d, 1 - a + e - i, f + h, c - g),
        (c + g, f + h, 1 - a - e + i, d - b),
        (h - f, c - g, d - b, 1 + a + e + i),
    )
    rows = torch.stack([torch.stack(row, dim=-1) for row in outer], dim=-2)
    longest = rows.diagonal(dim1=-2, dim2=-1).argmax(dim=-1, keepdim=True)
    q = rows.take_along_dim(longest[..., None], dim=-2).squeeze(-2)
    q = q / q.norm(dim=-1, keepdim=True)
    return torch.where(q[..., 3:] < 0, -q, q)
