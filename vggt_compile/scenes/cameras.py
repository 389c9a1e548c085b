"""A trajectory says where cameras stand and what they look at; everything else about a camera follows from that.

OpenCV cameras: x right, y down, z forward; extrinsics map world to camera; pixel centres lie at +0.5.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vggt_compile.scenes.dice import Dice
from vggt_compile.scenes.layout import Region

Trajectory = Callable[[Dice, Region, int], tuple[Tensor, Tensor]]
TRAJECTORIES: dict[str, Trajectory] = {}


def trajectory(function: Trajectory) -> Trajectory:
    """Register `function(dice, region, frames) → eye, target`, both [B, S, 3] in metres, under its name."""
    TRAJECTORIES[function.__name__] = function
    return function


def place(region: Region, angle: Tensor, out: Tensor, up: Tensor) -> Tensor:
    """Points [B, S, 3] of the free region: angle in radians, `out` and `up` in [0, 1] across its radius and height."""
    radius = torch.lerp(region.radius[:, :1], region.radius[:, 1:], out)
    height = torch.lerp(region.height[:, :1], region.height[:, 1:], up)
    flat = torch.stack([angle.cos(), angle.sin()], -1) * radius[..., None] * region.stretch[:, None]
    return torch.cat([flat, height[..., None]], -1)


def gaze(region: Region, offset: Tensor) -> Tensor:
    """Targets [B, S, 3]: the focus, moved by offset in [−1, 1] (1 is most of the way to the nearest camera)."""
    scale = region.stretch.amin(-1, keepdim=True) * region.radius[:, :1] * 0.6
    return region.focus[:, None] + offset * torch.cat([scale, scale, scale * 0.4], -1)[:, None]


def wave(dice: Dice, steps: Tensor, count: int) -> Tensor:
    """Smooth numbers [B, S, count] in [0, 1], one slow sine each."""
    pace, phase = dice.uniform(0.02, 0.08, 1, count), dice.uniform(0.0, 2 * math.pi, 1, count)
    return 0.5 + 0.5 * (steps[:, None] * pace + phase).sin()


@trajectory
def orbit(dice: Dice, region: Region, frames: int) -> tuple[Tensor, Tensor]:
    """Around the focus at one distance and height, a full turn from 14 frames on, else 26° a frame."""
    steps = torch.arange(frames, dtype=torch.float64)
    start, turn = dice.uniform(0.0, 2 * math.pi, 1), dice.sign(1) * min(2 * math.pi / frames, 0.45)
    eye = place(region, start + turn * steps, dice.uniform(0.0, 1.0, 1), dice.uniform(0.0, 1.0, 1).expand(-1, frames))
    return eye, gaze(region, dice.uniform(-0.3, 0.3, 1, 3)).expand_as(eye)


@trajectory
def walk(dice: Dice, region: Region, frames: int) -> tuple[Tensor, Tensor]:
    """A smooth video: 2–4° a frame, distance, height and gaze drifting; more frames only lengthen it."""
    steps = torch.arange(frames, dtype=torch.float64)
    angle = dice.uniform(0.0, 2 * math.pi, 1) + dice.sign(1) * dice.uniform(0.03, 0.07, 1) * steps
    drift = wave(dice, steps, 5)
    return place(region, angle, drift[..., 0], drift[..., 1]), gaze(region, drift[..., 2:] * 2 - 1)


@trajectory
def wide(dice: Dice, region: Region, frames: int) -> tuple[Tensor, Tensor]:
    """Unordered photographs from anywhere in the free region, each looking somewhere near the focus."""
    eye = place(region, dice.uniform(0.0, 2 * math.pi, frames), *dice.uniform(0.0, 1.0, 2, frames).unbind(1))
    return eye, gaze(region, dice.uniform(-0.6, 0.6, frames, 3))


def look_at(eye: Tensor, target: Tensor) -> Tensor:
    """Extrinsics [B, S, 3, 4] of level cameras (no roll) at `eye` that see `target` at the centre."""
    up = torch.tensor([0.0, 0.0, 1.0], dtype=eye.dtype, device=eye.device).expand_as(eye)
    forward = torch.nn.functional.normalize(target - eye, dim=-1)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], -2)
    return torch.cat([rotation, -rotation @ eye[..., None]], -1)


def pinhole(dice: Dice, fov: tuple[float, float], frames: int, size: tuple[int, int]) -> Tensor:
    """Intrinsics [B, S, 3, 3] in pixels: square pixels, centred, fov in degrees along the longer side."""
    height, width = size
    angle = torch.deg2rad(dice.uniform(*fov, 1)).expand(-1, frames)
    focal = 0.5 * max(size) / (angle / 2).tan()
    zero, one = torch.zeros_like(focal), torch.ones_like(focal)
    rows = [focal, zero, one * width / 2, zero, focal, one * height / 2, zero, zero, one]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))
