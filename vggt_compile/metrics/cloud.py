"""Distances between point clouds: accuracy, completeness and the chamfer distance."""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_compile.metrics.align import Similarity
from vggt_compile.metrics.cameras import check_finite

TILE = {"cpu": 2**22, "cuda": 2**26}
"""Distances in memory at once."""
LIMIT = 100_000
"""Points that the published evaluations keep."""
SEED = 33


def nearest_distances(points: Tensor, reference: Tensor) -> Tensor:
    """From each of points `[N, 3]` to the nearest of reference `[M, 3]`: `[N]`, in memory that N·M does not bound.

    All N·M distances are computed: a moment on a GPU, but about 10 ns each on two CPU cores, so thin clouds there.
    """
    rows = 2**10
    columns = max(1, TILE.get(points.device.type, TILE["cuda"]) // rows)
    found = []
    for part in points.split(rows):
        # Products of coordinates would lose half the digits of short distances.
        tiles = (
            torch.cdist(part, tile, compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
            for tile in reference.split(columns)
        )
        best = next(tiles)
        for distance in tiles:
            best = torch.minimum(best, distance)
        found.append(best)
    return torch.cat(found)


def cloud_metrics(
    predicted: Tensor,
    true: Tensor,
    alignment: Similarity | None = None,
    *,
    clip: float | None = None,
    limit: int | None = LIMIT,
    seed: int = SEED,
) -> dict[str, float]:
    """Accuracy, completeness and chamfer of a cloud `[N, 3]` against the true one `[M, 3]`, in the true unit.

    Accuracy is the mean distance from predicted points to the nearest true one, completeness the reverse, chamfer their
    sum.

    Args:
        alignment: moves the predicted points: `umeyama` of corresponding points, or `align_cameras`.
        clip: no distance counts as more than that.
        limit: larger clouds are thinned to so many points at random, the same ones for the same seed.

    Raises:
        ValueError: clouds that are empty or not `[N, 3]`, NaN or infinity, an alignment of several scenes, or a clip or
            a limit that is not positive.
    """
    for name, cloud in (("predicted", predicted), ("true", true)):
        if cloud.ndim != 2 or cloud.shape[-1] != 3 or not len(cloud):
            raise ValueError(f"{name} points must be [N, 3] with N ≥ 1, got {list(cloud.shape)}")
        check_finite(f"{name} points", cloud)
    if alignment is not None and alignment.scale.ndim:
        raise ValueError(f"one cloud takes one alignment, got {list(alignment.scale.shape)} of them")
    if (clip is not None and clip <= 0) or (limit is not None and limit < 1):
        raise ValueError(f"clip and limit must be positive, got clip={clip} and limit={limit}")
    ours, theirs = thin(predicted, limit, seed).double(), thin(true, limit, seed).double()
    if alignment is not None:
        ours = alignment.points(ours)
    distances = nearest_distances(ours, theirs), nearest_distances(theirs, ours)
    accuracy, completeness = (d.clamp(max=torch.inf if clip is None else clip).mean().item() for d in distances)
    return {"accuracy": accuracy, "completeness": completeness, "chamfer": accuracy + completeness}


def thin(points: Tensor, limit: int | None, seed: int) -> Tensor:
    """At most `limit` of points `[N, 3]`, chosen on the CPU so that every device takes the same ones."""
    if limit is None or len(points) <= limit:
        return points
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:limit]
    return points[chosen.to(points.device)]
