"""One form for what VGGT and π³ predict, so that whoever judges geometry need not know which of them made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vggt_compile.models.pose import decode_pose


class Prediction(NamedTuple):
    """Geometry of B scenes of S frames, up to a similarity of each scene."""

    extrinsics: Tensor
    """`[B, S, 3, 4]`, world to camera."""
    depth: Tensor
    """`[B, S, H, W]`, along the optical axis."""
    points: Tensor
    """`[B, S, H, W, 3]`, in the world that the extrinsics start from."""


def prediction(outputs: Mapping[str, Any], image_size: tuple[int, int]) -> Prediction:
    """Read the outputs of a VGGT or of a π³ on images of `image_size` = (H, W) pixels.

    Raises:
        ValueError: outputs of neither, or without cameras, depth or points.
    """
    if "camera_poses" in outputs:
        rotation, centre = outputs["camera_poses"][..., :3, :3].mT, outputs["camera_poses"][..., :3, 3:]
        extrinsics = torch.cat((rotation, -rotation @ centre), dim=-1)
        return Prediction(extrinsics, outputs["local_points"][..., 2], outputs["points"])
    if missing := {"pose_enc", "depth", "world_points"} - set(outputs):
        raise ValueError(f"outputs hold no {', '.join(sorted(missing))}; is this a VGGT or a π³ with all heads?")
    extrinsics = decode_pose(outputs["pose_enc"], image_size).extrinsics
    return Prediction(extrinsics, outputs["depth"][..., 0], outputs["world_points"])
