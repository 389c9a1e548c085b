"""ATE and RPE of a video's cameras, after the similarity that brings predicted centres nearest to the true ones.

The numbers are those of `evo_ape` and `evo_rpe` with --align --correct_scale, RPE over one frame. Where the alignment
leaves a rotation open, because cameras stand on a line, no number depends on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_compile.metrics.align import Similarity, camera_points, umeyama
from vggt_compile.metrics.cameras import centres, checked_cameras, motion, rotation_angle


def absolute_errors(predicted: Tensor, true: Tensor) -> Tensor:
    """Distances `[..., S]` of aligned centres from the true ones, in the true world's unit.

    Where the true cameras all stand at one place, they tell no scale, and the predicted one is kept.

    Raises:
        ValueError: shapes that differ or are not `[..., S, 3, 4]`, fewer than two frames, NaN or infinity.
    """
    alignment = by_centres(predicted, true)
    predicted, true = checked_cameras(predicted, true)
    return (alignment.points(centres(predicted)) - centres(true)).norm(dim=-1)


def relative_errors(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of each step from one frame to the next: lengths in the true unit and degrees, both `[..., S − 1]`.

    Raises:
        ValueError: as `absolute_errors`.
    """
    scale = by_centres(predicted, true).scale
    predicted, true = checked_cameras(predicted, true)
    frames = torch.arange(predicted.shape[-3], device=predicted.device)
    ours, theirs = (motion(extrinsics, frames[:-1], frames[1:]) for extrinsics in (predicted, true))
    step = (scale[..., None, None] * ours.translation - theirs.translation).norm(dim=-1)
    return step, rotation_angle(ours.rotation, theirs.rotation)


def by_centres(predicted: Tensor, true: Tensor) -> Similarity:
    """The alignment of both: unlike `align_cameras`, it takes cameras on a line, too."""
    checked_cameras(predicted, true)
    return umeyama(camera_points(predicted), camera_points(true))


def trajectory_metrics(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Root mean squares over frames, then means over scenes: ATE, RPE_trans (the true unit), RPE_rot (degrees)."""
    step, turn = relative_errors(predicted, true)
    errors = {"ATE": absolute_errors(predicted, true), "RPE_trans": step, "RPE_rot": turn}
    return {name: error.square().mean(-1).sqrt().mean().item() for name, error in errors.items()}
