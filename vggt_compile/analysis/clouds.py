"""Tokens around an axis, of the density e^{κ cos θ}, as independent points: particles start from them."""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_compile.analysis.axisymmetric import Relative
from vggt_compile.analysis.particles import unit


def gathered(kappa: float) -> Relative:
    """The density e^{κ cos θ} of von Mises and Fisher, relative to the even one."""
    return lambda cosine: torch.exp(kappa * cosine)


def cloud(tokens: int, seeds: int, dimension: int = 3, kappa: float = 1.0) -> Tensor:
    """Independent tokens [seeds, n, d] of that density, by the inverse of the sum over the angle."""
    generator = torch.Generator().manual_seed(1000 * dimension + tokens)
    angles = torch.linspace(0, torch.pi, 4001, dtype=torch.float64)
    density = gathered(kappa)(angles.cos()) * angles.sin() ** (dimension - 2)
    share = torch.nn.functional.pad(torch.cumulative_trapezoid(density), (1, 0))
    level = torch.rand(seeds, tokens, 1, dtype=torch.float64, generator=generator)
    angle = interpolated(level, share / share[-1], angles)
    across = unit(torch.randn(seeds, tokens, dimension - 1, dtype=torch.float64, generator=generator))
    return torch.cat((angle.cos(), angle.sin() * across), -1)


def interpolated(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + share * (y[right] - y[right - 1])
