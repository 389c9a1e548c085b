"""What each candidate costs at each layer: attention FLOPs as the report counts them, or seconds on this device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_compile.auto.candidates import DENSE, everywhere
from vggt_compile.auto.runner import Runner, Traced
from vggt_compile.errors import BadInput
from vggt_compile.plan import Policy
from vggt_compile.report import Report, Row

REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """Layer → candidate → cost of one global attention; a candidate that a layer cannot take is not there.

    Attributes:
        elsewhere: what the attentions cost that no plan changes.
        refused: candidate → the reason that a layer gave.
    """

    layers: Mapping[int, Mapping[str, float]]
    elsewhere: float
    refused: Mapping[str, str]

    def of(self, choice: Mapping[int, str]) -> float:
        """Of the global attentions under a choice of candidates."""
        return sum(self.layers[layer][name] for layer, name in choice.items())

    @property
    def dense(self) -> float:
        return sum(found[DENSE] for found in self.layers.values())

    def share(self, choice: Mapping[int, str]) -> float:
        """Of the whole model's attention, frame attention and encoder included."""
        return (self.of(choice) + self.elsewhere) / (self.dense + self.elsewhere)


def flops(traced: Traced, policies: Mapping[str, Policy]) -> Costs:
    """Costs in attention FLOPs, from what the report says of each candidate in every global layer."""
    reports = {name: traced.report(everywhere(name, policy)) for name, policy in policies.items()}
    dense = _by_layer(reports[DENSE])
    if not dense:
        raise BadInput(
            f"none of the {len(reports[DENSE].rows)} attentions of this model is over frames, so there is nothing to "
            "plan; print(vggt_compile.explain(model, images)) says what each of them is"
        )
    layers: dict[int, dict[str, float]] = {layer: {DENSE: float(row.flops_before)} for layer, row in dense.items()}
    refused: dict[str, str] = {}
    for name, found in reports.items():
        for layer, row in _by_layer(found).items():
            if row.axes:
                layers[layer][name] = float(row.flops_after)
            elif name != DENSE:
                refused[name] = row.reason or "left as it is"
    every = sum(row.flops_before for row in reports[DENSE].rows)
    return Costs(layers, every - sum(found[DENSE] for found in layers.values()), refused)


def seconds(runner: Runner, images: Tensor, counted: Costs, policies: Mapping[str, Policy]) -> Costs:
    """Costs in seconds: a few calls of the dense model, and of it with one candidate in every layer.

    What a candidate saves in all layers is shared out by what it saves in FLOPs; the dense attention of a layer is
    timed by itself. Rewritten graphs run node by node here, so what Inductor would fuse counts in full.
    """
    rows = _by_layer(runner.report(everywhere(DENSE, Policy())))
    alone = {layer: _timed(partial(_attention, row, images), images) for layer, row in rows.items()}
    layers: dict[int, dict[str, float]] = {layer: {DENSE: alone[layer]} for layer in rows}
    whole = _of_plan(runner, images, DENSE, Policy())
    for name, policy in policies.items():
        taking = [layer for layer, found in counted.layers.items() if name in found]
        if name == DENSE or not taking:
            continue
        saved = whole - _of_plan(runner, images, name, policy)
        parts = {layer: counted.layers[layer][DENSE] - counted.layers[layer][name] for layer in taking}
        total = sum(parts.values()) or 1.0
        for layer in taking:
            layers[layer][name] = max(0.0, alone[layer] - saved * parts[layer] / total)
    return Costs(layers, whole - sum(alone.values()), counted.refused)


def _by_layer(report: Report) -> dict[int, Row]:
    return {row.layer: row for row in report.global_rows if row.layer is not None}


def _of_plan(runner: Runner, images: Tensor, name: str, policy: Policy) -> float:
    plan = everywhere(name, policy)
    return _timed(lambda: runner(plan, images), images)


def _attention(row: Row, images: Tensor) -> Tensor:
    shape = (row.batch, row.heads, (row.frames or 1) * (row.per_frame or 1), row.head_dim)
    x = torch.zeros(shape, dtype=getattr(torch, row.dtype), device=images.device)
    return F.scaled_dot_product_attention(x, x, x)


def _timed(call: Callable[[], object], images: Tensor) -> float:
    """Median seconds of a warm call."""
    call()
    return statistics.median(_once(call, images.device) for _ in range(REPEATS))


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000
