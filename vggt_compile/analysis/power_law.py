"""Does collapse follow 1 − ρ = C (t + t0)^{−p}? At p = 2 distances between tokens fall as one over depth.

t is absolute depth: with the norm before the layer it grows by step · r / r_0 at a layer whose tokens have radius r,
so it is the sum of measured relative steps times how much longer tokens have become. A sum of relative steps alone is
another clock, on which the same law reads e^{−2t} (see equiangular.layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_compile.analysis.bootstrap import Interval, interval, resampled
from vggt_compile.errors import BadInput


@dataclass(frozen=True)
class PowerLaw:
    exponent: float  # p
    offset: float  # t0
    interval: Interval | None  # of p over scenes; None with one scene
    error: float  # root of the mean square of log(1 − ρ) that is left

    @property
    def one_over_depth(self) -> bool | None:
        """Whether p = 2 lies in the interval; None where there is none."""
        return None if self.interval is None else self.interval[0] <= 2 <= self.interval[1]


def depth(step: Tensor, radius: Tensor) -> Tensor:
    """t at the input of each layer [S, L], from relative steps and mean lengths of tokens, both [S, L]."""
    absolute = step * radius / radius[:, :1]
    return torch.nn.functional.pad(absolute.cumsum(1)[:, :-1], (1, 0))


def fit_power_law(gap: Tensor, depths: Tensor, samples: int = 1000, seed: int = 0) -> PowerLaw:
    """Of gaps 1 − ρ at depths, both [S, L]; each scene has a C of its own, p and t0 are common.

    For a given t0 the law is a straight line in logarithms, so least squares searches t0 alone: on a grid on which
    t + t0 at the first layer is 1/1000 to 100 of the span of depths. It may be negative where collapse sets in late. At
    either end of the grid the data do not tell t0, and p means little.
    """
    if gap.shape != depths.shape or gap.shape[-1] < 4:
        raise BadInput("a power law with an offset needs the gaps and depths of four layers or more")
    scenes = len(gap)
    first, last = float(depths.min()), float(depths.max())
    grid = (last - first) * torch.logspace(-3, 2, 500, dtype=torch.float64) - first
    x = (depths.double() + grid[:, None, None]).log()  # [grid, S, L]
    y = gap.double().log()
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    moments = torch.stack((x.square().sum(-1), (x * y).sum(-1), y.square().sum(-1).expand(len(grid), -1)))
    exponent, offset, left = _best(moments, torch.ones(1, scenes, dtype=torch.float64), grid)
    span = None
    if scenes > 1:
        span = interval(_best(moments, resampled(scenes, samples, seed), grid)[0])
    return PowerLaw(float(exponent), float(offset), span, float(left / gap.numel()) ** 0.5)


def _best(moments: Tensor, counts: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, t0 and the squares left for each row of counts [R, S]."""
    xx, xy, yy = torch.einsum("mgs,rs->mrg", moments, counts)
    left = yy - xy.square() / xx
    index = left.argmin(1, keepdim=True)
    return (-xy / xx).gather(1, index)[:, 0], grid[index[:, 0]], left.gather(1, index)[:, 0].clamp(min=0)
