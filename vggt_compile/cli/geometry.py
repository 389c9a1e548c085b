"""A prediction beside the true scene, where one is known: scores, and everything moved into the true world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from vggt_compile.metrics import depth_metrics, pose_metrics, umeyama
from vggt_compile.models import prediction
from vggt_compile.scenes import Views

SHOWN = ("RRA@15", "RTA@15", "AUC@30", "AbsRel")
SAMPLES = 20_000
"""Corresponding points that the alignment is found from."""


class Placed(NamedTuple):
    """What one run found, in the world of the true scene, metres, z up."""

    points: Tensor
    """`[S, H, W, 3]`"""
    centres: Tensor
    """`[S, 3]`, where the cameras stand."""


def scores(output: Mapping[str, Tensor], views: Views) -> dict[str, float] | None:
    """Relative poses in percent and AbsRel, see `vggt_compile.metrics`; None where a number is not finite."""
    ours = prediction(output, _size(views))
    if not all(bool(tensor.isfinite().all()) for tensor in ours) or not bool((ours.depth > 0).any()):
        return None
    found = pose_metrics(ours.extrinsics, views.extrinsics.cpu(), (15, 30)) | depth_metrics(
        ours.depth.clamp(min=1e-6), views.depth.cpu()
    )
    return {name: found[name] for name in SHOWN}


def placed(output: Mapping[str, Tensor], views: Views) -> Placed:
    """Aligned by the similarity between corresponding points of all frames."""
    ours, true = prediction(output, _size(views)), views.world_points[0].cpu()
    step = max(1, true[..., 0].numel() // SAMPLES)
    found = umeyama(ours.points[0].flatten(0, 2)[::step], true.flatten(0, 2)[::step])
    rotation, translation = ours.extrinsics[0].split((3, 1), dim=-1)
    centres = -(rotation.mT @ translation)[..., 0]
    return Placed(found.points(ours.points[0].flatten(0, 2)).view_as(true), found.points(centres))


def true_centres(views: Views) -> Tensor:
    """Where the true cameras stand, `[S, 3]`."""
    rotation, translation = views.extrinsics[0].cpu().split((3, 1), dim=-1)
    return -(rotation.mT @ translation)[..., 0]


def _size(views: Views) -> tuple[int, int]:
    return views.depth.shape[-2], views.depth.shape[-1]
