"""From a calibration and a target to a plan: the knapsack's choice, and what it measures as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vggt_compile.auto.calibration import Calibration, calibrate
from vggt_compile.auto.candidates import DENSE
from vggt_compile.auto.costs import Costs
from vggt_compile.auto.refine import refined
from vggt_compile.auto.select import Choice, least_cost, least_error
from vggt_compile.auto.target import Target
from vggt_compile.errors import BadInput
from vggt_compile.plan import Plan

CHECKS = 12
"""How many plans are run in full to meet a target of error."""


@dataclass(frozen=True)
class Found:
    """A plan, and what is known of it.

    Attributes:
        choice: layer → candidate.
        predicted: error by the sum over layers.
        measured: error of the whole plan on the calibration's images.
        flops: share of the model's attention FLOPs that is left.
        speedup: of the attentions over frames together, by the costs that were asked for.
    """

    plan: Plan
    choice: Choice
    target: Target
    predicted: float
    measured: float
    flops: float
    speedup: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return vars(self) | {"plan": self.plan.to_json(), "target": str(self.target), "choice": dict(self.choice)}


def find_plan(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    target: object,
    *,
    name: str = "auto",
    rounds: int = 1,
    **options: Any,
) -> Plan:
    """The plan that reaches a target with the least change of the outputs, or stays within an error at least cost.

    >>> plan = vggt_compile.find_plan(model, images, {"speedup": 4})
    >>> torch.compile(model, backend="vggt_sparse", options={"plan": plan})

    Args:
        target: one of `{"speedup": 4}`, `{"flops": 0.2}` and `{"error": 0.02}`, see `vggt_compile.auto.target`.
        rounds: how often errors of layers are measured: once around the dense model, then around the plan found.
        options: see `vggt_compile.auto.calibration.calibrate`.

    Raises:
        BadInput: a target out of reach, with what is in reach, and whatever `calibrate` refuses.
    """
    wanted = Target.read(target)
    return find(calibrate(model, images, **options), wanted, name=name, rounds=rounds).plan


def find(
    calibration: Calibration, target: Target, *, name: str = "auto", rounds: int = 1, progress: bool = False
) -> Found:
    """The same from a calibration, which serves any number of targets."""
    if rounds < 1:
        raise BadInput(f"rounds={rounds}: errors are measured once or more often")
    if target.kind == "error":
        choice = _within_error(calibration, target)
    else:
        costs = calibration.flops if target.kind == "flops" else calibration.costs
        limit = _limit(costs, calibration.least(costs), target)
        choice = least_error(calibration, costs, limit)
        for _ in range(1, rounds):
            choice = refined(calibration, costs, limit, choice, progress)
    costs = calibration.costs
    return Found(
        plan=calibration.plan(choice, name),
        choice=choice,
        target=target,
        predicted=calibration.predicted(choice),
        measured=calibration.measured(choice),
        flops=calibration.flops.share(choice),
        speedup=costs.dense / costs.of(choice) if costs.of(choice) else float("inf"),
    )


def _limit(costs: Costs, least: float, target: Target) -> float:
    """What the attentions over frames may cost together, which is at least `least`."""
    if target.kind == "speedup":
        limit = costs.dense / target.value
        if limit < least:
            most = costs.dense / least
            raise BadInput(f"{target} is out of reach: the cheapest candidate at every layer gives {most:.3g}")
        return limit
    every = costs.dense + costs.elsewhere
    limit = target.value * every - costs.elsewhere
    if limit < least:
        whole, fixed = (least + costs.elsewhere) / every, costs.elsewhere / every
        raise BadInput(
            f"{target} is out of reach: the cheapest candidate at every layer leaves {whole:.3g}, of which {fixed:.3g} "
            "is attention inside frames that no plan changes; more frames make that part smaller"
        )
    return limit


def _within_error(calibration: Calibration, target: Target) -> Choice:
    """The cheapest of some choices whose error was measured to be within the target.

    What is allowed by prediction starts at the target, doubles until that is not met, and is then halved between what
    was met and what was not.
    """
    costs = calibration.costs
    best: Choice = dict.fromkeys(calibration.errors, DENSE)
    low, high, allowed = 0.0, None, target.value
    for _ in range(CHECKS):
        choice = least_cost(calibration, costs, allowed)
        if calibration.measured(choice) <= target.value:
            low = allowed
            best = min(best, choice, key=costs.of)
        else:
            high = allowed
        allowed = 2 * allowed if high is None else (low + high) / 2
    if set(best.values()) == {DENSE}:
        least = min(e for found in calibration.errors.values() for name, e in found.items() if name != DENSE)
        raise BadInput(f"{target} is out of reach: the mildest candidate at one layer alone has {least:.3g}")
    return best
