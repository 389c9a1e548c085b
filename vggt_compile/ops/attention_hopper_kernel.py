"""The Gluon kernel of `attention` for Hopper: loads, products and exponentials run beside each other.

Law: what it writes is `attention.reference`, to rounding, for the operands that `suits` accepts.

A program has 128 queries of one head. One warp loads tiles of keys and values through the tensor memory accelerator
into a ring of buffers, each of two *units* of 64 keys that may lie anywhere. Two groups of four warps have 64 queries
each; while one group's products are in the tensor cores, the other computes its exponentials, as in FlashAttention-3
(arXiv:2407.08608). The softmax keeps the maximum of its first tile where no later logit can exceed it by much, which
the lengths of queries and keys tell: two thirds of the instructions are left then. Units that are cut short come last,
in a loop whose maximum moves, and so do all tiles where it may not stay.

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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vggt_compile.ops.hopper_softmax_kernel import (
    BFLOAT16_ROOM,
    FLOAT16_ROOM,
    FLOOR,
    beside,
    may_stay,
    softmax,
    with_own_key,
)
from vggt_compile.ops.hopper_units_kernel import load_tiles, masked, runs_of
from vggt_compile.ops.hopper_variant import Variant, variant
from vggt_compile.ops.operands import Operands
from vggt_compile.ops.sizes import cdiv

LOG2E = 1.4426950408889634

# What Triton 3.6 has under other names than 3.9.
IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
group_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

WARPS = 4
"""Warps that a program starts with; its two groups and the loading warp are in partitions beside them."""

RING = 160 * 2**10
"""Bytes of the ring of keys and values: with the queries, what a multiprocessor of sm_90 has, and a little less."""


@gluon.jit
def _as_tiles(ring, shape: gl.constexpr, layout: gl.constexpr):
    """The same buffers, units of one tile taken together."""
    return ring.reinterpret(ring.dtype, shape, layout) if IS_PUBLIC else ring._reinterpret(ring.dtype, shape, layout)


@gluon.jit
def _tile(
    tile, state, buffers, runs, scale,
    UNITS: gl.constexpr, LISTS: gl.constexpr, K_BLOCK: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    """One tile of keys: its logits are computed beside the tile before's product with its values.

    With `FIXED` all its keys count, and the maximum stays.
    """
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
    if not FIXED:  # noqa: SIM102 (the first is known when this is compiled)
        if tile >= runs[2] // UNITS:
            s = masked(s, tile, runs, UNITS, LISTS, K_BLOCK)
    e, sums, peak, shrink = softmax(s, peak, scale, FIXED)
    total = total + sums if FIXED else total * beside(shrink, total) + sums
    following = gl.convert_layout(e.to(p.dtype), p.type.layout)
    # Held here, the weights are packed once; without it they are taken apart and packed again.
    acc, p, following, total = warpgroup_mma_wait(0, deps=[product, p, following, total])
    group_barrier()  # one thread arrives for all four warps
    mbarrier.arrive(free.index(before), count=1)
    if not FIXED:
        acc = acc * beside(shrink, acc)
    return acc, following, total, peak


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
    p, total, peak, _ = softmax(masked(s, 0, runs, UNITS, LISTS, K_BLOCK), lowest, scale, False)
    acc = gl.zeros([64, D], gl.float32, OUT)
    p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, OUT, 2))

    state = acc, p, total, peak
    buffers = q, keys, values, ready, free
    whole = 1 + gl.maximum(full_tiles - 1, 0) // 2 * 2
    stays = may_stay(q, longest, peak, scale, BFLOAT16_ROOM if dtype == gl.bfloat16 else FLOAT16_ROOM)
    fixed = gl.where(stays, whole, 1)
    for tile in range(1, fixed, 2):  # two a turn: less is computed of where buffers lie
        state = _tile(tile, state, buffers, runs, scale, UNITS, LISTS, K_BLOCK, True)
        state = _tile(tile + 1, state, buffers, runs, scale, UNITS, LISTS, K_BLOCK, True)
    for tile in range(fixed, tiles):
        state = _tile(tile, state, buffers, runs, scale, UNITS, LISTS, K_BLOCK, False)
    acc, p, total, peak = state
    acc = warpgroup_mma(p, values.index((tiles - 1) % STAGES), acc)

    total, peak = gl.convert_layout(gl.sum(total, 1), PER_ROW), gl.convert_layout(peak, PER_ROW)
    if OWN:
        acc, total = with_own_key(acc, total, peak, q, own, rows, queries, scale, D)
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
    runs = runs_of(index, count, item, always, tokens, capacity, LISTS, K_BLOCK)
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
            (load_tiles, (q_desc, k_desc, v_desc, ring, runs, tiles, at, UNITS, LISTS, K_BLOCK)),
        ],
        [4, 1],
        [240, 24],
    )


def launch(x: Operands, order: Tensor | None, longest: Tensor) -> Tensor:
    """The result [B, H, M, D] of `attention`, stored token by token, of operands that `hopper.suits`.

    `order` and `longest` as in `hopper.attention_hopper`, which has a second launch: hopper_launch.cpp.
    """
    batch, heads, queries, head_dim = x.q.shape
    out = x.v.new_empty(batch, queries, heads, head_dim)
    made_for = variant(x)
    assert made_for is not None
    arguments = _arguments(x, made_for, out, order, longest)
    programs = batch * heads * arguments["q_blocks"] * (made_for.q_block // 128)
    attention_hopper[(programs,)](**arguments, **constants(made_for), num_warps=WARPS)
    return out.transpose(1, 2)


def compile_ahead(made_for: Variant, device: torch.device) -> None:
    """Compile what `launch` runs, and run nothing. To Triton all operands are alike whose strides 16 divides."""
    with torch.cuda.device(device):
        x = torch.empty(1, 1, 128, made_for.head_dim, dtype=made_for.dtype, device=device)
        index = torch.empty(1, 1, 1, 1, dtype=torch.int32, device=device) if made_for.lists else None
        own = torch.empty(128, dtype=torch.bool, device=device) if made_for.own else None
        own_kv = None if own is None else x
        blocks = (index, None if index is None else index[0], 0, made_for.q_block, made_for.k_block)
        operands = Operands(x, x, x, *blocks, None, own_kv, own_kv, own, 1.0)
        arguments = _arguments(operands, made_for, x, index, torch.empty(1, device=device))
        attention_hopper.warmup(**arguments, **constants(made_for), num_warps=WARPS, grid=(1,))


def _arguments(x: Operands, made_for: Variant, out: Tensor, order: Tensor | None, longest: Tensor) -> dict[str, Any]:
    """What the kernel reads when it runs; where an operand is not given, q holds its place and is not read."""
    heads, queries = x.q.shape[1:3]
    own_k, own_v = (x.q if y is None else y for y in (x.own_k, x.own_v))
    return {
        **{f"{name}_desc": _described(y) for name, y in (("q", x.q), ("k", x.k), ("v", x.v))},
        "out": out,
        "index": x.q if x.block_index is None else x.block_index,
        "count": x.q if x.block_count is None else x.block_count,
        "order": x.q if order is None else order,
        "longest": longest,
        "own_k": own_k,
        "own_v": own_v,
        "own": x.q if x.own is None else x.own,
        **{f"own_k_{axis}": own_k.stride(i) for i, axis in enumerate("bht")},
        **{f"own_v_{axis}": own_v.stride(i) for i, axis in enumerate("bht")},
        "heads": heads,
        "queries": queries,
        "tokens": x.k.shape[2],
        "always": x.always if made_for.lists else x.k.shape[2],
        "q_blocks": cdiv(queries, made_for.q_block),
        "capacity": 0 if x.block_index is None else x.block_index.shape[3],
        "scale": x.scale * LOG2E,
    }


def constants(made_for: Variant) -> dict[str, Any]:
    """What the kernel is compiled for: nothing here depends on how many tokens there are."""
    units = 2 if made_for.head_dim <= 64 else 1  # beyond, two units side by side are not one tile in shared memory
    return {
        "D": made_for.head_dim,
        "Q_BLOCK": made_for.q_block,
        "K_BLOCK": made_for.k_block,
        "UNITS": units,
        "STAGES": min(8, RING // (units * 64 * made_for.head_dim * 4)),
        "LISTS": made_for.lists,
        "OWN": made_for.own,
    }


def _described(x: Tensor) -> TensorDescriptor:
    """Loads of 64 tokens of one head of [B, H, T, D]; beyond the end there are zeros."""
    block, layout = loaded_at_once(x.dtype, x.shape[3])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def loaded_at_once(dtype: torch.dtype, head_dim: int) -> tuple[list[int], gl.NVMMASharedLayout]:
    """The block of a descriptor, and how it lies in shared memory."""
    block = [1, 1, 64, head_dim]
    return block, gl.NVMMASharedLayout.get_default_for(block, gl.float16 if dtype == torch.float16 else gl.bfloat16)
