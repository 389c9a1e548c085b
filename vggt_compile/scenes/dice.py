"""A scene is a pure function of its seed: each scene draws from its own CPU generators, one for each purpose."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PURPOSES = ("layout", "materials", "light", "cameras")
SEEDS = 2**32  # torch's CPU generator reads only the low 32 bits; larger seeds would repeat scenes silently


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry called `name`; ValueError names the nearest valid one."""
    if name in table:
        return table[name]
    nearest = get_close_matches(str(name), list(table), n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown {what} {name!r}; did you mean {nearest!r}? Valid: {', '.join(table)}")


class Dice:
    """Uniform numbers [B, *shape], float64 on the CPU; row i depends on seed i, the purpose and the calls before it.

    A stream for each purpose keeps the geometry of a seed when, say, a new texture draws one number more.
    """

    def __init__(self, seeds: Sequence[int], purpose: str) -> None:
        salt = PURPOSES.index(purpose) * 0x85EBCA6B
        # An odd multiplier is a bijection modulo 2**32: two seeds never share a stream.
        self.generators = [torch.Generator().manual_seed((seed * 0x9E3779B1 + salt) % SEEDS) for seed in seeds]

    def uniform(self, low: float | Tensor, high: float | Tensor, *shape: int) -> Tensor:
        """Numbers in [low, high); tensor bounds broadcast against [B, *shape]."""
        draws = torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) for g in self.generators])
        return low + (high - low) * draws

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in 0 … high − 1 as int64 (high < 2**52)."""
        return self.uniform(0.0, float(high), *shape).long()

    def sign(self, *shape: int) -> Tensor:
        """−1 or +1."""
        return self.integers(2, *shape).double() * 2 - 1


def checked_seeds(seed: int | Sequence[int]) -> list[int]:
    """One seed for each scene as a non-empty list; ValueError outside 0 … 2³² − 1."""
    seeds = [seed] if isinstance(seed, int) else [int(s) for s in seed]
    if not seeds:
        raise ValueError("seed is empty; give one seed for each scene")
    for s in seeds:
        if not 0 <= s < SEEDS:
            raise ValueError(f"seed {s} is outside 0 … {SEEDS - 1}")
    return seeds
