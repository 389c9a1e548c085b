"""How much of an attention lies in few blocks, and whether means of blocks tell which.

Blocks are those of `blocks: predict`: of patch queries and patch keys in the order of the model. Shares are shares of
the attention that blocks compete for, which is what special keys leave. Whole blocks of queries are drawn, and their
attention to all keys is computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_compile.measures.operator import measure
from vggt_compile.measures.sample import Rows, drawn, each_head, mean, quantities, weights
from vggt_compile.ops.select_blocks import SLACK, select_blocks
from vggt_compile.ops.sizes import cdiv
from vggt_compile.registry import Share, Stride

HELD = (0.90, 0.95, 0.99)
"""Shares of the mass of a block of queries that the best blocks of keys are counted for."""


@measure("sparsity", "blocks_90", "blocks_95", "blocks_99")
def sparsity(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    frames: int,
    special: int,
    *,
    rows: Rows = 512,
    q_block: Stride = 128,
    k_block: Stride = 64,
    seed: int = 0,
) -> Tensor:
    """Share of the blocks of keys that hold 90, 95 and 99 % of the mass of a block of queries, the best ones first."""
    patches, chosen = _places(q, frames, special, rows, q_block, seed)

    def of_head(q: Tensor, k: Tensor) -> Tensor:
        held = block_mass(q, k, patches, chosen, scale, k_block)
        ranked = held.sort(-1, descending=True).values
        ranked = ranked.cumsum(-1) / ranked.sum(-1, keepdim=True)
        needed = [1 + (ranked < share - SLACK).sum(-1).clamp(max=held.shape[-1] - 1) for share in HELD]
        shares = [torch.where(held.isfinite().all(-1), n / held.shape[-1], torch.nan) for n in needed]
        return quantities(*(mean(share, cdiv(len(patches), q_block)) for share in shares))

    return each_head(of_head, q, k)


@measure("recall", "predicted_recall", "best_recall")
def recall(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    frames: int,
    special: int,
    *,
    keep: Share = 0.25,
    rows: Rows = 512,
    q_block: Stride = 128,
    k_block: Stride = 64,
    seed: int = 0,
) -> Tensor:
    """Share of the mass in the blocks that `blocks: predict` reads with `keep`, and in as many of the best ones."""
    patches, chosen = _places(q, frames, special, rows, q_block, seed)

    def of_head(q: Tensor, k: Tensor) -> Tensor:
        held = block_mass(q, k, patches, chosen, scale, k_block)
        # Only the last drawn block may be short, so the operator cuts them all as they were cut.
        drawn_q, keys = q[None, None, torch.cat(chosen)], k[None, None, patches]
        index, _ = select_blocks(drawn_q, keys, keep, q_block=q_block, k_block=k_block, scale=scale)
        predicted = held.gather(-1, index[0, 0].long()).sum(-1)
        best = held.topk(index.shape[-1]).values.sum(-1)
        shares = (found / held.sum(-1) for found in (predicted, best))
        return quantities(*(mean(share, cdiv(len(patches), q_block)) for share in shares))

    return each_head(of_head, q, k)


def block_mass(
    q: Tensor, k: Tensor, patches: Tensor, chosen: list[Tensor], scale: float | None, k_block: int
) -> Tensor:
    """[blocks of queries, blocks of keys]: attention of drawn queries that the patches of a block of keys get."""
    filled = cdiv(len(patches), k_block) * k_block - len(patches)
    found = [weights(q[block], k, scale).mean(0)[patches] for block in chosen]
    return F.pad(torch.stack(found), (0, filled)).unflatten(-1, (-1, k_block)).sum(-1)


def _places(q: Tensor, frames: int, special: int, rows: int, q_block: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Where the patches are, and the queries of each drawn block; a short last one is as likely as any."""
    per_frame = q.shape[-2] // frames
    tokens = torch.arange(frames * per_frame, device=q.device)
    patches = tokens[tokens % per_frame >= special]
    blocks = cdiv(len(patches), q_block)
    places = drawn(blocks, max(2, rows // q_block), seed, torch.device("cpu")).tolist()
    return patches, [patches[place * q_block : (place + 1) * q_block] for place in places]
