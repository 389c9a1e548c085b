"""How far one geometry is from another: the numbers of the bench, each a mean over the frames of one scene."""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_compile.bench.accuracy.cases import Geometry
from vggt_compile.metrics import Similarity, cloud_metrics, depth_metrics, pose_metrics, trajectory_metrics, umeyama
from vggt_compile.metrics.align import camera_points
from vggt_compile.metrics.cloud import SEED

METRICS = ("AUC@30", "AUC@15", "AUC@5", "RRA@15", "RTA@15", "ATE", "AbsRel", "delta1.25", "chamfer")
"""The first five and delta1.25 are percentages, of which more is better; ATE and chamfer are in the true unit."""
POINTS = 2048
"""Pixels whose points are compared: enough for a mean, and all their distances take a moment on a CPU."""


def scores(found: Geometry, true: Geometry) -> dict[str, float]:
    """Every metric that the true geometry has what it takes for.

    Raises:
        ValueError: NaN or infinity in what was found.
    """
    numbers = pose_metrics(found.extrinsics, true.extrinsics, (30, 15, 5))
    numbers |= trajectory_metrics(found.extrinsics, true.extrinsics)
    if found.depth is not None and true.depth is not None:
        numbers |= depth_metrics(found.depth, true.depth)
    if found.points is not None and true.points is not None:
        ours, theirs = corresponding(found, true)
        numbers |= cloud_metrics(ours, theirs, umeyama(ours, theirs))
    return {name: numbers[name] for name in METRICS if name in numbers}


def corresponding(found: Geometry, true: Geometry) -> tuple[Tensor, Tensor]:
    """Points `[N, 3]` of both at the same pixels, at most POINTS, wherever the truth knows them."""
    assert found.points is not None
    assert true.points is not None
    known = true.points.isfinite().all(-1)
    if true.depth is not None:
        known &= true.depth.isfinite() & (true.depth > 0)
    chosen = known.flatten().nonzero()[:, 0]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(SEED))[:POINTS]
    chosen = chosen[order.to(chosen.device)]
    return found.points.flatten(0, 2)[chosen], true.points.flatten(0, 2)[chosen]


def in_world(found: Geometry, true: Geometry) -> Geometry:
    """What was found, moved into the true world, so that distances from it are in the true unit."""
    moved = _alignment(found, true)
    points = None if found.points is None else moved.points(found.points.flatten(0, 2)).view(found.points.shape)
    depth = None if found.depth is None else found.depth * moved.scale
    return Geometry(moved.cameras(found.extrinsics), depth, points)


def _alignment(found: Geometry, true: Geometry) -> Similarity:
    if found.points is not None and true.points is not None:
        return umeyama(*corresponding(found, true))
    return umeyama(camera_points(found.extrinsics), camera_points(true.extrinsics))
