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
from vggt_compile.bench.accuracy.machine import machine
from vggt_compile.bench.accuracy.score import in_world, scores
from vggt_compile.dry_run import fresh_call
from vggt_compile.errors import BadInput
from vggt_compile.journal import Journal, Key
from vggt_compile.models import prediction
from vggt_compile.plan import Plan
from vggt_compile.report import Report, collect_reports

BASELINE = "dense"
"""The plan that all others are compared with."""
NOT_FINITE = (ValueError, torch.linalg.LinAlgError)
"""What metrics and models raise over NaN and infinity."""


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
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
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
    made: dict[str, tuple[Callable[..., Any], list[Report]]] = field(default_factory=dict)

    def __call__(self, plan: str, images: Tensor) -> Geometry:
        """The geometry that the model finds in `[1, S, 3, H, W]` under a plan."""
        if plan not in self.made:
            self.made[plan] = self._compiled(plan), []
        (call, reports), device = self.made[plan], self.bench.device
        half = torch.autocast(device.type, torch.bfloat16, enabled=self.bench.dtype == "bf16")
        with torch.inference_mode(), half, collect_reports() as new:
            try:
                found = geometry(call(self.bench.model, images.to(device)), images)
            finally:
                reports += new
        if not reports:
            raise BadInput(
                f"plan {plan!r} never reached the model: Dynamo ran it without compiling; its warnings say why, and "
                "TORCH_LOGS=graph_breaks,recompiles says more"
            )
        return found

    def report(self, plan: str) -> Report:
        """What a plan did, once it was called; of the graph that holds the trunk where there are several."""
        return max(self.made[plan][1], key=lambda report: len(report.rows), default=Report())

    def _compiled(self, plan: str) -> Callable[..., Any]:
        backend: Any = vggt_sparse if self.bench.compiled else vggt_sparse_eager
        options: dict[str, Any] = {"plan": self.bench.plans[plan]}
        return torch.compile(fresh_call(), backend=backend, options=options, dynamic=False)


def geometry(outputs: Mapping[str, Any], images: Tensor) -> Geometry:
    """A model's outputs for one scene in single precision."""
    height, width = images.shape[-2:]
    return Geometry(*(tensor[0].float() for tensor in prediction(outputs, (height, width))))


def measure(bench: Bench, journal: Journal, step: Callable[[int], object]) -> Iterator[dict[str, Any]]:
    """Rows of all plans and cases in order; `step` is told how many were done."""
    policies = {name: plan.to_json() for name, plan in bench.plans.items()}
    here = {"machine": machine(bench.device)}
    for frames in bench.frames:
        ways = Ways(bench)
        for scene, seed in bench.source.keys(frames):
            keys = bench.keys(frames, scene, seed)
            missing = {name: key for name, key in keys.items() if journal.get(key, policies[name]) is None}
            step(len(keys) - len(missing))
            if missing:
                case = bench.source.case(scene, seed, frames)
                for name, found in judge(ways, case, tuple(missing)):
                    journal.append(missing[name]._asdict() | {"policy": policies[name]} | here | found)
                    step(1)
            yield from (journal.rows[key] for key in keys.values())


def judge(ways: Ways, case: Case, plans: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each plan's scores on one case, against the truth and against the baseline's output.

    Raises:
        BadInput: the baseline itself finds nothing finite.
    """
    truth = case.truth.to(ways.bench.device)
    try:
        base = ways(BASELINE, case.images)
        reference = in_world(base, truth)
    except NOT_FINITE as error:
        raise BadInput(f"the {BASELINE} {ways.bench.name} gives no geometry to compare with: {error}") from error
    for name in plans:
        try:
            found = base if name == BASELINE else ways(name, case.images)
            row: dict[str, Any] = {"truth": scores(found, truth), "baseline": scores(found, reference)}
        except NOT_FINITE as error:  # a result as well, and no reason to stop
            row = {"failed": str(error)}
        report = ways.report(name)
        done = {"attention_left": report.attention_left(), "rewritten": len(report.rewritten)}
        yield name, json.loads(json.dumps(done | row))


def total(bench: Bench) -> int:
    """How many rows `measure` gives."""
    return sum(len(bench.source.keys(frames)) for frames in bench.frames) * len(bench.plans)
