"""A texture is a function of the point on the surface alone, low-passed to the pixel's footprint.

Noise hashes integer cells with wrapping int32 arithmetic, so that CPU and GPU agree on every cell.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OCTAVES = 4


class Patch(NamedTuple):
    """Where a pixel meets a surface; every tensor has the same shape."""

    u: Tensor  # along the surface, in cells
    v: Tensor  # along the surface (up, on walls), in cells
    width: Tensor  # the pixel's footprint, in cells
    salt: Tensor  # int32 seed of the surface
    noise: Tensor  # fBm at this point, in [0, 1]; shared because it costs more than all other textures


Texture = Callable[[Patch], Tensor]
TEXTURES: dict[str, Texture] = {}


def texture(function: Texture) -> Texture:
    """Register `function(patch) → value in [0, 1]` (0 is the first colour, 1 the second) under its name."""
    TEXTURES[function.__name__] = function
    return function


def blend(patch: Patch, names: Sequence[str], index: Tensor) -> Tensor:
    """The value of texture names[index] at each point, with a little noise so that no surface is flat."""
    value = patch.noise
    for i, name in enumerate(names):
        value = torch.where(index == i, TEXTURES[name](patch), value)
    return (0.8 * value + 0.2 * patch.noise).clamp(0, 1)


def cell_hash(x: Tensor, y: Tensor, salt: Tensor) -> Tensor:
    """A number in [0, 1) for each integer cell (x, y: int32)."""
    h = (x * 0x27D4EB2D) ^ (y * 0x165667B1) ^ salt
    h = (h ^ (h >> 15)) * 0x2C1B3C6D
    h = (h ^ (h >> 12)) * 0x297A2D39
    return ((h >> 8) & 0x7FFFFF).float() * 2.0**-23


def value_noise(u: Tensor, v: Tensor, salt: Tensor) -> Tensor:
    """Smooth noise in [0, 1] with one random value at each integer point."""
    x, y = u.floor(), v.floor()
    fu, fv = u - x, v - y
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    x, y = x.int(), y.int()
    low = torch.lerp(cell_hash(x, y, salt).to(u.dtype), cell_hash(x + 1, y, salt).to(u.dtype), fu)
    high = torch.lerp(cell_hash(x, y + 1, salt).to(u.dtype), cell_hash(x + 1, y + 1, salt).to(u.dtype), fu)
    return torch.lerp(low, high, fv)


def fbm(u: Tensor, v: Tensor, width: Tensor, salt: Tensor) -> Tensor:
    """Noise summed over octaves, in [0, 1]; an octave finer than the footprint fades out rather than alias."""
    total = torch.zeros_like(u)
    for octave in range(OCTAVES):
        scale = 2.0**octave
        noise = value_noise(u * scale, v * scale, salt + octave * 0x1F123BB5) - 0.5
        total = total + noise * fade(width * scale) * 0.62**octave
    return (0.5 + total).clamp(0, 1)


def fade(width: Tensor) -> Tensor:
    """1 where a cell spans two pixels or more, 0 where it is smaller than one."""
    return (2 - 2 * width).clamp(0, 1)


def pulse(x: Tensor, width: Tensor, duty: float) -> Tensor:
    """The wave that is 1 on the first `duty` of each unit and else 0, averaged exactly over `width` around x."""
    width = width.clamp(min=0.02)

    def integral(at: Tensor) -> Tensor:
        whole = at.floor()
        return whole * duty + (at - whole).clamp(max=duty)

    return (integral(x + width / 2) - integral(x - width / 2)) / width


def tint(patch: Patch, x: Tensor, y: Tensor) -> Tensor:
    """A random number in [0, 1) for the cell at floor(x), floor(y), going to 0.5 where cells are too small to see."""
    noise = cell_hash(x.floor().int(), y.floor().int(), patch.salt).to(x.dtype)
    return torch.lerp(torch.full_like(noise, 0.5), noise, fade(patch.width))


@texture
def checker(patch: Patch) -> Tensor:
    a, b = pulse(patch.u / 2, patch.width / 2, 0.5), pulse(patch.v / 2, patch.width / 2, 0.5)
    return (a + b - 2 * a * b) * (0.65 + 0.35 * tint(patch, patch.u, patch.v))


@texture
def stripes(patch: Patch) -> Tensor:
    return pulse(patch.u, patch.width, 0.5) * (0.55 + 0.45 * tint(patch, patch.u, torch.zeros_like(patch.v)))


@texture
def bricks(patch: Patch) -> Tensor:
    row = (patch.v * 2).floor()
    x = patch.u + 0.5 * (row - 2 * (row / 2).floor())
    brick = pulse(x, patch.width, 0.94) * pulse(patch.v * 2, patch.width * 2, 0.88)
    return 1 - brick * (0.5 + 0.5 * tint(patch, x, row))


@texture
def dots(patch: Patch) -> Tensor:
    u, v = patch.u - patch.u.floor() - 0.5, patch.v - patch.v.floor() - 0.5
    radius = 0.22 + 0.2 * tint(patch, patch.u, patch.v)
    inside = (0.5 + (radius - (u * u + v * v).sqrt()) / patch.width.clamp(min=0.02)).clamp(0, 1)
    return torch.lerp(torch.full_like(inside, 0.32), inside, fade(patch.width))


@texture
def clouds(patch: Patch) -> Tensor:
    return ((patch.noise - 0.5) * 1.6 + 0.5).clamp(0, 1)


@texture
def marble(patch: Patch) -> Tensor:
    wave = (2 * math.pi * (0.5 * patch.u + 0.25 * patch.v + 1.5 * patch.noise)).sin()
    return 0.5 + 0.5 * wave * fade(patch.width)
