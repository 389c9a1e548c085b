"""The Triton kernel of `attention`: one program for each tile of queries, online softmax over the keys that it reads.

Law: what it writes is `attention.reference`, to rounding, for every tile below. Keys that are read by all come first, in
order; then the listed blocks. Only the tiles at the end of a run are masked; they have a loop of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from vggt_compile.ops.operands import Operands

# The softmax runs in base 2. Its running maximum starts at a finite number, so that keys of weight zero, whose logit is
# -inf, never meet another -inf in a difference.
LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-3.0e38)


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut and scheduled; every choice gives the same result.

    `rows` queries meet `keys` keys at a time in `warps` warps, with `stages` tiles of keys in flight. `longest_first`
    starts query blocks with long lists first; `programs` for each multiprocessor stay and walk over the tiles (0: one
    program a tile). `descriptors` loads keys through tensor descriptors (TMA, sm_90 and later), `specialized` asks
    Triton to give loads and arithmetic to different warps.
    """

    rows: int = 128
    keys: int = 64
    warps: int = 4
    stages: int = 3
    longest_first: bool = True
    programs: int = 0
    descriptors: bool = False
    specialized: bool = False


@triton.jit
def _addresses(base, stride, key, lanes):
    """Pointers [keys, lanes]; one 64-bit product a key, as a view of a fused projection passes 2³¹ elements."""
    return base + key.to(tl.int64)[:, None] * stride + lanes[None, :]


@triton.jit
def _step(
    acc, total, peak, q, k, v, weight, k_t, v_t, batch, head, start, key, valid, scale,
    D: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: what was summed so far is rescaled to the new maximum. `scale` holds log₂e already."""
    WIDTH: tl.constexpr = q.shape[1]
    KEYS: tl.constexpr = key.shape[0]
    lanes = tl.arange(0, WIDTH)
    if DESCRIPTORS:
        keys = k.load([batch, head, start, 0]).reshape(KEYS, WIDTH)
        values = v.load([batch, head, start, 0]).reshape(KEYS, WIDTH)
    elif MASKED:
        inside = valid[:, None] & (lanes < D)[None, :]
        keys = tl.load(_addresses(k, k_t, key, lanes), mask=inside, other=0.0)
        values = tl.load(_addresses(v, v_t, key, lanes), mask=inside, other=0.0)
    elif WIDTH != D:
        inside = (key >= 0)[:, None] & (lanes < D)[None, :]
        keys = tl.load(_addresses(k, k_t, key, lanes), mask=inside, other=0.0)
        values = tl.load(_addresses(v, v_t, key, lanes), mask=inside, other=0.0)
    else:
        keys = tl.load(_addresses(k, k_t, key, lanes))
        values = tl.load(_addresses(v, v_t, key, lanes))

    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if WEIGHTED:
        bias = tl.load(weight + key, mask=valid, other=0.0) if MASKED else tl.load(weight + key)
        logits = logits * scale + (bias * LOG2E)[None, :]
    if MASKED:
        logits = tl.where(valid[None, :], logits, float("-inf"))
    highest = tl.max(logits, 1)
    # Without weights the scale waits for the exponent, where it is part of a multiply-add that is there anyway.
    peak_now = tl.maximum(peak, highest if WEIGHTED else highest * scale)
    power = (logits if WEIGHTED else logits * scale) - peak_now[:, None]
    p = tl.exp2(power)
    shrink = tl.exp2(peak - peak_now)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, peak_now


@triton.jit
def _listed(blocks, at, always, K_BLOCK: tl.constexpr, KEYS: tl.constexpr, count, MASKED: tl.constexpr):
    """Keys `at`, `at` + 1, … of the listed blocks laid end to end: the first, all of them [KEYS], which are listed."""
    cols = tl.arange(0, KEYS)
    slot = at // K_BLOCK
    start = always + tl.load(blocks + slot) * K_BLOCK + at % K_BLOCK
    key = start + cols
    listed = cols >= 0
    if KEYS > K_BLOCK:
        # A tile of two blocks, which may lie anywhere.
        second = tl.load(blocks + slot + 1, mask=slot + 1 < count, other=0) if MASKED else tl.load(blocks + slot + 1)
        key = tl.where(cols < K_BLOCK, key, always + second * K_BLOCK + cols - K_BLOCK)
        listed = (cols < K_BLOCK) | (slot + 1 < count)
    return start, key, listed


@triton.jit(do_not_specialize=["heads", "queries", "tokens", "always", "q_blocks", "capacity", "tiles"])
def attention_kernel(
    q, k, v, out, index, count, order, weight, own_k, own_v, own,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, w_b, w_h, own_k_b, own_k_h, own_k_t, own_v_b, own_v_h, own_v_t,
    heads, queries, tokens, always, q_blocks, capacity, tiles, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    LISTS: tl.constexpr, ORDERED: tl.constexpr, WEIGHTED: tl.constexpr, OWN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Operands as in `attention`; `_b`, `_h`, `_t` are strides in batch, head, token; out is [B, M, H, D], dense."""
    TILES_IN_BLOCK: tl.constexpr = Q_BLOCK // ROWS
    lanes = tl.arange(0, WIDTH)
    cols = tl.arange(0, KEYS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        item = tile // TILES_IN_BLOCK
        if ORDERED:
            item = tl.load(order + item)
        batch = item // q_blocks // heads
        head = item // q_blocks % heads
        b = batch.to(tl.int64)
        h = head.to(tl.int64)
        row = item % q_blocks * Q_BLOCK + tile % TILES_IN_BLOCK * ROWS + tl.arange(0, ROWS)
        inside = (row < queries)[:, None] & (lanes < D)[None, :]
        q_tile = tl.load(_addresses(q + b * q_b + h * q_h, q_t, row, lanes), mask=inside, other=0.0)

        if OWN:
            # The softmax starts with the own key as its only term.
            has = tl.load(own + row, mask=row < queries, other=0) != 0
            mine = has[:, None] & (lanes < D)[None, :]
            own_key = tl.load(_addresses(own_k + b * own_k_b + h * own_k_h, own_k_t, row, lanes), mask=mine, other=0.0)
            own_value = tl.load(
                _addresses(own_v + b * own_v_b + h * own_v_h, own_v_t, row, lanes), mask=mine, other=0.0
            )
            logit = tl.sum(q_tile.to(tl.float32) * own_key.to(tl.float32), 1) * scale
            peak = tl.where(has, logit, FLOOR)
            total = tl.where(has, 1.0, 0.0)
            acc = own_value.to(tl.float32)
        else:
            peak = tl.full([ROWS], FLOOR, tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, WIDTH], tl.float32)

        k_plane = k if DESCRIPTORS else k + b * k_b + h * k_h
        v_plane = v if DESCRIPTORS else v + b * v_b + h * v_h
        w_plane = weight + b * w_b + h * w_h

        whole = always // KEYS * KEYS
        for start in tl.range(0, whole, KEYS, warp_specialize=SPECIALIZED):
            acc, total, peak = _step(
                acc, total, peak, q_tile, k_plane, v_plane, w_plane, k_t, v_t, batch, head, start, start + cols,
                cols >= 0, scale, D, False, WEIGHTED, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        for start in tl.range(whole, always, KEYS, num_stages=1):
            acc, total, peak = _step(
                acc, total, peak, q_tile, k_plane, v_plane, w_plane, k_t, v_t, batch, head, start, start + cols,
                start + cols < always, scale, D, True, WEIGHTED, DESCRIPTORS, PRECISION,
            )  # fmt: skip

        if LISTS:
            blocks = index + item.to(tl.int64) * capacity
            listed = tl.load(count + item)
            # Lists ascend, so a block that the end of the keys cuts short is the last of its list.
            last = tl.load(blocks + listed - 1, mask=listed > 0, other=0)
            full = tl.where((listed > 0) & (always + (last + 1) * K_BLOCK > tokens), listed - 1, listed)
            whole = full * K_BLOCK // KEYS * KEYS
            for at in tl.range(0, whole, KEYS, warp_specialize=SPECIALIZED):
                start, key, valid = _listed(blocks, at, always, K_BLOCK, KEYS, listed, False)
                acc, total, peak = _step(
                    acc, total, peak, q_tile, k_plane, v_plane, w_plane, k_t, v_t, batch, head, start, key,
                    valid, scale, D, False, WEIGHTED, DESCRIPTORS, PRECISION,
                )  # fmt: skip
            for at in tl.range(whole, listed * K_BLOCK, KEYS, num_stages=1):
                start, key, valid = _listed(blocks, at, always, K_BLOCK, KEYS, listed, True)
                acc, total, peak = _step(
                    acc, total, peak, q_tile, k_plane, v_plane, w_plane, k_t, v_t, batch, head, start, key,
                    valid & (key < tokens), scale, D, True, WEIGHTED, DESCRIPTORS, PRECISION,
                )  # fmt: skip

        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        place = _addresses(out + (b * queries * heads + h) * D, heads * D, row, lanes)
        tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


def launch(x: Operands, tile: Tile | None = None) -> Tensor:
    """The result [B, H, M, D] of `attention`, stored token by token, with the tile of this device or a given one."""
    batch, heads, queries, head_dim = x.q.shape
    tile = fitted(tile or chosen(x), x, shared_memory(x.q.device))
    out = x.v.new_empty(batch, queries, heads, head_dim)
    arguments = _arguments(x, tile, out)
    # Under the interpreter the kernel is not one that torch could trace.
    kernel = wrap_triton(attention_kernel) if isinstance(attention_kernel, triton.JITFunction) else attention_kernel
    kernel[(_programs(tile, arguments["tiles"], x.q.device),)](
        **arguments, num_warps=tile.warps, num_stages=tile.stages
    )
    return out.transpose(1, 2)
