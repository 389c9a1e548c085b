"""The line through measured peaks gives back what it was made from, and says how far off it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggt_compile.bench.length import CARDS, RESERVE, line, table


@given(st.floats(0.5, 20), st.floats(0.01, 0.5), st.sets(st.integers(1, 2000), min_size=2, max_size=6))
def test_peaks_on_a_line_give_it_back(fixed: float, per_frame: float, counts: set[int]) -> None:
    found = line({n: fixed + per_frame * n for n in counts})
    assert found.fixed == pytest.approx(fixed, abs=1e-6 * (1 + per_frame * max(counts)))
    assert found.per_frame == pytest.approx(per_frame, rel=1e-6)
    assert found.check < 1e-6 * (1 + per_frame * max(counts))


@given(st.floats(0.01, 0.5), st.floats(4, 200))
def test_the_most_frames_fit_and_one_more_does_not(per_frame: float, gib: float) -> None:
    found, rounding = line({10: 2 + 10 * per_frame, 500: 2 + 500 * per_frame}), 1e-9
    most = found.frames(gib)
    assert found.fixed + found.per_frame * most <= gib - RESERVE + rounding
    assert found.fixed + found.per_frame * (most + 1) > gib - RESERVE - rounding


def test_nothing_fits_where_weights_alone_do_not() -> None:
    assert line({1: 30.0, 2: 31.0}).frames(24) == 0


def test_a_bent_curve_is_told_by_its_error() -> None:
    assert line({1: 1.0, 2: 2.0, 3: 5.0}).check > 0.5


def test_variants_with_too_few_counts_have_no_row() -> None:
    rows = [{"variant": "a", "frames": n, "peak_gib": 5 + 0.1 * n} for n in (24, 60, 100)]
    rows += [{"variant": "b", "frames": 30, "peak_gib": 5.0}, {"variant": "a", "frames": 900, "out_of_memory": True}]
    text = table(rows)
    assert "5.0 + 0.1000 n" in text
    assert "| b " not in text
    assert str(int((CARDS[80] - RESERVE - 5) / 0.1)) in text
    assert table(rows[:2]) == ""


def test_counts_that_heads_see_at_once_are_on_no_line() -> None:
    short = [{"variant": "a", "frames": n, "peak_gib": 5 + 0.5 * n} for n in (4, 16, 22, 23)]
    assert table(short) == ""
    assert "5.0 + 0.1000 n" in table(
        short + [{"variant": "a", "frames": n, "peak_gib": 5 + 0.1 * n} for n in (24, 60, 100)]
    )
