"""One more round: what a layer adds to the error of the plan at hand, rather than to that of the dense model.

Each layer's candidates that cost a little more or less than its own are tried in its place with all else as the plan
has it. The knapsack over these differences gives another plan, and every single change that stays within the limit is
one too; whichever of them measured best is taken, so that a round never makes a plan worse.
"""

from __future__ import annotations

from collections.abc import Mapping

from vggt_compile.auto.calibration import Calibration
from vggt_compile.auto.costs import Costs
from vggt_compile.auto.select import Choice, within

NEAR = 2
"""Places in the order of cost, both ways."""


def refined(calibration: Calibration, costs: Costs, limit: float, choice: Choice, progress: bool = False) -> Choice:
    moves = {
        (layer, name): {**choice, layer: name}
        for layer in choice
        for name in neighbours(costs.layers[layer], list(calibration.errors[layer]), choice[layer])
    }
    calibration.gauge.run([calibration.plan(changed) for changed in moves.values()], progress)
    here = calibration.measured(choice)
    gains = {layer: {choice[layer]: 0.0} for layer in choice}
    for (layer, name), changed in moves.items():
        gains[layer][name] = calibration.measured(changed) - here
    plans = [choice, *(changed for changed in moves.values() if costs.of(changed) <= limit)]
    if (whole := within(gains, costs, limit)) is not None:
        plans.append(whole)
    return min(plans, key=lambda found: (calibration.measured(found), costs.of(found)))


def neighbours(costs: Mapping[str, float], tried: list[str], own: str) -> list[str]:
    """Candidates up to NEAR places from a layer's own in the order of cost."""
    order = sorted(tried, key=lambda name: (costs[name], name))
    place = order.index(own)
    return [name for name in order[max(0, place - NEAR) : place + NEAR + 1] if name != own]
