"""A candidate for each layer by the knapsack, from errors that add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vggt_compile.auto.calibration import Calibration
from vggt_compile.auto.costs import Costs
from vggt_compile.auto.gains import Errors
from vggt_compile.auto.knapsack import Option, choose

Choice = Mapping[int, str]
"""Layer → candidate."""


def least_error(calibration: Calibration, costs: Costs, limit: float) -> Choice:
    """The least predicted error within a cost of the attentions over frames together."""
    choice = within(calibration.gains, costs, limit)
    assert choice is not None  # the limit is checked against the least that there is
    return choice


def least_cost(calibration: Calibration, costs: Costs, error: float) -> Choice:
    """The least cost within a predicted error."""
    gains = calibration.gains
    layers = [
        [Option(gain, costs.layers[layer][name]) for name, gain in found.items()] for layer, found in gains.items()
    ]
    indices = choose(layers, error)
    assert indices is not None  # dense everywhere adds no error
    return _named(gains, indices)


def within(gains: Errors, costs: Costs, limit: float) -> Choice | None:
    """The least sum of gains within a cost, None where no choice is."""
    layers = [
        [Option(costs.layers[layer][name], gain) for name, gain in found.items()] for layer, found in gains.items()
    ]
    indices = choose(layers, limit)
    return None if indices is None else _named(gains, indices)


def _named(gains: Errors, indices: Sequence[int]) -> Choice:
    return {layer: list(found)[index] for (layer, found), index in zip(gains.items(), indices, strict=True)}
