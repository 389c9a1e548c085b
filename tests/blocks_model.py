"""Small models under plans with blocks, and the same attention by hand under a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import alternating
import blocks_oracle as oracle
import torch
import torch.nn.functional as F
from alternating import Spec
from torch import Tensor

SPEC = Spec(head_dim=16)
BLOCKS = {"q_block": 32, "k_block": 16}


def plan(method: str = "predict", layers: str = "*", **parameters: Any) -> dict:
    return {"layers": {layers: {"blocks": {"method": method, **BLOCKS, **parameters}}}}


def scene(batch: int = 1, frames: int = 4, grid: tuple[int, int] = (5, 7), seed: int = 0) -> Tensor:
    return alternating.images(SPEC, batch, frames, grid, seed)


Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def confined(
    frames: int, special: int, choose: Choose, first_frame: bool = False, walk: Sequence[int] | None = None
) -> Callable:
    """Attention under a mask [queries, keys] in the model's own token order: block lists, spread out pair by pair.

    Blocks are runs of patches row by row, or along a `walk` through each frame.
    """

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[-2]
        place = torch.arange(tokens)
        inside = place % (tokens // frames)
        patches = place[inside >= special].view(frames, -1)
        patches = patches if walk is None else patches[:, list(walk)]
        patches, listed = patches.flatten(), patches[int(first_frame) :].flatten()
        index, count = choose(q[:, :, patches], k[:, :, listed])
        blocks = oracle.mask(index, count, -(-len(listed) // BLOCKS["k_block"]))
        pairs = blocks.repeat_interleave(BLOCKS["q_block"], 2).repeat_interleave(BLOCKS["k_block"], 3)
        allowed = torch.ones(*q.shape[:2], tokens, tokens, dtype=torch.bool)
        allowed[:, :, patches[:, None], listed] = pairs[:, :, : len(patches), : len(listed)]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    return core
