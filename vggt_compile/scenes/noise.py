"""What textures are made of: noise and edges on a surface, low-passed to the pixel's footprint.

Noise hashes integer cells with wrapping int32 arithmetic, so that CPU and GPU agree on every cell.
"""

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


def step(x: Tensor, width: Tensor) -> Tensor:
    """1 where x > 0 and 0 where x < 0, averaged over `width` around x."""
    return (0.5 + x / width.clamp(min=0.02)).clamp(0, 1)


def fract(x: Tensor) -> Tensor:
    """What is left of x above its whole part."""
    return x - x.floor()


def settle(value: Tensor, mean: float, width: Tensor) -> Tensor:
    """The value, going to its mean over the surface where cells of this footprint are too small to see."""
    return mean + (value - mean) * fade(width)


def tint(patch: Patch, x: Tensor, y: Tensor) -> Tensor:
    """A random number in [0, 1) for the cell at floor(x), floor(y), going to 0.5 where cells are too small to see."""
    noise = cell_hash(x.floor().int(), y.floor().int(), patch.salt).to(x.dtype)
    return torch.lerp(torch.full_like(noise, 0.5), noise, fade(patch.width))


def coin(u: Tensor, v: Tensor, width: Tensor, salt: Tensor) -> Tensor:
    """0 or 1 for each cell by chance, averaged over the footprint, going to 0.5 where cells are too small to see."""
    x, y = (u - 0.5).floor(), (v - 0.5).floor()
    right, up = step(u - x - 1, width), step(v - y - 1, width)
    x, y = x.int(), y.int()
    low = torch.lerp(cell_hash(x, y, salt).round(), cell_hash(x + 1, y, salt).round(), right.float())
    high = torch.lerp(cell_hash(x, y + 1, salt).round(), cell_hash(x + 1, y + 1, salt).round(), right.float())
    return settle(torch.lerp(low, high, up.float()).to(u.dtype), 0.5, width)
