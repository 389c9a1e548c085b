"""How far tokens have come together: their directions, their spread around the mean, and how alike the nearest are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_compile.measures.operator import measure
from vggt_compile.measures.sample import Rows, drawn, exact, mean, quantities
from vggt_compile.ops.sizes import pieces
from vggt_compile.registry import Share


@measure("cosine", "cosine")
def cosine(x: Tensor) -> Tensor:
    """Mean cosine ρ of the angles between all pairs of tokens: (‖Σu‖² − Σ‖u‖²) / (N (N − 1)) of u = x / ‖x‖; exact."""
    tokens = x.shape[1]
    total = summed(lambda part: F.normalize(part, dim=-1).sum(1), x)
    own = summed(lambda part: F.normalize(part, dim=-1).square().sum((1, 2)), x)
    return _whole((total.square().sum(-1) - own) / (tokens * (tokens - 1)))


@measure("residual", "residual_ratio")
def residual(x: Tensor) -> Tensor:
    """‖JX‖ / ‖X‖ in the Frobenius norm, J = I − 11ᵀ/N: 0 where all tokens are equal, 1 where their mean is 0; exact."""
    return _whole((spread(x) / size(x)).sqrt())


@measure("length", "token_length")
def length(x: Tensor) -> Tensor:
    """‖X‖ / √N, the length of a token as the root of its mean square; exact."""
    return _whole((size(x) / x.shape[1]).sqrt())


@measure("step", "step", "residual_contraction")
def step(x: Tensor, update: Tensor) -> Tensor:
    """Step size Δt = ‖update‖ / ‖X‖, and what the step contracts with the residual; exact.

    D̂res = −½ log((‖JX'‖² / ‖X'‖²) / (‖JX‖² / ‖X‖²)) of X' = X + update: above 0 where tokens come together. It is that
    of the attention alone; layers in between are not in it.
    """
    whole = size(x)
    before, after = spread(x) / whole, spread(x, update) / size(x, update)
    ratio = (size(update) / whole).sqrt()
    return quantities(exact(ratio), exact(0.5 * (before.log() - after.log()))).unsqueeze(1)


@measure("redundancy", "nearest_cosine", "redundant")
def redundancy(x: Tensor, *, similar: Share = 0.9, rows: Rows = 512, seed: int = 0) -> Tensor:
    """Cosine to the most similar other token, mean over tokens, and the share of them where it reaches `similar`."""
    tokens = x.shape[1]
    places = drawn(tokens, rows, seed, x.device)
    nearest = torch.stack([_nearest(F.normalize(item.float(), dim=-1), places) for item in x])
    alike = torch.where(nearest.isfinite(), (nearest >= similar).float(), torch.nan)
    return quantities(mean(nearest, tokens), mean(alike, tokens)).unsqueeze(1)


def _nearest(unit: Tensor, places: Tensor) -> Tensor:
    """The largest cosine of each drawn token of [N, C] to another token."""
    found = []
    for part in pieces(len(places), len(unit) * unit.itemsize):
        own = places[part]
        cosines = unit[own] @ unit.mT
        cosines.scatter_(1, own[:, None], -torch.inf)
        found.append(cosines.amax(-1))
    return torch.cat(found)


def spread(*terms: Tensor) -> Tensor:
    """‖JX‖² of X = the sum of some [B, N, C], [B] in fp64."""
    centre = middle(*terms)
    return summed(lambda *parts: (sum(parts) - centre).square().sum((1, 2)), *terms)


def middle(*terms: Tensor) -> Tensor:
    """The mean token of X = the sum of some [B, N, C], [B, 1, C] in fp64. `mean(dtype=…)` would copy all of X."""
    return summed(lambda *parts: sum(parts).sum(1, keepdim=True), *terms) / terms[0].shape[1]


def size(*terms: Tensor) -> Tensor:
    """‖X‖² of X = the sum of some [B, N, C], [B] in fp64."""
    return summed(lambda *parts: sum(parts).square().sum((1, 2)), *terms)


def summed(of: Callable[..., Tensor], *terms: Tensor) -> Tensor:
    """The sum of `of` over pieces of the tokens of [B, N, C], each in fp64: the whole would be large."""
    batch, tokens, width = terms[0].shape
    found: list[Tensor] = [of(*(x[:, part].double() for x in terms)) for part in pieces(tokens, batch * width * 8)]
    return torch.stack(found).sum(0)


def _whole(value: Tensor) -> Tensor:
    """[B] → [B, 1, 1, 2]."""
    return quantities(exact(value)).unsqueeze(1)
