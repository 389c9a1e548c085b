"""How much an attention draws tokens together: the spread around the mean before it and after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vggt_compile.measures.operator import measure
from vggt_compile.measures.product import product, split
from vggt_compile.measures.sample import Rows, drawn, each_head, exact, quantities, weights
from vggt_compile.measures.tokens import middle, spread

Mixer = Callable[[Tensor], Tensor]


@measure("contraction", "contraction")
def contraction(q: Tensor, k: Tensor, x: Tensor, scale: float | None, *, rows: Rows = 512, seed: int = 0) -> Tensor:
    """D̂ = −½ log(‖JAX‖² / ‖JX‖²) of each head's attention matrix A on the tokens X, without the residual.

    0 for the identity, ∞ for uniform attention. From drawn rows of AX: ‖JAX‖² is estimated by their variance.
    """
    tokens = q.shape[-2]
    places = drawn(tokens, rows, seed, q.device)
    wide, inner = (torch.promote_types(y.dtype, torch.float32) for y in (x, q))
    before, centre = spread(x), middle(x).to(wide)
    found = []
    for item, (queries, keys) in enumerate(zip(q, k, strict=True)):
        mix = _mixer(x[item], centre[item], inner)

        def of_head(q: Tensor, k: Tensor, mix: Mixer = mix, whole: Tensor = before[item]) -> Tensor:
            return quantities(_from_rows(mix(weights(q[places], k, scale)).double(), tokens, whole))

        found.append(each_head(of_head, queries[None], keys[None]))
    return torch.cat(found)


@measure("mixing", "value_contraction")
def mixing(q: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """−½ log(‖J out‖² / ‖JV‖²) of each head: the contraction of its values by what is run, plan included; exact."""
    del q  # read for the number of heads
    before, after = (spread(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (v, out))
    return quantities(exact(0.5 * (before.log() - after.log())))


def _mixer(x: Tensor, centre: Tensor, dtype: torch.dtype) -> Mixer:
    """Rows of A → A(X − centre), which is AX − centre. On a GPU fp32 is slow, and split it is far within D̂'s error."""
    if x.is_cuda and dtype == torch.float32:
        parts = split(x, centre)
        return lambda rows: product(rows, parts)
    centred = (x - centre).to(dtype)
    return lambda rows: rows @ centred


def _from_rows(rows: Tensor, count: int, before: Tensor) -> Tensor:
    """[S, C] of `count` rows, and ‖JX‖² → [2]: D̂ and its standard error by the jackknife, each row left out once."""
    drawn_rows = len(rows)
    squares = (rows - rows.mean(0)).square().sum(-1)
    value = 0.5 * (before.log() - (squares.sum() * (count - 1) / (drawn_rows - 1)).log())
    if drawn_rows == count:
        return exact(value)
    left_out = 0.5 * (squares.sum() - squares * drawn_rows / (drawn_rows - 1)).log()
    variance = left_out.var(correction=0) * (drawn_rows - 1) * (1 - drawn_rows / count)
    return torch.stack((value, variance.sqrt()))
