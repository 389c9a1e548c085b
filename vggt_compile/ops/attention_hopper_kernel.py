"""The Gluon kernel of `attention` for Hopper: loads, products and exponentials run beside each other.

Law: what it writes is `attention.reference`, to rounding, for the operands that `suits` accepts.

A program has 128 queries of one head. One warp loads tiles of keys and values through the tensor memory accelerator
into a ring of buffers, each of two *units* of 64 keys that may lie anywhere. Two groups of four warps have 64 queries
each; while one group's products are in the tensor cores, the other computes its exponentials, as in FlashAttention-3
(arXiv:2407.08608). Units that are cut short come last: only their tiles are masked, in a loop of their own.

Masked keys have weight zero, but their values are multiplied with it: those that share a unit with the last key that
all queries read must be finite.
"""

# mypy: disallow-incomplete-defs=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vggt_compile.ops.longest_key_kernel import longest_key
from vggt_compile.ops.operands import Operands
from vggt_compile.ops.tiles import longest_first

# The softmax runs in base 2. Its running maximum starts at a finite number, so that masked logits, which are -inf,
# never meet another -inf in a difference.
LOG2E = 1.4426950408889634
FLOOR = gl.constexpr(-3.0e38)

# How far, in powers of two, weights may exceed one where the maximum is fixed: in bfloat16 up to the square root of its
# range, so that sums over all keys stay in it too, in float16 up to its end.
BFLOAT16_ROOM = gl.constexpr(64.0)
FLOAT16_ROOM = gl.constexpr(14.0)

# What Triton 3.6 has under other names than 3.9.
IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
group_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

RING = 160 * 2**10
"""Bytes of the ring of keys and values: with the queries, what a multiprocessor of sm_90 has, and a little less."""


@gluon.jit
def _runs(index, count, item, always, tokens, capacity, LISTS: gl.constexpr, K_BLOCK: gl.constexpr):
    """Of the keys of one query block: its list, its last block, and how many units there are of each sort.

    `whole` units are read by all, those up to `full` are listed, then comes `partial`, the rest of the keys that all
    read, and `cut`, the units of a block that the end of the keys cuts short.
    """
    PER_BLOCK: gl.constexpr = K_BLOCK // 64
    whole = always // 64
    partial = (always % 64 > 0).to(gl.int32)
    full, last, cut = whole, always * 0, always * 0
    blocks = index
    if LISTS:
        blocks = index + item.to(gl.int64) * capacity
        listed = gl.load(count + item)
        last = gl.load(blocks + listed - 1, mask=listed > 0, other=0)
        # Lists ascend, so only the last block of one can be cut.
        is_cut = ((listed > 0) & (always + (last + 1) * K_BLOCK > tokens)).to(gl.int32)
        full = whole + (listed - is_cut) * PER_BLOCK
        cut = is_cut * PER_BLOCK
    return blocks, whole, full, partial, cut, last, always, tokens


@gluon.jit
def _unit(u, runs, LISTS: gl.constexpr, K_BLOCK: gl.constexpr):
    """First key of a unit and how many of its 64 keys count; of units beyond the last one none do."""
    PER_BLOCK: gl.constexpr = K_BLOCK // 64
    blocks, whole, full, partial, cut, last, always, tokens = runs
    start = u * 64
    valid = u * 0 + 64
    if LISTS:
        j = u - whole
        block = gl.load(blocks + j // PER_BLOCK, mask=(j >= 0) & (u < full), other=0)
        start = gl.where(j < 0, start, always + block * K_BLOCK + j % PER_BLOCK * 64)
    if u >= full:
        j = u - full - partial
        start = gl.where(j < 0, whole * 64, always + last * K_BLOCK + j * 64)
        left = gl.where(j < 0, always % 64, gl.where(j < cut, tokens - start, 0))
        valid = gl.minimum(gl.maximum(left, 0), 64)
        start = gl.where(valid > 0, start, tokens)  # beyond the end there are zeros
    return start, valid


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, ring, runs, tiles, at, UNITS: gl.constexpr, LISTS: gl.constexpr, K_BLOCK: gl.constexpr
):
    """The warp that loads: queries once, then tile after tile as buffers become free."""
    q_ring, k_ring, v_ring, q_ready, ready, free = ring
    batch, head, row = at
    STAGES: gl.constexpr = ready.shape[0]
    D: gl.constexpr = q_ring.shape[2]
    BYTES: gl.constexpr = 64 * D * 2
    mbarrier.expect(q_ready, 2 * BYTES)
    for half in gl.static_range(2):
        rows = q_ring.index(half).reshape([1, 1, 64, D])
        load_tile(q_desc, [batch, head, row + 64 * half, 0], q_ready, rows)
    for tile in range(tiles):
        stage = tile % STAGES
        bar = ready.index(stage)
        mbarrier.wait(free.index(stage), (tile // STAGES + 1) % 2)
        mbarrier.expect(bar, 2 * UNITS * BYTES)
        for unit in gl.static_range(UNITS):
            start, _ = _unit(tile * UNITS + unit, runs, LISTS, K_BLOCK)
            keys = k_ring.index(stage * UNITS + unit).reshape([1, 1, 64, D])
            values = v_ring.index(stage * UNITS + unit).reshape([1, 1, 64, D])
            load_tile(k_desc, [batch, head, start, 0], bar, keys)
            load_tile(v_desc, [batch, head, start, 0], bar, values)


@gluon.jit
def _masked(s, tile, runs, UNITS: gl.constexpr, LISTS: gl.constexpr, K_BLOCK: gl.constexpr):
    """The logits of a tile, [64, 64 · UNITS], with -inf for keys that do not count."""
    col = gl.arange(0, 64 * UNITS, layout=gl.SliceLayout(0, s.type.layout))
    _, valid = _unit(tile * UNITS, runs, LISTS, K_BLOCK)
    counts = col < valid
    if UNITS == 2:
        _, valid = _unit(tile * UNITS + 1, runs, LISTS, K_BLOCK)
        counts = gl.where(col < 64, counts, col - 64 < valid)
    return gl.where(counts[None, :], s, float("-inf"))


@gluon.jit
def _as_tiles(ring, shape: gl.constexpr, layout: gl.constexpr):
    """The same buffers, units of one tile taken together."""
    return ring.reinterpret(ring.dtype, shape, layout) if IS_PUBLIC else ring._reinterpret(ring.dtype, shape, layout)


@gluon.jit
def _softmax(s, peak, scale, FIXED: gl.constexpr):
    """Weights of logits [64, N] against a maximum, their partial sums [64, 8], that maximum, what older sums shrink by.

    Sums stay in eight parts until the end, as they lie in the threads: no thread asks another one. Where the maximum is
    fixed, it is that of the first tile, nothing shrinks, and a third of the instructions of a tile is saved.
    """
    # The scale waits for the exponent, where it is part of a multiply-add that is there anyway.
    highest = peak if FIXED else gl.maximum(peak, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - highest[:, None])
    return p, gl.sum(p.reshape([64, s.shape[1] // 8, 8]), 1), highest, gl.exp2(peak - highest)


@gluon.jit
def _may_stay(q, longest, peak, scale, ROOM: gl.constexpr):
    """Whether no logit of these 64 queries can exceed the maxima that they have by more than `ROOM` powers of two.

    A logit is at most the product of the lengths of its query and its key (Cauchy and Schwarz). What lies far below a
    maximum vanishes under a larger one too; only what lies above it could leave the range of numbers. NaN: no.
    """
    QUARTERS: gl.constexpr = gl.BlockedLayout([1, q.shape[1] // 4], [8, 4], [4, 1], [1, 0])
    x = q.load(QUARTERS).to(gl.float32)
    most = gl.sqrt(gl.sum(x * x, 1)) * longest * gl.abs(scale)
    fits = most - gl.convert_layout(peak, most.type.layout) <= ROOM
    # Each warp counts all rows, so that no warp asks another one.
    ALL: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    return gl.sum(gl.convert_layout(fits.to(gl.int32), ALL), 0) == 64


@gluon.jit
def _with_own_key(acc, total, peak, q, own, rows, queries, scale, D: gl.constexpr):
    """The softmax of 64 rows after one more term, the key of its own that a query may have."""
    own_k, own_v, own_has, own_k_t, own_v_t = own
    layout: gl.constexpr = acc.type.layout
    lanes = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    has = gl.load(own_has + rows, mask=rows < queries, other=0) != 0
    place = rows.to(gl.int64)[:, None]
    key = gl.load(own_k + place * own_k_t + lanes[None, :], mask=has[:, None], other=0.0).to(gl.float32)
    value = gl.load(own_v + place * own_v_t + lanes[None, :], mask=has[:, None], other=0.0).to(gl.float32)
    logit = gl.where(has, gl.sum(q.load(layout).to(gl.float32) * key, 1) * scale, float("-inf"))
    highest = gl.maximum(peak, logit)
    p = gl.exp2(logit - highest)
    shrink = gl.exp2(peak - highest)
    return acc * shrink[:, None] + p[:, None] * value, total * shrink + p


@gluon.jit
def _tile(
    tile, state, buffers, runs, scale,
    UNITS: gl.constexpr, LISTS: gl.constexpr, K_BLOCK: gl.constexpr, MASKED: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    """One tile of keys: its logits are computed beside the tile before's product with its values."""
    acc, p, total, peak = state
    q, keys, values, ready, free = buffers
    STAGES: gl.constexpr = ready.shape[0]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64 * UNITS, 16])
    zero = gl.zeros([64, 64 * UNITS], gl.float32, S)
    stage = tile % STAGES
    before = (tile - 1) % STAGES
    mbarrier.wait(ready.index(stage), tile // STAGES % 2)
    logits = warpgroup_mma(q, keys.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    product = warpgroup_mma(p, values.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[logits])
    if MASKED:  # noqa: SIM102 (the first is known when this is compiled)
        if tile >= runs[2] // UNITS:
            s = _masked(s, tile, runs, UNITS, LISTS, K_BLOCK)
    e, sums, peak, shrink = _softmax(s, peak, scale, FIXED)
    total = total + sums if FIXED else total * _beside(shrink, total) + sums
    following = gl.convert_layout(e.to(p.dtype), p.type.layout)
    # Held here, the weights are packed once; without it they are taken apart and packed again.
    acc, p, following, total = warpgroup_mma_wait(0, deps=[product, p, following, total])
    group_barrier()  # one thread arrives for all four warps
    mbarrier.arrive(free.index(before), count=1)
    if not FIXED:
        acc = acc * _beside(shrink, acc)
    return acc, following, total, peak


@gluon.jit
def _beside(x, y):
    """A number for each row, to be multiplied with the rows of `y`."""
    return gl.convert_layout(x, gl.SliceLayout(1, y.type.layout))[:, None]


@gluon.jit
def _tiles(
    first, end, state, buffers, runs, scale,
    UNITS: gl.constexpr, LISTS: gl.constexpr, K_BLOCK: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    """Pairs of whole tiles from `first` on."""
    for tile in range(first, end, 2):
        state = _tile(tile, state, buffers, runs, scale, UNITS, LISTS, K_BLOCK, False, FIXED)
        state = _tile(tile + 1, state, buffers, runs, scale, UNITS, LISTS, K_BLOCK, False, FIXED)
    return state


@gluon.jit
def _attend(
    HALF: gl.constexpr, out, own, ring, runs, tiles, at, sizes, longest,
    UNITS: gl.constexpr, LISTS: gl.constexpr, K_BLOCK: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """One of the two groups of warps: attention of 64 queries over all tiles."""
    q_ring, k_ring, v_ring, q_ready, ready, free = ring
    batch, head, row = at
    queries, heads, scale = sizes
    STAGES: gl.constexpr = ready.shape[0]
    D: gl.constexpr = q_ring.shape[2]
    dtype: gl.constexpr = q_ring.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64 * UNITS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PER_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    WHOLE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64 * UNITS, D], dtype)
    keys = _as_tiles(k_ring, [STAGES, 64 * UNITS, D], WHOLE)
    values = _as_tiles(v_ring, [STAGES, 64 * UNITS, D], WHOLE)
    q = q_ring.index(HALF)
    rows = row + HALF * 64 + gl.arange(0, 64, layout=PER_ROW)
    full_tiles = runs[2] // UNITS

    mbarrier.wait(q_ready, 0)
    mbarrier.wait(ready.index(0), 0)
    zero = gl.zeros([64, 64 * UNITS], gl.float32, S)
    s = warpgroup_mma(q, keys.index(0).permute((1, 0)), zero, use_acc=False)
    lowest = gl.full([64], FLOOR, gl.float32, gl.SliceLayout(1, S))
    p, total, peak, _ = _softmax(_masked(s, 0, runs, UNITS, LISTS, K_BLOCK), lowest, scale, False)
    acc = gl.zeros([64, D], gl.float32, OUT)
    p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, OUT, 2))

    state = acc, p, total, peak
    buffers = q, keys, values, ready, free
    whole = 1 + gl.maximum(full_tiles - 1, 0) // 2 * 2
    stays = _may_stay(q, longest, peak, scale, BFLOAT16_ROOM if dtype == gl.bfloat16 else FLOAT16_ROOM)
    fixed = gl.where(stays, whole, 1)
    state = _tiles(1, fixed, state, buffers, runs, scale, UNITS, LISTS, K_BLOCK, True)
    for tile in range(fixed, tiles):
        state = _tile(tile, state, buffers, runs, scale, UNITS, LISTS, K_BLOCK, True, False)
    acc, p, total, peak = state
    acc = warpgroup_mma(p, values.index((tiles - 1) % STAGES), acc)

    total, peak = gl.convert_layout(gl.sum(total, 1), PER_ROW), gl.convert_layout(peak, PER_ROW)
    if OWN:
        acc, total = _with_own_key(acc, total, peak, q, own, rows, queries, scale, D)
    acc = acc / gl.where(total > 0, total, 1.0)[:, None]
    lanes = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    place = ((batch.to(gl.int64) * queries + rows) * heads + head)[:, None] * D + lanes[None, :]
    gl.store(out + place, acc.to(dtype), mask=(rows < queries)[:, None])


@gluon.jit(do_not_specialize=["heads", "queries", "tokens", "always", "q_blocks", "capacity"])
def attention_hopper(
    q_desc, k_desc, v_desc, out, index, count, order, longest, own_k, own_v, own,
    own_k_b, own_k_h, own_k_t, own_v_b, own_v_h, own_v_t,
    heads, queries, tokens, always, q_blocks, capacity, scale,
    D: gl.constexpr, Q_BLOCK: gl.constexpr, K_BLOCK: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr,
    LISTS: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """Operands as in `attention`; `_b`, `_h`, `_t` are strides in batch, head, token; out is [B, M, H, D], dense."""
    PER_BLOCK: gl.constexpr = Q_BLOCK // 128
    item = gl.program_id(0) // PER_BLOCK
    if LISTS:
        item = item - item % q_blocks + gl.load(order + item)
    batch = item // q_blocks // heads
    head = item // q_blocks % heads
    row = item % q_blocks * Q_BLOCK + gl.program_id(0) % PER_BLOCK * 128
    b = batch.to(gl.int64)
    h = head.to(gl.int64)
    runs = _runs(index, count, item, always, tokens, capacity, LISTS, K_BLOCK)
    units = runs[2] + runs[3] + runs[4]
    tiles = gl.maximum((units + UNITS - 1) // UNITS, 1)

    dtype: gl.constexpr = out.dtype.element_ty
    UNIT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [2, 64, D], UNIT_LAYOUT)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES * UNITS, 64, D], UNIT_LAYOUT)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES * UNITS, 64, D], UNIT_LAYOUT)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()

    ring = q_ring, k_ring, v_ring, q_ready, ready, free
    at = batch, head, row
    own_keys = own_k + b * own_k_b + h * own_k_h, own_v + b * own_v_b + h * own_v_h, own, own_k_t, own_v_t
    sizes = queries, heads, scale
    reach = gl.sqrt(gl.load(longest + item // q_blocks))
    gl.warp_specialize(
        [
            (
                _attend,
                (gl.constexpr(0), out, own_keys, ring, runs, tiles, at, sizes, reach, UNITS, LISTS, K_BLOCK, OWN),
            ),
            (
                _attend,
                (gl.constexpr(1), out, own_keys, ring, runs, tiles, at, sizes, reach, UNITS, LISTS, K_BLOCK, OWN),
            ),
            (_load, (q_desc, k_desc, v_desc, ring, runs, tiles, at, UNITS, LISTS, K_BLOCK)),
        ],
        [4, 1],
        [240, 24],
    )


def launch(x: Operands) -> Tensor:
    """The result [B, H, M, D] of `attention`, stored token by token, of operands that `hopper.suits`."""
    batch, heads, queries, head_dim = x.q.shape
    out = x.v.new_empty(batch, queries, heads, head_dim)
    arguments = _arguments(x) | {"out": out, "longest": longest_key(x.k)}
    programs = batch * heads * arguments["q_blocks"] * (arguments["Q_BLOCK"] // 128)
    attention_hopper[(programs,)](**arguments, num_warps=4)
    return out.transpose(1, 2)


def _arguments(x: Operands) -> dict[str, Any]:
    """What the kernel is given; where an operand is not given, q holds its place and is not read."""
    heads, queries, head_dim = x.q.shape[1:]
    lists = x.block_index is not None and x.block_count is not None
    own_k, own_v = (x.q if y is None else y for y in (x.own_k, x.own_v))
    q_block = x.q_block if lists else 128
    units = 2 if head_dim <= 64 else 1  # beyond, two units side by side are not one tile in shared memory
    return {
        **{f"{name}_desc": _described(y) for name, y in (("q", x.q), ("k", x.k), ("v", x.v))},
        "index": x.q if x.block_index is None else x.block_index.contiguous(),
        "count": x.q if x.block_count is None else x.block_count.contiguous(),
        "order": x.q if x.block_count is None else longest_first(x.block_count),
        "own_k": own_k,
        "own_v": own_v,
        "own": x.q if x.own is None else x.own.contiguous(),
        **{f"own_k_{axis}": own_k.stride(i) for i, axis in enumerate("bht")},
        **{f"own_v_{axis}": own_v.stride(i) for i, axis in enumerate("bht")},
        "heads": heads,
        "queries": queries,
        "tokens": x.k.shape[2],
        "always": x.always if lists else x.k.shape[2],
        "q_blocks": (queries + q_block - 1) // q_block,
        "capacity": 0 if x.block_index is None else x.block_index.shape[3],
        "scale": x.scale * LOG2E,
        "D": head_dim,
        "Q_BLOCK": q_block,
        "K_BLOCK": x.k_block if lists else 64,
        "UNITS": units,
        "STAGES": min(8, RING // (units * 64 * head_dim * 4)),
        "LISTS": lists,
        "OWN": x.own is not None,
    }


def _described(x: Tensor) -> TensorDescriptor:
    """Loads of 64 tokens of one head of [B, H, T, D]; beyond the end there are zeros."""
    block = [1, 1, 64, x.shape[3]]
    dtype = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
