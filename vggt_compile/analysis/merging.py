"""What merging n tokens to n' does to mixing: much where tokens mostly see themselves, nothing where they hardly do.

Derived for this project from the equiangular equation. The share of attention that leaves a token is its coefficient
of mixing,

    D(n, β, δ) = (n−1) e^{−βδ} / (1 + (n−1) e^{−βδ}) = 1 − the share that it keeps to itself,

which is 1/2 at n − 1 = e^{βδ}. Far below that count D grows in proportion to n, so merging slows collapse; far above
it 1 − D ≈ e^{βδ} / n, and merging does nothing to the pace of this model. δ falls during collapse, and with it the
count. Merging weighted by log size (equal tokens as one of weight k) changes nothing at all.

The paper that claims a slower effective diffusion by merging (arXiv 2512.21691) was read as its abstract only; these
equations are not from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_compile.analysis.equiangular import log_gap_rate, shares
from vggt_compile.analysis.integrate import integrate


def mixing(tokens: Tensor | float, beta: Tensor | float, gap: Tensor | float) -> Tensor:
    """D(n, β, δ), between 0 and 1."""
    itself, _ = shares(torch.as_tensor(gap, dtype=torch.float64), tokens, beta)
    return 1 - itself


def critical_count(beta: float, gap: float) -> float:
    """How many other tokens it takes for half of the attention to leave a token: e^{βδ}."""
    return math.exp(beta * gap)


@dataclass(frozen=True)
class Merged:
    """Mixing and the depth of collapse with all tokens, and with fewer."""

    tokens: float
    kept: float
    beta: float
    gap: float
    mixing: float
    mixing_kept: float
    time: float
    time_kept: float

    @property
    def slowed(self) -> float:
        """D(n') / D(n): 1 is no effect."""
        return self.mixing_kept / self.mixing

    @property
    def delay(self) -> float:
        """How many times as deep the merged stack gets before it collapses as far: 1 is no effect."""
        return self.time_kept / self.time


def merge(tokens: float, kept: float, beta: float, gap: float, until: float = 0.01, radius: float = 1.0) -> Merged:
    """What `kept` of `tokens` change, from a gap 1 − ρ until it is `until`, with the norm before the layer."""
    return Merged(
        tokens=tokens,
        kept=kept,
        beta=beta,
        gap=gap,
        mixing=float(mixing(tokens, beta, gap)),
        mixing_kept=float(mixing(kept, beta, gap)),
        time=time_until(until, tokens, beta, gap, radius),
        time_kept=time_until(until, kept, beta, gap, radius),
    )


def time_until(until: float, tokens: float, beta: float, gap: float, radius: float = 1.0) -> float:
    """When the gap has fallen from `gap` to `until`, with the norm before the layer.

    log δ falls all the time, so it serves as the clock: dt = r d(log δ) / (log δ)˙ and dr = ⟨x, A⟩ dt.
    """

    def field(state: Tensor) -> Tensor:
        now = gap * torch.exp(-state[0])
        pace = state[2] / -log_gap_rate(now, tokens, beta)
        itself, other = shares(now, tokens, beta)
        return torch.stack((torch.ones_like(pace), pace, pace * (itself + (tokens - 1) * other * (1 - now))))

    start = torch.tensor([0.0, 0.0, radius], dtype=torch.float64)
    return float(integrate(field, start, [math.log(gap / until)])[-1, 1])
