"""What a training step sees is a function of the run's seed, the step and the worker alone, so a run can be resumed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from vggt_compile.scenes import TRAINING_SEEDS, Difficulty, Views, render

T = TypeVar("T")

FRAMES = {2: 4.0, 3: 2.0, 4: 4.0, 6: 3.0, 8: 4.0, 12: 3.0, 16: 2.0, 24: 2.0, 36: 0.5, 48: 0.5}
"""How often each frame count is drawn, in the end; a run starts with the small ones."""
KINDS = {"indoor": 1, "objects": 1}
TRAJECTORIES = {"video": 4, "orbit": 4}
LATER = {"wide": 5, "rig": 1, "rooms": 1}
"""Trajectories whose frames may share nothing; they come in gradually."""
OBJECTS = 10  # the same for every difficulty: a compiled renderer is specialised to their number


@dataclass(frozen=True)
class Curriculum:
    """`images` a step and worker, of `size` = (height, width) pixels; `warm` steps until all is as hard as it gets."""

    seed: int
    images: int
    size: tuple[int, int]
    warm: int
    compile: bool

    def views(self, step: int, worker: int, device: torch.device) -> Views:
        dice = random.Random(f"{self.seed} {step} {worker}")
        progress = min(1.0, step / max(1, self.warm))
        counts = {n: often * progress ** ((n - 2) / 8) for n, often in FRAMES.items() if n <= self.images}
        paths = TRAJECTORIES | {name: often * progress for name, often in LATER.items()}
        frames, kind, trajectory = draw(dice, counts), draw(dice, KINDS), draw(dice, paths)
        seeds = [dice.choice(TRAINING_SEEDS) for _ in range(self.images // frames)]
        return self.rendered(seeds, frames, kind, trajectory, knobs(dice, progress), device)

    def rendered(
        self, seeds: list[int], frames: int, kind: str, trajectory: str, difficulty: Difficulty, device: torch.device
    ) -> Views:
        return render(
            seeds,
            frames,
            self.size,
            trajectory,
            kind,
            device,
            difficulty=difficulty,
            pace=(2.0, 10.0) if trajectory == "video" else None,
            chunk=self.images * self.size[0] * self.size[1],
            compile=self.compile,
        )

    def warm_up(self, worker: int, device: torch.device) -> None:
        """Draw one scene of each kind: workers begin with different kinds and find the others' code on disk."""
        kinds = sorted(KINDS)
        for index in range(len(kinds)):
            kind = kinds[(index + worker) % len(kinds)]
            self.rendered([0] * self.images, 1, kind, "wide", Difficulty(OBJECTS), device)


def knobs(dice: random.Random, progress: float) -> Difficulty:
    """From the easy end up to the middle; now and then beyond."""
    level = progress * dice.random() * (2.0 if dice.random() < 0.2 else 1.0)
    return Difficulty(
        OBJECTS,
        scale=(1 - 0.3 * level, 1 + 0.6 * level),
        flat=0.15 * level,
        repeated=0.15 * level,
        light_change=0.4 * level,
        fov_jitter=0.2 * level,
    )


def stream(curriculum: Curriculum, first: int, worker: int, device: torch.device) -> Iterator[Views]:
    """The views of step `first` and of all steps after it. Nothing in it waits for the GPU."""
    step = first
    while True:
        yield curriculum.views(step, worker, device)
        step += 1


def draw(dice: random.Random, weights: dict[T, float]) -> T:
    return dice.choices(list(weights), list(weights.values()))[0]
