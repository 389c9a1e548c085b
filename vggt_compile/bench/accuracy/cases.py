"""Where images with known geometry come from: scenes rendered from held-out seeds, or windows of a recording."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vggt_compile.datasets import PosedImages, load, read
from vggt_compile.errors import BadInput, UnknownName
from vggt_compile.scenes import (
    HELD_OUT_SEEDS,
    HELD_OUT_TEXTURES,
    KINDS,
    TRAINING_TEXTURES,
    TRAJECTORIES,
    Views,
    render,
    unproject,
)

TEXTURES = {"training": TRAINING_TEXTURES, "held_out": HELD_OUT_TEXTURES}
SCENES = ("orbit", "video", "wide", "rig", "rooms")


class Geometry(NamedTuple):
    """S frames in one world; where depth is 0 or not finite, depth and points are unknown."""

    extrinsics: Tensor
    """`[S, 3, 4]`, world to camera."""
    depth: Tensor | None = None
    """`[S, H, W]`, along the optical axis."""
    points: Tensor | None = None
    """`[S, H, W, 3]`"""

    def to(self, device: torch.device | str) -> Geometry:
        """The same geometry on another device."""
        depth, points = (None if x is None else x.to(device) for x in (self.depth, self.points))
        return Geometry(self.extrinsics.to(device), depth, points)


class Case(NamedTuple):
    """One input of the model, and what is true of it."""

    images: Tensor
    """`[1, S, 3, H, W]` in 0..1."""
    truth: Geometry


def rendered_case(views: Views) -> Case:
    """The first of the scenes that were rendered."""
    return Case(views.images[:1], Geometry(views.extrinsics[0], views.depth[0], views.world_points[0]))


class Source(Protocol):
    """Cases by the name of their kind of scene and a number."""

    def keys(self, frames: int) -> list[tuple[str, int]]:
        """Scene and seed of every case at this number of frames."""

    def case(self, scene: str, seed: int, frames: int) -> Case:
        """Consecutive frames of one scene, on the CPU or where the source renders."""

    def identity(self) -> dict[str, Any]:
        """JSON-ready: what cases of equal scene, seed and frame count depend on besides."""


@dataclass(frozen=True)
class Rendered:
    """The first `count` held-out seeds of each scene, named "trajectory/kind"; square images of `size` pixels."""

    scenes: tuple[str, ...]
    count: int
    size: int
    textures: str = "training"
    device: torch.device | str = "cpu"

    def keys(self, frames: int) -> list[tuple[str, int]]:
        del frames
        return [(scene, seed) for scene in self.scenes for seed in HELD_OUT_SEEDS[: self.count]]

    def case(self, scene: str, seed: int, frames: int) -> Case:
        trajectory, _, kind = scene.partition("/")
        textures, side = list(TEXTURES[self.textures]), (self.size, self.size)
        return rendered_case(render(seed, frames, side, trajectory, kind, self.device, textures=textures))

    def identity(self) -> dict[str, Any]:
        return {"source": "rendered", "size": self.size, "textures": self.textures}


@dataclass(frozen=True)
class Recorded:
    """Up to `count` windows spread evenly over a recording, each of frames `stride` apart; the seed is the first one.

    `size` is the longer side in pixels, `patch` what both sides are multiples of.
    """

    images: Path
    poses: Path | None
    count: int
    size: int
    patch: int
    stride: int = 1

    @cached_property
    def posed(self) -> PosedImages:
        return read(self.images, poses=self.poses)

    @property
    def name(self) -> str:
        return self.images.resolve().name

    def keys(self, frames: int) -> list[tuple[str, int]]:
        length = (frames - 1) * self.stride + 1
        last = len(self.posed) - length
        if last < 0:
            raise BadInput(
                f"{self.images} has {len(self.posed)} frames with poses; {frames} frames at stride {self.stride} "
                f"need {length}: fewer --frames or a smaller --stride"
            )
        starts = torch.linspace(0, last, min(self.count, last + 1)).round().long().tolist()
        return [(self.name, start) for start in starts]

    def case(self, scene: str, seed: int, frames: int) -> Case:
        del scene
        chosen = range(seed, seed + frames * self.stride, self.stride)
        found = load(self.posed.take(chosen), self.size, self.patch)
        depth = found.depth if found.depth is not None and bool((found.depth > 0).any()) else None
        points = None
        if depth is not None and found.intrinsics is not None:
            points = unproject(depth, found.intrinsics, found.extrinsics)
        return Case(found.images[None], Geometry(found.extrinsics, depth, points))

    def identity(self) -> dict[str, Any]:
        poses = None if self.poses is None else str(self.poses)
        return {"source": "recorded", "images": str(self.images), "poses": poses} | {
            "size": self.size,
            "stride": self.stride,
        }


def read_scenes(text: str) -> tuple[str, ...]:
    """Comma-separated "trajectory" or "trajectory/kind" in full; without a kind, rooms are in rooms, others indoor."""
    return tuple(dict.fromkeys(_in_full(part.strip()) for part in text.split(",")))


def _in_full(text: str) -> str:
    trajectory, slash, kind = text.partition("/")
    if not slash:
        kind = "rooms" if trajectory == "rooms" else "indoor"
    for what, name, known in (("trajectory", trajectory, TRAJECTORIES), ("kind of scene", kind, KINDS)):
        if name not in known:
            raise UnknownName(what, name, known)
    return f"{trajectory}/{kind}"
