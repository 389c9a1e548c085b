"""The ray's parameter is the depth: directions have z = 1 in the camera, so a hit needs no conversion to be exact.

Rays are stored component first ([3, V, N]: V views of N rays) because then every operation streams over rays.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vggt_compile.scenes.layout import FACES, Scene

NEAR = 1e-3  # hits nearer than this, as a multiple of the direction, are the surface that the ray starts from


class Hit(NamedTuple):
    """The first surface on each ray."""

    depth: Tensor  # [V, N] multiple of the direction
    point: Tensor  # [3, V, N] world
    normal: Tensor  # [3, V, N] unit length, towards the viewer's side of the surface
    material: Tensor  # [V, N] int64
    uv: Tensor  # [2, V, N] metres along the surface


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the first dimension, added in a fixed order."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def to_local(vector: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """World to solid: undo the yaw of this cosine and sine."""
    return torch.stack([cos * vector[0] + sin * vector[1], cos * vector[1] - sin * vector[0], vector[2]])


def slabs(origin: Tensor, direction: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave a box around the origin; it is hit if enter < leave."""
    # A ray parallel to a face gets huge but finite distances, never 0 × ∞.
    inverse = 1 / torch.where(direction == 0, 1e-12, direction)
    side = torch.copysign(half.expand_as(inverse), inverse)
    enter, leave = (-side - origin) * inverse, (side - origin) * inverse
    return (
        torch.maximum(torch.maximum(enter[0], enter[1]), enter[2]),
        torch.minimum(torch.minimum(leave[0], leave[1]), leave[2]),
    )


def ball(origin: Tensor, direction: Tensor, radius: Tensor) -> Tensor:
    """Distance to a sphere around the origin, ∞ where missed."""
    square = dot(direction, direction)
    middle = -dot(origin, direction) / square
    nearest = origin + middle * direction  # the discriminant from this point does not cancel, that from |o|² − r² does
    room = radius * radius - dot(nearest, nearest)
    distance = middle - (room.clamp(min=0) / square).sqrt()
    return torch.where((room > 0) & (distance > NEAR), distance, torch.inf)


def distance(origin: Tensor, direction: Tensor, scene: Scene, k: int) -> Tensor:
    """Distance [V, N] to solid k (not the room), ∞ where missed; origin [3, V, 1 or N], direction [3, V, N]."""
    centre, half = scene.centre[:, k].T[..., None], scene.half[:, k].T[..., None]
    if k >= scene.boxes:
        return ball(origin - centre, direction, half[0])
    origin = origin - centre
    if k >= scene.aligned:
        turn = scene.turn[:, k].T[..., None].unbind()
        origin, direction = to_local(origin, *turn), to_local(direction, *turn)
    enter, leave = slabs(origin, direction, half)
    return torch.where((enter < leave) & (enter > NEAR), enter, torch.inf)


def trace(origin: Tensor, direction: Tensor, scene: Scene) -> Hit:
    """The nearest hit of rays from inside the room: origin [3, V, 1], direction [3, V, N], scene of V rows."""
    centre, half = scene.centre[:, 0].T[..., None], scene.half[:, 0].T[..., None]
    depth = slabs(origin - centre, direction, half)[1]
    solid = torch.zeros_like(depth, dtype=torch.int64)
    for k in range(1, scene.centre.shape[1]):
        other = distance(origin, direction, scene, k)
        solid = torch.where(other < depth, k, solid)
        depth = torch.minimum(other, depth)
    point = origin + depth * direction
    return Hit(depth, point, *surface(point, solid, scene))


def surface(point: Tensor, solid: Tensor, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Normal [3, V, N], material [V, N] and uv [2, V, N] at points [3, V, N] of the given solids [V, N].

    Done once for the nearest hit rather than inside the loop over solids.
    """
    table = torch.cat([scene.centre, scene.half, scene.turn], -1).permute(2, 0, 1)
    table = table.gather(2, solid.expand(table.shape[0], -1, -1))
    half, cos, sin = table[3:6], table[6], table[7]
    local = to_local(point - table[:3], cos, sin)
    unit = local / half
    size = unit.abs()
    x = (size[0] >= size[1]) & (size[0] >= size[2])  # on which pair of a box's faces
    z = ~x & (size[2] > size[1])
    room, round_ = solid == 0, solid >= scene.boxes
    axis = torch.stack([x, ~x & ~z, z])
    normal = torch.where(round_, unit, torch.where(axis, unit.sign(), 0.0))
    normal = torch.where(room, -normal, to_local(normal, cos, -sin))
    high = torch.where(axis, unit, 0.0).sum(0) > 0
    face = torch.where(x, 0, torch.where(z, 4, 2)) + high
    material = torch.where(room, face, solid + (FACES - 1))
    flat = torch.stack([torch.where(x, local[1], local[0]), torch.where(z, local[1], local[2])])
    globe = torch.stack([torch.atan2(local[1], local[0]), unit[2].clamp(-1, 1).asin()]) * half[:1]
    return normal, material, torch.where(round_, globe, flat)


def shadowed(point: Tensor, light: Tensor, scene: Scene) -> Tensor:
    """Whether a solid stands between points [3, V, N] and the light [3, V, 1]; bool [V, N]."""
    direction = light - point
    blocked = torch.zeros_like(point[0], dtype=torch.bool)
    for k in range(1, scene.centre.shape[1]):
        blocked = blocked | (distance(point, direction, scene, k) < 1)
    return blocked
