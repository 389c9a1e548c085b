"""The Triton kernel that measures the longest key of each head: what bounds every logit with it.

Law: it writes `k.float().square().sum(-1).amax(-1)`, to the order of the sum; a length that is not a number is ignored.
The torch operations took three to five times as long (docs/benchmarks/kernel-log.md).
"""

# mypy: disallow-incomplete-defs=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from vggt_compile.ops.sizes import cdiv

TOKENS, TILES = 64, 16
"""Keys that a program reads at a time, and how often it does."""


def longest_key(k: Tensor) -> Tensor:
    """[B, H, N, D] of any strides → [B, H] in fp32: the square of the length of the longest key."""
    batch, heads, tokens, width = k.shape
    longest = torch.zeros((batch, heads), dtype=torch.float32, device=k.device)
    # Under the interpreter the kernel is not one that torch could trace.
    kernel = wrap_triton(_longest) if isinstance(_longest, triton.JITFunction) else _longest
    kernel[(cdiv(tokens, TOKENS * TILES), heads, batch)](
        k, longest, *k.stride(), tokens, D=width, WIDTH=triton.next_power_of_2(width), TOKENS=TOKENS, TILES=TILES
    )
    return longest


@triton.jit(do_not_specialize=["tokens"])
def _longest(
    k, longest, k_batch, k_head, k_token, k_lane, tokens,
    D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    head, item = tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, WIDTH)
    k += item.to(tl.int64) * k_batch + head.to(tl.int64) * k_head + lane[None, :] * k_lane
    most = tl.zeros([TOKENS], tl.float32)
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * TOKENS + tl.arange(0, TOKENS)
        there = (token < tokens)[:, None] & (lane < D)[None, :]
        keys = tl.load(k + token.to(tl.int64)[:, None] * k_token, mask=there, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.sum(keys * keys, 1))
    tl.atomic_max(longest + item * tl.num_programs(1) + head, tl.max(most, 0))
