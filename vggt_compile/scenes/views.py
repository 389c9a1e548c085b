"""Views are images with the exact geometry that made them; projecting a world point gives back its pixel and depth."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Views:
    """B scenes of S frames, H × W pixels; lengths in metres."""

    images: Tensor  # [B, S, 3, H, W] in [0, 1]
    depth: Tensor  # [B, S, H, W] along the optical axis
    world_points: Tensor  # [B, S, H, W, 3]
    intrinsics: Tensor  # [B, S, 3, 3] in pixels, pixel centres at +0.5
    extrinsics: Tensor  # [B, S, 3, 4] world → camera, OpenCV axes

    def to(self, device: torch.device | str) -> "Views":
        """The same views on another device."""
        return Views(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def pixel_centres(height: int, width: int, like: Tensor) -> Tensor:
    """Homogeneous pixel centres [H·W, 3] with like's dtype and device."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=like.dtype, device=like.device) + 0.5,
        torch.arange(width, dtype=like.dtype, device=like.device) + 0.5,
        indexing="ij",
    )
    return torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1)


def unproject(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> Tensor:
    """World points […, H, W, 3] of depth […, H, W] under […, 3, 3] and […, 3, 4]."""
    height, width = depth.shape[-2:]
    rays = pixel_centres(height, width, depth) @ torch.linalg.inv(intrinsics).mT
    camera = rays * depth.flatten(-2)[..., None]
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3]
    return ((camera - translation[..., None, :]) @ rotation).unflatten(-2, (height, width))


def project(points: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates […, N, 2] and depth […, N] of world points […, N, 3]; points behind have depth ≤ 0."""
    camera = points @ extrinsics[..., :3].mT + extrinsics[..., None, :, 3]
    image = camera @ intrinsics.mT
    return image[..., :2] / image[..., 2:], camera[..., 2]


def compare(views: Views, frame: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frame i's points seen by every frame j: whether inside it, their depth there, and the depth recorded there.

    Each [B, S, H·W]. Recorded depth is interpolated as 1 / depth, which is affine across any plane's pixels, so that
    planes compare without error at any slant.
    """
    points = views.world_points[:, frame].flatten(1, 2)[:, None]
    pixels, depth = project(points, views.intrinsics, views.extrinsics)
    height, width = views.depth.shape[-2:]
    size = pixels.new_tensor([width, height])
    inside = (depth > 0) & (pixels >= 0).all(-1) & (pixels < size).all(-1)
    grid = torch.where(inside[..., None], 2 * pixels / size - 1, 0.0).flatten(0, 1)[:, None]
    inverse = (1 / views.depth).flatten(0, 1)[:, None]
    recorded = torch.nn.functional.grid_sample(inverse, grid, padding_mode="border", align_corners=False)
    return inside, depth, 1 / recorded[:, 0, 0].view_as(depth)


def overlap(views: Views, tolerance: float = 0.01) -> Tensor:
    """[B, S, S]: the fraction of frame i's pixels that frame j sees too, inside it and at a depth that agrees.

    Depths agree within `tolerance` times the depth; the rest is outside the frame or hidden behind something nearer.
    Along silhouettes, where neighbouring pixels see different surfaces, it errs on the side of unseen.
    """
    rows = []
    for frame in range(views.depth.shape[1]):
        inside, depth, recorded = compare(views, frame)
        rows.append((inside & ((depth - recorded).abs() < tolerance * depth)).to(depth.dtype).mean(-1))
    return torch.stack(rows, 1)
