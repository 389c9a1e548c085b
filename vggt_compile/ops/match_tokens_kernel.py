"""The Triton kernel of `match_tokens`: one program for a tile of sources, the best destination so far beside it.

Law: what it writes is `match_tokens.reference`, to the order in which products are summed.
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

ROWS, TILE = 128, 128
"""Sources of a program, and how many destinations it compares at a time."""
LINE = 128
"""Bytes of a token's channels in a product, so that three stages of both operands, 96 KiB, fit into every GPU."""


def launch(
    source: Tensor,
    destination: Tensor,
    source_run: int | None = None,
    destination_run: int | None = None,
    *,
    wrap: Callable[[Any], Any] = wrap_triton,
) -> tuple[Tensor, Tensor]:
    """index and similarity as in `match_tokens`, of tokens [B, S, C] and [B, T, C] of length one, not in float64."""
    batch, sources, width = source.shape
    channels = int(width)  # lengths may be symbols, the width is a constant of the kernel
    index = torch.empty((batch, sources), dtype=torch.int64, device=source.device)
    similarity = torch.empty((batch, sources), dtype=torch.float32, device=source.device)
    wrap(_match)[((sources + ROWS - 1) // ROWS, batch, 1)](
        source.contiguous(),
        destination.contiguous(),
        index,
        similarity,
        sources,
        destination.shape[1],
        sources if source_run is None else source_run,
        destination.shape[1] if destination_run is None else destination_run,
        C=channels,
        LANES=min(LINE // source.itemsize, max(16, triton.next_power_of_2(channels))),
        ROWS=ROWS,
        TILE=TILE,
        num_warps=8,
        num_stages=3,
    )
    return index, similarity


@triton.jit(do_not_specialize=["sources", "destinations", "source_run", "destination_run"])
def _match(
    source, destination, index, similarity, sources, destinations, source_run, destination_run,
    C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1).to(tl.int64)
    source += item * sources * C
    destination += item * destinations * C
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    place = tl.zeros([ROWS], tl.int32)
    first = _channels(source, row, sources, 0, C, LANES)
    lowest = row // source_run * destination_run  # what each row may be matched with: from here to the end of the run
    beyond = tl.minimum(lowest + destination_run, destinations)
    end = tl.max(tl.where(row < sources, beyond, 0), 0)
    for start in range(tl.min(lowest, 0), end, TILE):
        column = start + tl.arange(0, TILE)
        products = tl.dot(first, tl.trans(_channels(destination, column, destinations, 0, C, LANES)),
                          input_precision="ieee")  # fmt: skip
        for channel in range(LANES, C, LANES):
            left = _channels(source, row, sources, channel, C, LANES)
            right = _channels(destination, column, destinations, channel, C, LANES)
            products = tl.dot(left, tl.trans(right), products, input_precision="ieee")
        inside = (column[None, :] >= lowest[:, None]) & (column[None, :] < beyond[:, None])
        products = tl.where(inside, products, float("-inf"))
        highest, at = tl.max(products, 1, return_indices=True, return_indices_tie_break_left=True)
        better = highest > best  # not of equal ones, so that the first stays
        best = tl.where(better, highest, best)
        place = tl.where(better, start + at, place)
    there = row < sources
    tl.store(index + item * sources + row, place.to(tl.int64), mask=there)
    tl.store(similarity + item * sources + row, best, mask=there)


@triton.jit
def _channels(x, token, tokens, start, C: tl.constexpr, LANES: tl.constexpr):
    """Channels of some tokens from `start` on, [tokens, LANES], zeros beyond the last one."""
    lane = start + tl.arange(0, LANES)
    return tl.load(
        x + token.to(tl.int64)[:, None] * C + lane[None, :],
        mask=(token < tokens)[:, None] & (lane < C)[None, :],
        other=0.0,
    )
