"""Singular values: how many directions an attention matrix, or a set of tokens, really has.

Of σ, descending: effective rank exp(−Σ p log p) with p = σ / Σσ (Roy and Vetterli, 2007), stable rank Σσ² / σ1², and
σ2 / σ1. A matrix of rank one has 1, 1 and 0; n equal singular values give n, n and 1.

Of an attention matrix A there are S drawn rows, and the values are those of these rows: with more rows the effective
rank rises, and σ2 / σ1 of what is noise falls. How far they are from all rows is told by what they change by from S / 2
to S: what they would still change by, if that went on as 1 / √S does, and what the two halves differ by. It is nothing
where all rows are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_compile.measures.operator import measure
from vggt_compile.measures.sample import Rows, drawn, each_head, exact, quantities, weights
from vggt_compile.measures.tokens import middle
from vggt_compile.ops.sizes import pieces


@measure("spectrum", "attention_effective_rank", "attention_stable_rank", "attention_sigma_ratio")
def spectrum(q: Tensor, k: Tensor, scale: float | None, *, rows: Rows = 256, seed: int = 0) -> Tensor:
    """Effective rank, stable rank and σ2/σ1 of the attention matrix, from drawn rows, which bound the first."""
    tokens = q.shape[-2]
    places = drawn(tokens, rows, seed, q.device)

    gram = each_head(lambda q, k: products(weights(q[places], k, scale)), q, k)
    value = shape(gram)
    if len(places) == tokens:
        return exact(value)
    even, odd = (shape(gram[..., half::2, half::2]) for half in range(2))
    change = (value - (even + odd) / 2) / (2**0.5 - 1)
    return torch.stack((value, torch.hypot(change, (even - odd) / 2)), -1)


@measure("token_spectrum", "token_effective_rank", "token_stable_rank", "token_sigma_ratio", "token_top_share")
def token_spectrum(x: Tensor) -> Tensor:
    """Effective rank, stable rank and σ2/σ1 of the centred tokens JX, and the share σ1² / Σσ² of their first direction.

    J = I − 11ᵀ/N; exact.
    """
    means = middle(x).squeeze(1)
    squares = eigenvalues(torch.stack([products(item.mT, mean) for item, mean in zip(x, means, strict=True)]))
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


def shape(gram: Tensor) -> Tensor:
    """[..., S, S] → [..., 3]: effective rank, stable rank and σ2/σ1 of rows, from their products."""
    squares, total = eigenvalues(gram), gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    largest, second = squares[..., 0], squares[..., 1]
    return torch.stack((effective_rank(squares.sqrt()), total / largest, (second / largest).sqrt()), -1)


def effective_rank(sigma: Tensor) -> Tensor:
    """[..., S] → [...]: exp of the entropy of σ / Σσ."""
    return torch.special.entr(sigma / sigma.sum(-1, keepdim=True)).sum(-1).exp()
