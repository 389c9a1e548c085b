"""Which blocks of keys a block of queries reads, told by the scores of their means (arXiv 2509.07120).

Queries and keys are pooled over runs of `q_block` and `k_block` tokens; the last run has what is left. The score of a
key block is the product of the two pooled vectors, and each query block keeps the blocks with the best scores.

The function below is the operator; on CUDA Triton kernels pool and find the same blocks, without a sort.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from vggt_compile.ops.sizes import cdiv, ratio

SLACK = 1e-5
"""What the published code adds to the mass it asks for."""


@triton_op("vggt_compile::select_blocks", mutates_args=())
def select_blocks(
    q: Tensor,
    k: Tensor,
    keep: float,
    cdf: float = 0.0,
    pool: str = "mean",
    coverage: str = "reference",
    most: float = 0.5,
    q_block: int = 128,
    k_block: int = 64,
    scale: float | None = None,
    least: int = 1,
) -> tuple[Tensor, Tensor]:
    """The best key blocks of each query block, for every batch item and head by itself.

    The blocks of a row are ranked by score in fp32, equal scores by index, lower first. With P = softmax of the row,
    it keeps max(least, ⌊keep·nK⌋, n_cdf) blocks, where n_cdf asks for a share of the mass of P:

    - `coverage="reference"`: the longest run of best blocks with mass ≤ cdf + 1e-5, as in the published code. It stops
      one block short of `cdf`.
    - `coverage="reach"`: one more, so that the mass reaches `cdf`.

    Args:
        q, k: [B, H, M, D] and [B, H, N, D], of any strides.
        keep: share of the nK = ⌈N / k_block⌉ key blocks that every row keeps at least, in steps of 1/10000.
        cdf: share of the mass, 0 for none, so that every row keeps the same number.
        pool: "mean" or "max".
        most: with `cdf`, no row keeps more than this share, or than `keep` if that is larger: it keeps its best ones.
            The lists are as long as that.
        scale: of the scores, 1/√D where None.
        least: blocks that every row keeps at least, from 1 to nK; with nK the lists are of all blocks.

    Returns:
        block_index [B, H, nQ, cap] int32, ascending, zeros after the last kept block, and block_count [B, H, nQ] int32.
        cap = max(least, ⌊keep·nK⌋), with `cdf` at least ⌈most·nK⌉. Without keys the counts are 0.
    """
    blocks = cdiv(k.shape[-2], k_block)
    floor, cap = budget(blocks, keep, cdf, most, least)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.is_cuda:
        from vggt_compile.ops import pool_blocks_kernel, select_blocks_kernel

        pooled_q = pool_blocks_kernel.launch(q, q_block, pool, scale)
        pooled_k = pool_blocks_kernel.launch(k, k_block, pool, across=select_blocks_kernel.LANES)
        share = cdf + SLACK if cdf else 0.0
        return select_blocks_kernel.launch(pooled_q, pooled_k, blocks, floor, cap, share, coverage == "reach")
    pooled_q, pooled_k = pooled(q, q_block, pool) * scale, pooled(k, k_block, pool)
    with torch.autocast(q.device.type, enabled=False):  # the scores are fp32 whatever is around
        scores = pooled_q @ pooled_k.mT
    return best_blocks(scores, floor, cap, cdf, coverage == "reach")


@select_blocks.register_fake
def _shapes(
    q: Tensor,
    k: Tensor,
    keep: float,
    cdf: float = 0.0,
    pool: str = "mean",
    coverage: str = "reference",
    most: float = 0.5,
    q_block: int = 128,
    k_block: int = 64,
    scale: float | None = None,
    least: int = 1,
) -> tuple[Tensor, Tensor]:
    """Shapes alone. The operator could be traced for them, but with symbolic sizes that takes seconds a layer."""
    _, cap = budget(cdiv(k.shape[-2], k_block), keep, cdf, most, least)
    count = q.new_empty((*q.shape[:2], cdiv(q.shape[-2], q_block)), dtype=torch.int32)
    return count.new_empty((*count.shape, cap)), count


def pooled(x: Tensor, block: int, pool: str) -> Tensor:
    """[B, H, N, D] → [B, H, ⌈N / block⌉, D] in fp32."""
    tokens = x.shape[-2]
    blocks = cdiv(tokens, block)
    runs = F.pad(x, (0, 0, 0, blocks * block - tokens), value=0.0 if pool == "mean" else -torch.inf)
    runs = runs.unflatten(-2, (blocks, block))
    if pool == "max":
        return runs.amax(-2).float()
    sizes = (tokens - torch.arange(blocks, device=x.device) * block).clamp(max=block)
    return runs.sum(-2, dtype=torch.float32) / sizes.unsqueeze(-1)


def best_blocks(scores: Tensor, floor: int, cap: int, cdf: float, reach: bool) -> tuple[Tensor, Tensor]:
    """The definition: sort each row of scores [B, H, nQ, nK], take the first ones, and list them by index."""
    blocks = scores.shape[-1]
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    count = torch.full(scores.shape[:-1], floor, dtype=torch.int64, device=scores.device)
    if cdf:
        mass = ranked.softmax(-1).cumsum(-1)
        count = torch.maximum(count, (mass <= cdf + SLACK).sum(-1) + int(reach)).clamp(max=cap)
    count = count.clamp(max=blocks)
    kept = torch.arange(cap, device=scores.device) < count[..., None]
    order = F.pad(order, (0, 1))[..., :cap]  # one slot too where there are no blocks
    index = torch.where(kept, order, blocks).sort(-1).values
    return torch.where(kept, index, 0).int(), count.int()


def budget(blocks: int, keep: float, cdf: float, most: float, least: int = 1) -> tuple[int, int]:
    """How many of so many key blocks a row keeps at least, and at most, `least` of none; sizes may be symbolic."""
    at_least, at_most = ratio(keep), ratio(most)
    # torch.sym_max where max() would add a guard
    floor = _max(blocks * at_least.numerator // at_least.denominator, least)
    return floor, _max(floor, cdiv(blocks * at_most.numerator, at_most.denominator)) if cdf else floor


_max = cast(Callable[[int, int], int], torch.sym_max)
