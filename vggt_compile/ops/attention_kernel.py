"""The Triton kernel of `attention`: one program for each tile of queries, online softmax over the keys that it reads.

Law: what it writes is `attention.reference`, to rounding, for every `Tile`. Keys that are read by all come first, in
order; then the listed blocks. Only the tiles at the end of a run are masked; they have a loop of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from vggt_compile.ops.operands import Operands
from vggt_compile.ops.tiles import Tile, chosen, fitted, longest_first, shared_memory, width

# The softmax runs in base 2. Its running maximum starts at a finite number, so that keys of weight zero, whose logit is
# -inf, never meet another -inf in a difference.
LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-3.0e38)


@triton.jit
def _addresses(base, stride, key, lanes):
    """Pointers [keys, lanes]; one 64-bit product a key, as a view of a fused projection passes 2³¹ elements."""
    return base + key.to(tl.int64)[:, None] * stride + lanes[None, :]


@triton.jit
def _load(
    x, stride, key, valid, batch, head, start, D: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Keys or values [KEYS, WIDTH], zeros where there are none. A mask is carried only where something is masked."""
    lanes = tl.arange(0, WIDTH)
    if DESCRIPTORS:
        loaded = x.load([batch, head, start, 0]).reshape(key.shape[0], WIDTH)
    elif MASKED:
        loaded = tl.load(_addresses(x, stride, key, lanes), mask=valid[:, None] & (lanes < D)[None, :], other=0.0)
    elif WIDTH != D:
        loaded = tl.load(_addresses(x, stride, key, lanes), mask=(key >= 0)[:, None] & (lanes < D)[None, :], other=0.0)
    else:
        loaded = tl.load(_addresses(x, stride, key, lanes))
    return loaded


@triton.jit
def _step(
    acc, total, peak, q, k, v, weight, k_t, v_t, batch, head, start, key, valid, scale,
    D: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: what was summed so far is rescaled to the new maximum. `scale` holds log₂e already."""
    keys = _load(k, k_t, key, valid, batch, head, start, D, q.shape[1], MASKED, DESCRIPTORS)
    values = _load(v, v_t, key, valid, batch, head, start, D, q.shape[1], MASKED, DESCRIPTORS)
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if WEIGHTED:
        bias = tl.load(weight + key, mask=valid, other=0.0) if MASKED else tl.load(weight + key)
        logits = logits * scale + (bias * LOG2E)[None, :]
    if MASKED:
        logits = tl.where(valid[None, :], logits, float("-inf"))
    highest = tl.max(logits, 1)
    # Without weights the scale waits for the exponent, where it is part of a multiply-add that is there anyway.
    peak_now = tl.maximum(peak, highest if WEIGHTED else highest * scale)
    p = tl.exp2((logits if WEIGHTED else logits * scale) - peak_now[:, None])
    shrink = tl.exp2(peak - peak_now)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, peak_now


@triton.jit
def _listed(blocks, at, always, end, K_BLOCK: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Of the listed blocks laid end to end the keys from `at` on, [KEYS], and the first of them."""
    cols = tl.arange(0, KEYS)
    start = always + tl.load(blocks + at // K_BLOCK) * K_BLOCK + at % K_BLOCK
    key = start + cols
    if KEYS > K_BLOCK:
        # A tile is two blocks, which may lie anywhere.
        place = blocks + at // K_BLOCK + 1
        second = tl.load(place, mask=at + K_BLOCK < end, other=0) if MASKED else tl.load(place)
        key = tl.where(cols < K_BLOCK, key, always + second * K_BLOCK + cols - K_BLOCK)
    return start, key


@triton.jit
def _beginning(
    q, own_k, own_v, own, k_t, v_t, row, queries, scale,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The softmax before its first tile: nothing, or the own key as its only term."""
    peak = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    if OWN:
        lanes = tl.arange(0, WIDTH)
        has = tl.load(own + row, mask=row < queries, other=0) != 0
        inside = has[:, None] & (lanes < D)[None, :]
        key = tl.load(_addresses(own_k, k_t, row, lanes), mask=inside, other=0.0)
        logit = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale
        peak = tl.where(has, logit, peak)
        total = tl.where(has, 1.0, total)
        acc = tl.load(_addresses(own_v, v_t, row, lanes), mask=inside, other=0.0).to(tl.float32)
    return acc, total, peak


@triton.jit(do_not_specialize=["heads", "queries", "tokens", "always", "q_blocks", "capacity", "tiles"])
def attention_kernel(
    q, k, v, out, index, count, order, weight, own_k, own_v, own,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, w_b, w_h, own_k_b, own_k_h, own_k_t, own_v_b, own_v_h, own_v_t,
    heads, queries, tokens, always, q_blocks, capacity, tiles, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    LISTS: tl.constexpr, ORDERED: tl.constexpr, WEIGHTED: tl.constexpr, OWN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Operands as in `attention`; `_b`, `_h`, `_t` are strides in batch, head, token; out is [B, M, H, D], dense."""
    TILES_IN_BLOCK: tl.constexpr = Q_BLOCK // ROWS
    scale = tl.cast(scale, tl.float32)  # Inductor hands over Python's floats as doubles
    lanes = tl.arange(0, WIDTH)
    cols = tl.arange(0, KEYS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        item = tile // TILES_IN_BLOCK
        if ORDERED:
            item = item - item % q_blocks + tl.load(order + item)
        batch = item // q_blocks // heads
        head = item // q_blocks % heads
        b = batch.to(tl.int64)
        h = head.to(tl.int64)
        row = item % q_blocks * Q_BLOCK + tile % TILES_IN_BLOCK * ROWS + tl.arange(0, ROWS)
        inside = (row < queries)[:, None] & (lanes < D)[None, :]
        q_tile = tl.load(_addresses(q + b * q_b + h * q_h, q_t, row, lanes), mask=inside, other=0.0)
        acc, total, peak = _beginning(
            q_tile, own_k + b * own_k_b + h * own_k_h, own_v + b * own_v_b + h * own_v_h, own, own_k_t, own_v_t,
            row, queries, scale, D, ROWS, WIDTH, OWN,
        )  # fmt: skip
        k_plane = k if DESCRIPTORS else k + b * k_b + h * k_h
        v_plane = v if DESCRIPTORS else v + b * v_b + h * v_h
        w_plane = weight + b * w_b + h * w_h

        whole = always // KEYS * KEYS
        for start in tl.range(0, whole, KEYS):
            acc, total, peak = _step(
                acc, total, peak, q_tile, k_plane, v_plane, w_plane, k_t, v_t, batch, head, start, start + cols,
                True, scale, D, False, WEIGHTED, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        for start in tl.range(whole, always, KEYS, num_stages=1):
            acc, total, peak = _step(
                acc, total, peak, q_tile, k_plane, v_plane, w_plane, k_t, v_t, batch, head, start, start + cols,
                start + cols < always, scale, D, True, WEIGHTED, DESCRIPTORS, PRECISION,
            )  # fmt: skip

        if LISTS:
            blocks = index + item.to(tl.int64) * capacity
            listed = tl.load(count + item)
            end = listed * K_BLOCK
            # Lists ascend, so a block that the end of the keys cuts short is the last of its list.
            last = tl.load(blocks + listed - 1, mask=listed > 0, other=0)
            cut = (listed > 0) & (always + (last + 1) * K_BLOCK > tokens)
            whole = tl.where(cut, end - K_BLOCK, end) // KEYS * KEYS
            for at in tl.range(0, whole, KEYS):
                start, key = _listed(blocks, at, always, end, K_BLOCK, KEYS, False)
                acc, total, peak = _step(
                    acc, total, peak, q_tile, k_plane, v_plane, w_plane, k_t, v_t, batch, head, start, key,
                    True, scale, D, False, WEIGHTED, DESCRIPTORS, PRECISION,
                )  # fmt: skip
            for at in tl.range(whole, end, KEYS, num_stages=1):
                start, key = _listed(blocks, at, always, end, K_BLOCK, KEYS, True)
                acc, total, peak = _step(
                    acc, total, peak, q_tile, k_plane, v_plane, w_plane, k_t, v_t, batch, head, start, key,
                    (at + cols < end) & (key < tokens), scale, D, True, WEIGHTED, DESCRIPTORS, PRECISION,
                )  # fmt: skip

        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        place = _addresses(out + (b * queries * heads + h) * D, heads * D, row, lanes)
        tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


def launch(x: Operands, tile: Tile | None = None) -> Tensor:
    """The result [B, H, M, D] of `attention`, stored token by token, with the tile of this device or a given one."""
    if x.q.dtype == torch.float64:
        raise ValueError("vggt_compile::attention: float64 has a reference only, not a kernel")
    batch, heads, queries, head_dim = x.q.shape
    tile = chosen(x) if tile is None else fitted(tile, x, shared_memory(x.q.device))
    out = x.v.new_empty(batch, queries, heads, head_dim)
    arguments = _arguments(x, tile) | _flags(x, tile) | {"out": out}
    grid = (_programs(tile, arguments["tiles"], x.q.device),)
    # Under the interpreter the kernel is not one that torch could trace.
    kernel = wrap_triton(attention_kernel) if isinstance(attention_kernel, triton.JITFunction) else attention_kernel
    kernel[grid](**arguments, num_warps=tile.warps, num_stages=tile.stages)
    return out.transpose(1, 2)


def _arguments(x: Operands, tile: Tile) -> dict[str, Any]:
    """What the kernel reads when it runs; where an operand is not given, q holds its place and is not read."""
    heads, queries = x.q.shape[1:3]
    q, k, v, own_k, own_v = (_unit_stride(x.q if y is None else y) for y in (x.q, x.k, x.v, x.own_k, x.own_v))
    weight = q if (given := x.weight()) is None else _unit_stride(given)
    index, count, order = (q, q, q) if (lists := _lists(x, tile)) is None else lists
    q_block = tile.rows if lists is None else x.q_block
    q_blocks = (queries + q_block - 1) // q_block
    return {
        "q": q,
        "k": _described(k, tile, width(x)),
        "v": _described(v, tile, width(x)),
        "weight": weight,
        "own_k": own_k,
        "own_v": own_v,
        "own": q if x.own is None else x.own.contiguous(),
        "index": index,
        "count": count,
        "order": order,
        **_strides(q=q, k=k, v=v, own_k=own_k, own_v=own_v),
        "w_b": weight.stride(0),
        "w_h": weight.stride(1),
        "heads": heads,
        "queries": queries,
        "tokens": k.shape[2],
        "always": k.shape[2] if lists is None else x.always,
        "q_blocks": q_blocks,
        "capacity": 0 if x.block_index is None else x.block_index.shape[3],
        "tiles": x.q.shape[0] * heads * q_blocks * (q_block // tile.rows),
        "scale": x.scale * LOG2E.value,
    }


def _lists(x: Operands, tile: Tile) -> tuple[Tensor, Tensor, Tensor] | None:
    """Index, count, and the query blocks of each head in the order in which they start."""
    if x.block_index is None or x.block_count is None:
        return None
    count = x.block_count.contiguous()
    order = longest_first(count) if tile.longest_first else count
    return x.block_index.contiguous(), count, order


def _flags(x: Operands, tile: Tile) -> dict[str, Any]:
    """What the kernel is compiled for: nothing here depends on how many tokens there are."""
    lists = x.block_index is not None
    return {
        "D": x.q.shape[3],
        "WIDTH": width(x),
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "Q_BLOCK": x.q_block if lists else tile.rows,
        "K_BLOCK": x.k_block,
        "LISTS": lists,
        "ORDERED": lists and tile.longest_first,
        "WEIGHTED": x.key_log_weight is not None,
        "OWN": x.own is not None,
        "DESCRIPTORS": tile.descriptors,
        "PRECISION": "ieee" if x.q.dtype == torch.float32 else "tf32",  # read for float32 only
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bht")}


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _described(x: Tensor, tile: Tile, lanes: int) -> Any:
    """A tensor descriptor over [B, H, T, D] that loads `keys` tokens of one head; beyond the end it gives zeros."""
    if not tile.descriptors:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tile.keys, lanes])


def _programs(tile: Tile, tiles: int, device: torch.device) -> int:
    if not tile.programs:
        return tiles
    return torch.sym_min(tiles, tile.programs * torch.cuda.get_device_properties(device).multi_processor_count)
