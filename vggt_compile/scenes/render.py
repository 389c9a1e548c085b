"""One ray a pixel gives colour, depth and world point together, in chunks of bounded memory."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from vggt_compile.scenes.cameras import TRAJECTORIES, Pace, look_at, pinhole, zoom
from vggt_compile.scenes.dice import Dice, checked_seeds, pick
from vggt_compile.scenes.difficulty import DIFFICULTIES, Difficulty
from vggt_compile.scenes.layout import Scene, sample
from vggt_compile.scenes.noise import Patch, fbm
from vggt_compile.scenes.textures import TRAINING_TEXTURES, blend
from vggt_compile.scenes.trace import Hit, dot, shadowed, trace
from vggt_compile.scenes.views import Views, pixel_centres

Core = Callable[..., tuple[Tensor, Tensor, Tensor]]
# Rays in flight at once. On a CPU a chunk should stay in the cache; a GPU wants few launches.
CHUNK = {"cpu": 2**15, "cuda": 2**23}


@dataclass(frozen=True)
class Style:
    """What stays the same for every ray of a call."""

    textures: tuple[str, ...]
    shadows: bool


def shade(hit: Hit, direction: Tensor, focal: Tensor, scene: Scene, style: Style) -> Tensor:
    """Display colours [3, V, N]: texture, Lambert's law for one lamp, and ambient light that favours upward faces."""
    table = torch.cat([scene.cell[..., None], scene.colours], -1).permute(2, 0, 1)
    table = table.gather(2, hit.material.expand(table.shape[0], -1, -1))
    length = dot(direction, direction).sqrt()
    slant = (dot(hit.normal, direction).abs() / length).clamp(min=0.1)
    u, v = hit.uv / table[0]
    width = hit.depth * length / (focal * slant.sqrt() * table[0])
    salt = scene.salt.gather(1, hit.material)
    patch = Patch(u, v, width, salt, fbm(u, v, width, salt))
    value = blend(patch, style.textures, scene.texture.gather(1, hit.material))
    colour = torch.lerp(table[1:4], table[4:7], value) * illuminate(hit, scene, style).sqrt()
    return (colour * scene.gain.T[..., None]).clamp(max=1)


def illuminate(hit: Hit, scene: Scene, style: Style) -> Tensor:
    """Linear light [3, V, N] that falls on each point, at most 1."""
    lamp, light = scene.lamp.T[..., None], scene.light.T[..., None]
    if scene.quarters:
        lamp = torch.cat([lamp[:2].copysign(hit.point[:2]), lamp[2:].expand_as(hit.point[2:])])
    towards = lamp - hit.point
    square = dot(towards, towards)
    lambert = (dot(hit.normal, towards) * square.rsqrt()).clamp(min=0)
    reach = (scene.half[:, 0] ** 2).sum(-1)[:, None]  # the lamp fades to half over the room's half diagonal
    direct = light[1] * lambert * reach / (reach + square) * 1.2
    if style.shadows:
        direct = torch.where(shadowed(hit.point + 2e-3 * hit.normal, lamp, scene), 0.0, direct)
    return (light[0] * (0.9 + 0.1 * hit.normal[2]) + direct * light[2:5]).clamp(max=1)


def cast(
    pixels: Tensor, intrinsics: Tensor, extrinsics: Tensor, scene: Scene, style: Style
) -> tuple[Tensor, Tensor, Tensor]:
    """Colours [3, V, N], depth [V, N] and world points [3, V, N] of pixels [N, 3] in each of V views."""
    focal, centre = intrinsics[:, 0, 0], intrinsics[:, :2, 2]
    x, y = (pixels.T[:2, None] - centre.T[..., None]) / focal[:, None]
    rows = extrinsics.permute(1, 2, 0)[..., None]  # [3, 4, V, 1]
    direction = x * rows[0, :3] + y * rows[1, :3] + rows[2, :3]
    origin = -(rows[0, :3] * rows[0, 3] + rows[1, :3] * rows[1, 3] + rows[2, :3] * rows[2, 3])
    hit = trace(origin, direction, scene)
    return shade(hit, direction, focal[:, None], scene, style), hit.depth, hit.point


@functools.cache
def compiled_cast() -> Core:
    """`cast` under torch.compile, once in a process: it fuses the whole ray into a few kernels."""
    return torch.compile(cast, dynamic=False)


def cast_all(
    cameras: tuple[Tensor, Tensor], scene: Scene, style: Style, size: tuple[int, int], chunk: int, core: Core
) -> tuple[Tensor, Tensor, Tensor]:
    """`cast` for every pixel of every view, at most `chunk` rays at a time: [V, 3, H·W], [V, H·W], [V, H·W, 3]."""
    intrinsics, extrinsics = cameras
    pixels = pixel_centres(*size, like=intrinsics)
    count, rays = len(intrinsics), len(pixels)
    images, depth = intrinsics.new_empty(count, 3, rays), intrinsics.new_empty(count, rays)
    points = intrinsics.new_empty(count, rays, 3)
    for first in range(0, count, group := max(1, chunk // rays)):
        v = slice(first, first + group)
        rows = scene.map(itemgetter(v))
        for start in range(0, rays, chunk):
            n = slice(start, start + chunk)
            colour, depth[v, n], point = core(pixels[n], intrinsics[v], extrinsics[v], rows, style)
            images[v, :, n], points[v, n] = colour.transpose(0, 1), point.permute(1, 2, 0)
    return images, depth, points


def relight(dice: Dice, scene: Scene, frames: int, change: float) -> Scene:
    """Each scene once for each of its views: exposure, colour cast and lamp drift apart as `change` goes to 1."""
    exposure, cast = dice.uniform(-0.5, 0.2, frames, 1), dice.uniform(-0.15, 0.15, frames, 3)
    drift = dice.uniform(-0.6, 0.0, frames, 3)  # towards the middle of the floor: the lamp stays in its room
    views = scene.map(lambda tensor: tensor.repeat_interleave(frames, 0))
    return replace(
        views,
        gain=views.gain * (change * (exposure + cast)).exp().flatten(0, 1),
        lamp=views.lamp * (1 + change * drift * drift.new_tensor([1.0, 1.0, 0.3])).flatten(0, 1),
    )


@torch.no_grad()
def render(
    seed: int | Sequence[int],
    frames: int,
    size: tuple[int, int] = (224, 224),
    trajectory: str = "orbit",
    kind: str = "indoor",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    difficulty: Difficulty | str = "easy",
    fov: tuple[float, float] = (60.0, 80.0),
    pace: Pace = None,
    textures: Sequence[str] | None = None,
    shadows: bool = True,
    chunk: int | None = None,
    compile: bool = False,
) -> Views:
    """Render one scene for each seed, `frames` views of `size` = (height, width) pixels each.

    trajectory: "orbit", "video", "wide", "rig" or "rooms"; kind: "indoor", "objects" or "rooms".
    dtype: float32 or float64 for all five tensors. difficulty: "easy", "medium", "hard" or knobs of your own.
    fov: range in degrees along the longer side, one value for each scene.
    pace: range in degrees that a camera moves around the scene a frame (a rig: a time step), one value for each scene;
    by default the trajectory's own.
    textures: names to draw from, by default TRAINING_TEXTURES. chunk: rays in flight, by default what suits the device.
    compile: fuse with torch.compile (a minute or two for the first call of a shape; equal up to rounding).

    The same arguments give the same bits on the same device; a scene depends on its own seed only.
    Raises ValueError for an unknown name, saying the nearest valid one, and for sizes and counts out of range.
    """
    seeds, names = checked_seeds(seed), tuple(TRAINING_TEXTURES if textures is None else textures)
    path = pick(TRAJECTORIES, trajectory, "trajectory")
    knobs = pick(DIFFICULTIES, difficulty, "difficulty") if isinstance(difficulty, str) else difficulty
    check(frames, size, dtype, fov, pace, names, chunk)
    scene, region = sample(seeds, kind, knobs, names)
    dice, between = Dice(seeds, "cameras"), Dice(seeds, "views")
    intrinsics = pinhole(dice, fov, zoom(between, frames, knobs.fov_jitter), size).to(device, dtype)
    extrinsics = look_at(*path(dice, region, frames, pace)).to(device, dtype)
    views = relight(between, scene, frames, knobs.light_change)
    views = views.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    flat = (intrinsics.flatten(0, 1), extrinsics.flatten(0, 1))
    core, chunk = compiled_cast() if compile else cast, chunk or CHUNK.get(intrinsics.device.type, CHUNK["cuda"])
    images, depth, points = cast_all(flat, views, Style(names, shadows), size, chunk, core)
    shape = (len(seeds), frames)
    return Views(
        images.view(*shape, 3, *size), depth.view(*shape, *size), points.view(*shape, *size, 3), intrinsics, extrinsics
    )


def check(
    frames: int, size: tuple, dtype: torch.dtype, fov: tuple, pace: Pace, names: tuple, chunk: int | None
) -> None:
    """ValueError for the first argument out of range."""
    if frames < 1 or len(size) != 2 or min(size) < 1:
        raise ValueError(f"frames and both sides of size must be at least 1, got frames={frames}, size={tuple(size)}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype {dtype} cannot hold exact geometry; use float32 or float64 and convert the images")
    if not names or (chunk is not None and chunk < 1):
        raise ValueError(f"need one texture and chunk ≥ 1; got {names=}, chunk={chunk}")
    if not 0 < fov[0] <= fov[1] < 180 or not math.isfinite(sum(fov)):
        raise ValueError(f"fov must be an increasing range of degrees inside 0 … 180, got {fov}")
    if pace is not None and not 0 <= pace[0] <= pace[1] <= 180:
        raise ValueError(f"pace must be an increasing range of degrees a frame inside 0 … 180, got {pace}")
