"""One model, one set of images, several ways to run it: eager dense, compiled dense, compiled and rewritten."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vggt_compile.backend import vggt_sparse
from vggt_compile.cli.compare import Deviation, compare
from vggt_compile.cli.geometry import scores
from vggt_compile.cli.images import Frames
from vggt_compile.cli.measure import Run, measure
from vggt_compile.cli.subject import RANDOM, Subject
from vggt_compile.plan import Plan
from vggt_compile.recipes import resolve
from vggt_compile.report import Report, collect_reports

EAGER, DENSE, REWRITTEN = "eager dense", "compiled dense", "compiled rewritten"


@dataclass(frozen=True)
class Result:
    """What the demo found out.

    Attributes:
        runs: eager dense, compiled dense where that was asked for, compiled rewritten.
        deviations: of the compiled ones from the eager one, by quantity.
        report: of the rewritten graph.
        scores: of each run against the true scene, by its name; empty where no scene is known or weights are random.
    """

    subject: Subject
    frames: Frames
    plan: Plan
    device: torch.device
    dtype: str
    runs: tuple[Run, ...]
    deviations: dict[str, dict[str, Deviation]]
    report: Report
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not finite become null."""
        shape = self.frames.images.shape
        return {
            "model": self.subject.name,
            "weights": self.subject.weights or "random",
            "device": device_name(self.device),
            "dtype": self.dtype,
            "plan": self.plan.name,
            "input": {"frames": shape[1], "size": list(shape[-2:]), "names": self.frames.names},
            "runs": [run.to_dict() for run in self.runs],
            "deviations": {
                run: {name: _finite(d.to_dict()) for name, d in deviations.items()}
                for run, deviations in self.deviations.items()
            },
            "scores": self.scores,
            "report": self.report.to_dict(),
            "notes": self.notes,
        }


def run(
    subject: Subject,
    frames: Frames,
    plan: Plan,
    device: torch.device,
    dtype: str,
    say: Callable[[str], None],
    compile_dense: bool = True,
) -> Result:
    """Measure all; a first call is quick where Inductor finds its code on disk, from an earlier process."""
    images = frames.images.to(device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        say(f"running {EAGER} on {device_name(device)}")
        eager = measure(EAGER, lambda: subject.model(images), device)
        dense = [_compiled(DENSE, subject.model, images, resolve("dense"), say)[0]] if compile_dense else []
        rewritten, report = _compiled(REWRITTEN, subject.model, images, plan, say)
    runs = (eager, *dense, rewritten)
    deviations = {one.name: compare(one.output, eager.output) for one in runs[1:]}
    notes = [*frames.notes, *_notes(subject, runs)]
    return Result(subject, frames, plan, device, dtype, runs, deviations, report, _scores(subject, frames, runs), notes)


def _scores(subject: Subject, frames: Frames, runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    if frames.truth is None or subject.weights is None:
        return {}
    found = {one.name: scores(one.output, frames.images, frames.truth) for one in runs}
    return {name: score for name, score in found.items() if score is not None}


def _compiled(
    name: str, model: nn.Module, images: Tensor, plan: Plan, say: Callable[[str], None]
) -> tuple[Run, Report]:
    """One compiled run, and the report of the graph that holds the trunk where the model breaks into several."""
    say(f"compiling and running {name}: plan {plan.name!r}; this can take a minute")
    options: dict[str, Any] = {"plan": plan}
    compiled = torch.compile(model, backend=vggt_sparse, options=options)
    with collect_reports() as reports:
        measured = measure(name, lambda: compiled(images), images.device)
    return measured, max(reports, key=lambda report: len(report.rows), default=Report())


def _notes(subject: Subject, runs: Sequence[Run]) -> list[str]:
    notes = [] if subject.weights else [RANDOM]
    broken = [one.name for one in runs if not all(_is_finite(t) for t in one.output.values())]
    if broken:
        notes.append(f"outputs of {', '.join(broken)} are not all finite")
    return notes


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
