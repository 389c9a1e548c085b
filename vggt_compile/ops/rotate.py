"""Two-dimensional rotary embedding (RoPE, arXiv 2104.09864; per axis as in arXiv 2403.13298), from positions alone.

As an operator it is one operation of a trace and not 27, and its fake value costs nothing to find. AOTAutograd takes it
apart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op


def rotate(tokens: Tensor, positions: Tensor, base: float) -> Tensor:
    """Turn the features of each token by the angles of its position.

    Args:
        tokens: [B, H, N, D], D divisible by 4; the first half of D turns with the row, the second with the column.
        positions: [B, N, 2], row and column in patches, integers.
        base: the longest wavelength is 2π·base patches.

    Returns:
        [B, H, N, D] in the dtype of `tokens`; angles are rounded to that dtype, as the published tables are.
    """
    half = tokens.shape[-1] // 2
    frequency = 1.0 / base ** (torch.arange(0, half, 2, device=tokens.device).float() / half)
    angle = (positions[..., None].to(frequency.dtype) * frequency).to(tokens.dtype)[:, None]  # [B, 1, N, 2, D/4]
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    axes = tokens.unflatten(-1, (2, half))
    first, second = axes.chunk(2, -1)
    return (axes * cos + torch.cat((-second, first), -1) * sin).flatten(-2)


@triton_op("vggt_compile::rotate", mutates_args=())
def rotated(tokens: Tensor, positions: Tensor, base: float) -> Tensor:
    """`rotate` as one operation; it has no gradient."""
    return rotate(tokens, positions, base)


@rotated.register_fake
def _like_tokens(tokens: Tensor, positions: Tensor, base: float) -> Tensor:
    return torch.empty_like(tokens) if tokens.is_contiguous() else rotate(tokens, positions, base)
