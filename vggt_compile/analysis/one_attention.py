"""What one attention does to the spread of tokens: D̂ with the residual, against the equiangular map.

The cosine from one global layer to the next has MLPs and frame attention in it; D̂ of X → X + update has not. It is
½ log(δ / δ') with δ = ‖JX‖² / ‖X‖² · n / (n − 1), and the map gives δ' from the measured step. So a pace that is
fitted here is that of attention alone: 1 says that updates gather tokens as with V = identity, 0 that they do nothing
to their spread, and below 0 that they part them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_compile.analysis import equiangular
from vggt_compile.analysis.bootstrap import Interval, interval, resampled
from vggt_compile.analysis.least_squares import least_squares
from vggt_compile.analysis.profile import Profile
from vggt_compile.analysis.records import QUANTITY, Reading, excess, keys, measured_layers, values


@dataclass(frozen=True)
class OneAttention:
    layers: list[int]
    predicted: Tensor  # [scenes, layers], at pace 1
    pace: float
    interval: Interval | None  # over scenes; None with one


def one_attention(profile: Profile, reading: Reading, samples: int = 1000, seed: int = 0) -> OneAttention | None:
    """None where step, residual ratio or what the reading takes was not measured."""
    layers = measured_layers(profile, "residual_ratio", "step", "residual_contraction", QUANTITY[reading])
    if not layers:
        return None
    measured = values(profile, "residual_contraction", layers)
    operands = _operands(profile, layers, reading)

    def residuals(pace: Tensor) -> Tensor:
        return _contraction(*operands, pace[..., None]) - measured

    start = torch.ones(1, 1, dtype=torch.float64)
    best = least_squares(residuals, torch.ones(1, len(measured), 1, dtype=torch.float64), start)
    span = None
    if len(measured) > 1:
        counts = resampled(len(measured), samples, seed)
        span = interval(least_squares(residuals, counts[..., None], best.repeat(samples, 1))[:, 0])
    return OneAttention(layers, _contraction(*operands, start), float(best), span)


def _operands(profile: Profile, layers: list[int], reading: Reading) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """δ, step, keys and β."""
    n = profile.tokens
    gap = values(profile, "residual_ratio", layers).square() * n / (n - 1)
    found = [
        [excess(profile, scene[layer][QUANTITY[reading]], reading) for layer in layers] for scene in profile.scenes
    ]
    left = torch.tensor([max(2.0, keys(profile, layer)) for layer in layers], dtype=torch.float64)
    return gap, values(profile, "step", layers), left, torch.tensor(found, dtype=torch.float64) / gap


def _contraction(gap: Tensor, step: Tensor, tokens: Tensor, beta: Tensor, pace: Tensor) -> Tensor:
    return 0.5 * (gap.log() - equiangular.layer(gap, pace * step, tokens, beta).log())
