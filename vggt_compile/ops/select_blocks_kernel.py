"""The k best of a row without a sort: a search for the value of the k-th, digit by digit of its bit pattern.

Floats are compared as integers of the same order, and the value is found from the most significant digit on: a
candidate stands if enough blocks lie at or above it, by number and by mass. A last sweep lists the blocks above the
value, by index, and of the equal ones as many as are wanted. All is counted in one fixed order, so that equal inputs
give equal lists.

A program handles `ROWS` rows of one head at a time. Their scores lie in a strip of scratch memory, which serves its
next rows again: a strip for every row would be gigabytes at a thousand frames.
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
PROGRAMS_PER_SM = 2


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
        num_warps=8,
    )
    return index, count


@triton.jit
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
):
    row = tl.arange(0, ROWS)
    strip = tl.program_id(0).to(tl.int64) * ROWS + row
    line = scratch_ptr + strip * (tl.cdiv(blocks, 16) * 16)
    per_head = tl.cdiv(queries, ROWS)
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        head = (group // per_head).to(tl.int64)
        query = (group % per_head) * ROWS + row
        there = query < queries
        col = tl.arange(0, WIDTH)
        q_rows = (head * queries + query)[:, None] * D + col[None, :]
        q = tl.load(q_ptr + q_rows, mask=there[:, None] & (col < D)[None, :], other=0.0)
        peak = _score(q, k_ptr + head * blocks * D, line, blocks, D, WIDTH, ROWS, TILE)
        tl.debug_barrier()  # scores are read by other threads than wrote them
        value, above, count = _threshold(line, blocks, peak, floor, cap, share, COVER, REACH, ROWS, TILE)
        out = (head * queries + query) * cap
        tl.store(count_ptr + head * queries + query, count, mask=there)
        _compact(index_ptr + out, line, blocks, value, count - above, cap, there, ROWS, TILE)
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
    line,
    blocks,
    peak,
    floor,
    cap,
    share,
    COVER: tl.constexpr,
    REACH: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The value of the last block to keep of each row, how many lie above it, and how many to keep."""
    four = tl.arange(0, 4)
    lowest = -2147483648
    found = tl.zeros([ROWS], tl.int32)  # digits so far; with the sign flipped they are in the order of signed integers
    goal = tl.zeros([ROWS], tl.float32)
    if COVER:
        _, whole = _tally(line, blocks, (found ^ lowest)[:, None] + (four * 0)[None, :], peak, COVER, ROWS, TILE)
        goal = share * tl.max(whole, 1)
    for digit in range(16):
        shift = 30 - 2 * digit
        tried = found[:, None] | (four << shift)[None, :]
        n, mass = _tally(line, blocks, tried ^ lowest, peak, COVER, ROWS, TILE)
        stands = n >= floor
        if COVER:
            stands = stands & (mass > goal[:, None])
        stands = stands | (n >= cap) | (four == 0)[None, :]
        found = found | ((tl.sum(stands.to(tl.int32), 1) - 1) << shift)
    value = found ^ lowest
    n, mass = _tally(line, blocks, value[:, None] + (four > 0).to(tl.int32)[None, :], peak, COVER, ROWS, TILE)
    above = tl.min(n, 1)
    count = tl.zeros([ROWS], tl.int32) + floor
    if COVER:
        equal = tl.maximum(tl.max(n, 1) - above - REACH, 0)
        each = tl.exp(_float(value) - peak)
        fit = (goal - tl.min(mass, 1)) / tl.where(each > 0.0, each, 1.0)
        fit = tl.minimum(tl.maximum(fit, 0.0), equal.to(tl.float32)).to(tl.int32)
        count = tl.minimum(tl.maximum(count, above + fit + REACH), cap)
    return value, above, count


@triton.jit
def _tally(line, blocks, candidates, peak, COVER: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Number and mass of the blocks at or above each of a row's four candidates, [ROWS, 4] both."""
    number = tl.zeros([ROWS, 4, TILE], tl.int32)
    mass = tl.zeros([ROWS, 4, TILE], tl.float32)
    for start in range(0, blocks, TILE):
        j = start + tl.arange(0, TILE)
        key = tl.load(line[:, None] + j[None, :], mask=(j < blocks)[None, :], other=-2147483648)
        at = (key[:, None, :] >= candidates[:, :, None]) & (j < blocks)[None, None, :]
        number += at.to(tl.int32)
        if COVER:
            weight = tl.exp(_float(key) - peak[:, None])
            mass += tl.where(at, weight[:, None, :], 0.0)
    return tl.sum(number, 2), tl.sum(mass, 2)


@triton.jit
def _compact(index_ptr, line, blocks, value, wanted, cap, there, ROWS: tl.constexpr, TILE: tl.constexpr):
    """List the blocks above `value` and the first `wanted` that are equal to it."""
    done = tl.zeros([ROWS], tl.int32)
    ties = tl.zeros([ROWS], tl.int32)
    for start in range(0, blocks, TILE):
        j = start + tl.arange(0, TILE)
        valid = (j < blocks)[None, :]
        key = tl.load(line[:, None] + j[None, :], mask=valid, other=-2147483648)
        equal = (key == value[:, None]) & valid
        rank = ties[:, None] + tl.cumsum(equal.to(tl.int32), 1)
        keep = ((key > value[:, None]) | (equal & (rank <= wanted[:, None]))) & valid
        place = done[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
        fits = keep & there[:, None] & (place < cap)
        tl.store(index_ptr[:, None] + place, tl.broadcast_to(j[None, :], [ROWS, TILE]), mask=fits)
        done += tl.sum(keep.to(tl.int32), 1)
        ties += tl.sum(equal.to(tl.int32), 1)


@triton.jit
def _ordered(x):
    """Floats as signed integers of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
