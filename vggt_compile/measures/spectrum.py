"""Singular values: how many directions an attention matrix, or a set of tokens, really has.

Of σ, descending: effective rank exp(−Σ p log p) with p = σ / Σσ (Roy and Vetterli, 2007), stable rank Σσ² / σ1², and
σ2 / σ1. A matrix of rank one has 1, 1 and 0; n equal singular values give n, n and 1.

Of an attention matrix A there are S drawn rows. Scaled by N / S, their σ1² and σ1² + σ2² are on average too large,
because the best directions are looked for in the rows that they are judged by. Directions found in one half of the rows
and judged by the other are on average too small. What is given is the middle of both; its error is half of what lies
between, and the standard error that comes of drawing. It is nothing where all rows are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_compile.measures.operator import measure
from vggt_compile.measures.sample import Rows, drawn, each_head, exact, quantities, quotient, weights
from vggt_compile.ops.sizes import pieces


@measure("spectrum", "attention_effective_rank", "attention_stable_rank", "attention_sigma_ratio")
def spectrum(q: Tensor, k: Tensor, scale: float | None, *, rows: Rows = 256, seed: int = 0) -> Tensor:
    """Effective rank, stable rank and σ2/σ1 of the attention matrix.

    The effective rank is that of the drawn rows, at most S; its error is what it changes by from S/2 rows to S.
    """
    tokens = q.shape[-2]
    places = drawn(tokens, rows, seed, q.device)

    def of_head(q: Tensor, k: Tensor) -> Tensor:
        found = weights(q[places], k, scale)
        sizes, gram = found.double().square().sum(-1), products(found)
        squares = eigenvalues(gram) / len(places)  # a mean over rows, as those below
        if len(places) == tokens:
            stable, ratio = exact(sizes.mean() / squares[0]), exact(squares[1] / squares[0])
        else:
            first, second = _judged_by_others(gram)
            stable = _between(quotient(sizes, first, tokens), sizes.mean() / squares[0])
            judged = quotient(second, first, tokens)
            judged = torch.stack(
                (judged[0].clamp(max=1), judged[1])
            )  # two directions may be judged the other way round
            ratio = _between(judged, squares[1] / squares[0])
        root = ratio[0].sqrt()
        ratio = torch.stack((root, ratio[1] / (2 * root) if ratio[1] else ratio[1]))
        return quantities(_effective(gram, len(places) == tokens), stable, ratio)

    return each_head(of_head, q, k)


@measure("token_spectrum", "token_effective_rank", "token_stable_rank", "token_sigma_ratio", "token_top_share")
def token_spectrum(x: Tensor) -> Tensor:
    """Effective rank, stable rank and σ2/σ1 of the centred tokens JX, and the share σ1² / Σσ² of their first direction.

    J = I − 11ᵀ/N; exact.
    """
    squares = eigenvalues(torch.stack([products(item.mT, item.mean(0, dtype=torch.float64)) for item in x]))
    total = squares.sum(-1)
    found = (
        effective_rank(squares.sqrt()),
        total / squares[..., 0],
        (squares[..., 1] / squares[..., 0]).sqrt(),
        squares[..., 0] / total,
    )
    return quantities(*map(exact, found)).unsqueeze(1)


def products(rows: Tensor, offset: Tensor | None = None) -> Tensor:
    """R Rᵀ of R = rows [S, N] less `offset` [S] in fp64, some columns at a time."""
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for columns in pieces(rows.shape[1], rows.shape[0] * 8):
        part = rows[:, columns].double()
        part = part if offset is None else part - offset[:, None]
        total.addmm_(part, part.mT)
    return total


def eigenvalues(gram: Tensor) -> Tensor:
    """Of [..., S, S], descending and not negative; NaN where the matrix has any."""
    values = torch.linalg.eigvalsh(gram.nan_to_num(0.0, 0.0, 0.0)).flip(-1).clamp(min=0)
    return torch.where(gram.isfinite().all((-2, -1)).unsqueeze(-1), values, torch.nan)


def effective_rank(sigma: Tensor) -> Tensor:
    """[..., S] → [...]: exp of the entropy of σ / Σσ."""
    return torch.special.entr(sigma / sigma.sum(-1, keepdim=True)).sum(-1).exp()


def _effective(gram: Tensor, complete: bool) -> Tensor:
    value = effective_rank(eigenvalues(gram).sqrt())
    if complete:
        return exact(value)
    halves = [effective_rank(eigenvalues(gram[half::2, half::2]).sqrt()) for half in range(2)]
    return torch.stack((value, (value - sum(halves) / 2).abs()))


def _judged_by_others(gram: Tensor) -> Tensor:
    """[2, S]: squares of each row along the first two directions of the half of the rows that it is not in."""
    found = torch.empty_like(gram[:2])
    for half in range(2):
        own, other = gram[half::2, half::2], gram[1 - half :: 2, half::2]
        squares, vectors = torch.linalg.eigh(own.nan_to_num(0.0, 0.0, 0.0))
        directions = vectors[:, -2:].flip(-1) / squares[-2:].flip(-1).clamp(min=1e-300).sqrt()
        found[:, 1 - half :: 2] = (other @ directions).square().mT  # by products alone: row · direction
    return found


def _between(judged: Tensor, fitted: Tensor) -> Tensor:
    """[2]: the middle of an estimate with its standard error and of one from the other side, and what may be wrong."""
    middle = (judged[0] + fitted) / 2
    return torch.stack((middle, (judged[0] - fitted).abs() / 2 + judged[1]))
