"""Rotary position embedding in two dimensions, from positions alone: no cached table, no maximum, no host sync.

Half of each head's features turn with the patch's row, half with its column (RoPE, arXiv:2104.09864; in 2-D:
arXiv:2403.13298). Special tokens stand at position 0, where nothing turns; patches start at 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, each `[N, 2, D/4]`: tokens, (row, column), frequencies."""

    cos: Tensor
    sin: Tensor

    def repeat(self, frames: int) -> Rotation:
        """The same grid for `frames` frames in a row: `[frames·N, 2, D/4]`."""
        return Rotation(self.cos.repeat(frames, 1, 1), self.sin.repeat(frames, 1, 1))


def grid_positions(height: int, width: int, special: int, device: torch.device) -> Tensor:
    """Row and column of each token of one frame, special tokens first: `[special + height·width, 2]`, in patches."""
    rows = torch.arange(1, height + 1, device=device)[:, None].expand(height, width)
    columns = torch.arange(1, width + 1, device=device)[None, :].expand(height, width)
    patches = torch.stack((rows, columns), dim=-1).flatten(0, 1)
    return F.pad(patches, (0, 0, special, 0))


def rotation(positions: Tensor, head_dim: int, base: float) -> Rotation:
    """Angles `position · base^(−4i/D)` of `positions` `[N, 2]` for heads of width D = `head_dim`, in fp32."""
    axis_dim = head_dim // 2
    exponents = torch.arange(0, axis_dim, 2, device=positions.device).float() / axis_dim
    # Multiplied, not contracted: a matmul would fall to bf16 under autocast and lose the position.
    angles = positions[..., None].float() * (1.0 / base**exponents)
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the feature pairs (i, i + D/4) of each half of `x` `[B, H, N, D]` by their token's angles."""
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = (first * by.cos - second * by.sin, second * by.cos + first * by.sin)
    return torch.stack(turned, dim=-2).flatten(-3)
