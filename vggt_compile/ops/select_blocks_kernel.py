"""The k best of a row without a sort: a search for the value of the k-th, digit by digit of its bit pattern.

Floats are compared as integers of the same order, and the value is found from the most significant digit on: a
candidate stands if enough blocks lie at or above it, by number and by mass. A last sweep lists the blocks above the
value, by index, and of the equal ones as many as are wanted. All is counted in one fixed order, so that equal inputs
give equal lists.

A program scores `ROWS` rows of one head at a time. Their scores lie in a strip of scratch memory, which serves its
next rows again: a strip for every row would be gigabytes at a thousand frames. It then chooses row by row, so that the
sweeps over one row find it in the first-level cache.
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

ROWS, TILE = 16, 64
"""Rows whose scores are computed together, and with how many blocks at a time."""
WIDE = 1024
"""Blocks of one row that are compared at a time."""
WARPS, PROGRAMS_PER_SM = 4, 4


def launch(
    q: Tensor,
    k: Tensor,
    floor: int,
    cap: int,
    mass: float,
    reach: bool,
    *,
    programs: int | None = None,
    wrap: Callable[[Any], Any] = wrap_triton,
) -> tuple[Tensor, Tensor]:
    """Lists and counts as in `select_blocks`, from pooled, scaled q [B, H, nQ, D] and k [B, H, nK, D] in fp32.

    `mass` is the share of softmax mass that a row may keep beyond `floor` blocks, 0 for none. `programs` run at once.
    """
    batch, heads, queries = q.shape[:3]
    blocks, width = k.shape[-2], int(k.shape[-1])  # lengths may be symbols, the width is a constant of the kernel
    groups = batch * heads * ((queries + ROWS - 1) // ROWS)
    if programs is None:
        programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = torch.sym_min(groups, programs)
    index = torch.zeros((batch, heads, queries, cap), dtype=torch.int32, device=q.device)
    count = torch.empty((batch, heads, queries), dtype=torch.int32, device=q.device)
    scratch = torch.empty((programs, ROWS, (blocks + 15) // 16 * 16), dtype=torch.int32, device=q.device)
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
        ROWS=ROWS,
        TILE=TILE,
        WIDE=WIDE,
        num_warps=WARPS,
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
    WIDE: tl.constexpr,
):
    share = tl.cast(share, tl.float32)  # Inductor hands over Python's floats as doubles
    row = tl.arange(0, ROWS)
    stride = tl.cdiv(blocks, 16) * 16
    strip = scratch_ptr + tl.program_id(0).to(tl.int64) * ROWS * stride
    per_head = tl.cdiv(queries, ROWS)
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        head = (group // per_head).to(tl.int64)
        first = (group % per_head) * ROWS
        col = tl.arange(0, WIDTH)
        q_rows = (head * queries + first + row)[:, None] * D + col[None, :]
        there = (first + row < queries)[:, None] & (col < D)[None, :]
        q = tl.load(q_ptr + q_rows, mask=there, other=0.0)
        peaks = _score(q, k_ptr + head * blocks * D, strip + row * stride, blocks, D, WIDTH, ROWS, TILE)
        tl.debug_barrier()  # scores are read by other threads than wrote them
        for i in range(tl.minimum(ROWS, queries - first)):
            line = strip + i * stride
            peak = tl.max(tl.where(row == i, peaks, float("-inf")), 0)
            value, above, count = _threshold(line, blocks, peak, floor, cap, share, COVER, REACH, WIDE)
            place = head * queries + first + i
            tl.store(count_ptr + place, count)
            _compact(index_ptr + place * cap, line, blocks, value, count - above, cap, WIDE)
        tl.debug_barrier()  # the next rows go where these are still read


@triton.jit
def _score(q, k_ptr, line, blocks, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Scores of [ROWS, WIDTH] queries with all keys go into the strip as ordered integers; returns the largest ones."""
    col = tl.arange(0, WIDTH)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(0, blocks, TILE):
        j = start + tl.arange(0, TILE)
        k = tl.load(k_ptr + j[None, :] * D + col[:, None], mask=(j < blocks)[None, :] & (col < D)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        scores = tl.where(scores == 0.0, 0.0, scores)  # −0 and 0 are equal
        tl.store(line[:, None] + j[None, :], _ordered(scores), mask=(j < blocks)[None, :])
        peak = tl.maximum(peak, tl.max(tl.where((j < blocks)[None, :], scores, float("-inf")), 1))
    return peak


@triton.jit
def _threshold(
    line, blocks, peak, floor, cap, share, COVER: tl.constexpr, REACH: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The value of the last block of a row to keep, how many lie above it, and how many to keep."""
    lowest = -2147483648
    found = 0  # digits so far; with the sign flipped they are in the order of signed integers
    goal = 0.0
    if COVER:
        _, _, _, whole, _, _ = _tally(line, blocks, lowest, lowest, lowest, peak, COVER, WIDE)
        goal = share * whole
    shift = 30
    at_found = blocks
    # Where exactly `floor` blocks lie at or above a candidate, further digits would tell these blocks the same.
    while (shift >= 0) & (COVER | (at_found != floor)):
        one = (found | (1 << shift)) ^ lowest
        two = (found | (2 << shift)) ^ lowest
        three = (found | (3 << shift)) ^ lowest
        n1, n2, n3, m1, m2, m3 = _tally(line, blocks, one, two, three, peak, COVER, WIDE)
        if COVER:
            digit = _stands(n1, m1, floor, cap, goal) + _stands(n2, m2, floor, cap, goal)
            digit += _stands(n3, m3, floor, cap, goal)
        else:
            digit = (n1 >= floor).to(tl.int32) + (n2 >= floor).to(tl.int32) + (n3 >= floor).to(tl.int32)
        found = found | (digit << shift)
        at_found = tl.where(digit == 3, n3, tl.where(digit == 2, n2, tl.where(digit == 1, n1, at_found)))
        shift -= 2
    value = found ^ lowest
    above, at, _, beyond, _, _ = _tally(line, blocks, value + 1, value, value, peak, COVER, WIDE)
    count = floor
    if COVER:
        equal = tl.maximum(at - above - REACH, 0)
        each = tl.exp(_float(value) - peak)
        fit = (goal - beyond) / tl.where(each > 0.0, each, 1.0)
        fit = tl.minimum(tl.maximum(fit, 0.0), equal.to(tl.float32)).to(tl.int32)
        count = tl.minimum(tl.maximum(count, above + fit + REACH), cap)
    return value, above, tl.minimum(count, blocks)


@triton.jit
def _stands(number, mass, floor, cap, goal):
    """1 where a candidate has enough blocks and mass at or above it, or as many blocks as a list can hold."""
    return (((number >= floor) & (mass > goal)) | (number >= cap)).to(tl.int32)


@triton.jit
def _tally(line, blocks, one, two, three, peak, COVER: tl.constexpr, WIDE: tl.constexpr):
    """Numbers of the blocks of a row at or above each of three values, then their masses.

    The three numbers are bits of one, so that they are added up over all threads at once.
    """
    number = tl.zeros([WIDE], tl.int64)
    m1 = tl.zeros([WIDE], tl.float32)
    m2 = tl.zeros([WIDE], tl.float32)
    m3 = tl.zeros([WIDE], tl.float32)
    for start in range(0, blocks, WIDE):
        j = start + tl.arange(0, WIDE)
        valid = j < blocks
        key = tl.load(line + j, mask=valid, other=-2147483648)
        first, second, third = (key >= one) & valid, (key >= two) & valid, (key >= three) & valid
        number += first.to(tl.int64) + (second.to(tl.int64) << 21) + (third.to(tl.int64) << 42)
        if COVER:
            mass = tl.exp(_float(key) - peak)
            m1 += tl.where(first, mass, 0.0)
            m2 += tl.where(second, mass, 0.0)
            m3 += tl.where(third, mass, 0.0)
    n = tl.sum(number, 0)
    n1, n2, n3 = (n & 0x1FFFFF).to(tl.int32), ((n >> 21) & 0x1FFFFF).to(tl.int32), (n >> 42).to(tl.int32)
    return n1, n2, n3, tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(m3, 0)


@triton.jit
def _compact(list_ptr, line, blocks, value, wanted, cap, WIDE: tl.constexpr):
    """List the blocks above `value` and the first `wanted` that are equal to it."""
    higher = 0
    ties = 0
    for start in range(0, blocks, WIDE):
        j = start + tl.arange(0, WIDE)
        key = tl.load(line + j, mask=j < blocks, other=-2147483648)
        above, equal = (key > value) & (j < blocks), (key == value) & (j < blocks)
        both = above.to(tl.int64) + (equal.to(tl.int64) << 32)
        upto = tl.cumsum(both, 0)
        rank = ties + (upto >> 32).to(tl.int32)
        keep = above | (equal & (rank <= wanted))
        place = higher + (upto & 0xFFFFFFFF).to(tl.int32) + tl.minimum(rank, wanted) - 1
        tl.store(list_ptr + place, j, mask=keep & (place < cap))
        here = tl.sum(both, 0)
        higher += (here & 0xFFFFFFFF).to(tl.int32)
        ties += (here >> 32).to(tl.int32)


@triton.jit
def _ordered(x):
    """Floats as signed integers of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
