"""Similarity transforms, and the one that brings points nearest to their counterparts.

Source: S. Umeyama, Least-squares estimation of transformation parameters between two point patterns, PAMI 1991.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vggt_compile.metrics.cameras import centres, check_finite, checked_cameras

COLLINEAR = 1e-4
"""Width of a set of points over its length below which it counts as a line."""


class Similarity(NamedTuple):
    """x ↦ scale · rotation · x + translation."""

    rotation: Tensor
    """`[..., 3, 3]`, determinant 1."""
    translation: Tensor
    """`[..., 3]`"""
    scale: Tensor
    """`[...]`, at least 0."""

    def points(self, points: Tensor) -> Tensor:
        """Points `[..., N, 3]`, moved."""
        moved = points.to(self.rotation.dtype) @ self.rotation.mT
        return self.scale[..., None, None] * moved + self.translation[..., None, :]

    def cameras(self, extrinsics: Tensor) -> Tensor:
        """Extrinsics `[..., S, 3, 4]` of the cameras, moved with the world that they see; they stay rigid."""
        rotation = extrinsics[..., :3].to(self.rotation.dtype) @ self.rotation.mT[..., None, :, :]
        centre = self.points(centres(extrinsics.to(self.rotation.dtype)))
        return torch.cat((rotation, -rotation @ centre[..., None]), dim=-1)


def umeyama(source: Tensor, target: Tensor, with_scale: bool = True) -> Similarity:
    """The similarity that takes points `[..., N, 3]` nearest to their counterparts, by the sum of squared distances.

    Never a reflection. Where the points leave it open, the sum is minimal all the same, but the answer is one of many:
    the rotation about the line of one or two points, or of collinear ones, is arbitrary. Where all source or all target
    points coincide, the scale is 1.

    Raises:
        ValueError: shapes that differ or are not `[..., N, 3]`, no points, NaN or infinity.
    """
    if source.shape != target.shape or source.ndim < 2 or source.shape[-1] != 3 or 0 in source.shape:
        shapes = f"{list(source.shape)} and {list(target.shape)}"
        raise ValueError(f"umeyama needs as many source as target points, [..., N, 3] with N ≥ 1, got {shapes}")
    check_finite("source points", source)
    check_finite("target points", target)
    floor = coincidence(source), coincidence(target)
    source, target = source.double(), target.double()
    middle, goal = source.mean(-2), target.mean(-2)
    x, y = source - middle[..., None, :], target - goal[..., None, :]
    u, stretch, vt = torch.linalg.svd(y.mT @ x)
    sign = torch.ones_like(stretch)
    sign[..., 2] = torch.linalg.det(u @ vt).sign()  # a negative determinant is a reflection: flip the thinnest axis
    rotation = u * sign[..., None, :] @ vt
    scale = torch.ones_like(stretch[..., 0])
    if with_scale:
        spread = x.square().sum((-2, -1))
        points = (spread <= floor[0]) | (y.square().sum((-2, -1)) <= floor[1])
        scale = torch.where(points, scale, (stretch * sign).sum(-1) / torch.where(points, scale, spread))
    return Similarity(rotation, goal - scale[..., None] * (rotation @ middle[..., None]).squeeze(-1), scale)


def coincidence(points: Tensor) -> Tensor:
    """The sum of squares `[...]` below which the spread of points `[..., N, 3]` is no more than their rounding."""
    rounding = 8 * torch.finfo(points.dtype).eps * points.double().abs().amax((-2, -1))
    return points.shape[-2] * rounding.square()


def camera_points(extrinsics: Tensor) -> Tensor:
    """Centres `[..., S, 3]` in the precision of the extrinsics, by which `umeyama` tells rounding from a distance."""
    return centres(extrinsics.double()).to(extrinsics.dtype)


def align_cameras(predicted: Tensor, true: Tensor, with_scale: bool = True) -> Similarity:
    """The similarity from the predicted to the true world by camera centres; extrinsics `[..., S, 3, 4]`.

    Raises:
        ValueError: as `checked_cameras`; fewer than three cameras, or cameras on a line, which leave a rotation open.
    """
    checked_cameras(predicted, true)
    source, target = camera_points(predicted), camera_points(true)
    for name, points in (("predicted", source), ("true", target)):
        singular = torch.linalg.svdvals(points.double() - points.double().mean(-2, keepdim=True))
        width = torch.maximum(COLLINEAR * singular[..., 0], coincidence(points).sqrt())
        if singular.shape[-1] < 3 or bool((singular[..., 1] <= width).any()):
            raise ValueError(
                f"the {name} cameras stand on one line, so they leave the rotation about it open; "
                "align by corresponding points instead: umeyama(predicted_points, true_points)"
            )
    return umeyama(source, target, with_scale)
