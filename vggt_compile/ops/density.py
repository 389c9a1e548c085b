"""How much of a dense attention the lists of blocks leave: pairs of queries and keys that are read, over all pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from vggt_compile.ops.sizes import cdiv


@triton_op("vggt_compile::density", mutates_args=())
def density(
    block_index: Tensor,
    block_count: Tensor,
    queries: int,
    keys: int,
    always: int = 0,
    q_block: int = 128,
    k_block: int = 64,
    dense_queries: int = 0,
    own_keys: int = 0,
    of_tokens: int | None = None,
) -> Tensor:
    """The share of pairs that an attention reads, for each batch item and head, [B, H] fp32.

    It stays on the device and waits for nothing. Blocks count with the tokens that they have, the last of each row and
    column with what is left, so lists of all blocks give 1 exactly.

    Args:
        block_index, block_count: [B, H, ⌈queries / q_block⌉, cap] and [B, H, ⌈queries / q_block⌉], as `attention`
            reads them.
        queries: those that the lists are for.
        keys: all keys, with the first `always`, which belong to no block and are read by every query.
        dense_queries: further queries, which read every key.
        own_keys: how many queries read a key of their own beside these.
        of_tokens: the share is of the pairs of so many queries and keys, where some were dropped or have merged before;
            of those that there are where None.
    """
    device, blocks = block_count.device, cdiv(keys - always, k_block)
    rows = (queries - torch.arange(block_count.shape[-1], device=device) * q_block).clamp(max=q_block)
    last = block_index.gather(-1, (block_count - 1).clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    short = ((last == blocks - 1) & (block_count > 0)) * (blocks * k_block - (keys - always))
    read = always + block_count.long() * k_block - short
    pairs = (rows * read).sum(-1) + (dense_queries * keys + own_keys)
    whole = (queries + dense_queries) * keys if of_tokens is None else of_tokens * of_tokens
    return pairs.float() / whole


@density.register_fake
def _shape(block_index: Tensor, block_count: Tensor, *rest: Any, **named: Any) -> Tensor:
    return block_count.new_empty(block_count.shape[:2], dtype=torch.float32)
