"""The multiple-choice knapsack, exactly: one option for each layer, least total value, total weight within a limit.

Layers are added one by one to a list of partial choices, from which every one goes that another beats in weight and
value (Nemhauser and Ullmann, 1969), and every one whose best completion cannot reach a choice already known. What a
completion can reach is bounded by the Lagrangian relaxation: a price on weight in place of the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

STEPS = 64
"""Halvings of the interval of prices; the bound is valid at any price, and tight enough after these."""
SLACK = 1e-9
"""Relative: what sums of numbers in another order may differ by."""


class Option(NamedTuple):
    weight: float
    value: float


Layer = Sequence[Option]


def choose(layers: Sequence[Layer], limit: float) -> tuple[int, ...] | None:
    """The index of an option for each layer, None where nothing is within the limit.

    Of equal totals the lighter one, then the one with smaller indices. Options of infinite value are never chosen.
    """
    if any(not any(map(_possible, layer)) for layer in layers):
        return None
    lightest = [min(option.weight for option in layer if _possible(option)) for layer in layers]
    if sum(lightest) > limit:
        return None
    price, best = _price(layers, limit)
    bounds = [sum(_relaxed(layer, price) for layer in layers[i:]) for i in range(1, len(layers) + 1)]
    rest = [sum(lightest[i:]) for i in range(1, len(layers) + 1)]
    found: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for layer, bound, least in zip(layers, bounds, rest, strict=True):
        grown = [
            (weight + option.weight, value + option.value, (*chosen, index))
            for weight, value, chosen in found
            for index, option in enumerate(layer)
            if _possible(option)
        ]
        reach = best + SLACK * (abs(best) + abs(bound) + price * abs(limit))
        within = limit + SLACK * abs(limit)
        grown = [x for x in grown if x[0] + least <= within and x[1] + bound - price * (limit - x[0]) <= reach]
        found = _undominated(grown)
    fitting = [entry for entry in found if entry[0] <= limit]
    return min(fitting, key=lambda entry: (entry[1], entry[0], entry[2]))[2]


def _possible(option: Option) -> bool:
    return math.isfinite(option.value) and math.isfinite(option.weight)


def _undominated(
    entries: list[tuple[float, float, tuple[int, ...]]],
) -> list[tuple[float, float, tuple[int, ...]]]:
    kept: list[tuple[float, float, tuple[int, ...]]] = []
    for entry in sorted(entries):
        if not kept or entry[1] < kept[-1][1]:
            kept.append(entry)
    return kept


def _relaxed(layer: Layer, price: float) -> float:
    return min(option.value + price * option.weight for option in layer if _possible(option))


def _cheapest(layers: Sequence[Layer], price: float) -> list[Option]:
    """What each layer takes at a price of weight; the lighter one where two cost the same."""
    return [min(filter(_possible, layer), key=lambda x: (x.value + price * x.weight, x.weight)) for layer in layers]


def _price(layers: Sequence[Layer], limit: float) -> tuple[float, float]:
    """A price at which the relaxed choice is about as heavy as the limit, and the value of one that is within it."""
    lightest = [min(filter(_possible, layer), key=lambda x: (x.weight, x.value)) for layer in layers]
    best = sum(option.value for option in lightest)
    low, high = 0.0, 1.0
    while sum(x.weight for x in _cheapest(layers, high)) > limit and high < 1e30:
        low, high = high, 4 * high
    for _ in range(STEPS):
        middle = (low + high) / 2
        taken = _cheapest(layers, middle)
        if sum(x.weight for x in taken) > limit:
            low = middle
        else:
            high, best = middle, min(best, sum(x.value for x in taken))
    return high, best
