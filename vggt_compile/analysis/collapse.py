"""Collapse over depth with the norm before the layer, four ways: 1 − ρ falls as t^{−2}, the distance to a point as 1/t.

With one radius for all tokens that takes d of 4 or more, or a start in an open hemisphere. The mass within δ of the
antipode is δ^{d−1} and is left behind until time −log δ, so on S² the distance has a factor √(log t) more, and on the
circle it falls as 1/√t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vggt_compile.analysis import equiangular
from vggt_compile.analysis.agreement import Row
from vggt_compile.analysis.axisymmetric import pre_norm_time, rings
from vggt_compile.analysis.clouds import cloud, gathered, interpolated
from vggt_compile.analysis.meanfield import MeanField
from vggt_compile.analysis.particles import Attention, distance_to_point, flow, gap, unit


def collapse(times: Sequence[float], dimension: int = 8, beta: float = 1.0, seeds: int = 4) -> list[Row]:
    """1 − ρ and the distance to a point over depth, with the norm before the layer.

    `rings` are the mean field by characteristics, each with a radius of its own as particles have them. `field` is
    finite volumes, with one radius for all tokens.
    """
    moments, kappa = torch.tensor(times, dtype=torch.float64), dimension / 2
    start = cloud(128, seeds, dimension, kappa)
    tokens = unit(flow(start, moments, Attention(beta), "before", rtol=1e-7, atol=1e-9))
    angles, mass = rings(gathered(kappa), moments, dimension, beta, radius=1.0)
    found = _field_in_depth(moments, dimension, beta, kappa)
    pairs = equiangular.solve(0.3, moments, 1e4, beta, radius=1.0)
    chords = (mass * (2 * (angles / 2).sin()).square()).sum(-1).sqrt()
    return [
        {
            "depth": float(moments[i]),
            "1 − ρ, equation": float(pairs[i]),
            "1 − ρ, particles": float(gap(tokens[i]).mean()),
            "W2, particles": float(distance_to_point(tokens[i]).mean()),
            "W2, rings": float(chords[i]),
            "W2, field": float(found[i]),
        }
        for i in range(len(moments))
    ]


def _field_in_depth(depths: Tensor, dimension: int, beta: float, kappa: float) -> Tensor:
    """W2 to the pole by finite volumes. They are solved with the norm after the layer, then seen in depth."""
    field = MeanField.on(300, dimension, beta, finest=0.02 / float(depths[-1]))
    times = torch.linspace(0, float(depths[-1].log()) + 2.5, 200, dtype=torch.float64)
    masses = field.solve(field.masses(gathered(kappa)), times)
    alignment = torch.stack([(mass * field.at_centres.alignment(mass)).sum() for mass in masses])
    reached, _ = pre_norm_time(times, alignment, 1.0)
    distances = field.distance_to_pole(masses)
    return interpolated(depths.log(), reached[1:].log(), distances[1:].log()).exp()
