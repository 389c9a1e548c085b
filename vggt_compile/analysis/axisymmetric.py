"""Between rings of tokens around one axis only angles count: the pull of a ring is an average over its azimuth.

A ring holds tokens x = cos φ e + sin φ ω with ω even on the sphere S^{d−2} across the axis e. For a token at angle θ,
⟨x, y⟩ = cos θ cos φ + s sin θ sin φ, where s = ⟨ω, ω'⟩ is one coordinate of an even point on S^{d−2}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vggt_compile.analysis.integrate import integrate


def coordinate(dimension: int, count: int = 32) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the mean over one coordinate of an even point on S^{dimension−1}.

    Its density is (1−s²)^{(dimension−3)/2}, under which ultraspherical polynomials are orthogonal; their Gauss rule
    (Golub and Welsch 1969) is exact for polynomials of degree 2 · count − 1. At dimension 1 it is s = ±1.
    """
    half = dimension / 2 - 1
    k = torch.arange(2, count, dtype=torch.float64)
    first = torch.tensor([1 / dimension], dtype=torch.float64)  # the mean of s²; the formula below can have 0/0 there
    squares = torch.cat((first, k * (k + 2 * half - 1) / (4 * (k + half) * (k + half - 1))))
    nodes, vectors = torch.linalg.eigh(torch.diag(squares.sqrt(), 1) + torch.diag(squares.sqrt(), -1))
    return nodes, vectors[0].square()


@dataclass(frozen=True)
class Pull:
    """The velocity of tokens at angles θ [m] from masses at angles φ [n], as tables made once or at every call."""

    weight: Tensor  # [m, n] the mean over azimuth of e^{β⟨x,y⟩}
    across: Tensor  # [m, n] of e^{β⟨x,y⟩}⟨ê_θ, y⟩, which turns
    along: Tensor  # [m, n] of e^{β⟨x,y⟩}⟨x, y⟩, which lengthens
    divide: Literal["softmax", "count"]

    @staticmethod
    def of(
        at: Tensor, sources: Tensor, dimension: int, beta: float, divide: Literal["softmax", "count"] = "softmax"
    ) -> Pull:
        nodes, weights = coordinate(dimension - 1)
        theta, phi = at[:, None, None], sources[None, :, None]
        level, tilt = theta.cos() * phi.cos(), theta.sin() * phi.sin()
        cosine = level + tilt * nodes
        turn = -theta.sin() * phi.cos() + theta.cos() * phi.sin() * nodes
        # A softmax does not change by a factor, so the largest exponent is taken out of it.
        share = weights * (beta * (cosine - 1 if divide == "softmax" else cosine)).exp()
        return Pull(share.sum(-1), (share * turn).sum(-1), (share * cosine).sum(-1), divide)

    def velocity(self, mass: Tensor) -> Tensor:
        """θ̇ [m] of tokens on the sphere; masses [n] sum to one."""
        return self.across @ mass / self._total(mass)

    def alignment(self, mass: Tensor) -> Tensor:
        """⟨x, A⟩ [m], the rate at which a radius grows."""
        return self.along @ mass / self._total(mass)

    def _total(self, mass: Tensor) -> Tensor | float:
        return self.weight @ mass if self.divide == "softmax" else 1.0


Relative = Callable[[Tensor], Tensor]
"""A density relative to the even one, of the cosine to the axis, known to a factor."""


def rings(
    density: Relative,
    times: Sequence[float] | Tensor,
    dimension: int,
    beta: float,
    count: int = 48,
    radius: float | None = None,
    tolerance: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    """Angles [times, n] and masses [n] of rings that move with softmax attention: characteristics of the mean field.

    Rings start at Gauss nodes, so while the flow is smooth, means over few rings have many digits. What starts near the
    antipode leaves it late and in a thin layer that they do not resolve; in many dimensions it carries no mass. With a
    `radius` at time 0 the norm stands before the layer, and every ring has a radius of its own.
    """
    cosines, weights = coordinate(dimension, count)
    mass = weights * density(cosines)
    mass = mass / mass.sum()

    def field(state: Tensor) -> Tensor:
        pull = Pull.of(state[0], state[0], dimension, beta)
        if radius is None:
            return torch.stack((pull.velocity(mass), torch.zeros_like(mass)))
        return torch.stack((pull.velocity(mass) / state[1], pull.alignment(mass)))

    start = torch.stack((cosines.acos(), torch.full_like(mass, radius or 1.0)))
    return integrate(field, start, times, rtol=tolerance, atol=tolerance * 1e-2)[:, 0], mass


def pre_norm_time(times: Tensor, alignment: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Depths and radii of a stack with the norm before its layers, from a solution with the norm after them.

    With one radius r for all tokens, ẋ = P A / r is the flow of ẋ = P A in another time: dt = r dτ, and
    (log r)˙ = mean ⟨x, A⟩ in τ. One radius is exact for equiangular tokens, and a closure for others; `rings` does
    without it. `alignment` [times] is that mean at each of `times`, and integrals are trapezoids between them.
    """
    radii = radius * torch.exp(_running(alignment, times))
    return _running(radii, times), radii


def _running(values: Tensor, times: Tensor) -> Tensor:
    return torch.cat((values.new_zeros(1), torch.cumulative_trapezoid(values, times)))
