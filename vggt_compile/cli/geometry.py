"""A demo's run beside the true scene, by the same numbers and the same alignment as the accuracy bench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vggt_compile.bench.accuracy import score
from vggt_compile.bench.accuracy.cases import Geometry
from vggt_compile.bench.accuracy.run import NOT_FINITE, geometry

SHOWN = ("RRA@15", "RTA@15", "AUC@30", "AbsRel")


def scores(output: Mapping[str, Any], images: Tensor, truth: Geometry) -> dict[str, float] | None:
    """What the demo shows of `score.scores`; None where the output is not finite."""
    found = geometry(output, images)
    try:
        numbers = score.scores(found, truth)
    except NOT_FINITE:
        return None
    return {name: numbers[name] for name in SHOWN}


def placed(output: Mapping[str, Any], images: Tensor, truth: Geometry) -> Geometry:
    """What a run found, moved into the true world: metres, z up."""
    return score.in_world(geometry(output, images), truth)
