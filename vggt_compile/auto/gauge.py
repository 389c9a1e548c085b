"""How far plans move the outputs on given scenes: each plan and scene is run once, and kept in a journal."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggt_compile.auto.change import change, combined, finite
from vggt_compile.auto.runner import Runner
from vggt_compile.errors import BadInput
from vggt_compile.journal import Journal, Key
from vggt_compile.plan import Plan

NO_NUMBERS = (
    "the dense model gives NaN or infinity for scene {}, so there is nothing to compare with; some models do so with "
    "fresh weights, VGGT-Ω among them: load a checkpoint"
)


class Gauge:
    """The error of any plan of a model, as a mean over scenes [1, F, 3, H, W] of one shape.

    Args:
        work: a file of results; a run that was cut short goes on where it stopped.
        settings: what results depend on besides the model's weights and the images.
    """

    def __init__(
        self,
        model: nn.Module,
        scenes: Sequence[Tensor],
        work: Path | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.scenes = model, scenes
        self._known: dict[Key, dict[str, Any]] = {}
        self._journal: Journal | None = None
        if work is not None:
            told = {"weights": digest(model.state_dict().values()), "images": digest(scenes), **(settings or {})}
            self._journal = Journal(work, told)

    @property
    def frames(self) -> int:
        return self.scenes[0].shape[1]

    @cached_property
    def runner(self) -> Runner:
        try:
            return Runner(self.model, self.scenes[0])
        except torch.linalg.LinAlgError as error:
            raise BadInput(NO_NUMBERS.format(0)) from error

    @cached_property
    def dense(self) -> list[Any]:
        """The dense outputs of each scene."""
        found = [self.runner.first, *(self.runner(Plan(), images) for images in self.scenes[1:])]
        for index, outputs in enumerate(found):
            if not finite(outputs):
                raise BadInput(NO_NUMBERS.format(index))
        return found

    def __call__(self, plan: Plan) -> float:
        """The mean error of a plan, infinite where an output is not finite."""
        if plan.dense:
            return 0.0
        return sum(combined(self._row(plan, i)["errors"]) for i in range(len(self.scenes))) / len(self.scenes)

    def run(self, plans: Sequence[Plan], progress: bool) -> None:
        """Measure them all, behind a progress bar where one is wanted and tqdm is installed."""
        for plan in _tracked(plans) if progress else plans:
            self(plan)

    def parts(self, plan: Plan) -> dict[str, float]:
        """The errors behind the mean: of cameras, depth and points."""
        rows = [self._row(plan, i)["errors"] for i in range(len(self.scenes))]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def _row(self, plan: Plan, index: int) -> dict[str, Any]:
        policy = plan.to_json()
        key = Key(json.dumps(policy["layers"]), self.frames, "images", index)
        row = self._known.get(key) if self._journal is None else self._journal.get(key, policy)
        if row is None:
            row = key._asdict() | {"policy": policy, "errors": self._run(plan, index)}
            self._known[key] = row
            if self._journal is not None:
                self._journal.append(row)
        return row

    def _run(self, plan: Plan, index: int) -> dict[str, float]:
        images, dense = self.scenes[index], self.dense[index]
        height, width = images.shape[-2:]
        try:
            errors = change(self.runner(plan, images), dense, (height, width))
        except torch.linalg.LinAlgError:  # what a model's own decompositions say of NaN
            return dict.fromkeys(change(dense, dense, (height, width)), math.inf)
        return {name: math.inf if math.isnan(value) else value for name, value in errors.items()}


def _tracked(plans: Sequence[Plan]) -> Iterable[Plan]:
    try:
        from tqdm import tqdm
    except ImportError:
        return plans
    return tqdm(plans, unit="plan", file=sys.stderr)


def digest(tensors: Iterable[Tensor]) -> str:
    """Twelve digits that tell tensors apart by shape and content."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]
