"""A scene is a pure function of its seed: each scene draws from streams of its own, one for each purpose."""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PURPOSES = ("layout", "materials", "light", "cameras", "views")
SEEDS = 2**32
TRAINING_SEEDS = range(SEEDS // 2)
HELD_OUT_SEEDS = range(SEEDS // 2, SEEDS)  # for judging a model; nothing is ever trained on them
STRIDE = -0x61C8864680B583EB  # 2**64 over the golden ratio, as int64: SplitMix64 steps by it


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry called `name`; ValueError names the nearest valid one."""
    if name in table:
        return table[name]
    nearest = get_close_matches(str(name), list(table), n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown {what} {name!r}; did you mean {nearest!r}? Valid: {', '.join(table)}")


class Dice:
    """Uniform numbers [B, *shape], float64 on the CPU; row i depends on seed i, the purpose and the calls before it.

    Number n of a stream is a hash of the stream and n, so that all rows of a batch come from a few tensor operations.
    A stream for each purpose keeps the geometry of a seed when, say, a new texture draws one number more.
    """

    def __init__(self, seeds: Sequence[int], purpose: str) -> None:
        # Seed and purpose share no bits of the key, and scrambling is a bijection: no two streams start alike.
        keys = torch.tensor(seeds, dtype=torch.int64) + PURPOSES.index(purpose) * SEEDS
        self.streams = scramble(keys)
        self.drawn = 0

    def uniform(self, low: float | Tensor, high: float | Tensor, *shape: int) -> Tensor:
        """Numbers in [low, high); tensor bounds broadcast against [B, *shape]."""
        index = self.drawn + torch.arange(math.prod(shape))
        self.drawn += len(index)
        bits = scramble(self.streams[:, None] + index * STRIDE)
        draws = ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53
        return low + (high - low) * draws.view(len(draws), *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in 0 … high − 1 as int64 (high < 2**52)."""
        return self.uniform(0.0, float(high), *shape).long()

    def sign(self, *shape: int) -> Tensor:
        """−1 or +1."""
        return self.integers(2, *shape).double() * 2 - 1


def scramble(bits: Tensor) -> Tensor:
    """SplitMix64's bijection of int64 [...] (Steele, Lea and Flood 2014), with wrapping products."""
    bits = (bits ^ (bits >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31 & 2**33 - 1)


def checked_seeds(seed: int | Sequence[int]) -> list[int]:
    """One seed for each scene as a non-empty list; ValueError outside 0 … 2³² − 1."""
    seeds = [seed] if isinstance(seed, int) else [int(s) for s in seed]
    if not seeds:
        raise ValueError("seed is empty; give one seed for each scene")
    for s in seeds:
        if not 0 <= s < SEEDS:
            raise ValueError(f"seed {s} is outside 0 … {SEEDS - 1}")
    return seeds
