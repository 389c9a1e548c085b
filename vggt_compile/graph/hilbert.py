"""A walk through all cells of a grid, step by step to a neighbour, whose every stretch covers a compact piece of it.

Hilbert's curve does so in squares of 2ⁿ cells a side. For rectangles of any size J. Červený's generalisation cuts along
the middle again and again: a long rectangle into two that the walk crosses one after the other, any other one into
three, up the near side, along the far one, and down again. (https://github.com/jakubcerveny/gilbert)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

Cell = tuple[int, int]
"""Row and column."""


@functools.cache
def hilbert_order(rows: int, columns: int) -> tuple[int, ...]:
    """The cells of a grid, row · columns + column, in the order of the walk.

    Each step leads to one of the four neighbours, but for one that is diagonal where the longer side is odd and the
    shorter one even: by the colours of a chessboard, no walk leads through all cells from corner to corner along that.
    """
    if rows > columns:
        whole = _Rectangle((0, 0), (1, 0), rows, (0, 1), columns)
    else:
        whole = _Rectangle((0, 0), (0, 1), columns, (1, 0), rows)
    return tuple(row * columns + column for row, column in whole.walk())


@dataclass(frozen=True)
class _Rectangle:
    """`length` cells along one unit step, `width` across it; the walk goes from `start` to the far end of `along`."""

    start: Cell
    along: Cell
    length: int
    across: Cell
    width: int

    def walk(self) -> Iterator[Cell]:
        if self.width == 1:
            yield from (_moved(self.start, self.along, i) for i in range(self.length))
        elif self.length == 1:
            yield from (_moved(self.start, self.across, i) for i in range(self.width))
        else:
            for part in self._halves() if 2 * self.length > 3 * self.width else self._thirds():
                yield from part.walk()

    def _halves(self) -> tuple[_Rectangle, ...]:
        cut = _even_half(self.length)
        return (
            _Rectangle(self.start, self.along, cut, self.across, self.width),
            _Rectangle(_moved(self.start, self.along, cut), self.along, self.length - cut, self.across, self.width),
        )

    def _thirds(self) -> tuple[_Rectangle, ...]:
        half, cut = self.length // 2, _even_half(self.width)
        corner = _moved(_moved(self.start, self.along, self.length - 1), self.across, cut - 1)
        return (
            _Rectangle(self.start, self.across, cut, self.along, half),
            _Rectangle(_moved(self.start, self.across, cut), self.along, self.length, self.across, self.width - cut),
            _Rectangle(corner, _back(self.across), cut, _back(self.along), self.length - half),
        )


def _even_half(size: int) -> int:
    """About half of it; even where there are more than two, as a walk there and back needs an even number of lanes."""
    half = size // 2
    return half + half % 2 if size > 2 else half


def _moved(cell: Cell, step: Cell, times: int) -> Cell:
    return cell[0] + step[0] * times, cell[1] + step[1] * times


def _back(step: Cell) -> Cell:
    return -step[0], -step[1]
