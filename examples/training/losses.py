"""What VGGT (arXiv:2503.11651) and π³ (arXiv:2507.13347) are trained to get right, on views whose geometry is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_compile.models.pose import Cameras, decode_pose, encode_pose
from vggt_compile.scenes import Views

Losses = dict[str, Tensor]
CONFIDENCE_REWARD = 0.2
REFINEMENT_DECAY = 0.6
SAMPLES = 4096


class Truth(NamedTuple):
    """Views in the frame of their first camera, in units of the mean distance of all points from it."""

    extrinsics: Tensor  # [B, S, 3, 4]
    intrinsics: Tensor  # [B, S, 3, 3] in pixels
    depth: Tensor  # [B, S, H, W]
    points: Tensor  # [B, S, H, W, 3]


def from_first_camera(views: Views) -> Truth:
    """What a model can know: neither where the world's origin is nor how long a metre is."""
    rotation, translation = views.extrinsics[..., :3], views.extrinsics[..., 3]
    first, origin = rotation[:, :1], translation[:, :1]
    relative = rotation @ first.mT
    moved = translation - (relative @ origin[..., None])[..., 0]
    points = torch.einsum("bij,bshwj->bshwi", first[:, 0], views.world_points) + origin[:, :, None, None]
    unit = points.norm(dim=-1).mean((1, 2, 3))
    extrinsics = torch.cat((relative, (moved / unit[:, None, None])[..., None]), -1)
    return Truth(
        extrinsics, views.intrinsics, views.depth / unit[:, None, None, None], points / unit[:, None, None, None, None]
    )


def vggt_loss(outputs: Mapping[str, Any], views: Views, mapped: list[int]) -> Losses:
    """Camera, depth and points; "total" is their weighted sum, which is to be minimised.

    Cameras are of all frames, dense maps of those `mapped`.

    Beside the encodings it compares the poses of all pairs of frames, as π³ does: with poses relative to the first
    frame alone, a small model had learnt next to nothing about cameras after 2,000 steps.
    """
    truth = from_first_camera(views)
    size = views.depth.shape[-2], views.depth.shape[-1]
    camera = camera_loss(outputs["pose_enc_list"], encode_pose(Cameras(truth.extrinsics, truth.intrinsics), size))
    depth = dense_loss(outputs["depth"], truth.depth[:, mapped, ..., None], outputs["depth_conf"])
    points = dense_loss(outputs["world_points"], truth.points[:, mapped], outputs["world_points_conf"])
    rotation, translation = relative_pose_loss(decode_pose(outputs["pose_enc"], size).extrinsics, truth.extrinsics)
    losses = {"camera": camera, "depth": depth, "points": points, "rotation": rotation, "translation": translation}
    return {"total": 2 * camera + depth + points + rotation + 5 * translation, **losses}


def camera_loss(steps: list[Tensor], target: Tensor) -> Tensor:
    """Huber loss of every refinement step's encoding `[B, S, 9]`, a mean in which later steps count more."""
    total, weights = torch.zeros((), device=target.device), 0.0
    for index, pose in enumerate(steps):
        # A quaternion and its negative are one rotation; near half a turn the canonical sign jumps.
        same = (pose[..., 3:7] * target[..., 3:7]).sum(-1, keepdim=True).detach() >= 0
        flipped = torch.where(same, target[..., 3:7], -target[..., 3:7])
        parts = (
            F.smooth_l1_loss(pose[..., :3], target[..., :3], beta=0.02),
            F.smooth_l1_loss(pose[..., 3:7], flipped, beta=0.02),
            0.5 * F.smooth_l1_loss(pose[..., 7:], target[..., 7:], beta=0.02),
        )
        weight = REFINEMENT_DECAY ** (len(steps) - 1 - index)
        total, weights = total + weight * sum(parts, torch.zeros_like(total)), weights + weight
    return total / weights


def dense_loss(predicted: Tensor, target: Tensor, confidence: Tensor) -> Tensor:
    """Error of maps `[B, S, H, W, C]` and of their gradients, weighted by the confidence that the model claims."""
    error = predicted - target
    size = error.square().sum(-1).add(1e-12).sqrt()
    value = (confidence * size - CONFIDENCE_REWARD * confidence.log()).mean()
    across, down = error.diff(dim=3).abs().sum(-1), error.diff(dim=2).abs().sum(-1)
    return value + (confidence[..., 1:] * across).mean() + (confidence[..., 1:, :] * down).mean()


def pi3_loss(outputs: Mapping[str, Any], views: Views, mapped: list[int]) -> Losses:
    """Local points, normals, relative poses and confidence; no frame is special and the scale is free."""
    truth = from_first_camera(views)
    target = local_points(truth)[:, mapped]
    weight = inverse_depth(target)
    scale = best_scale(outputs["local_points"].detach(), target, weight)
    points = outputs["local_points"] * scale[:, None, None, None, None]
    error = (weight * (points - target)).abs().sum(-1)
    normals = 1 - F.cosine_similarity(normals_of(points), normals_of(target), dim=-1)
    rotation, translation = relative_pose_loss(world_to_camera(outputs["camera_poses"], scale), truth.extrinsics)
    good = (error.detach() < 0.1).to(error.dtype)
    confidence = F.binary_cross_entropy_with_logits(outputs["conf"][..., 0], good)
    losses = {"points": error.mean(), "normals": normals.mean(), "rotation": rotation, "translation": translation}
    total = losses["points"] + 0.5 * losses["normals"] + rotation + 5 * translation + 0.05 * confidence
    return {"total": total, **losses, "confidence": confidence}


def scale_of_points(points: Tensor, truth: Truth) -> Tensor:
    """For each scene the factor `[B]` that takes a π³'s local points `[B, S, H, W, 3]` to the true unit."""
    target = local_points(truth)
    return best_scale(points, target, inverse_depth(target))


def inverse_depth(points: Tensor) -> Tensor:
    """Weights `[..., 1]` of local points `[..., 3]`: an error counts by its share of the distance."""
    return 1 / points[..., 2:].clamp(min=0.05)


def local_points(truth: Truth) -> Tensor:
    """Points `[B, S, H, W, 3]` in the frame of the camera that sees them."""
    rotation, translation = truth.extrinsics[..., :3], truth.extrinsics[..., 3]
    return torch.einsum("bsij,bshwj->bshwi", rotation, truth.points) + translation[:, :, None, None]


def best_scale(points: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """For each scene the factor `[B]` that minimises Σ weight·|factor·points − target|₁: a weighted median of ratios.

    Of evenly spaced samples: the median of thousands differs little from that of millions.
    """
    batch, step = len(points), max(1, points[0, ..., 0].numel() // SAMPLES)
    p, t = points.reshape(batch, -1, 3)[:, ::step], target.reshape(batch, -1, 3)[:, ::step]
    w = weight.reshape(batch, -1, 1)[:, ::step].expand_as(p)
    p, t, w = p.flatten(1), t.flatten(1), w.flatten(1)
    ratio, order = (t * p.sign() / p.abs().clamp(min=1e-6)).sort(dim=1)
    mass = (w * p.abs()).gather(1, order).cumsum(1)
    middle = (mass < 0.5 * mass[:, -1:]).sum(1, keepdim=True)
    return ratio.gather(1, middle)[:, 0].clamp(min=1e-3)


def normals_of(points: Tensor) -> Tensor:
    """Normals `[B, S, H − 1, W − 1, 3]` of point maps, not unit."""
    across, down = points.diff(dim=3)[:, :, :-1], points.diff(dim=2)[:, :, :, :-1]
    return torch.linalg.cross(across, down)


def world_to_camera(poses: Tensor, scale: Tensor) -> Tensor:
    """Extrinsics `[B, S, 3, 4]` of camera-to-world transforms `[B, S, 4, 4]` in a world enlarged by `scale` `[B]`."""
    rotation = poses[..., :3, :3].mT
    return torch.cat((rotation, -rotation @ poses[..., :3, 3:] * scale[:, None, None, None]), -1)


def relative_pose_loss(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Angle (radians) and Huber loss of the translation between all pairs of frames; extrinsics `[B, S, 3, 4]`."""
    turn, shift = between_frames(predicted)
    true_turn, true_shift = between_frames(true)
    chord = (turn - true_turn).square().sum((-2, -1)).add(1e-8).sqrt() / 8**0.5
    angle = 2 * chord.clamp(max=1 - 1e-4).asin()  # an arc cosine has no gradient at 0
    return angle.mean(), F.smooth_l1_loss(shift, true_shift, beta=0.02)


def between_frames(extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Pose of camera j in camera i: rotations `[B, S, S, 3, 3]`, translations `[B, S, S, 3]`."""
    rotation = extrinsics[..., :3]
    centre = -(rotation.mT @ extrinsics[..., 3:])[..., 0]
    shift = torch.einsum("bsij,bstj->bsti", rotation, centre[:, None] - centre[:, :, None])
    return rotation[:, :, None] @ rotation[:, None].mT, shift
