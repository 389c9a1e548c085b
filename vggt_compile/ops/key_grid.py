"""Which tokens keep their key where one patch stands for a window of patches, and which do not.

Tokens are frames of special tokens and then a grid of patches, row by row. The grid of every n-th frame is cut into
windows of `stride` patches, smaller ones at the lower and right edges, and each keeps one patch, or `kept` rows of them
and columns. These begin with its first one; or `shifted`, the place moves on from frame to frame, along the columns and
then along the rows, so that stride[0]·stride[1] frames visit all places of a window. A place beyond the edge is the one
at the edge, and rows and columns beyond the end of a window are those at its begin.

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
    kept: Sequence[int],
    every: int = 1,
    first_frame: bool = False,
    shifted: bool = False,
) -> Tensor:
    """Whether the key of each token is dropped: [F·(special + rows·columns)] bool, on the device of `x`.

    `x` is [B, H, F·(special + rows·columns), D]; `every` is the distance of the frames that keep patches.
    """
    special_ones, first, stands = _roles(x, special, rows, columns, stride, kept, every, first_frame, shifted)
    return ~(special_ones | first | stands)


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
    kept: Sequence[int],
    every: int = 1,
    first_frame: bool = False,
    shifted: bool = False,
) -> Tensor:
    """The tokens that stand for windows, as indices into dimension 2 of `x`; none in the first frame if that is whole.

    Arguments are those of `dropped_tokens`. int64, in the order of the model:
    [(⌈F/every⌉ − first_frame)·lines(rows, stride[0], kept[0])·lines(columns, stride[1], kept[1])].
    """
    special_ones, first, stands = _roles(x, special, rows, columns, stride, kept, every, first_frame, shifted)
    count = _count(x, special, rows, columns, stride, kept, every, first_frame)
    return (stands & ~special_ones & ~first).argsort(descending=True, stable=True)[:count]


@window_patches.register_fake
def _indices(x: Tensor, *place: Any, **named: Any) -> Tensor:
    return x.new_empty(_count(x, *place, **named), dtype=torch.int64)


def _count(
    x: Tensor,
    special: int,
    rows: int,
    columns: int,
    stride: Sequence[int],
    kept: Sequence[int],
    every: int = 1,
    first_frame: bool = False,
    shifted: bool = False,
) -> int:
    """How many tokens stand for windows; as many wherever in its window each stands."""
    frames = cdiv(x.shape[2] // (special + rows * columns), every)
    frames = torch.sym_max(frames, 1) - 1 if first_frame else frames
    return frames * lines(rows, stride[0], kept[0]) * lines(columns, stride[1], kept[1])


def lines(count: int, stride: int, kept: int) -> int:
    """How many of so many rows, or columns, are kept; sizes may be symbolic."""
    assert kept <= stride, "a window keeps no more than it has"
    return cdiv(count, stride) if kept == 1 else count // stride * kept + torch.sym_min(count % stride, kept)


def _roles(
    x: Tensor,
    special: int,
    rows: int,
    columns: int,
    stride: Sequence[int],
    kept: Sequence[int],
    every: int,
    first_frame: bool,
    shifted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each token is special, a patch of a first frame that is whole, and in a place that its window keeps."""
    token = torch.arange(x.shape[2], device=x.device)
    per_frame = special + rows * columns
    frame, patch = token // per_frame, token % per_frame - special
    turn = frame // every  # counts the frames that keep any
    down, right = (turn // stride[1] % stride[0], turn % stride[1]) if shifted else (0, 0)
    stands = (frame % every == 0) & _stands(patch // columns, rows, stride[0], down, kept[0])
    stands = stands & _stands(patch % columns, columns, stride[1], right, kept[1])
    return patch < 0, (frame == 0) & (patch >= 0) & first_frame, stands


def _stands(line: Tensor, count: int, stride: int, place: Tensor | int, kept: int) -> Tensor:
    """Whether rows (or columns) of a grid with so many are those that their windows keep, from `place` on."""
    start = line // stride * stride
    length = (count - start).clamp(min=1, max=stride)
    first = place if isinstance(place, int) else torch.minimum(place, length - 1)
    return (line - start - first) % length < kept
