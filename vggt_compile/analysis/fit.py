"""Measured steps and temperatures go through the equiangular map layer by layer, and come out as predicted cosines.

From the cosine at the first global attention, measured steps Δ_l, β_l and n_l predict the cosines at all later ones.
Two factors may be fitted: `pace`, which multiplies every step, and `sharpness`, which multiplies every β. A pace of 1
is the theory as it stands; 0.3 says that attention gathers tokens as 0.3 of its update would with V = identity, and one
below 0 that tokens part. Errors are of log(1 − ρ), in which collapse is straight. Intervals are percentiles over
bootstrap samples of scenes.

Where a model breaks the assumptions: Q, K, V and the output projection are not the identity and heads differ, so an
update need not point at the mean; MLPs, frame attention and residual norms between two global attentions move tokens
too; tokens are not equiangular (frames and special tokens form clusters), so their mean cosine is only one number of
many. All of these go into the pace and into the residuals, which is why both are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_compile.analysis import equiangular
from vggt_compile.analysis.bootstrap import Interval, interval, resampled
from vggt_compile.analysis.least_squares import least_squares
from vggt_compile.analysis.profiles import Measured, Profile
from vggt_compile.errors import UnknownName

PARAMETERS = ("pace", "sharpness")


def predict(measured: Measured, pace: Tensor | float = 1.0, sharpness: Tensor | float = 1.0) -> Tensor:
    """The gap 1 − ρ at every layer [..., S, L] from the first one's; factors are numbers or [..., 1]."""
    gap = measured.gap[:, 0].expand(*torch.broadcast_shapes(_shape(pace), _shape(sharpness), measured.gap[:, 0].shape))
    found = [gap]
    for index in range(measured.gap.shape[1] - 1):
        found.append(_next(measured, found[-1], index, pace, sharpness))
    return torch.stack(found, -1)


def one_layer(measured: Measured, pace: Tensor | float = 1.0, sharpness: Tensor | float = 1.0) -> Tensor:
    """log of measured over predicted gap [..., S, L−1] when every layer starts from its own measured gap."""
    columns = [
        _next(measured, measured.gap[:, index], index, pace, sharpness) for index in range(measured.gap.shape[1] - 1)
    ]
    return measured.gap[:, 1:].log() - torch.stack(columns, -1).log()


def _next(measured: Measured, gap: Tensor, index: int, pace: Tensor | float, sharpness: Tensor | float) -> Tensor:
    step, beta = measured.step[:, index] * pace, measured.beta[:, index] * sharpness
    return equiangular.layer(gap, step, measured.tokens[:, index], beta)


def _shape(value: Tensor | float) -> torch.Size:
    return value.shape if isinstance(value, Tensor) else torch.Size()


@dataclass(frozen=True)
class Fit:
    """Factors that bring prediction nearest to measurement, and how far that still is."""

    layers: tuple[int, ...]
    values: dict[str, float]
    intervals: dict[str, Interval]  # empty with one scene: there is nothing to sample
    measured: list[float]  # mean cosine of each layer, over scenes
    predicted: list[float]
    token_rank: list[float]  # stable rank of unit tokens that is predicted, a bound from above
    residuals: list[float]  # of log(1 − ρ), measured less predicted, mean over scenes
    cosine_intervals: list[Interval]  # of ρ, measured less predicted, fitted to each sample; empty with one scene
    jumps: list[float]  # the same over each layer but the last from its own measured input
    jump_intervals: list[Interval]  # empty with one scene
    explained: float  # share of the variance of log(1 − ρ) over layers and scenes; below 0 is worse than the mean


def fit(profiles: Sequence[Profile], fitted: Sequence[str] = ("pace",), samples: int = 1000, seed: int = 0) -> Fit:
    """Least squares over all layers and scenes; `fitted` of PARAMETERS, the others stay 1."""
    for name in fitted:
        if name not in PARAMETERS:
            raise UnknownName("parameter of a fit", name, PARAMETERS)
    measured = Measured.of(profiles)
    scenes = len(profiles)
    best = _least_squares(measured, fitted, torch.ones(1, scenes, dtype=torch.float64))
    values = {name: float(value) for name, value in _factors(best[0], fitted).items()}
    factors = {name: values.get(name, 1.0) for name in PARAMETERS}
    intervals: dict[str, Interval] = {}
    jumps = one_layer(measured, **factors)
    jump_spans: list[Interval] = []
    spans: list[Interval] = []
    if scenes > 1:
        counts = resampled(scenes, samples, seed)
        drawn = _factors(_least_squares(measured, fitted, counts, best), fitted)
        intervals = {name: interval(drawn[name][:, 0]) for name in fitted}
        jump_spans = _columns(counts @ jumps / scenes)
        left = predict(measured, **drawn) - measured.gap
        spans = _columns(torch.einsum("rs,rsl->rl", counts, left) / scenes)
    gaps = predict(measured, **factors)
    residuals = measured.gap.log() - gaps.log()
    spread = measured.gap[:, 1:].log()
    return Fit(
        layers=measured.layers,
        values=values,
        intervals=intervals,
        measured=(1 - measured.gap).mean(0).tolist(),
        predicted=(1 - gaps).mean(0).tolist(),
        token_rank=equiangular.stable_rank(gaps, measured.tokens).mean(0).tolist(),
        residuals=residuals.mean(0).tolist(),
        cosine_intervals=spans,
        jumps=jumps.mean(0).tolist(),
        jump_intervals=jump_spans,
        explained=1 - float(residuals[:, 1:].square().sum() / (spread - spread.mean()).square().sum()),
    )


def _least_squares(measured: Measured, fitted: Sequence[str], counts: Tensor, start: Tensor | None = None) -> Tensor:
    """Parameters [R, P] that minimise the squares of scenes weighted by each row of counts [R, S]."""
    if start is None:
        start = torch.tensor([[1.0 if name == "pace" else 0.0 for name in fitted]], dtype=torch.float64)

    def residuals(parameters: Tensor) -> Tensor:
        return (predict(measured, **_factors(parameters, fitted)).log() - measured.gap.log())[..., 1:]

    return least_squares(residuals, counts[..., None], start.repeat(len(counts) // len(start), 1))


def _factors(parameters: Tensor, fitted: Sequence[str]) -> dict[str, Tensor]:
    """Of parameters [..., P], each [..., 1]: a pace as it is, for it may be negative, a sharpness by its logarithm."""
    columns = {name: parameters[..., index : index + 1] for index, name in enumerate(fitted)}
    return {name: value if name == "pace" else value.exp() for name, value in columns.items()}


def _columns(drawn: Tensor) -> list[Interval]:
    """The interval of each column of samples [R, L]."""
    return [interval(column) for column in drawn.T]
