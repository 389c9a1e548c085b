"""What was measured of a model on a user's images: errors and costs of every candidate at every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vggt_compile.auto import costs
from vggt_compile.auto.candidates import DENSE, candidates, composed
from vggt_compile.auto.costs import Costs
from vggt_compile.auto.gains import Errors, gains
from vggt_compile.auto.gauge import Gauge
from vggt_compile.auto.hopeless import hopeless
from vggt_compile.auto.inputs import by_time, checked, dtype, read_policies
from vggt_compile.auto.runner import Traced
from vggt_compile.plan import Plan, Policy


@dataclass(frozen=True)
class Calibration:
    """Errors and costs of candidates, of which plans are composed.

    Attributes:
    policies: candidates by name.
    errors: layer → candidate → error of the outputs with that candidate at that layer alone.
    gains: layer → candidate → what it adds to the predicted error of a plan.
    together: candidate → error with it at all layers that tried it.
    flops: for as many frames as the plan is for.
    time: None where nothing was timed.
    left_out: layer → candidate → why it was not tried.
    """

    gauge: Gauge
    policies: Mapping[str, Policy]
    errors: Errors
    gains: Errors
    together: Mapping[str, float]
    flops: Costs
    time: Costs | None
    left_out: Mapping[int, Mapping[str, str]]

    @property
    def costs(self) -> Costs:
        """What is minimised where an error is the target."""
        return self.flops if self.time is None else self.time

    def least(self, costs: Costs) -> float:
        """Of the attentions over frames, with the cheapest candidate at each layer that was tried and gave numbers."""
        return sum(
            min(costs.layers[layer][name] for name, gain in found.items() if math.isfinite(gain))
            for layer, found in self.gains.items()
        )

    def plan(self, choice: Mapping[int, str], name: str = "auto") -> Plan:
        return composed({layer: self.policies[entry] for layer, entry in choice.items()}, name)

    def predicted(self, choice: Mapping[int, str]) -> float:
        """The error of a whole choice, by the sum over layers."""
        return sum(self.gains[layer][name] for layer, name in choice.items())

    def measured(self, choice: Mapping[int, str]) -> float:
        """The error of a whole choice, run."""
        return self.gauge(self.plan(choice))


def calibrate(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    *,
    frames: int | None = None,
    cost: str = "auto",
    work: str | Path | None = None,
    policies: Mapping[str, object] | Sequence[str] | None = None,
    prune: bool = True,
    progress: bool = False,
) -> Calibration:
    """Run a model once for each candidate, layer and scene, with everything else dense.

    Args:
        model: in evaluation mode; it follows the caller's autocast.
        images: one scene [S, 3, H, W] or [1, S, 3, H, W], or several of one shape.
        frames: how many the plan is for, where costs should be those of more frames than the images have.
        cost: `flops`, `time`, or `auto`: time on a GPU, FLOPs on a CPU and where `frames` is another number.
        work: a file of results, for going on where a run stopped; it belongs to one model and its images.
        policies: candidates by name, as in plans, or names of some of `vggt_compile.auto.candidates` (default: all).
        prune: leave out what probes call hopeless.
        progress: show a bar on stderr, where tqdm is installed.

    Raises:
        BadInput: images that cannot be used, no attention over frames, or outputs that are not numbers.
    """
    scenes = checked(images)
    frames = scenes[0].shape[1] if frames is None else frames
    other = frames != scenes[0].shape[1]
    timing = by_time(cost, scenes[0], other)
    gauge = Gauge(model, scenes, None if work is None else Path(work), {"dtype": dtype(scenes[0])})
    runner = gauge.runner
    chosen = read_policies(policies, candidates(runner.report(Plan()).family))
    counted = here = costs.flops(runner, chosen)
    if other:
        counted = costs.flops(Traced(model, scenes[0].new_zeros(1, frames, *scenes[0].shape[2:])), chosen)
    _ = gauge.dense  # says now where the model gives no numbers
    timed = costs.seconds(runner, scenes[0], here, chosen) if timing else None
    left_out = hopeless(runner, scenes[0], chosen) if prune else {}
    tried = {
        layer: {name: chosen[name] for name in found if name not in left_out.get(layer, {})}
        for layer, found in counted.layers.items()
    }
    errors, together = measure_errors(gauge, tried, progress)
    added = gains(errors, together)
    return Calibration(gauge, chosen, errors, added, together, counted, timed, left_out)


def measure_errors(
    gauge: Gauge, tried: Mapping[int, Mapping[str, Policy]], progress: bool
) -> tuple[Errors, Mapping[str, float]]:
    """The error of each candidate at each layer alone, and at all of them together."""
    alone = {(layer, name): composed({layer: p}, name) for layer, found in tried.items() for name, p in found.items()}
    names = dict.fromkeys(name for found in tried.values() for name in found if name != DENSE)
    whole = {name: composed({layer: p[name] for layer, p in tried.items() if name in p}, name) for name in names}
    gauge.run([*alone.values(), *whole.values()], progress)
    errors = {layer: {name: gauge(alone[layer, name]) for name in found} for layer, found in tried.items()}
    return errors, {name: gauge(plan) for name, plan in whole.items()}
