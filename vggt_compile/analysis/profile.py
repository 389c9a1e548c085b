"""Profiles of collapse: what probes measure at each global layer of a model, by plan and by number of frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.dry_run import fresh_call
from vggt_compile.errors import BadInput
from vggt_compile.families import trace
from vggt_compile.plan import Plan, read_probe
from vggt_compile.probes import Probe, collect_probes
from vggt_compile.report import Report, Row, collect_reports

Layers = Mapping[int, Mapping[str, Probe]]
"""Layer → quantity → what one scene gave."""


@dataclass(frozen=True)
class Point:
    """One quantity at one layer: mean over scenes and heads, and the standard error of that mean.

    With several scenes the error is what they differ by, which includes what drawing rows does; with one it is that of
    drawing alone.
    """

    value: float
    error: float


@dataclass(frozen=True)
class Profile:
    """Quantities over layers of one model, for one plan and number of frames.

    A prediction of the same quantities is a profile too: whatever draws or compares profiles asks for `curve` alone.

    Attributes:
        plan: its name.
        scenes: what was measured on each.
        rewritten: how many layers the plan rewrote.
        notes: what could not be measured or rewritten, and why.
        sites: layer → what the report says of it.
        queries: so many are drawn for singular values of attention.
    """

    plan: str
    frames: int
    tokens: int
    scenes: Sequence[Layers]
    rewritten: int = 0
    notes: list[str] = field(default_factory=list)
    sites: Mapping[int, Row] = field(default_factory=dict)
    queries: int | None = None

    @property
    def layers(self) -> list[int]:
        return list(self.scenes[0])

    @property
    def quantities(self) -> list[str]:
        return list(dict.fromkeys(name for found in self.scenes[0].values() for name in found))

    def curve(self, quantity: str) -> dict[int, Point]:
        """Layer → point, for the layers where the quantity was measured."""
        return {layer: self._point(layer, quantity) for layer in self.layers if quantity in self.scenes[0][layer]}

    def _point(self, layer: int, quantity: str) -> Point:
        found = [scene[layer][quantity] for scene in self.scenes]
        values = torch.tensor([probe.value for probe in found], dtype=torch.float64)
        error = found[0].error if len(found) == 1 else (values.std() / math.sqrt(len(found))).item()
        return Point(values.mean().item(), error)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: for each layer and quantity the mean, its error, each scene, and each head."""
        return {
            "plan": self.plan,
            "frames": self.frames,
            "tokens": self.tokens,
            "rewritten": self.rewritten,
            "notes": self.notes,
            "layers": [{"layer": layer, **self._site(layer), **self._layer(layer)} for layer in self.layers],
        }

    def _site(self, layer: int) -> dict[str, Any]:
        return {"path": self.sites[layer].path, "keys": self.sites[layer].keys}

    def _layer(self, layer: int) -> dict[str, Any]:
        def entry(quantity: str) -> dict[str, Any]:
            found, point = [scene[layer][quantity] for scene in self.scenes], self._point(layer, quantity)
            heads = torch.tensor([probe.heads for probe in found], dtype=torch.float64).mean(0).tolist()
            scenes = [finite(probe.value) for probe in found]
            return {
                "value": finite(point.value),
                "error": finite(point.error),
                "scenes": scenes,
                "heads": [finite(value) for value in heads],
            }

        return {quantity: entry(quantity) for quantity in self.scenes[0][layer]}


def finite(value: float) -> float | None:
    """The number, None where JSON has none for it."""
    return value if math.isfinite(value) else None


def profile(model: nn.Module, scenes: Sequence[Tensor], plan: Plan, measures: Sequence[object]) -> Profile:
    """Run a model under a plan on scenes [1, F, 3, H, W], all of one shape, and measure every global layer.

    The graph runs node by node: nothing is compiled, and the model's own outputs are those of the plan without probes.

    Args:
        measures: as in the `probe` part of a plan.

    Raises:
        BadInput: one frame only, no attention over frames, or activations that are not numbers.
    """
    frames = scenes[0].shape[1]
    if frames < 2:
        raise BadInput("one frame only: collapse is that of attention between frames, which needs two or more")
    probe = read_probe(measures)
    options: Any = {"plan": replace(plan, probe=probe)}
    trace.arm()
    compiled = torch.compile(fresh_call(), backend=vggt_sparse_eager, dynamic=False, options=options)
    found: list[Layers] = []
    with torch.no_grad(), collect_reports() as reports:
        for images in scenes:
            with collect_probes() as probes:
                compiled(model, images)
            if not probes.layers:
                raise BadInput(_nothing(reports))
            _check_numbers(probes.layers)
            found.append(probes.layers)
    sites = {row.layer: row for report in reports for row in report.global_rows if row.layer is not None}
    tokens = next((row.frames or 0) * (row.per_frame or 0) for row in sites.values())
    notes = list(dict.fromkeys(note for report in reports for note in report.notes))
    if not plan.dense:
        reasons = dict.fromkeys(row.reason for row in sites.values() if not row.axes and row.reason)
        notes += [f"layers left as they are: {reason}" for reason in reasons]
    rewritten = sum(bool(row.axes) for row in sites.values())
    drawn = next((dict(entry.parameters)["rows"] for entry in probe if entry.method == "spectrum"), None)
    return Profile(plan.name, frames, tokens, found, rewritten, notes, sites, drawn)


def _nothing(reports: Sequence[Report]) -> str:
    notes = "; ".join(dict.fromkeys(note for report in reports for note in report.notes))
    sites = sum(len(report.rows) for report in reports)
    why = f" ({notes})" if notes else ""
    return (
        f"none of the {sites} attentions of this model is over frames and can be measured{why}; "
        "print(vggt_compile.explain(model, images)) says what each of them is"
    )


def _check_numbers(layers: Layers) -> None:
    for layer, found in layers.items():
        if all(math.isnan(probe.value) for probe in found.values()):
            path = next(iter(found.values())).path
            raise BadInput(
                f"activations at layer {layer} ({path}) are not numbers, so nothing can be measured from there on; "
                "some models are so with fresh weights, VGGT-Ω among them: load a checkpoint"
            )
