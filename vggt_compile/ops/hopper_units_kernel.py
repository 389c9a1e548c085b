"""Keys by the unit: where those of a query block lie, how many of a unit count, and the warp that loads them.

A unit is 64 keys side by side that may lie anywhere: keys that all queries read come first, then listed blocks, then
the units that are cut short.
"""

# mypy: disallow-incomplete-defs=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.6 has it under another name than 3.9.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def runs_of(index, count, item, always, tokens, capacity, LISTS: gl.constexpr, K_BLOCK: gl.constexpr):
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
def unit_of(u, runs, LISTS: gl.constexpr, K_BLOCK: gl.constexpr):
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
def load_tiles(
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
            start, _ = unit_of(tile * UNITS + unit, runs, LISTS, K_BLOCK)
            keys = k_ring.index(stage * UNITS + unit).reshape([1, 1, 64, D])
            values = v_ring.index(stage * UNITS + unit).reshape([1, 1, 64, D])
            load_tile(k_desc, [batch, head, start, 0], bar, keys)
            load_tile(v_desc, [batch, head, start, 0], bar, values)


@gluon.jit
def masked(s, tile, runs, UNITS: gl.constexpr, LISTS: gl.constexpr, K_BLOCK: gl.constexpr):
    """The logits of a tile, [64, 64 · UNITS], with -inf for keys that do not count."""
    col = gl.arange(0, 64 * UNITS, layout=gl.SliceLayout(0, s.type.layout))
    _, valid = unit_of(tile * UNITS, runs, LISTS, K_BLOCK)
    counts = col < valid
    if UNITS == 2:
        _, valid = unit_of(tile * UNITS + 1, runs, LISTS, K_BLOCK)
        counts = gl.where(col < 64, counts, col - 64 < valid)
    return gl.where(counts[None, :], s, float("-inf"))
