"""The walk through a grid: every cell once, to a neighbour each time, and stretches of it are compact."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggt_compile.graph.hilbert import hilbert_order

SIDE = st.integers(1, 48)


def cells(rows: int, columns: int) -> list[tuple[int, int]]:
    return [divmod(cell, columns) for cell in hilbert_order(rows, columns)]


def steps(rows: int, columns: int) -> list[tuple[int, int]]:
    """How far each step goes, (down, across) without signs."""
    return [(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in pairwise(cells(rows, columns))]


@given(SIDE, SIDE)
def test_it_is_a_permutation(rows: int, columns: int) -> None:
    assert sorted(hilbert_order(rows, columns)) == list(range(rows * columns))


@given(SIDE, SIDE)
def test_it_steps_to_neighbours(rows: int, columns: int) -> None:
    """All four ways but once, where the colours of a chessboard forbid a walk that ends in a corner."""
    found = steps(rows, columns)
    diagonal = found.count((1, 1))
    assert all(sum(step) == 1 or step == (1, 1) for step in found)
    odd_long_side = max(rows, columns) % 2 and not min(rows, columns) % 2
    assert diagonal <= (1 if odd_long_side else 0)


@given(SIDE, SIDE)
def test_it_begins_in_the_first_corner_and_turns_with_the_grid(rows: int, columns: int) -> None:
    walk = cells(rows, columns)
    assert walk[0] == (0, 0)
    if rows != columns:
        assert [(column, row) for row, column in cells(columns, rows)] == walk


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_it_is_hilberts_curve_in_squares_of_powers_of_two(side: int) -> None:
    """Each quarter of the walk is a quarter of the square, and so on inside."""
    walk = cells(side, side)
    quarter = len(walk) // 4
    for start in range(0, len(walk), quarter):
        part = walk[start : start + quarter]
        assert len({(2 * row // side, 2 * column // side) for row, column in part}) == 1


@pytest.mark.parametrize(("rows", "columns", "block"), [(28, 37, 64), (37, 37, 64), (16, 16, 32), (20, 37, 128)])
def test_blocks_are_more_compact_than_rows_are(rows: int, columns: int, block: int) -> None:
    def spread(order: list[tuple[int, int]]) -> float:
        """Mean squared distance of a cell from the middle of its block."""
        total = 0.0
        for start in range(0, len(order), block):
            part = order[start : start + block]
            for axis in zip(*part, strict=True):
                middle = sum(axis) / len(axis)
                total += sum((x - middle) ** 2 for x in axis)
        return total / len(order)

    assert spread(cells(rows, columns)) < 0.5 * spread([divmod(i, columns) for i in range(rows * columns)])
