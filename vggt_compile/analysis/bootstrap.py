"""How far a number might be off with other scenes: percentiles over samples of scenes, drawn with replacement."""

from __future__ import annotations

import torch
from torch import Tensor

Interval = tuple[float, float]


def resampled(scenes: int, samples: int, seed: int) -> Tensor:
    """How often each scene is in each bootstrap sample [samples, scenes]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(scenes, (samples, scenes), generator=generator)
    return torch.nn.functional.one_hot(drawn, scenes).sum(1).double()


def interval(values: Tensor, level: float = 0.95) -> Interval:
    """The middle `level` of values."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
    low, high = values.quantile(ends).tolist()
    return low, high
