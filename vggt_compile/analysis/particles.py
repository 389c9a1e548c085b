"""Tokens as interacting particles on a sphere: a layer is a step of time, attention is the velocity.

The dynamics and their name are of Geshkovski, Letrouit, Polyanskiy and Rigollet, A mathematical perspective on
transformers (arXiv 2312.10794); radii after a norm before the layer are of Karagodin et al. (arXiv 2510.22026).
With P_x y = y − ⟨x, y⟩ x and A_i = Σ_j w_j e^{β⟨Qx_i, Kx_j⟩} V x_j / Z_i:

    norm after the layer    ẋ_i = P_{x_i} A_i                    on the sphere
    norm before the layer   ẏ_i = A_i(x), x_i = y_i / |y_i|      in space, which is ẋ = P A / r with ṙ = ⟨x, A⟩

Assumed, and not so in a trained model: Q, K and V are the identity (they can be given), one head, one β for all layers,
no MLP, no LayerScale, no frame attention between two global ones, no rotary positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vggt_compile.analysis.integrate import integrate

Norm = Literal["after", "before"]


@dataclass(frozen=True)
class Attention:
    """What tokens get from each other, at inverse temperature β."""

    beta: float = 1.0
    divide: Literal["softmax", "count"] = "softmax"  # by Z_i = Σ_j w_j e^{…} (SA), or by Σ_j w_j (USA)
    weights: Tensor | None = None  # [n] how many tokens each particle stands for; None is one
    query: Tensor | None = None  # [d, d]; None is the identity
    key: Tensor | None = None
    value: Tensor | None = None

    def matrix(self, x: Tensor) -> Tensor:
        """Row i [..., n, n] is what token i takes of each token."""
        logits = self.beta * _mapped(x, self.query) @ _mapped(x, self.key).mT
        if self.weights is not None:
            logits = logits + self.weights.log()
        if self.divide == "softmax":
            return logits.softmax(-1)
        return logits.exp() / (x.shape[-2] if self.weights is None else self.weights.sum())

    def __call__(self, x: Tensor) -> Tensor:
        """A [..., n, d] of unit tokens [..., n, d]."""
        return self.matrix(x) @ _mapped(x, self.value)


def flow(
    start: Tensor,
    times: Sequence[float] | Tensor,
    attention: Attention,
    norm: Norm = "after",
    rtol: float = 1e-8,
    atol: float = 1e-10,
) -> Tensor:
    """Tokens [times, ..., n, d] that started at [..., n, d], in fp64.

    With the norm after the layer they are unit vectors to rounding at every time; with the norm before it they carry
    their radii, those of `start` at time 0.
    """
    if norm == "before":
        return integrate(lambda y: attention(unit(y)), start, times, rtol, atol)
    return integrate(lambda x: tangent(x, attention(x)), unit(start.double()), times, rtol, atol, project=unit)


def unit(y: Tensor) -> Tensor:
    return normalize(y, dim=-1)


def tangent(x: Tensor, y: Tensor) -> Tensor:
    """P_x y: y less its part along x."""
    return y - (x * y).sum(-1, keepdim=True) * x


def gap(x: Tensor) -> Tensor:
    """1 − the mean cosine of two different tokens, of unit vectors [..., n, d], without cancellation near 0."""
    tokens = x.shape[-2]
    spread = (x - x.mean(-2, keepdim=True)).square().sum(-1).mean(-1)
    return spread * tokens / (tokens - 1)


def distance_to_point(x: Tensor) -> Tensor:
    """W2 between the tokens [..., n, d] and the nearest Dirac measure on the sphere, in chords."""
    centre = unit(x.mean(-2, keepdim=True))
    return (x - centre).square().sum(-1).mean(-1).sqrt()


def energy(x: Tensor, beta: float) -> Tensor:
    """(1/2β) Σ_ij e^{β⟨x_i,x_j⟩} / n², which grows along the flow with Q = K = V = identity (arXiv 2312.10794)."""
    return (beta * x @ x.mT).exp().mean((-1, -2)) / (2 * beta)


def equiangular(tokens: int, cosine: float) -> Tensor:
    """Unit vectors [n, n], any two of them at this cosine."""
    gram = torch.full((tokens, tokens), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    return torch.linalg.cholesky(gram)


def _mapped(x: Tensor, matrix: Tensor | None) -> Tensor:
    return x if matrix is None else x @ matrix.mT
