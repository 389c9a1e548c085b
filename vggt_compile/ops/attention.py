"""Attention in which every query block reads its own list of key blocks, keys carry weights, and some are always read.

The function `reference` is the operator's definition, its path on the CPU, and the oracle of its tests. On CUDA the
same function is one kernel: on Hopper `hopper.attend` where it suits, else `attention_kernel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from vggt_compile.ops.hopper import attend, suits
from vggt_compile.ops.operands import Operands
from vggt_compile.ops.sizes import pieces

Rows = tuple[Tensor | None, ...]  # queries, own keys, own values, which have one: [B, H, ..., rows, channels]


@triton_op("vggt_compile::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor | None = None,
    block_count: Tensor | None = None,
    always: int = 0,
    q_block: int = 128,
    k_block: int = 64,
    key_log_weight: Tensor | None = None,
    own_k: Tensor | None = None,
    own_v: Tensor | None = None,
    own: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale·q kᵀ + key_log_weight) v over the keys that each query block reads; fp32 inside, v.dtype outside.

    `q` [B, H, M, D] meets `k`, `v` [B, H, A + N, D]. The first A = `always` keys are read by every query. Key block j
    is the keys from A + j·k_block up to A + (j+1)·k_block or the end, query block i the queries from i·q_block.

    - `block_index` [B, H, ⌈M/q_block⌉, cap], int32: the key blocks that a query block reads, ascending, each once.
      `block_count` [B, H, ⌈M/q_block⌉], int32, says how many of them count; what follows may be anything. Without
      both every query reads every key.
    - `key_log_weight` [B or 1, H or 1, A + N], fp32, is added to the logits: log n makes a key count n times, -inf
      makes it count not at all.
    - `own_k`, `own_v` [B, H, M, D]: a query i with `own[i]` ([M], bool) reads this key of its own too.

    A query that reads no key at all gives zeros. The result [B, H, M, D] lies in memory token by token, [B, M, H, D],
    as that of `scaled_dot_product_attention` does. Strides are free but for the last one, so q, k and v may be views of
    one fused projection. `scale` is positive, D^-½ unless given. There is no gradient.

    Raises ValueError for shapes and dtypes that do not fit each other, NotImplementedError on a backward pass.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocks = (block_index, block_count, always, q_block, k_block)
    operands = Operands(q, k, v, *blocks, key_log_weight, own_k, own_v, own, scale)
    operands.check()
    if q.device.type == "cuda":
        if suits(operands):
            return attend(operands)
        from vggt_compile.ops.attention_kernel import launch  # Triton may be missing where there is no GPU

        return launch(operands)
    with torch.autocast(q.device.type, enabled=False):  # the law is in fp32 whatever is around
        return reference(operands)


@attention.register_fake
def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor | None = None,
    block_count: Tensor | None = None,
    always: int = 0,
    q_block: int = 128,
    k_block: int = 64,
    key_log_weight: Tensor | None = None,
    own_k: Tensor | None = None,
    own_v: Tensor | None = None,
    own: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What tracing needs to know, without a trace of the whole reference for every layer."""
    blocks = (block_index, block_count, always, q_block, k_block)
    Operands(q, k, v, *blocks, key_log_weight, own_k, own_v, own, scale or 1.0).check()
    batch, heads, queries, head_dim = q.shape
    return v.new_empty(batch, queries, heads, head_dim).transpose(1, 2)


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "vggt_compile::attention has no gradient: run the rewritten model under torch.inference_mode() or "
        "torch.no_grad(), or train the original one"
    )


attention.register_autograd(_refuse_gradient)


def reference(x: Operands) -> Tensor:
    """The operator in plain PyTorch, piece by piece; float64 stays float64."""
    own = None if x.own is None else x.own[None, None, :, None]
    rows = (x.q, x.own_k, x.own_v, own)  # all have their queries in dimension 2
    pieces = _every_key(x, rows) if x.block_index is None else _listed_keys(x, rows)
    out = torch.cat(list(pieces), dim=2)[:, :, : x.q.shape[2]]
    return out.to(x.v.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _every_key(x: Operands, rows: Rows) -> Iterator[Tensor]:
    """Results [B, H, R, D] of some queries after the others."""
    batch, heads, queries, _ = x.q.shape
    for part in pieces(queries, batch * heads * x.k.shape[2] * 4):
        yield _attend(_take(rows, part), x.k, x.v, _log_weight(x).unsqueeze(2), x.scale)


def _listed_keys(x: Operands, rows: Rows) -> Iterator[Tensor]:
    """Results [B, H, R, D] of some query blocks after the others, each over a copy of the keys that it reads."""
    assert x.block_index is not None
    batch, heads, _, head_dim = x.q.shape
    blocks, cap = x.block_index.shape[2:]
    split = tuple(None if row is None else _split(row, blocks, x.q_block) for row in rows)
    read = batch * heads * (x.always + cap * x.k_block)
    for part in pieces(blocks, read * (x.q_block + 2 * head_dim) * 4):
        key, listed = _reads(x, part)  # [B, H, n, S]
        flat = key.flatten(2)
        k, v = (y.gather(2, flat.unsqueeze(-1).expand(-1, -1, -1, head_dim)) for y in (x.k, x.v))
        k, v = (y.unflatten(2, key.shape[2:]).where(listed.unsqueeze(-1), 0) for y in (k, v))
        bias = _log_weight(x).gather(2, flat).unflatten(2, key.shape[2:]).where(listed, -torch.inf)
        yield _attend(_take(split, part), k, v, bias.unsqueeze(3), x.scale).flatten(2, 3)


def _reads(x: Operands, part: slice) -> tuple[Tensor, Tensor]:
    """Keys that some query blocks read, [B, H, n, A + cap·k_block], and which of these entries count."""
    assert x.block_index is not None
    assert x.block_count is not None
    block, count, tokens = x.block_index[:, :, part].long(), x.block_count[:, :, part, None], x.k.shape[2]
    counts = torch.arange(block.shape[3], device=block.device) < count
    inside = torch.arange(x.k_block, device=block.device)
    key = (x.always + block.where(counts, 0).unsqueeze(-1) * x.k_block + inside).flatten(3)
    listed = counts.repeat_interleave(x.k_block, dim=3) & (key < tokens)
    first = torch.arange(x.always, device=block.device).expand(*key.shape[:3], x.always)
    return torch.cat((first, key.where(listed, 0)), 3), torch.cat((first >= 0, listed), 3)


def _attend(rows: Rows, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax attention of queries [..., R, D] over k, v [..., S, D], bias [..., 1, S]; an own key is one column."""
    q, own_k, own_v, own = rows
    assert q is not None
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    logits = q @ k.transpose(-1, -2) * scale + bias
    if own is not None and own_k is not None:
        logit = (q * own_k).sum(-1, keepdim=True) * scale
        logits = torch.cat((logits, logit.where(own, -torch.inf)), -1)
    weights = logits.softmax(-1).where((logits != -torch.inf).any(-1, keepdim=True), 0)
    out = weights[..., : k.shape[-2]] @ v
    if own is not None and own_v is not None:
        out = out + weights[..., k.shape[-2] :] * own_v.where(own, 0)
    return out


def _log_weight(x: Operands) -> Tensor:
    """[B, H, A + N], zeros where none are given."""
    weight = x.weight()
    return x.q.new_zeros(1, dtype=torch.float32).expand(x.k.shape[:3]) if weight is None else weight


def _take(rows: Rows, part: slice) -> Rows:
    return tuple(None if row is None else row[:, :, part] for row in rows)


def _split(x: Tensor, blocks: int, size: int) -> Tensor:
    """[B, H, M, C] as blocks of queries [B, H, blocks, size, C], the last filled up with zeros."""
    return F.pad(x, (0, 0, 0, blocks * size - x.shape[2])).unflatten(2, (blocks, size))
