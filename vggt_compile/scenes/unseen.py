"""Textures that no model is trained on: curved and branching, where those of training are grids, bands and blots."""

import torch
from torch import Tensor

from vggt_compile.scenes.noise import Patch, cell_hash, fract, settle, step, tint
from vggt_compile.scenes.textures import held_out


@held_out
def cracks(patch: Patch) -> Tensor:
    """Borders of the cells nearest to points that are each jittered inside a grid cell."""
    x, y = (patch.u - 0.5).floor(), (patch.v - 0.5).floor()
    first = second = torch.full_like(patch.u, torch.inf)
    for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
        chance = cell_hash(x.int() + dx, y.int() + dy, patch.salt).to(patch.u.dtype)
        right, up = x + dx + 0.2 + 0.6 * chance - patch.u, y + dy + 0.2 + 0.6 * fract(chance * 97) - patch.v
        distance = (right * right + up * up).sqrt()
        first, second = torch.minimum(first, distance), torch.minimum(second, torch.maximum(first, distance))
    return 1 - settle(step(second - first - 0.08, 2 * patch.width), 0.85, patch.width) * (1 - 0.5 * first.clamp(max=1))


@held_out
def truchet(patch: Patch) -> Tensor:
    """A labyrinth of quarter circles, each cell turned one way or the other."""
    turned = tint(patch, patch.u, patch.v) > 0.5
    x, y = fract(patch.u), fract(patch.v)
    x = torch.where(turned, 1 - x, x)
    near, far = (x * x + y * y).sqrt(), ((1 - x) ** 2 + (1 - y) ** 2).sqrt()
    ring = torch.minimum((near - 0.5).abs(), (far - 0.5).abs())
    return settle(step(0.13 - ring, patch.width), 0.4, patch.width)


@held_out
def rosettes(patch: Patch) -> Tensor:
    """A flower in each cell, of three to eight petals."""
    x, y = fract(patch.u) - 0.5, fract(patch.v) - 0.5
    petals = (3 + 6 * tint(patch, patch.u, patch.v)).floor()
    radius, reach = (x * x + y * y).sqrt(), 0.31 + 0.15 * (petals * torch.atan2(y, x)).cos()
    return settle(step(reach - radius, 1.5 * patch.width) - step(0.09 - radius, patch.width), 0.32, patch.width)


@held_out
def scales(patch: Patch) -> Tensor:
    """Fish scales: half discs in rows, each row over the next, brighter towards the rim."""
    row = (2 * patch.v).floor()
    x, y = (fract(patch.u + 0.5 * row) - 0.5).abs(), fract(2 * patch.v) / 2
    here, next_row = (x * x + y * y).sqrt(), ((0.5 - x) ** 2 + (0.5 - y) ** 2).sqrt()
    return settle(torch.lerp(2 * next_row, 2 * here, step(0.5 - here, patch.width)).clamp(max=1), 0.6, patch.width)
