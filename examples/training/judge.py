"""Geometry of held-out scenes, for the log of a run; `python -m vggt_compile bench accuracy` is the thorough form."""

from __future__ import annotations

import torch
from curriculum import LATER, TRAJECTORIES
from torch import nn

from vggt_compile.metrics import depth_metrics, pose_metrics
from vggt_compile.models.prediction import prediction
from vggt_compile.scenes import HELD_OUT_SEEDS, render

SCENES = 16
FRAMES = 10


@torch.no_grad()
def judge(model: nn.Module, size: tuple[int, int], device: torch.device) -> dict[str, dict[str, float]]:
    """AUC@30, RRA@15, RTA@15 and AbsRel of each trajectory, at ten frames."""
    found = {}
    for trajectory in TRAJECTORIES | LATER:
        views = render(HELD_OUT_SEEDS[:SCENES], FRAMES, size, trajectory, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            ours = prediction(model(views.images), size)
        scores = pose_metrics(ours.extrinsics, views.extrinsics, (15, 30)) | depth_metrics(ours.depth, views.depth)
        kept = ("AUC@30", "RRA@15", "RTA@15", "AbsRel")
        found[trajectory] = {name: round(scores[name], 4) for name in kept}
    return found
