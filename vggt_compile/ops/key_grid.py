"""Which tokens keep their key where one patch stands for a window of patches, and which do not.

Tokens are frames of special tokens and then a grid of patches, row by row. The grid of every n-th frame is cut into
windows of `stride` patches, smaller ones at the lower and right edges, and each keeps one patch. That is its first one;
or `shifted`, the place moves on from frame to frame, along the columns and then along the rows, so that
stride[0]·stride[1] frames visit all places of a window. A place beyond the edge is the one at the edge.

Special tokens are all kept, and with `first_frame` so is the whole of the first frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from vggt_compile.ops.sizes import cdiv


@triton_op("vggt_compile::dropped_tokens", mutates_args=())
def dropped_tokens(
    x: Tensor,
    special: int,
    rows: int,
    columns: int,
    stride: Sequence[int],
    every: int = 1,
    first_frame: bool = False,
    shifted: bool = False,
) -> Tensor:
    """Whether the key of each token is dropped: [F·(special + rows·columns)] bool, on the device of `x`.

    `x` is [B, H, F·(special + rows·columns), D]; `every` is the distance of the frames that keep patches.
    """
    token = torch.arange(x.shape[2], device=x.device)
    per_frame = special + rows * columns
    frame, patch = token // per_frame, token % per_frame - special
    down, right = _place(frame // every, stride, shifted)
    kept = (frame % every == 0) & _stands(patch // columns, rows, stride[0], down)
    kept = kept & _stands(patch % columns, columns, stride[1], right)
    if first_frame:
        kept = kept | (frame == 0)
    return ~kept & (patch >= 0)


@dropped_tokens.register_fake
def _mask(x: Tensor, *rest: Any, **named: Any) -> Tensor:
    return x.new_empty(x.shape[2], dtype=torch.bool)


@triton_op("vggt_compile::window_patches", mutates_args=())
def window_patches(
    x: Tensor,
    special: int,
    rows: int,
    columns: int,
    stride: Sequence[int],
    every: int = 1,
    first_frame: bool = False,
    shifted: bool = False,
) -> Tensor:
    """The tokens that stand for windows, as indices into dimension 2 of `x`; none in the first frame if that is whole.

    Arguments are those of `dropped_tokens`. int64, frame by frame and in each window by window:
    [(⌈F/every⌉ − first_frame)·⌈rows/stride[0]⌉·⌈columns/stride[1]⌉].
    """
    per_frame = special + rows * columns
    frame = torch.arange(int(first_frame), cdiv(x.shape[2] // per_frame, every), device=x.device)[:, None, None]
    down, right = _place(frame, stride, shifted)
    row = torch.arange(cdiv(rows, stride[0]), device=x.device)[:, None] * stride[0] + down
    column = torch.arange(cdiv(columns, stride[1]), device=x.device) * stride[1] + right
    patch = row.clamp(max=rows - 1) * columns + column.clamp(max=columns - 1)
    return (frame * (every * per_frame) + special + patch).flatten()


@window_patches.register_fake
def _indices(
    x: Tensor,
    special: int,
    rows: int,
    columns: int,
    stride: Sequence[int],
    every: int = 1,
    first_frame: bool = False,
    shifted: bool = False,
) -> Tensor:
    frames = cdiv(x.shape[2] // (special + rows * columns), every) - int(first_frame)
    return x.new_empty(frames * cdiv(rows, stride[0]) * cdiv(columns, stride[1]), dtype=torch.int64)


def _place(frame: Tensor, stride: Sequence[int], shifted: bool) -> tuple[Tensor, Tensor] | tuple[int, int]:
    """Rows and columns from the first patch of a window to the one that is kept; frames count those that keep any."""
    return (frame // stride[1] % stride[0], frame % stride[1]) if shifted else (0, 0)


def _stands(line: Tensor, lines: int, stride: int, place: Tensor | int) -> Tensor:
    """Whether rows (or columns) of a grid with so many are those that their windows keep."""
    return line == (line // stride * stride + place).clamp(max=lines - 1)
