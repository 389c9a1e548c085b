"""A texture is a function of the point on the surface alone, low-passed to the pixel's footprint.

Every texture in use is evaluated at every pixel, so each should stay at a hash or two; costly noise is shared.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggt_compile.scenes.noise import Patch, coin, fade, fract, pulse, settle, step, tint, value_noise

Texture = Callable[[Patch], Tensor]
TEXTURES: dict[str, Texture] = {}
TRAINING_TEXTURES: dict[str, Texture] = {}
HELD_OUT_TEXTURES: dict[str, Texture] = {}  # a family that looks unlike the rest, for judging a model; never trained on


def texture(function: Texture) -> Texture:
    """Register `function(patch) → value in [0, 1]` (0 is the first colour, 1 the second) under its name."""
    TEXTURES[function.__name__] = TRAINING_TEXTURES[function.__name__] = function
    return function


def held_out(function: Texture) -> Texture:
    """`texture` for the held-out family."""
    TEXTURES[function.__name__] = HELD_OUT_TEXTURES[function.__name__] = function
    return function


def blend(patch: Patch, names: Sequence[str], index: Tensor) -> Tensor:
    """The value of texture names[index] at each point, with a little noise so that no surface is flat."""
    value = patch.noise
    for i, name in enumerate(names):
        value = torch.where(index == i, TEXTURES[name](patch), value)
    return (0.8 * value + 0.2 * patch.noise).clamp(0, 1)


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
    u, v = fract(patch.u) - 0.5, fract(patch.v) - 0.5
    radius = 0.22 + 0.2 * tint(patch, patch.u, patch.v)
    return settle(step(radius - (u * u + v * v).sqrt(), patch.width), 0.32, patch.width)


@texture
def clouds(patch: Patch) -> Tensor:
    return ((patch.noise - 0.5) * 1.6 + 0.5).clamp(0, 1)


@texture
def marble(patch: Patch) -> Tensor:
    wave = (2 * math.pi * (0.5 * patch.u + 0.25 * patch.v + 1.5 * patch.noise)).sin()
    return 0.5 + 0.5 * wave * fade(patch.width)


@texture
def tiles(patch: Patch) -> Tensor:
    tile = pulse(patch.u, patch.width, 0.93) * pulse(patch.v, patch.width, 0.93)
    return 1 - tile * (0.5 + 0.5 * tint(patch, patch.u, patch.v))


@texture
def planks(patch: Patch) -> Tensor:
    row = (patch.v * 2).floor()
    x = 0.4 * patch.u + fract(row * 0.618)
    board = pulse(x, 0.4 * patch.width, 0.985) * pulse(patch.v * 2, patch.width * 2, 0.94)
    grain = (2 * math.pi * (4 * patch.v + 2 * patch.noise)).sin() * fade(6 * patch.width)
    return 1 - board * (0.5 + 0.4 * tint(patch, x, row) + 0.1 * grain)


@texture
def wood(patch: Patch) -> Tensor:
    ring = 2 * math.pi * (2 * patch.v + 0.15 * patch.u + 1.2 * patch.noise)
    return 0.5 + 0.5 * (ring + 0.8 * ring.sin()).sin() * fade(4 * patch.width)


@texture
def hexagons(patch: Patch) -> Tensor:
    height = 3**0.5
    x, y = fract(patch.u) - 0.5, (fract(patch.v / height) - 0.5) * height
    other_x, other_y = fract(patch.u + 0.5) - 0.5, (fract(patch.v / height + 0.5) - 0.5) * height
    near = x * x + y * y < other_x * other_x + other_y * other_y
    x, y = torch.where(near, x, other_x), torch.where(near, y, other_y)
    border = torch.maximum(x.abs(), 0.5 * x.abs() + 0.5 * height * y.abs())
    # Centres lie at half-integer places, which a quarter moves away from where rounding could flip the cell.
    shade = tint(patch, 2 * (patch.u - x) + 0.25, 2 * (patch.v - y) / height + 0.25)
    return 1 - settle(step(0.46 - border, patch.width), 0.85, patch.width) * (0.45 + 0.55 * shade)


@texture
def triangles(patch: Patch) -> Tensor:
    a, b = patch.u - patch.v / 3**0.5, patch.v * (2 / 3**0.5)
    width = 1.2 * patch.width
    inside = pulse(a, width, 0.94) * pulse(b, width, 0.94) * pulse(a + b, width, 0.94)
    return 1 - inside * (0.3 + 0.7 * tint(patch, a + b, 2 * a.floor() + 1000 * b.floor()))


@texture
def plaid(patch: Patch) -> Tensor:
    broad = pulse(patch.u, patch.width, 0.5) + pulse(patch.v, patch.width, 0.5)
    thin = pulse(2 * patch.u + 0.3, 2 * patch.width, 0.15) + pulse(2 * patch.v + 0.3, 2 * patch.width, 0.15)
    return 0.32 * broad + 0.18 * thin


@texture
def argyle(patch: Patch) -> Tensor:
    a, b, width = patch.u + 0.6 * patch.v, patch.u - 0.6 * patch.v, 1.2 * patch.width
    first, second = pulse(a / 2, width / 2, 0.5), pulse(b / 2, width / 2, 0.5)
    lines = torch.maximum(pulse(a + 0.5, width, 0.07), pulse(b + 0.5, width, 0.07))
    return torch.maximum(0.7 * (first + second - 2 * first * second), lines)


@texture
def weave(patch: Patch) -> Tensor:
    a, b = pulse(patch.u / 2, patch.width / 2, 0.5), pulse(patch.v / 2, patch.width / 2, 0.5)
    warp, weft = pulse(3 * patch.u, 3 * patch.width, 0.72), pulse(3 * patch.v, 3 * patch.width, 0.72)
    return torch.lerp(0.8 * warp, weft, a + b - 2 * a * b)


@texture
def waves(patch: Patch) -> Tensor:
    bend = 0.25 * (2 * math.pi * 0.7 * patch.u).sin()
    return pulse(2 * patch.v + 2 * bend, 3 * patch.width, 0.5) * (0.7 + 0.3 * patch.noise)


@texture
def blocks(patch: Patch) -> Tensor:
    return coin(4 * patch.u, 4 * patch.v, 4 * patch.width, patch.salt)


@texture
def glyphs(patch: Patch) -> Tensor:
    row, word = patch.v * 1.5, patch.u * 1.3 + fract((patch.v * 1.5).floor() * 0.618)
    line = pulse(row, 1.5 * patch.width, 0.6) * pulse(word, 1.3 * patch.width, 0.8)
    return line * coin(9 * patch.u, 7.5 * patch.v, 9 * patch.width, patch.salt)


@texture
def camouflage(patch: Patch) -> Tensor:
    return 0.5 * (step(patch.noise - 0.42, 2 * patch.width) + step(patch.noise - 0.56, 2 * patch.width))


@texture
def contours(patch: Patch) -> Tensor:
    return pulse(4 * patch.noise, 8 * patch.width, 0.35)


@texture
def terrazzo(patch: Patch) -> Tensor:
    chance = tint(patch, patch.u, patch.v)
    x, y = fract(patch.u) - 0.35 - 0.3 * chance, fract(patch.v) - 0.35 - 0.3 * fract(chance * 37)
    turn = 2 * math.pi * fract(chance * 11)
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    chip = step(0.3 - along.abs() - (0.6 + chance) * across.abs(), 1.5 * patch.width)
    x, y = fract(2.3 * patch.u + patch.noise) - 0.5, fract(2.3 * patch.v - 2 * patch.noise) - 0.5
    small = step(0.12 - x.abs() - y.abs(), 4 * patch.width)
    return settle(torch.maximum(chip * (0.4 + 0.6 * fract(chance * 7)), 0.5 * small), 0.2, patch.width)


@texture
def gradients(patch: Patch) -> Tensor:
    return 0.5 + 0.5 * (1.7 * patch.u + 1.5 * (0.8 * patch.v).sin()).sin() * fade(0.5 * patch.width)


@texture
def granite(patch: Patch) -> Tensor:
    grain = value_noise(7 * patch.u, 7 * patch.v, patch.salt)
    return settle(step(grain - 0.62, 14 * patch.width), 0.3, 7 * patch.width) * 0.8 + 0.2 * patch.noise
