"""A trajectory says where cameras stand and what they look at; everything else about a camera follows from that.

OpenCV cameras: x right, y down, z forward; extrinsics map world to camera; pixel centres lie at +0.5.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vggt_compile.scenes.dice import Dice
from vggt_compile.scenes.layout import Region

Trajectory = Callable[[Dice, Region, int, "Pace"], tuple[Tensor, Tensor]]
Pace = tuple[float, float] | None  # degrees a frame, least and greatest; None is the trajectory's own range
TRAJECTORIES: dict[str, Trajectory] = {}
RIG = 4  # cameras on a rig: frame i is camera i % RIG at time i // RIG


def trajectory(function: Trajectory) -> Trajectory:
    """Register `function(dice, region, frames, pace) → eye, target`, both [B, S, 3] in metres, under its name."""
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


def wave(dice: Dice, angle: Tensor, count: int) -> Tensor:
    """Smooth numbers [B, S, count] in [0, 1], one sine each, as slow as the path: angle [B, S] in radians along it."""
    pace, phase = dice.uniform(0.4, 1.6, 1, count), dice.uniform(0.0, 2 * math.pi, 1, count)
    return 0.5 + 0.5 * (angle[..., None] * pace + phase).sin()


def advance(dice: Dice, frames: int, pace: tuple[float, float]) -> Tensor:
    """Angles [B, S] in radians from 0, at one steady pace in each scene; more frames only lengthen it."""
    return torch.deg2rad(dice.uniform(*pace, 1)) * torch.arange(frames, dtype=torch.float64)


@trajectory
def orbit(dice: Dice, region: Region, frames: int, pace: Pace) -> tuple[Tensor, Tensor]:
    """Around the focus at one distance and height; by default a full turn from 14 frames on, else 26° a frame."""
    start, side = dice.uniform(0.0, 2 * math.pi, 1), dice.sign(1)
    angle = start + side * advance(dice, frames, pace or (min(360 / frames, 26.0),) * 2)
    eye = place(region, angle, dice.uniform(0.0, 1.0, 1), dice.uniform(0.0, 1.0, 1).expand(-1, frames))
    return eye, gaze(region, dice.uniform(-0.3, 0.3, 1, 3)).expand_as(eye)


@trajectory
def video(dice: Dice, region: Region, frames: int, pace: Pace) -> tuple[Tensor, Tensor]:
    """A smooth video: by default 1–6° a frame, distance, height and gaze drifting."""
    angle = advance(dice, frames, pace or (1.0, 6.0))
    start, side, drift = dice.uniform(0.0, 2 * math.pi, 1), dice.sign(1), wave(dice, angle, 5)
    return place(region, start + side * angle, drift[..., 0], drift[..., 1]), gaze(region, drift[..., 2:] * 2 - 1)


@trajectory
def wide(dice: Dice, region: Region, frames: int, pace: Pace) -> tuple[Tensor, Tensor]:
    """Unordered photographs from anywhere in the free region, each looking somewhere near the focus; no pace."""
    del pace
    eye = place(region, dice.uniform(0.0, 2 * math.pi, frames), *dice.uniform(0.0, 1.0, 2, frames).unbind(1))
    return eye, gaze(region, dice.uniform(-0.6, 0.6, frames, 3))


@trajectory
def rig(dice: Dice, region: Region, frames: int, pace: Pace) -> tuple[Tensor, Tensor]:
    """RIG cameras mounted rigidly, 25–70° apart, on a body that moves like a video; by default 3–12° a time step."""
    times = -(-frames // RIG)
    angle = advance(dice, times, pace or (3.0, 12.0))
    start, side, drift = dice.uniform(0.0, 2 * math.pi, 1), dice.sign(1), wave(dice, angle, 3)
    # A mount reaches 0.1 m beyond the body, which therefore keeps to the middle of the free region.
    body = place(region, start + side * angle, 0.2 + 0.5 * drift[..., 0], drift[..., 1])
    inwards = region.focus[:, None] - body
    heading = torch.atan2(inwards[..., 1], inwards[..., 0]) + (drift[..., 2] * 2 - 1)
    mount = torch.deg2rad(dice.uniform(25.0, 70.0, 1)) * (torch.arange(RIG, dtype=torch.float64) - (RIG - 1) / 2)
    yaw = (heading[..., None] + mount[:, None]).flatten(1)[:, :frames]
    tilt = dice.uniform(-0.35, 0.05, RIG).repeat(1, times)[:, :frames]
    forward = torch.stack([yaw.cos(), yaw.sin(), tilt], -1)
    eye = body.repeat_interleave(RIG, 1)[:, :frames] + 0.1 * forward * forward.new_tensor([1.0, 1.0, 0.0])
    return eye, eye + forward


@trajectory
def rooms(dice: Dice, region: Region, frames: int, pace: Pace) -> tuple[Tensor, Tensor]:
    """A walk that looks ahead, through the next doorway if there is one; by default 15–25° a frame.

    Neighbours overlap; frames half a turn apart look in opposite directions and share next to nothing.
    """
    angle = advance(dice, frames, pace or (15.0, 25.0))
    start, side, drift = dice.uniform(0.0, 2 * math.pi, 1), dice.sign(1), wave(dice, angle, 3)
    angle = start + side * angle
    further = angle + side * (0.6 + 0.4 * drift[..., 0])
    ahead = place(region, further, 0.5 + 0.5 * drift[..., 1], drift[..., 2] - 0.6)
    return place(region, angle, drift[..., 1], drift[..., 2]), ahead


def look_at(eye: Tensor, target: Tensor) -> Tensor:
    """Extrinsics [B, S, 3, 4] of level cameras (no roll) at `eye` that see `target` at the centre."""
    up = torch.tensor([0.0, 0.0, 1.0], dtype=eye.dtype, device=eye.device).expand_as(eye)
    forward = torch.nn.functional.normalize(target - eye, dim=-1)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], -2)
    return torch.cat([rotation, -rotation @ eye[..., None]], -1)


def zoom(dice: Dice, frames: int, jitter: float) -> Tensor:
    """Factors [B, S] on the focal lengths of a scene's views, between 2/3 and 3/2 where jitter is 1."""
    return (dice.uniform(-1.0, 1.0, frames) * jitter * math.log(1.5)).exp()


def pinhole(dice: Dice, fov: tuple[float, float], zoomed: Tensor, size: tuple[int, int]) -> Tensor:
    """Intrinsics [B, S, 3, 3] in pixels: square pixels, centred; fov in degrees along the longer side, unzoomed."""
    height, width = size
    angle = torch.deg2rad(dice.uniform(*fov, 1))
    focal = zoomed * 0.5 * max(size) / (angle / 2).tan()
    zero, one = torch.zeros_like(focal), torch.ones_like(focal)
    rows = [focal, zero, one * width / 2, zero, focal, one * height / 2, zero, zero, one]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))
