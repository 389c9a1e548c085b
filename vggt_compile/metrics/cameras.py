"""What the camera metrics share: centres, relative poses, angles, and the check that two sets can be compared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Motion(NamedTuple):
    """Second cameras in the coordinates of first ones."""

    rotation: Tensor
    """`[..., 3, 3]`"""
    translation: Tensor
    """`[..., 3]`, in the world's unit."""


def centres(extrinsics: Tensor) -> Tensor:
    """Camera centres `[..., S, 3]` in the world of extrinsics `[..., S, 3, 4]`."""
    return -(extrinsics[..., :3].mT @ extrinsics[..., 3:]).squeeze(-1)


def motion(extrinsics: Tensor, first: Tensor, second: Tensor) -> Motion:
    """From frames `first` to frames `second`, both indices `[P]`; the product E_first · E_second⁻¹.

    The translation comes from a difference of centres, so that cameras at one place give exactly zero.
    """
    rotation, centre = extrinsics[..., :3], centres(extrinsics)
    start = rotation[..., first, :, :]
    step = centre[..., second, :] - centre[..., first, :]
    return Motion(start @ rotation[..., second, :, :].mT, (start @ step[..., None]).squeeze(-1))


def rotation_angle(a: Tensor, b: Tensor) -> Tensor:
    """Geodesic angle in degrees `[...]` between rotations `[..., 3, 3]`.

    The antisymmetric part of aᵀb is 2 sin θ long and its trace is 1 + 2 cos θ. Unlike the arc cosine of the trace,
    the arc tangent of the two keeps its digits near 0° and 180°.
    """
    between = a.mT @ b
    twice = between - between.mT
    sine = torch.stack((twice[..., 2, 1], twice[..., 0, 2], twice[..., 1, 0]), dim=-1).norm(dim=-1)
    cosine = between.diagonal(dim1=-2, dim2=-1).sum(-1) - 1
    return torch.rad2deg(torch.atan2(sine, cosine))


def checked_cameras(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Both as double precision, or ValueError: shapes that differ or are not `[..., S, 3, 4]`, S < 2, NaN, infinity."""
    if predicted.shape != true.shape:
        raise ValueError(f"predicted extrinsics are {list(predicted.shape)}, true ones {list(true.shape)}")
    if predicted.ndim < 3 or predicted.shape[-2:] != (3, 4):
        raise ValueError(f"extrinsics must be [..., S, 3, 4] (world to camera), got {list(predicted.shape)}")
    if predicted.shape[-3] < 2:
        raise ValueError(f"camera metrics compare pairs of frames and need two or more, got {predicted.shape[-3]}")
    if 0 in predicted.shape:
        raise ValueError(f"no scene to average over: extrinsics are {list(predicted.shape)}")
    for name, extrinsics in (("predicted", predicted), ("true", true)):
        check_finite(f"{name} extrinsics", extrinsics)
    return predicted.double(), true.double()


def check_finite(what: str, values: Tensor) -> None:
    """ValueError that counts what is NaN or infinite."""
    if not values.is_floating_point():
        raise ValueError(f"{what} must be floating point, got {values.dtype}")
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise ValueError(f"{what} hold {wrong} values that are NaN or infinite, of {values.numel()}")
