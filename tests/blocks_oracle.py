"""The choice of key blocks by its words: loops, a sort, and sums in float64. No code of the package takes part."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import torch
from torch import Tensor

NEAR = 1e-6
"""Closer than this to the mass that is asked for, fp32 may decide either way."""


class TooClose(Exception):
    """The mass of some row is so near to the one asked for that rounding decides."""


def pooled(x: Tensor, block: int, pool: str) -> Tensor:
    """[N, D] → [⌈N / block⌉, D], run by run."""
    runs = x.double().split(block)
    return torch.stack([run.amax(0) if pool == "max" else run.mean(0) for run in runs])


def chosen(scores: list[float], keep: float, cdf: float, reach: bool, most: float) -> list[int]:
    """The blocks that one row of scores keeps, ascending."""
    blocks = len(scores)
    order = sorted(range(blocks), key=lambda j: (-scores[j], j))
    count = floor = max(1, math.floor(blocks * Fraction(str(keep))))
    if cdf:
        weights = [math.exp(scores[j] - max(scores)) for j in order]
        masses = list(itertools.accumulate(w / sum(weights) for w in weights))
        if any(abs(mass - cdf - 1e-5) < NEAR for mass in masses):
            raise TooClose
        count = max(floor, sum(mass <= cdf + 1e-5 for mass in masses) + reach)
        count = min(count, max(floor, math.ceil(blocks * Fraction(str(most)))))
    return sorted(order[:count])


def lists(
    q: Tensor,
    k: Tensor,
    keep: float,
    cdf: float = 0.0,
    pool: str = "mean",
    coverage: str = "reference",
    most: float = 0.5,
    q_block: int = 128,
    k_block: int = 64,
    scale: float | None = None,
) -> list[list[list[list[int]]]]:
    """Kept blocks for each batch item, head and query block; TooClose where fp32 may say otherwise."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def of_head(q: Tensor, k: Tensor) -> list[list[int]]:
        scores = pooled(q, q_block, pool) @ pooled(k, k_block, pool).T * scale
        return [chosen(row, keep, cdf, coverage == "reach", most) for row in scores.tolist()]

    return [[of_head(q[b, h], k[b, h]) for h in range(q.shape[1])] for b in range(q.shape[0])]


def mask(index: Tensor, count: Tensor, blocks: int) -> Tensor:
    """Lists of the operator as [B, H, nQ, nK] booleans, entry by entry."""
    kept = torch.zeros(*count.shape, blocks, dtype=torch.bool)
    for place in itertools.product(*map(range, count.shape)):
        kept[place][index[place][: count[place]].long()] = True
    return kept
