"""Operands of `attention` for tests, and what it must give in float64, whatever it does inside."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vggt_compile.ops.operands import Operands


@dataclass(frozen=True)
class Case:
    """`density` None is no lists; `fused` takes q, k and v from one projection [B, tokens, 3, H, D]."""

    batch: int = 1
    heads: int = 2
    queries: int = 70
    always: int = 7
    patches: int = 90
    head_dim: int = 32
    q_block: int = 32
    k_block: int = 16
    density: float | None = 0.5
    weighted: bool = False
    own: bool = False
    fused: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0


def operands(case: Case) -> Operands:
    torch.manual_seed(case.seed)
    tokens = case.always + case.patches
    shape = (case.batch, case.heads, case.queries, case.head_dim)
    if case.fused:
        length = max(case.queries, tokens)
        fused = torch.randn(case.batch, length, 3, case.heads, case.head_dim).to(case.dtype)
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        q, k, v = q[:, :, : case.queries], k[:, :, :tokens], v[:, :, :tokens]
    else:
        q = torch.randn(shape).to(case.dtype)
        k, v = (torch.randn(case.batch, case.heads, tokens, case.head_dim).to(case.dtype) for _ in "kv")
    index, count = (None, None) if case.density is None else lists(case)
    weight = torch.randn(1, case.heads, tokens) if case.weighted else None
    own: tuple[Tensor | None, ...] = (None, None, None)
    if case.own:
        own = (*(torch.randn(shape).to(case.dtype) for _ in "kv"), torch.rand(case.queries) < 0.5)
    blocks = (index, count, case.always, case.q_block, case.k_block)
    return Operands(q, k, v, *blocks, weight, *own, scale=case.head_dim**-0.5)


def lists(case: Case) -> tuple[Tensor, Tensor]:
    """Random lists; what follows their end is nonsense on purpose."""
    blocks = -(-case.queries // case.q_block), -(-case.patches // case.k_block)
    assert case.density is not None
    kept = torch.rand(case.batch, case.heads, *blocks) < case.density
    index = torch.where(kept, torch.arange(blocks[1]), 2**30).sort(-1).values
    return index.int(), kept.sum(-1).int()


def reads(x: Operands) -> Tensor:
    """Whether a query reads a key, [B, H, M, A + N], entry by entry."""
    batch, heads, queries, _ = x.q.shape
    if x.block_index is None or x.block_count is None:
        return torch.ones(batch, heads, queries, x.k.shape[2], dtype=torch.bool)
    read = torch.zeros(batch, heads, queries, x.k.shape[2], dtype=torch.bool)
    read[..., : x.always] = True
    for b, h, i in torch.cartesian_prod(*map(torch.arange, x.block_count.shape)).tolist():
        rows = slice(i * x.q_block, (i + 1) * x.q_block)
        for block in x.block_index[b, h, i, : x.block_count[b, h, i]].tolist():
            start = x.always + block * x.k_block
            read[b, h, rows, start : start + x.k_block] = True
    return read


def wanted(x: Operands) -> Tensor:
    """The result in float64, all logits at once."""
    q, k, v = x.q.double(), x.k.double(), x.v.double()
    logits = q @ k.transpose(-1, -2) * x.scale
    if x.key_log_weight is not None:
        logits = logits + x.key_log_weight.double().unsqueeze(-2)
    logits = logits.masked_fill(~reads(x), -torch.inf)
    if x.own is None or x.own_k is None or x.own_v is None:
        return logits.softmax(-1).nan_to_num(0) @ v
    mine = ((q * x.own_k.double()).sum(-1) * x.scale).masked_fill(~x.own, -torch.inf)
    weights = torch.cat((logits, mine.unsqueeze(-1)), -1).softmax(-1).nan_to_num(0)
    return weights[..., :-1] @ v + weights[..., -1:] * x.own_v.double()


def eager(x: Operands) -> Tensor:
    """What spelled-out attention gives in the dtype of the operands: products and weights are rounded to it."""
    logits = (x.q @ x.k.transpose(-1, -2)).float() * x.scale
    if x.key_log_weight is not None:
        logits = logits + x.key_log_weight.unsqueeze(-2)
    logits = logits.masked_fill(~reads(x), -torch.inf)
    if x.own is not None and x.own_k is not None:
        mine = ((x.q * x.own_k).sum(-1).float() * x.scale).masked_fill(~x.own, -torch.inf)
        logits = torch.cat((logits, mine.unsqueeze(-1)), -1)
    weights = logits.softmax(-1).nan_to_num(0).to(x.v.dtype)
    out = weights[..., : x.k.shape[2]] @ x.v
    return out if x.own_v is None else out + weights[..., -1:] * x.own_v


def double(x: Operands) -> Operands:
    names = ("q", "k", "v", "own_k", "own_v")
    return replace(x, **{name: None if (y := getattr(x, name)) is None else y.double() for name in names})
