"""How far one output of a model is from another of the same model and images: camera, depth, points, confidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vggt_compile.errors import BadInput
from vggt_compile.metrics.cameras import centres
from vggt_compile.models.pose import decode_pose

CHUNK = 2**24
"""Elements that are widened to fp64 at a time."""


@dataclass(frozen=True)
class Deviation:
    """Attributes:
    relative: ‖a − b‖ / ‖b‖ over all elements, in fp64.
    largest: max |a − b| / max |b|.
    """

    relative: float
    largest: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def compare(output: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Deviation]:
    """Deviations of the quantities that the reference has, each against the reference's own size."""
    ours, theirs = quantities(output), quantities(reference)
    return {name: deviation(ours[name], b) for name, b in theirs.items()}


def quantities(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """What VGGT or π³ predict, under common names.

    - camera: VGGT's pose encoding `[B, S, 9]`, π³'s camera-to-world transforms `[B, S, 3, 4]`
    - depth: `[B, S, H, W]`; points: `[B, S, H, W, 3]` in the scene's frame; confidence: as the model gives it
    """
    if "camera_poses" in output:
        return {
            "camera": output["camera_poses"][..., :3, :],
            "depth": output["local_points"][..., 2],
            "points": output["points"],
            "confidence": output["conf"],
        }
    names = {"camera": "pose_enc", "depth": "depth", "points": "world_points", "confidence": "depth_conf"}
    found = {name: output[key] for name, key in names.items() if key in output}
    if not found:
        raise BadInput(f"neither an output of VGGT nor of π³: it holds {', '.join(map(str, output)) or 'nothing'}")
    if "depth" in found:
        found["depth"] = found["depth"][..., 0]
    return found


def deviation(a: Tensor, b: Tensor) -> Deviation:
    """Of `a` from `b`, of one shape. Equal tensors give 0, others infinity where `b` is zero; NaN stays NaN."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    square, size, most, scale = (torch.zeros((), dtype=torch.float64, device=b.device) for _ in range(4))
    for x, y in zip(a.to(b.device).flatten().split(CHUNK), b.flatten().split(CHUNK), strict=True):
        gap, y = x.double() - y.double(), y.double()
        square, size = square + gap.square().sum(), size + y.square().sum()
        most, scale = torch.maximum(most, gap.abs().amax()), torch.maximum(scale, y.abs().amax())
    return Deviation(_ratio(square.sqrt().item(), size.sqrt().item()), _ratio(most.item(), scale.item()))


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else float("inf")
    return part / whole


def camera_centres(output: Mapping[str, Any], image_size: tuple[int, int]) -> Tensor | None:
    """Where the cameras stand in the scene's frame, `[B, S, 3]`; None where the model gives no cameras."""
    if "camera_poses" in output:
        return output["camera_poses"][..., :3, 3]
    if "pose_enc" not in output:
        return None
    return centres(decode_pose(output["pose_enc"], image_size).extrinsics)
