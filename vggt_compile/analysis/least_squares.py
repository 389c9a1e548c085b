"""Many small least-squares problems at once, each with weights and damping of its own (Levenberg and Marquardt)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def least_squares(
    residuals: Callable[[Tensor], Tensor], weights: Tensor, start: Tensor, rounds: int = 60, most: float = 0.5
) -> Tensor:
    """Minimise Σ weights · residuals² for each row of parameters [R, P] by itself; residuals are [R, ...].

    Damping falls where a step helped and grows where it did not; no parameter moves by more than `most` in a round.
    """
    at, damping = start, start.new_full((len(start), 1, 1), 1e-3)
    directions = torch.eye(start.shape[1], dtype=start.dtype)
    cost = _cost(residuals(at), weights)
    for _ in range(rounds):
        slopes = [torch.func.jvp(residuals, (at,), (way.repeat(len(at), 1),))[1] for way in directions]
        jacobian = torch.stack(slopes, -1).flatten(1, -2)
        scale = weights.expand_as(slopes[0]).flatten(1)[..., None]
        normal = jacobian.mT @ (scale * jacobian)
        pull = jacobian.mT @ (scale * residuals(at).flatten(1)[..., None])
        ridge = damping * (normal.diagonal(dim1=-2, dim2=-1).diag_embed() + 1e-12 * directions)
        change = -torch.linalg.solve(normal + ridge, pull)[..., 0].clamp(-most, most)
        after = _cost(residuals(at + change), weights)
        better = after < cost
        at = torch.where(better[:, None], at + change, at)
        cost = torch.where(better, after, cost)
        damping = torch.where(better[:, None, None], damping / 5, damping * 5).clamp(1e-9, 1e9)
        if float(change.abs().max()) < 1e-7:
            break
    return at


def _cost(residuals: Tensor, weights: Tensor) -> Tensor:
    return (weights * residuals.square()).flatten(1).sum(1).nan_to_num(float("inf"))
