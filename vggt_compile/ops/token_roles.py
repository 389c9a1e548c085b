"""What becomes of each token where similar tokens are merged: special, reference, cell, protected, or source.

Tokens are frames of special tokens and then a grid of patches, row by row. The grid is cut into cells, smaller ones at
the lower and right edges. Of each frame's patches one stands for each cell, some of the others are protected, evenly
spread, and the rest are sources, which merge into tokens of other roles. The first frame may be the reference: its
patches are all of that role.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from vggt_compile.ops.random_blocks import scrambled, sown
from vggt_compile.ops.sizes import cdiv

SPECIAL, REFERENCE, CELL, PROTECTED, SOURCE = range(5)


@triton_op("vggt_compile::merge_order", mutates_args=())
def merge_order(
    x: Tensor,
    special: int,
    rows: int,
    columns: int,
    cell: Sequence[int],
    protected: int,
    reference: bool,
    seed: int | None = None,
) -> Tensor:
    """Tokens by their role, SPECIAL ones first and SOURCE ones last, each role in the order of the model.

    Args:
        x: [B, H, F·(special + rows·columns), D]; only its length and its device count.
        cell: rows and columns of a cell.
        protected: patches of a frame that are protected, of those that stand for no cell.
        reference: whether the first frame is the reference.
        seed: draws the patch that stands for a cell, for each cell of each frame; it is the first one where None.
            The same seed draws the same patches on every device.

    Returns:
        [F·(special + rows·columns)] int64, indices into dimension 2 of `x`, each once.
    """
    per_frame = special + rows * columns
    token = torch.arange(x.shape[2], device=x.device)
    frame, patch = token // per_frame, token % per_frame - special
    stands = _stands_for_its_cell(frame, patch, rows, columns, cell, seed)
    rest = rows * columns - cdiv(rows, cell[0]) * cdiv(columns, cell[1])
    others = (~stands & (patch >= 0)).view(-1, per_frame)
    rank = (others.cumsum(1) - 1).flatten()
    role = torch.where(rank * protected % torch.sym_max(rest, 1) < protected, PROTECTED, SOURCE)
    role = torch.where(stands, CELL, role)
    if reference:
        role = torch.where(frame == 0, REFERENCE, role)
    role = torch.where(patch < 0, SPECIAL, role)
    return role.argsort(stable=True)


@merge_order.register_fake
def _shape(x: Tensor, *rest: Any, **named: Any) -> Tensor:
    return x.new_empty(x.shape[2], dtype=torch.int64)


def _stands_for_its_cell(
    frame: Tensor, patch: Tensor, rows: int, columns: int, cell: Sequence[int], seed: int | None
) -> Tensor:
    """Whether each patch stands for its cell; for special tokens, whose `patch` is negative, anything."""
    row, column = patch // columns, patch % columns
    down, right = row % cell[0], column % cell[1]
    if seed is None:
        return (down == 0) & (right == 0)
    high = (rows - (row - down)).clamp(max=cell[0])
    wide = (columns - (column - right)).clamp(max=cell[1])
    number = (row // cell[0]) * cdiv(columns, cell[1]) + column // cell[1]
    drawn = scrambled(scrambled(frame + sown(seed, _APART)) + number) % (high * wide)
    return down * wide + right == drawn


_APART = 0x2545F491  # seeds are so far from each other that the frames of one do not repeat another's
