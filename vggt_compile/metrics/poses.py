"""Relative poses of all frame pairs: RRA, RTA and AUC, as VGGT's evaluation on Co3D has them.

For frames i < j, the pose of camera j in camera i. Its rotation error is the geodesic angle, its translation error the
angle between the directions, whose sign is left open: min(θ, 180° − θ). No alignment is needed, and a similarity of the
predicted world changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vggt_compile.metrics.cameras import centres, checked_cameras, motion, rotation_angle

THRESHOLDS = (30, 15, 5, 3)
"""Degrees at which the published tables report."""


class PoseErrors(NamedTuple):
    """One error for each of the P = S·(S − 1)/2 frame pairs, in degrees."""

    rotation: Tensor
    """`[..., P]`, 0 to 180."""
    translation: Tensor
    """`[..., P]`, 0 to 90."""


def relative_pose_errors(predicted: Tensor, true: Tensor) -> PoseErrors:
    """Errors of predicted against true extrinsics `[..., S, 3, 4]`, world to camera, for all pairs i < j in order.

    A pair of cameras at one place has no direction. Where both pairs have none, the translation error is 0°; where one
    of them has none, it is 90°, the largest.

    Raises:
        ValueError: shapes that differ or are not `[..., S, 3, 4]`, fewer than two frames, NaN or infinity.
    """
    checked = checked_cameras(predicted, true)
    still = [stationary(extrinsics) for extrinsics in (predicted, true)]
    predicted, true = checked
    first, second = torch.triu_indices(predicted.shape[-3], predicted.shape[-3], 1, device=predicted.device)
    ours, theirs = motion(predicted, first, second), motion(true, first, second)
    angle = line_angle(ours.translation, theirs.translation)
    a, b = (baseline[..., first, second] for baseline in still)
    angle = torch.where(a ^ b, 90.0, torch.where(a & b, 0.0, angle))
    return PoseErrors(rotation_angle(ours.rotation, theirs.rotation), angle)


def stationary(extrinsics: Tensor) -> Tensor:
    """Which pairs of cameras `[..., S, S]` are nearer to each other than the rounding of their centres."""
    centre = centres(extrinsics.double())
    rounding = 8 * torch.finfo(extrinsics.dtype).eps * centre.norm(dim=-1).amax(-1)
    return torch.cdist(centre, centre, compute_mode="donot_use_mm_for_euclid_dist") <= rounding[..., None, None]


def line_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle in degrees `[...]`, at most 90, between the lines along vectors `[..., 3]`; 0 where one is zero."""
    a, b = (torch.nn.functional.normalize(vector, dim=-1, eps=0.0).nan_to_num() for vector in (a, b))
    return torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1).abs()))


def accuracy(errors: Tensor, threshold: float) -> Tensor:
    """The percentage `[...]` of errors `[..., P]` below the threshold: RRA of rotations, RTA of translations."""
    return 100 * (errors < threshold).double().mean(-1)


def auc(errors: PoseErrors, threshold: int) -> Tensor:
    """Area under the accuracy curve up to `threshold` whole degrees, in percent `[...]`.

    The larger of a pair's two errors counts. The curve is sampled at 1°, 2°, …, `threshold`, and the area is the mean
    of these shares; a pair with an error of e is in threshold − ⌊e⌋ of them. VGGT's histogram also counts an error of
    exactly `threshold`, in its last share.
    """
    if threshold < 1 or threshold != int(threshold):
        raise ValueError(f"AUC has bins of one degree: its threshold must be a whole number ≥ 1, got {threshold}")
    worst = torch.maximum(errors.rotation, errors.translation)
    return 100 * (threshold - worst.double().floor()).clamp(min=0).mean(-1) / threshold


def pose_metrics(predicted: Tensor, true: Tensor, thresholds: Sequence[int] = THRESHOLDS) -> dict[str, float]:
    """RRA@k, RTA@k and AUC@k in percent for each threshold k, means over scenes; errors as `relative_pose_errors`."""
    errors = relative_pose_errors(predicted, true)
    found = {}
    for k in thresholds:
        found[f"RRA@{k}"] = accuracy(errors.rotation, k).mean().item()
        found[f"RTA@{k}"] = accuracy(errors.translation, k).mean().item()
        found[f"AUC@{k}"] = auc(errors, k).mean().item()
    return found
