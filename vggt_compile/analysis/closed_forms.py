"""What a softmax of independent Gaussian logits of standard deviation s looks like, without computing it.

Derived for this project. A row of n logits has Σ e^l ≈ n e^{s²/2}, so entries of A ≈ e^{l − s²/2}/n have mean 1/n and
variance (e^{s²} − 1)/n². Hence the entropy of a row is log n − s²/2, and ‖A‖_F² ≈ e^{s²} with ‖A‖₂ ≈ 1. What is
left of A without its mean is a matrix of independent entries of that variance, whose largest singular value is its
standard deviation times √m + √n for m rows (the edge of the Marchenko–Pastur law).

That σ1 stays and σ2 goes to 0 as n grows is collapse in width (Nait Saada et al., arXiv 2410.07799).

Good for s ≲ 1 and independent logits. At s = 1.5 the tail of e^l is so heavy that σ2 is 1.5 to 2.4 times the formula,
while entropy and stable rank still hold to a few percent; logits with structure (frames, a shared key that all like)
have singular values of their own. Both is why measured values stand beside these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy_share(tokens: Tensor | float, spread: Tensor | float) -> Tensor:
    """The mean entropy of a row over log n: 1 − s² / (2 log n)."""
    return 1 - _tensor(spread).square() / (2 * _tensor(tokens).log())


def stable_rank(spread: Tensor | float) -> Tensor:
    """‖A‖_F² / ‖A‖₂²: e^{s²}, whatever the number of rows and keys."""
    return _tensor(spread).square().exp()


def second_share(tokens: Tensor | float, spread: Tensor | float, queries: Tensor | float | None = None) -> Tensor:
    """σ2/σ1: √(e^{s²} − 1) (1/√m + 1/√n) for m of the queries; 2 √((e^{s²} − 1)/n) with all."""
    keys = _tensor(tokens)
    rows = keys if queries is None else _tensor(queries)
    return _tensor(spread).square().expm1().sqrt() * (rows.rsqrt() + keys.rsqrt())


def logit_spread(gap: Tensor | float, beta: Tensor | float, width: int) -> Tensor:
    """s of logits β⟨x_i, x_j⟩ when tokens are √ρ m + √(1−ρ) z_i, with z_i even on the sphere across m in `width` dims.

    Then ⟨x_i, x_j⟩ = ρ + (1−ρ)⟨z_i, z_j⟩ for i ≠ j, whose standard deviation is (1−ρ)/√(width−1).
    """
    return _tensor(beta) * _tensor(gap) / math.sqrt(width - 1)


def sample(queries: int, tokens: int, spread: float, generator: torch.Generator) -> Tensor:
    """A softmax matrix of independent Gaussian logits, to hold the formulas against."""
    logits = torch.randn(queries, tokens, dtype=torch.float64, generator=generator) * spread
    return logits.softmax(-1)


def measure(attention: Tensor) -> dict[str, float]:
    """Entropy share, stable rank and σ2/σ1 of one attention matrix [m, n], by its singular values."""
    values = torch.linalg.svdvals(attention.double())
    entropy = torch.special.entr(attention).sum(-1).mean() / math.log(attention.shape[-1])
    return {
        "entropy": float(entropy),
        "stable_rank": float(values.square().sum() / values[0].square()),
        "second": float(values[1] / values[0]),
    }


def _tensor(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)
