"""The Triton kernel that pools runs of tokens: one program for a run of one head, which reads each token once.

Law: what it writes is `select_blocks.pooled`, times a scale, to the order in which the tokens of a run are summed, and
that order is always the same. Tokens may lie at any strides; the torch operations would pad them first.
"""

# mypy: disallow-incomplete-defs=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from vggt_compile.ops.sizes import cdiv

TOKENS = 32
"""Tokens that a program reads at a time."""


def launch(
    x: Tensor,
    block: int,
    pool: str,
    scale: float = 1.0,
    across: int = 0,
    *,
    wrap: Callable[[Any], Any] = wrap_triton,
) -> Tensor:
    """[B, H, N, D] of any strides → [B, H, n, D] in fp32, n = ⌈N / block⌉: each run's mean or maximum times `scale`.

    With `across` [B, H, D, n rounded up to a multiple of it], and nothing is written behind the n.
    """
    batch, heads, tokens, width = x.shape
    blocks = cdiv(tokens, block)
    shape = (width, cdiv(blocks, across) * across) if across else (blocks, width)
    means = torch.empty((batch, heads, *shape), dtype=torch.float32, device=x.device)
    wrap(_pool)[(blocks, heads, batch)](
        x,
        means,
        *x.stride(),
        shape[1],
        tokens,
        scale,
        BLOCK=block,
        D=int(width),
        WIDTH=triton.next_power_of_2(int(width)),
        TOKENS=min(TOKENS, triton.next_power_of_2(block)),
        MEAN=pool == "mean",
        ACROSS=across > 0,
        num_warps=2,
    )
    return means


@triton.jit(do_not_specialize=["line", "tokens"])
def _pool(
    x, means, x_batch, x_head, x_token, x_lane, line, tokens, scale,
    BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    MEAN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    run, head, item = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    first = run * BLOCK
    size = tl.minimum(tokens - first, BLOCK)
    x += item * x_batch + head * x_head + first.to(tl.int64) * x_token
    total = tl.full([TOKENS, WIDTH], 0.0 if MEAN else float("-inf"), tl.float32)
    for start in tl.static_range(0, BLOCK, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = (token < size)[:, None] & (lane < D)[None, :]
        at = x + token.to(tl.int64)[:, None] * x_token + lane[None, :] * x_lane
        values = tl.load(at, mask=there, other=0.0 if MEAN else float("-inf")).to(tl.float32)
        total = total + values if MEAN else tl.maximum(total, values)
    pooled = tl.div_rn(tl.sum(total, 0), size.to(tl.float32)) if MEAN else tl.max(total, 0)
    nth = item * tl.num_programs(1) + head
    out = means + (nth * D + lane) * line + run if ACROSS else means + (nth * tl.num_programs(0) + run) * D + lane
    tl.store(out, pooled * tl.cast(scale, tl.float32), mask=lane < D)
