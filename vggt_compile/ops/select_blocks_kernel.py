"""The k best of a row without a sort: a search for the value of the k-th, digit by digit of its bit pattern.

Floats are compared as integers of the same order, and the value is found from the most significant digit on: a
candidate stands if enough blocks lie at or above it, by number and by mass. The search ends where the blocks to keep
are told from the others. A last sweep lists the blocks above the value, by index, and of the equal ones as many as are
wanted. All is counted in one fixed order, so that equal inputs give equal lists.

A program scores some rows of one head together. Their scores lie in a strip of scratch memory, which serves its next
rows again: a strip for every row would be gigabytes at a thousand frames. Then it sweeps over as many rows at once as
it has warps, which the first-level cache holds. Tiles are one warp wide, so that a row belongs to one warp: it is
summed inside a warp, and the warps wait for each other only once a sweep, to see whether all are done.
"""

# mypy: disallow-incomplete-defs=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from vggt_compile.ops.sizes import cdiv

LANES = 128
"""Blocks of one row that a warp compares at a time, four a thread."""


@dataclass(frozen=True)
class Cut:
    """How the kernel is cut; every choice gives the same lists, but for `precision`.

    `rows` are scored together, `tile` blocks at a time, by tensor cores where `precision` is "tf32x3". `abreast` of
    them are searched together, `unroll` steps of 128 blocks a turn. `warps` warps make a program, `stages` tiles of
    keys are in flight, and `programs` run at once on a multiprocessor.
    """

    rows: int = 16
    tile: int = 64
    abreast: int = 4
    unroll: int = 4
    warps: int = 4
    stages: int = 2
    programs: int = 4
    precision: str = "ieee"


CUT = Cut()


def launch(
    q: Tensor,
    k: Tensor,
    blocks: int,
    floor: int,
    cap: int,
    mass: float,
    reach: bool,
    *,
    programs: int | None = None,
    cut: Cut = CUT,
    wrap: Callable[[Any], Any] = wrap_triton,
) -> tuple[Tensor, Tensor]:
    """Lists and counts as in `select_blocks`, from pooled, scaled q [B, H, nQ, D] and pooled k in fp32.

    k is [B, H, D, K], blocks side by side: K is `blocks` = nK rounded up to whole `LANES`, and what lies behind nK does
    not matter. So the threads of a warp read neighbouring blocks, which lie in different banks of shared memory.
    `mass` is the share of softmax mass that a row may keep beyond `floor` blocks, 0 for none. `programs` run at once.
    """
    batch, heads, queries = q.shape[:3]
    width = int(q.shape[-1])  # lengths may be symbols, the width is a constant of the kernel
    groups = batch * heads * cdiv(queries, cut.rows)
    if programs is None:
        programs = cut.programs * torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = torch.sym_min(groups, programs)
    index = torch.empty((batch, heads, queries, cap), dtype=torch.int32, device=q.device)
    count = torch.empty((batch, heads, queries), dtype=torch.int32, device=q.device)
    scratch = torch.empty((programs, cut.rows, cdiv(blocks, LANES) * LANES), dtype=torch.int32, device=q.device)
    wrap(_select)[(programs, 1, 1)](
        q.contiguous(),
        k.contiguous(),
        scratch,
        index,
        count,
        queries,
        blocks,
        groups,
        floor,
        cap,
        mass,
        D=width,
        WIDTH=max(16, triton.next_power_of_2(width)),
        COVER=mass > 0,
        REACH=int(reach),
        ROWS=cut.rows,
        TILE=cut.tile,
        ABREAST=cut.abreast,
        LANES=LANES,
        UNROLL=cut.unroll,
        CORES=cut.precision == "tf32x3",
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return index, count


@triton.jit(do_not_specialize=["queries", "blocks", "groups", "floor", "cap"])
def _select(
    q_ptr,
    k_ptr,
    scratch_ptr,
    index_ptr,
    count_ptr,
    queries,
    blocks,
    groups,
    floor,
    cap,
    share,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    COVER: tl.constexpr,
    REACH: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ABREAST: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    CORES: tl.constexpr,
):
    PRECISION: tl.constexpr = "tf32x3" if CORES else "ieee"
    share = tl.cast(share, tl.float32)  # Inductor hands over Python's floats as doubles
    row = tl.arange(0, ROWS)
    stride = tl.cdiv(blocks, LANES) * LANES
    strip = scratch_ptr + tl.program_id(0).to(tl.int64) * ROWS * stride
    per_head = tl.cdiv(queries, ROWS)
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        head = (group // per_head).to(tl.int64)
        first = (group % per_head) * ROWS
        col = tl.arange(0, WIDTH)
        q_rows = (head * queries + first + row)[:, None] * D + col[None, :]
        there = (first + row < queries)[:, None] & (col < D)[None, :]
        q = tl.load(q_ptr + q_rows, mask=there, other=0.0)
        _score(q, k_ptr + head * D * stride, strip + row * stride, blocks, stride, D, WIDTH, TILE, PRECISION)
        tl.debug_barrier()  # scores are read by other threads than wrote them
        for i in range(0, tl.minimum(ROWS, queries - first), ABREAST):
            lines = i + tl.arange(0, ABREAST)
            line = strip + lines * stride
            value, ties, count = _threshold(
                line, blocks, stride, floor, cap, share, COVER, REACH, ABREAST, LANES, UNROLL
            )
            place = head * queries + first + lines
            real = first + lines < queries
            tl.store(count_ptr + place, count, mask=real)
            least = tl.minimum(floor, blocks)
            lists = index_ptr + place * cap
            _compact(lists, line, stride, value, ties, count, cap, real, least, ABREAST, UNROLL)
        tl.debug_barrier()  # the next rows go where these are still read


@triton.jit
def _score(
    q, k_ptr, line, blocks, stride,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of [ROWS, WIDTH] queries with all keys go into the strip as ordered integers, the lowest behind them."""
    col = tl.arange(0, WIDTH)
    for start in range(0, stride, TILE):
        j = start + tl.arange(0, TILE)
        k = tl.load(k_ptr + col[:, None] * stride + j[None, :], mask=(col < D)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)
        scores = tl.where(scores == 0.0, 0.0, scores)  # −0 and 0 are equal
        tl.store(line[:, None] + j[None, :], tl.where((j < blocks)[None, :], _ordered(scores), -2147483648))


@triton.jit
def _threshold(
    line, blocks, stride, floor, cap, share,
    COVER: tl.constexpr, REACH: tl.constexpr, ABREAST: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """For each row a value above which all blocks are kept, how many equal to it, and how many in all."""
    lowest = -2147483648
    none = tl.zeros([ABREAST], tl.int32)
    found = none  # digits so far; with the sign flipped they are in the order of signed integers
    at, over = none + blocks, none  # how many blocks lie at or above it, and beyond all that begin with these digits
    peak, goal, beyond = none.to(tl.float32), none.to(tl.float32), none.to(tl.float32)
    mass = goal
    if COVER:
        peak = _float(_highest(line, stride, ABREAST, LANES))
        _, _, _, mass, _, _ = _tally(line, stride, none + lowest + 1, none, none, peak, COVER, ABREAST, LANES, UNROLL)
        goal = share * mass
    shift = 30
    # The search is over where the blocks to keep are told from the others, or a single one is left to decide about.
    open = tl.max((at - over > 1).to(tl.int32) if COVER else (at > floor).to(tl.int32), 0)
    while (shift >= 0) & (open > 0):
        one = (found | (1 << shift)) ^ lowest
        two = (found | (2 << shift)) ^ lowest
        three = (found | (3 << shift)) ^ lowest
        n1, n2, n3, m1, m2, m3 = _tally(line, stride, one, two, three, peak, COVER, ABREAST, LANES, UNROLL)
        if COVER:
            s1, s2 = _stands(n1, m1, floor, cap, goal), _stands(n2, m2, floor, cap, goal)
            s3 = _stands(n3, m3, floor, cap, goal)
            mass = tl.where(s3, m3, tl.where(s2, m2, tl.where(s1, m1, mass)))
            beyond = tl.where(s3, beyond, tl.where(s2, m3, tl.where(s1, m2, m1)))
        else:
            s1, s2, s3 = n1 >= floor, n2 >= floor, n3 >= floor
        at = tl.where(s3, n3, tl.where(s2, n2, tl.where(s1, n1, at)))
        over = tl.where(s3, over, tl.where(s2, n3, tl.where(s1, n2, n1)))
        found = found | ((s1.to(tl.int32) + s2.to(tl.int32) + s3.to(tl.int32)) << shift)
        open = tl.max((at - over > 1).to(tl.int32) if COVER else (at > floor).to(tl.int32), 0)
        shift -= 2
    value = found ^ lowest
    count = none + floor
    if COVER:
        equal = tl.maximum(at - over - REACH, 0)
        each = tl.exp(_float(value) - peak)
        fit = (goal - beyond) / tl.where(each > 0.0, each, 1.0)
        fit = tl.minimum(tl.maximum(fit, 0.0), equal.to(tl.float32)).to(tl.int32)
        fit = tl.where(mass <= goal, equal, tl.where(at - over > 1, fit, 0))
        count = tl.minimum(tl.maximum(count, over + fit + REACH), cap)
    count = tl.minimum(count, blocks)
    # Not every digit may be known: then all blocks that begin with these are kept, or none of them.
    last = found | ((1 << tl.minimum(shift + 2, 31)) - 1)
    ties = count - over
    value = tl.where(ties > 0, value, last ^ lowest)
    return value, tl.where(ties < at - over, ties, blocks), count


@triton.jit
def _stands(number, mass, floor, cap, goal):
    """Whether a candidate has enough blocks and mass at or above it, or as many blocks as a list can hold."""
    return ((number >= floor) & (mass > goal)) | (number >= cap)


@triton.jit
def _highest(line, stride, ABREAST: tl.constexpr, LANES: tl.constexpr):
    """The largest score of each row."""
    highest = tl.full([ABREAST, LANES], -2147483648, tl.int32)
    for start in range(0, stride, LANES):
        highest = tl.maximum(highest, tl.load(line[:, None] + (start + tl.arange(0, LANES))[None, :]))
    return tl.max(highest, 1)


@triton.jit
def _tally(
    line, stride, one, two, three, peak,
    COVER: tl.constexpr, ABREAST: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Numbers of the blocks of each row at or above three values of its own, then their masses."""
    n1 = tl.zeros([ABREAST, LANES], tl.int32)
    n2, n3 = n1, n1
    m1 = tl.zeros([ABREAST, LANES], tl.float32)
    m2, m3 = m1, m1
    for start in tl.range(0, stride, LANES, loop_unroll_factor=UNROLL):
        key = tl.load(line[:, None] + (start + tl.arange(0, LANES))[None, :])
        first, second, third = key >= one[:, None], key >= two[:, None], key >= three[:, None]
        n1 += first.to(tl.int32)
        n2 += second.to(tl.int32)
        n3 += third.to(tl.int32)
        if COVER:
            mass = tl.exp(_float(key) - peak[:, None])
            m1 += tl.where(first, mass, 0.0)
            m2 += tl.where(second, mass, 0.0)
            m3 += tl.where(third, mass, 0.0)
    return tl.sum(n1, 1), tl.sum(n2, 1), tl.sum(n3, 1), tl.sum(m1, 1), tl.sum(m2, 1), tl.sum(m3, 1)


@triton.jit
def _compact(
    list_ptr, line, stride, value, ties, count, cap, real, least, ABREAST: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """List the blocks above `value` and the first `ties` that are equal to it, then zeros.

    A tile is 32 blocks of each row, one a thread, for they are written wherever they belong. Blocks come first in it:
    so Triton gives each row to a warp here too, and what a warp has found needs to go to no other one.
    """
    LANES: tl.constexpr = 32
    higher = tl.zeros([ABREAST], tl.int32)
    equal = higher
    lane = tl.arange(0, LANES)
    for start in tl.range(0, stride, LANES, loop_unroll_factor=UNROLL):
        key = tl.load(line[None, :] + (start + lane)[:, None])
        above, same = key > value[None, :], key == value[None, :]
        both = above.to(tl.int32) + (same.to(tl.int32) << 16)
        upto = tl.cumsum(both, 0)
        rank = equal[None, :] + (upto >> 16)
        place = higher[None, :] + (upto & 0xFFFF) + tl.minimum(rank, ties[None, :]) - 1
        keep = (above | (same & (rank <= ties[None, :]))) & (place < count[None, :]) & real[None, :]
        tl.store(list_ptr[None, :] + place, tl.broadcast_to((start + lane)[:, None], [LANES, ABREAST]), mask=keep)
        here = tl.sum(both, 0)
        higher += here & 0xFFFF
        equal += here >> 16
    for start in range(least, cap, LANES):
        slot = (start + lane)[:, None]
        unused = (slot >= count[None, :]) & (slot < cap) & real[None, :]
        tl.store(list_ptr[None, :] + slot, tl.zeros([LANES, ABREAST], tl.int32), mask=unused)


@triton.jit
def _ordered(x):
    """Floats as signed integers of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
