"""Every plan on every case: the loop of the bench, which skips what its journal already holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vggt_compile.backend import vggt_sparse, vggt_sparse_eager
from vggt_compile.bench.accuracy.cases import Case, Geometry, Source
from vggt_compile.bench.accuracy.journal import Journal, Key
from vggt_compile.bench.accuracy.score import in_world, scores
from vggt_compile.dry_run import fresh_call
from vggt_compile.models import prediction
from vggt_compile.plan import Plan
from vggt_compile.report import Report, collect_reports

BASELINE = "dense"
"""The plan that all others are compared with."""


@dataclass(frozen=True)
class Bench:
    """What is run on what.

    Attributes:
        name, weights: of the model, for records; results of equal settings differ by rounding only.
        plans: by the name that rows carry, the baseline first.
        compiled: Inductor compiles every plan at every frame count; otherwise rewritten graphs run node by node.
    """

    model: nn.Module
    name: str
    weights: str
    source: Source
    frames: tuple[int, ...]
    plans: Mapping[str, Plan]
    device: torch.device = torch.device("cpu")
    dtype: str = "fp32"
    compiled: bool = False

    def settings(self) -> dict[str, Any]:
        """What every result depends on besides its key."""
        own = {"model": self.name, "weights": self.weights, "dtype": self.dtype, "compiled": self.compiled}
        return own | self.source.identity()

    def keys(self, frames: int, scene: str, seed: int) -> dict[str, Key]:
        return {name: Key(name, frames, scene, seed) for name in self.plans}


@dataclass
class Ways:
    """One model under several plans at one number of frames; each is traced when it is first called."""

    bench: Bench
    made: dict[str, tuple[Callable[..., Any], Report]] = field(default_factory=dict)

    def __call__(self, plan: str, images: Tensor) -> tuple[Geometry, Report]:
        """The geometry that the model finds in `[1, S, 3, H, W]` under a plan, and what the plan did."""
        device, half = self.bench.device, self.bench.dtype == "bf16"
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            if plan not in self.made:
                return self._first(plan, images.to(device))
            call, report = self.made[plan]
            return geometry(call(self.bench.model, images.to(device)), images), report

    def _first(self, plan: str, images: Tensor) -> tuple[Geometry, Report]:
        backend: Any = vggt_sparse if self.bench.compiled else vggt_sparse_eager
        options: dict[str, Any] = {"plan": self.bench.plans[plan]}
        call = torch.compile(fresh_call(), backend=backend, options=options, dynamic=False)
        with collect_reports() as reports:
            outputs = call(self.bench.model, images)
        report = max(reports, key=lambda report: len(report.rows), default=Report())
        self.made[plan] = call, report
        return geometry(outputs, images), report


def geometry(outputs: Mapping[str, Any], images: Tensor) -> Geometry:
    """A model's outputs for one scene in single precision."""
    height, width = images.shape[-2:]
    return Geometry(*(tensor[0].float() for tensor in prediction(outputs, (height, width))))


def measure(bench: Bench, journal: Journal, step: Callable[[int], object]) -> Iterator[dict[str, Any]]:
    """Rows of all plans and cases in order; `step` is told how many were done."""
    policies = {name: plan.to_json() for name, plan in bench.plans.items()}
    for frames in bench.frames:
        ways = Ways(bench)
        for scene, seed in bench.source.keys(frames):
            keys = bench.keys(frames, scene, seed)
            missing = {name: key for name, key in keys.items() if journal.get(key, policies[name]) is None}
            step(len(keys) - len(missing))
            if missing:
                case = bench.source.case(scene, seed, frames)
                for name, found in judge(ways, case, tuple(missing)):
                    journal.append(missing[name]._asdict() | {"policy": policies[name]} | found)
                    step(1)
            yield from (journal.rows[key] for key in keys.values())


def judge(ways: Ways, case: Case, plans: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each plan's scores on one case, against the truth and against the baseline's output."""
    truth = Geometry(*(None if x is None else x.to(ways.bench.device) for x in case.truth))  # type: ignore[arg-type]
    base, report = ways(BASELINE, case.images)
    for name in plans:
        found = base
        if name != BASELINE:
            found, report = ways(name, case.images)
        row = {"attention_left": report.attention_left(), "rewritten": len(report.rewritten)}
        try:
            row |= {"truth": scores(found, truth), "baseline": scores(found, in_world(base, truth))}
        except ValueError as error:  # NaN or infinity: a result as well, and no reason to stop
            row |= {"failed": str(error)}
        yield name, json.loads(json.dumps(row))


def total(bench: Bench) -> int:
    """How many rows `measure` gives."""
    return sum(len(bench.source.keys(frames)) for frames in bench.frames) * len(bench.plans)
