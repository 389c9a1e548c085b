"""What the kernel for Hopper is compiled for: nothing that depends on how many tokens there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vggt_compile.ops.operands import Operands


@dataclass(frozen=True)
class Variant:
    """Without `lists` the blocks have a size of their own."""

    dtype: torch.dtype
    head_dim: int
    q_block: int
    k_block: int
    lists: bool
    own: bool


def variant(x: Operands) -> Variant | None:
    """That of these operands, wherever they are; None where the kernel is not written for them."""
    if not (x.q.dtype in (torch.bfloat16, torch.float16) and x.q.shape[3] in (32, 64, 128)):
        return None
    lists = x.block_index is not None
    if x.key_log_weight is not None or (lists and (x.q_block % 128 or x.k_block % 64)):
        return None
    q_block, k_block = (x.q_block, x.k_block) if lists else (128, 64)
    return Variant(x.q.dtype, x.q.shape[3], q_block, k_block, lists, x.own is not None)
