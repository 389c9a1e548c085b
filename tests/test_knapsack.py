"""The choice of a policy for each layer is the best of all, by trying all of them."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from vggt_compile.auto.knapsack import Option, choose

NUMBERS = st.one_of(st.integers(0, 8).map(float), st.floats(0, 1e12, allow_nan=False))
LAYERS = st.lists(st.lists(st.builds(Option, NUMBERS, NUMBERS), min_size=1, max_size=4), min_size=1, max_size=5)


def totals(layers: list[list[Option]], chosen: tuple[int, ...]) -> tuple[float, float]:
    taken = [layer[index] for layer, index in zip(layers, chosen, strict=True)]
    return sum(option.weight for option in taken), sum(option.value for option in taken)


def brute_force(layers: list[list[Option]], limit: float) -> float | None:
    """The least value within the limit."""
    every = (totals(layers, chosen) for chosen in itertools.product(*(range(len(layer)) for layer in layers)))
    return min((value for weight, value in every if weight <= limit), default=None)


@given(layers=LAYERS, share=st.floats(0, 1))
def test_the_choice_is_the_best_of_all(layers: list[list[Option]], share: float) -> None:
    light, heavy = (sum(pick(option.weight for option in layer) for layer in layers) for pick in (min, max))
    limit = light + share * (heavy - light)
    chosen, best = choose(layers, limit), brute_force(layers, limit)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        weight, value = totals(layers, chosen)
        assert weight <= limit
        assert math.isclose(value, best, rel_tol=1e-9)


@given(layers=LAYERS)
def test_nothing_is_chosen_below_the_lightest(layers: list[list[Option]]) -> None:
    lightest = sum(min(option.weight for option in layer) for layer in layers)
    assert choose(layers, lightest * (1 - 1e-6) - 1e-6) is None
    assert choose(layers, lightest) is not None


def test_an_option_of_infinite_value_is_no_option() -> None:
    layers = [[Option(0, math.inf), Option(2, 1)]]
    assert choose(layers, 2) == (1,)
    assert choose(layers, 1) is None
    assert choose([[Option(0, math.inf)]], 9) is None


def test_equal_totals_are_decided_by_weight_then_by_place() -> None:
    assert choose([[Option(3, 1), Option(2, 1)]], 3) == (1,)
    assert choose([[Option(2, 1), Option(2, 1)]] * 2, 9) == (0, 0)


def test_many_layers_take_a_moment() -> None:
    options = [Option(2.0**-i, (i * i % 7) + i * 3.7) for i in range(14)]
    layers = [[Option(w * (1 + n / 97), v * (1 + n % 5)) for w, v in options] for n in range(36)]
    chosen = choose(layers, 9.0)
    assert chosen is not None
    assert totals(layers, chosen)[0] <= 9.0
