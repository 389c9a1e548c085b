"""Objects never enter the free region and cameras never leave it, so every camera sees from open space.

World frame: metres, z up, floor at z = 0, the room's axis at x = y = 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vggt_compile.scenes.dice import Dice, pick
from vggt_compile.scenes.difficulty import Difficulty
from vggt_compile.scenes.textures import TEXTURES

FACES = 6  # the room's faces have a material each: −x, +x, −y, +y, floor, ceiling; after them one for each object


@dataclass(frozen=True)
class Scene:
    """B scenes of K solids (the room first, then boxes, then spheres) and M = K − 1 + 6 materials."""

    boxes: int  # how many of the K solids are boxes, the room counted
    centre: Tensor  # [B, K, 3]
    half: Tensor  # [B, K, 3] half extents; a sphere's radius three times
    turn: Tensor  # [B, K, 2] cosine and sine of the yaw
    texture: Tensor  # [B, M] index into the textures in use
    salt: Tensor  # [B, M] the texture's own seed, int32
    cell: Tensor  # [B, M] metres for one texture cell
    colours: Tensor  # [B, M, 6] two display colours
    lamp: Tensor  # [B, 3] position of the light
    light: Tensor  # [B, 5] ambient, direct, and the direct light's colour
    gain: Tensor  # [B, 3] the camera's factor on display colours: exposure and colour cast
    quarters: bool = False  # whether each quarter of the floor has a lamp of its own, mirror images of `lamp`

    def map(self, change: Callable[[Tensor], Tensor]) -> "Scene":
        """The scene with `change` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: change(value) for name, value in values.items() if torch.is_tensor(value)}
        return replace(self, **tensors)


class Region(NamedTuple):
    """Free space: an upright elliptic ring around the focus, which is what cameras look at."""

    focus: Tensor  # [B, 3]
    stretch: Tensor  # [B, 2] metres for one unit of radius along x and y
    radius: Tensor  # [B, 2] least and greatest
    height: Tensor  # [B, 2] metres, least and greatest


class Solids(NamedTuple):
    """What a kind of scene decides: boxes [B, n, …] with the room first, spheres [B, m, …], and the free region."""

    boxes: tuple[Tensor, Tensor, Tensor]  # centre [B, n, 3], half [B, n, 3], yaw [B, n] in radians
    spheres: tuple[Tensor, Tensor]  # centre [B, m, 3], radius [B, m]
    region: Region
    cell: tuple[float, float]  # metres, range of the room's texture cells
    quarters: bool = False  # see Scene


Kind = Callable[[Dice, int], Solids]
KINDS: dict[str, Kind] = {}


def kind(function: Kind) -> Kind:
    """Register `function(dice, objects) → Solids` under its name."""
    KINDS[function.__name__] = function
    return function


def spread(dice: Dice, count: int, low: float, high: float) -> Tensor:
    """Positions [B, count, 2] at radius low … high, one in each sector of the circle so that few objects collide."""
    sector = torch.arange(count) + dice.uniform(0.0, 0.7, count) + dice.uniform(0.0, count, 1)
    angle, radius = sector * (2 * math.pi / max(count, 1)), dice.uniform(low, high, count)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def standing(dice: Dice, place: Tensor, base: Tensor, side: tuple[float, float], top: tuple[float, float]) -> tuple:
    """Yawed boxes (centre, half, yaw) on the surface at height base [B, 1]; half sides and full heights in metres."""
    count = place.shape[1]
    height = dice.uniform(*top, count)
    half = torch.cat([dice.uniform(*side, count, 2), height[..., None] / 2], -1)
    centre = torch.cat([place, (base + height / 2)[..., None]], -1)
    return centre, half, dice.uniform(0.0, 2 * math.pi, count)


def balls(dice: Dice, place: Tensor, base: Tensor, size: tuple[float, float], boxes: tuple, ceiling: Tensor) -> tuple:
    """Spheres (centre, radius) on the surface, about half of them on top of the box of the same number."""
    count = place.shape[1]
    radius, stacked = dice.uniform(*size, count), dice.uniform(0.0, 1.0, count) < 0.5
    n = min(count, boxes[0].shape[1])
    stacked[:, n:] = False
    top = boxes[0][:, :n, 2] + boxes[1][:, :n, 2]
    ground = base.expand(-1, count).clone()
    ground[:, :n] = torch.where(stacked[:, :n], top, ground[:, :n])
    place = place.clone()
    place[:, :n] = torch.where(stacked[:, :n, None], boxes[0][:, :n, :2], place[:, :n])
    radius = torch.minimum(radius, (ceiling - ground) / 2)  # nothing may rise into the free region
    return torch.cat([place, (ground + radius)[..., None]], -1), radius


def room(dice: Dice, side: tuple[float, float], height: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Centre and half extents [B, 3] of a box that stands on z = 0."""
    half = torch.cat([dice.uniform(*side, 2), dice.uniform(height[0] / 2, height[1] / 2, 1)], -1)
    return half * torch.tensor([0.0, 0.0, 1.0], dtype=half.dtype), half


def furniture(dice: Dice, count: int, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes against the walls of a room with half extents [B, 3], outside 0.8 of its width; any height."""
    wall = (torch.arange(count) + dice.integers(4, 1)) % 4
    along_y, side = wall % 2 == 0, (wall // 2).double() * 2 - 1
    depth = dice.uniform(0.1, 0.2, count)  # as a part of the half width
    reach, width = torch.where(along_y, half[:, :1], half[:, 1:2]), dice.uniform(0.3, 0.8, count)
    length = torch.where(along_y, half[:, 1:2], half[:, :1])
    across, along = side * reach * (1 - depth / 2), dice.uniform(-1.0, 1.0, count) * (length - width)
    tall, thick = dice.uniform(0.35, 0.8, count) * 2 * half[:, 2:], reach * depth / 2
    centre = torch.stack([torch.where(along_y, across, along), torch.where(along_y, along, across), tall / 2], -1)
    size = torch.stack([torch.where(along_y, thick, width), torch.where(along_y, width, thick), tall / 2], -1)
    return centre, size, torch.zeros_like(tall)


@kind
def indoor(dice: Dice, objects: int) -> Solids:
    """A furnished room: cupboards along the walls, low boxes and balls on the floor, cameras at eye height."""
    centre, half = room(dice, (2.2, 4.0), (2.5, 3.4))
    walls, low = objects // 3, objects - objects // 3
    floor = torch.zeros(len(half), 1, dtype=half.dtype)
    cupboards = furniture(dice, walls, half)
    place = spread(dice, low, 0.15, 0.62) * half[:, None, :2]
    boxes = standing(dice, place[:, : (low + 1) // 2], floor, (0.15, 0.4), (0.25, 1.0))
    spheres = balls(dice, place[:, (low + 1) // 2 :], floor, (0.15, 0.45), boxes, floor + 1.15)
    zeros = torch.zeros_like(floor)
    focus = torch.cat([zeros, zeros, zeros + 0.75], -1)
    ring = torch.tensor([0.42, 0.72], dtype=half.dtype).expand(len(half), 2)
    region = Region(focus, half[:, :2], ring, torch.cat([zeros + 1.3, (2 * half[:, 2:] - 0.4).clamp(max=2.1)], -1))
    first = (centre[:, None], half[:, None], zeros)
    parts = [torch.cat(three, 1) for three in zip(first, cupboards, boxes, strict=True)]
    return Solids((parts[0], parts[1], parts[2]), spheres, region, (0.25, 0.9))


@kind
def objects(dice: Dice, objects: int) -> Solids:
    """A table of boxes and balls in a wide hall, cameras all around it."""
    centre, half = room(dice, (4.5, 6.0), (4.5, 5.5))
    zeros = torch.zeros(len(half), 1, dtype=half.dtype)
    table = standing(dice, torch.zeros(len(half), min(objects, 1), 2, dtype=half.dtype), zeros, (0.8, 1.0), (0.3, 0.7))
    surface = 2 * table[1][:, :1, 2] if objects else zeros
    small = max(objects - 1, 0)
    place = spread(dice, small, 0.15, 0.68)
    boxes = standing(dice, place[:, : (small + 1) // 2], surface, (0.1, 0.24), (0.2, 0.75))
    spheres = balls(dice, place[:, (small + 1) // 2 :], surface, (0.1, 0.27), boxes, surface + 1.2)
    focus = torch.cat([zeros, zeros, surface + 0.3], -1)
    bounds = torch.tensor([[1.8, 3.0], [1.0, 2.6]], dtype=half.dtype).expand(len(half), 2, 2)
    region = Region(focus, torch.ones_like(bounds[:, 0]), bounds[:, 0], bounds[:, 1])
    first = (centre[:, None], half[:, None], zeros)
    parts = [torch.cat(three, 1) for three in zip(first, table, boxes, strict=True)]
    return Solids((parts[0], parts[1], parts[2]), spheres, region, (0.4, 1.2))


@kind
def rooms(dice: Dice, objects: int) -> Solids:
    """Four furnished rooms around a pillar, each joined to the next by a doorway that the cameras' ring leads through.

    Two crossed walls end short of the ring, four stubs go on from it to the outer walls, and two beams lie over the
    doorways. Beams are thicker than walls, so that no two faces lie in one plane.
    """
    centre, half = room(dice, (4.0, 5.5), (2.6, 3.4))
    zeros = torch.zeros(len(half), 1, dtype=half.dtype)
    ring = torch.tensor([0.5, 0.72], dtype=half.dtype).expand(len(half), 2)
    inner, outer = ring[:, :1] * dice.uniform(0.3, 0.9, 1), ring[:, 1:] * 1.1
    thick, door = dice.uniform(0.04, 0.1, 1), dice.uniform(2.15, 2.35, 1)
    partitions = [
        upright(half, axis, low * half[:, axis, None], high * half[:, axis, None], bottom, thick + extra)
        for axis in (0, 1)
        for low, high, bottom, extra in (
            (-inner, inner, zeros, 0.0),
            (-zeros - 1, -outer, zeros, 0.0),
            (outer, zeros + 1, zeros, 0.0),
            (zeros - 1, zeros + 1, door, 0.02),
        )
    ]
    walls, low = objects // 3, objects - objects // 3
    place = spread(dice, low, 0.15, 0.62) * half[:, None, :2]
    boxes = standing(dice, place[:, : (low + 1) // 2], zeros, (0.15, 0.4), (0.25, 1.0))
    spheres = balls(dice, place[:, (low + 1) // 2 :], zeros, (0.15, 0.45), boxes, zeros + 1.15)
    height = torch.cat([zeros + 1.3, zeros + 1.9], -1)
    region = Region(torch.cat([zeros, zeros, zeros + 0.9], -1), half[:, :2], ring, height)
    groups = [(centre[:, None], half[:, None], zeros), *partitions, furniture(dice, walls, half), boxes]
    parts = [torch.cat(three, 1) for three in zip(*groups, strict=True)]
    return Solids((parts[0], parts[1], parts[2]), spheres, region, (0.25, 0.9), quarters=True)


def upright(half: Tensor, axis: int, low: Tensor, high: Tensor, bottom: Tensor, thick: Tensor) -> tuple:
    """A wall (centre, half, yaw) in the plane through the room's axis along x or y: low to high, bottom to ceiling."""
    zeros, top = torch.zeros_like(low), 2 * half[:, 2:]
    middle, length = (low + high) / 2, (high - low) / 2
    centre = [middle, zeros] if axis == 0 else [zeros, middle]
    size = [length, thick] if axis == 0 else [thick, length]
    height = [(bottom + top) / 2, (top - bottom) / 2]
    return torch.stack([*centre, height[0]], -1), torch.stack([*size, height[1]], -1), zeros


def paint(
    dice: Dice, count: int, textures: Sequence[str], cell: tuple[float, float], difficulty: Difficulty
) -> dict[str, Tensor]:
    """Materials [B, 6 + count]: pale room, vivid objects; the second colour is lighter or darker, near in hue."""
    surfaces = torch.arange(FACES + count)
    faces, count = surfaces < FACES, len(surfaces)
    hue, saturation = dice.uniform(0.0, 1.0, count), dice.uniform(0.25, 1.0, count)
    value = dice.uniform(0.6, 1.0, count)
    saturation = torch.where(faces, saturation * 0.3, saturation * 0.8)
    other = (hue + dice.uniform(-0.15, 0.15, count)) % 1.0
    darker = value * dice.uniform(0.3, 0.75, count)
    first, second = hsv(hue, saturation, value), hsv(other, saturation, darker)
    metres = torch.where(faces, dice.uniform(*cell, count), dice.uniform(0.08, 0.3, count))
    materials = {"texture": dice.integers(len(textures), count), "salt": dice.integers(2**31, count).int()}
    low, high = map(math.log, difficulty.scale)
    materials["cell"] = metres * dice.uniform(low, high, count).exp()
    flat = dice.uniform(0.0, 1.0, count) < difficulty.flat
    towards = torch.where(flat, dice.uniform(0.4, 0.48, count), 0.0)[..., None]  # at 0.5 both colours are their mean
    materials["colours"] = torch.cat([first.lerp(second, towards), second.lerp(first, towards)], -1)
    original = torch.where(faces, 0, FACES)
    source = torch.where(dice.uniform(0.0, 1.0, count) < difficulty.repeated, original, surfaces)
    rows = torch.arange(len(source))[:, None]
    return {name: tensor[rows, source] for name, tensor in materials.items()}


def hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB […, 3] of hue, saturation and value in [0, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0], dtype=hue.dtype) + hue[..., None] * 6) % 6
    fall = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * fall)


def lights(dice: Dice, half: Tensor, quarters: bool) -> dict[str, Tensor]:
    """Lamp and light of rooms with half extents [B, 3] that stand on z = 0."""
    spot = torch.cat([dice.uniform(-0.5, 0.5, 2), dice.uniform(0.75, 0.95, 1)], -1)
    light = torch.cat([dice.uniform(0.3, 0.5, 1), dice.uniform(0.7, 0.95, 1), dice.uniform(0.88, 1.0, 3)], -1)
    lamp = spot * half * torch.tensor([1.0, 1.0, 2.0], dtype=half.dtype)
    if quarters:  # from the middle of a quarter, away from its walls
        lamp[:, :2] = 0.25 * half[:, :2] + 0.5 * lamp[:, :2].abs()
    return {"lamp": lamp, "light": light}


def sample(seeds: Sequence[int], name: str, difficulty: Difficulty, textures: Sequence[str]) -> tuple[Scene, Region]:
    """The scenes of these seeds, float64 on the CPU, and where cameras may go in them."""
    for chosen in textures:
        pick(TEXTURES, chosen, "texture")
    solids = pick(KINDS, name, "kind")(Dice(seeds, "layout"), difficulty.objects)
    (centre, half, yaw), (middle, radius) = solids.boxes, solids.spheres
    turn = torch.stack([yaw.cos(), yaw.sin()], -1)
    upright = torch.tensor([1.0, 0.0], dtype=turn.dtype).expand(len(seeds), radius.shape[1], 2)
    solid_count = centre.shape[1] + radius.shape[1]
    scene = Scene(
        boxes=centre.shape[1],
        centre=torch.cat([centre, middle], 1),
        half=torch.cat([half, radius[..., None].expand(-1, -1, 3)], 1),
        turn=torch.cat([turn, upright], 1),
        gain=torch.ones_like(half[:, 0]),
        quarters=solids.quarters,
        **lights(Dice(seeds, "light"), half[:, 0], solids.quarters),
        **paint(Dice(seeds, "materials"), solid_count - 1, textures, solids.cell, difficulty),
    )
    return scene, solids.region
