"""How far a plan moves a model's outputs from the dense ones, as numbers without a unit.

- camera: over all pairs of frames, the larger of the angles between relative rotations and between directions of
  translation, as a share of 30° and at most 1. One less the mean is the AUC@30 against dense, unbinned.
- depth: mean |d − d'| / d' with one scale for all frames, the AbsRel against dense.
- points: mean distance after the best similarity, over the mean distance of the dense points from their middle.

A model whose outputs are not those of VGGT or π³ has the relative change of every tensor that it gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path

from vggt_compile.metrics import depth_metrics, relative_pose_errors, umeyama
from vggt_compile.models import prediction

DEGREES = 30.0
"""An error of a camera that counts in full."""
POINTS = 2**15
"""Pixels whose points are compared, spread evenly."""


def change(found: Any, dense: Any, image_size: tuple[int, int]) -> dict[str, float]:
    """Errors by their name; infinite where an output is not finite."""
    try:
        ours, theirs = prediction(found, image_size), prediction(dense, image_size)
    except (ValueError, KeyError, TypeError, IndexError):
        return {name: _relative(a, b) for name, (a, b) in _pairs(found, dense).items()}
    try:
        return {
            "camera": _camera(ours.extrinsics.float(), theirs.extrinsics.float()),
            "depth": depth_metrics(ours.depth[0].float(), theirs.depth[0].float())["AbsRel"],
            "points": _points(ours.points.float(), theirs.points.float()),
        }
    except (ValueError, torch.linalg.LinAlgError):  # what metrics say of NaN and infinity
        return dict.fromkeys(("camera", "depth", "points"), math.inf)


def combined(errors: Mapping[str, float]) -> float:
    """The mean of the errors, each with equal weight."""
    return sum(errors.values()) / len(errors)


def finite(outputs: Any) -> bool:
    """Whether all numbers that a model gives are."""
    return all(bool(x.isfinite().all()) for x in _tensors(outputs).values())


def _camera(ours: Tensor, theirs: Tensor) -> float:
    errors = relative_pose_errors(ours, theirs)
    worst = torch.maximum(errors.rotation, errors.translation)
    return (worst / DEGREES).clamp(max=1).mean().item()


def _points(ours: Tensor, theirs: Tensor) -> float:
    a, b = (x.reshape(-1, 3) for x in (ours, theirs))
    step = max(1, len(a) // POINTS)
    a, b = a[::step].double(), b[::step].double()
    distance = (umeyama(a, b).points(a) - b).norm(dim=-1).mean()
    return (distance / (b - b.mean(0)).norm(dim=-1).mean()).item()


def _pairs(found: Any, dense: Any) -> dict[str, tuple[Tensor, Tensor]]:
    ours, theirs = _tensors(found), _tensors(dense)
    return {name: (ours[name], theirs[name]) for name in theirs}


def _relative(a: Tensor, b: Tensor) -> float:
    gap, size = (a.double() - b.double()).norm().item(), b.double().norm().item()
    if not math.isfinite(gap):
        return math.inf
    return gap / size if size else (0.0 if gap == 0 else math.inf)


def _tensors(outputs: Any) -> dict[str, Tensor]:
    leaves = tree_leaves_with_path(outputs)
    return {keystr(path): x for path, x in leaves if isinstance(x, Tensor) and x.is_floating_point()}
