"""Random key blocks for each query block, as a control: as many as a choice by score has, and as cheap to attend to.

Each row draws one block from each of as many equal runs of blocks. So a list is ascending as it is drawn, has no block
twice, and every block is equally likely where the runs are equally long.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from vggt_compile.ops.select_blocks import budget
from vggt_compile.ops.sizes import cdiv

_WORD = 2**31 - 1


@triton_op("vggt_compile::random_blocks", mutates_args=())
def random_blocks(
    q: Tensor, k: Tensor, keep: float, seed: int = 0, q_block: int = 128, k_block: int = 64
) -> tuple[Tensor, Tensor]:
    """Lists and counts in the form of `select_blocks`, from the shapes of q [B, H, M, D] and k [B, H, N, D] alone.

    The same seed and shapes give the same lists on every device.
    """
    batch, heads, tokens, _ = q.shape
    queries, blocks = cdiv(tokens, q_block), cdiv(k.shape[-2], k_block)
    count, _ = budget(blocks, keep, cdf=0.0, most=keep)
    slot = torch.arange(count, device=q.device)
    start = slot * blocks // count
    length = (slot + 1) * blocks // count - start
    row = torch.arange(batch * heads * queries, device=q.device).unsqueeze(-1)
    drawn = start + scrambled(scrambled(row + sown(seed + 1, _WORD // 3)) + slot) % length.clamp(min=1)
    index = drawn.view(batch, heads, queries, count).int()
    kept = torch.sym_min(count, blocks)  # 0 where there are no keys
    return index, torch.full((batch, heads, queries), kept, dtype=torch.int32, device=q.device)


@random_blocks.register_fake
def _shapes(
    q: Tensor, k: Tensor, keep: float, seed: int = 0, q_block: int = 128, k_block: int = 64
) -> tuple[Tensor, Tensor]:
    slots, _ = budget(cdiv(k.shape[-2], k_block), keep, cdf=0.0, most=keep)
    count = q.new_empty((*q.shape[:2], cdiv(q.shape[-2], q_block)), dtype=torch.int32)
    return count.new_empty((*count.shape, slots)), count


def sown(seed: int, apart: int) -> int:
    """Where the numbers of a seed begin: below 2^30, for Inductor adds it to indices in 32 bits."""
    return seed * apart % 2**30


def scrambled(x: Tensor) -> Tensor:
    """A hash of the low 31 bits in 31 bits: shifts and odd factors that leave no pattern (M. Wellons' prospector)."""
    x = x & _WORD
    for shift, factor in ((16, 0x3D4D51CB), (15, 0x1B56C4E9), (14, 0x05B4D0F3)):
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> 15)
