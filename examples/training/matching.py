"""A loss that lives in training alone: early tokens of two frames that see one point of the world shall look alike.

VGGT is trained with such a signal, too: the points that its track head follows (arXiv:2503.11651, section 3.4). Without
it a small model spends most of a short run on finding out that frames can be compared at all.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_compile.models import VGGT
from vggt_compile.scenes import Views, project

LAYER = 1
"""The global block, counted from 0, whose patches are compared."""
SAME = 0.02
"""Share of the depth by which two depths of one visible point may differ."""


class Matching(nn.Module):
    """Projects the tokens that leave a global block and scores them by cross entropy over the other frame's patches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        block, self.special = early_block(model)
        self.patch = model.config.patch_size
        self.head = nn.Linear(model.config.embed_dim, 64)
        self.sharpness = nn.Parameter(torch.tensor(math.log(10.0)))
        self.tokens: Tensor | None = None
        block.register_forward_hook(self.keep)

    def keep(self, block: nn.Module, inputs: object, output: Tensor) -> None:
        self.tokens = output

    def forward(self, views: Views, dice: random.Random) -> Tensor:
        """The loss of every frame against the one `shift` frames on; the model has just run on these views."""
        assert self.tokens is not None
        batch, frames = views.depth.shape[:2]
        tokens = self.tokens.view(batch, frames, -1, self.tokens.shape[-1])[:, :, self.special :]
        self.tokens = None
        shift = dice.randrange(1, frames)
        target, visible = partners(views, self.patch, shift)
        features = F.normalize(self.head(tokens).float(), dim=-1)
        scores = features @ features.roll(-shift, 1).mT * self.sharpness.exp().clamp(max=100)
        loss = F.cross_entropy(scores.flatten(0, 2), target.flatten(), reduction="none")
        seen = visible.flatten().to(loss.dtype)
        return (loss * seen).sum() / seen.sum().clamp(min=1)


def early_block(model: nn.Module) -> tuple[nn.Module, int]:
    """The block to listen to, and the special tokens that precede a frame's patches."""
    if isinstance(model, VGGT):
        return model.aggregator.global_blocks[LAYER], model.aggregator.special
    return model.decoder[2 * LAYER + 1], model.config.registers


@torch.no_grad()
def partners(views: Views, patch: int, shift: int) -> tuple[Tensor, Tensor]:
    """Where the middle of each patch is seen `shift` frames on: index of the patch there, and whether it is visible.

    Both `[B, S, N]` for N patches a frame.
    """
    half = patch // 2
    points = views.world_points[:, :, half::patch, half::patch].flatten(2, 3)
    pixels, depth = project(points, views.intrinsics.roll(-shift, 1), views.extrinsics.roll(-shift, 1))
    height, width = views.depth.shape[-2:]
    x, y = pixels.floor().unbind(-1)
    inside = (depth > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x.clamp(0, width - 1).long(), y.clamp(0, height - 1).long()
    recorded = views.depth.roll(-shift, 1).flatten(2).gather(2, y * width + x)
    visible = inside & ((recorded - depth).abs() < SAME * depth)
    return (y // patch) * (width // patch) + x // patch, visible
