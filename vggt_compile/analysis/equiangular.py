"""Tokens that all stand at one cosine ρ to each other stay so under attention: one number tells the whole cloud.

The equation of ρ with the norm after the layer is of arXiv 2312.10794, its variants by the place of the norm are of
Karagodin et al. (arXiv 2510.22026). Here it is written for the gap δ = 1 − ρ, which keeps its digits near collapse:

    softmax   (log δ)˙ = −2 (1 + (n−1)ρ) / (e^{βδ} + n − 1) / s        s = 1 after the layer, s = r before it
    count     (log δ)˙ = −2 e^{βρ} (1 + (n−1)ρ) / n / s
    radius    ṙ = ⟨x, A⟩ = (e^{βδ} + (n−1)ρ) / (e^{βδ} + n − 1)        softmax, norm before the layer

Derived here, of the last line: near collapse ṙ → 1, so r ~ t, (log δ)˙ ~ −2/t and δ ~ C/t². Distances between tokens
are √(2δ), so those to the limit fall as 1/t: with the norm before the layer collapse is O(1/L) in depth L.
With n → ∞ dδ/dr = −2δ/r, so δ r² is constant and C = δ_0 r_0².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vggt_compile.analysis.integrate import integrate


def shares(gap: Tensor, tokens: Tensor | float, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    """What a token takes of itself, and of each other one: softmax over cosines 1 and 1 − gap."""
    relative = torch.exp(-beta * gap)  # of another token, before division
    total = 1 + (tokens - 1) * relative
    return 1 / total, relative / total


def log_gap_rate(gap: Tensor, tokens: float, beta: float, divide: Literal["softmax", "count"] = "softmax") -> Tensor:
    """(log δ)˙ at radius 1."""
    pull = 1 + (tokens - 1) * (1 - gap)
    if divide == "count":
        return -2 * torch.exp(beta * (1 - gap)) * pull / tokens
    return -2 * pull / (torch.exp(beta * gap) + tokens - 1)


def solve(
    cosine: float,
    times: Sequence[float] | Tensor,
    tokens: float,
    beta: float,
    radius: float | None = None,
    divide: Literal["softmax", "count"] = "softmax",
    rtol: float = 1e-10,
) -> Tensor:
    """The gap 1 − ρ at `times`; with a `radius` at time 0 the norm stands before the layer, without one after it."""

    def field(state: Tensor) -> Tensor:
        gap = state[0].exp()
        rate = log_gap_rate(gap, tokens, beta, divide)
        if radius is None:
            return torch.stack((rate, torch.zeros_like(rate)))
        itself, other = shares(gap, tokens, beta)
        scale = 1.0 if divide == "softmax" else torch.exp(beta * torch.ones_like(gap)) / (itself * tokens)
        grows = scale * (itself + (tokens - 1) * other * (1 - gap))
        return torch.stack((rate / state[1], grows))

    start = torch.tensor([math.log(1 - cosine), 1.0 if radius is None else radius], dtype=torch.float64)
    return integrate(field, start, times, rtol=rtol, atol=rtol)[:, 0].exp()


def layer(gap: Tensor, step: Tensor, tokens: Tensor | float, beta: Tensor | float) -> Tensor:
    """The gap after one layer whose update of a token is `step` times as long as the token. Exact for any step.

    The token x_i becomes x_i + step · A_i / |A_i|, that is p x_i + q Σ_j x_j, which keeps all cosines equal. This is
    what a measured step means: relative to the token, whose radius is in it already. Steps of an ODE in absolute time
    are step · r / |A|; in relative time δ falls as e^{−2t} whatever the norm, and radii that grow as t turn that into
    t^{−2}. Do not put relative steps into an equation that divides by r once more.
    """
    itself, other = shares(gap, tokens, beta)
    cosine = 1 - gap
    along = 1 + (tokens - 1) * cosine  # ⟨x_i, Σ x_j⟩, and |Σ x_j|² = n · along
    own = itself - other
    length = (own.square() + (2 * own * other + other.square() * tokens) * along).sqrt()
    p, q = 1 + step * own / length, step * other / length
    square = p.square() + (2 * p * q + q.square() * tokens) * along
    return p.square() * gap / square


def stable_rank(gap: Tensor, tokens: Tensor | float) -> Tensor:
    """‖X‖_F² / ‖X‖₂² of n equiangular tokens: n / (1 + (n−1)ρ).

    For any unit tokens with mean cosine ρ it bounds the stable rank from above, since the largest eigenvalue of the
    Gram matrix is at least 1ᵀG1/n = 1 + (n−1)ρ.
    """
    return tokens / (1 + (tokens - 1) * (1 - gap))
