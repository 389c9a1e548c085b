"""Arithmetic of sizes that operators share; sizes may be symbols."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

PIECE_BYTES = 2**27
"""What a definition in PyTorch holds at once of something that is too large as a whole."""


def cdiv(size: int, by: int) -> int:
    return (size + by - 1) // by


def ratio(share: float) -> Fraction:
    """0.3 as 3/10: products of sizes and floats are wrong by one now and then, and awkward where sizes are symbols."""
    return Fraction(share).limit_denominator(10_000)


def pieces(count: int, size: int) -> Iterator[slice]:
    """Ranges of `count` things of `size` bytes each. Symbols are one range: a loop over them would fix their number."""
    if not (isinstance(count, int) and isinstance(size, int)):
        yield slice(None)
        return
    step = max(1, PIECE_BYTES // max(1, size))
    for start in range(0, max(1, count), step):
        yield slice(start, start + step)
