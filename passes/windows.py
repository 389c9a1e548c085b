"""Windows of a grid of patches, of which some patches keep their key: how many these are, and how they are taken out.

It offers no choice of its own: `subsample_keys` asks it, for keys in the model's order and for those that have merged.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from vggt_compile.graph.edit import Editor
from vggt_compile.graph.parts import reshaped
from vggt_compile.graph.symbols import ceildiv, floordiv, greatest, least, minus, times
from vggt_compile.ops import key_grid as _key_grid  # noqa: F401  # registers operators
from vggt_compile.site import AttentionState, PatchKeys, Site, Size


@dataclass(frozen=True)
class Place:
    """Where patch keys lie: frame by frame in a grid, `special` others before each, from `start` on for `length` keys.

    Attributes:
        keys: all keys, those elsewhere too.
        from_first: whether the first frame is among the frames.
    """

    frames: Size
    grid: tuple[Size, Size]
    special: Size
    start: Size
    length: Size
    keys: Size
    from_first: bool = True


def of_model(site: Site) -> Place:
    layout = site.layout
    assert layout is not None
    assert layout.special is not None
    assert layout.grid is not None
    return Place(layout.frames, layout.grid, layout.special, 0, site.tokens, site.tokens)


def of_cells(state: AttentionState) -> Place:
    """Keys that stand for cells once tokens have merged; all others are kept."""
    assert state.merged is not None
    assert state.merged.keys is not None
    assert state.merged.cells is not None
    start, cells = state.merged.cells
    return Place(
        cells.frames, cells.grid, 0, start, times(cells.frames, *cells.grid), state.merged.keys, cells.from_first
    )


class Windows:
    """How many keys are kept and dropped, and how the kept ones are taken out of the order of all.

    Attributes:
        first: keys that are kept in any case: special ones, the first frame if it is whole, what lies in no grid.
        windows: the other keys, those of each window of patches.
        count: how many these are.
        dropped: patches without a key.
        every: distance of the frames that keep patches; a symbol where it depends on how many frames there are.
    """

    def __init__(
        self,
        edit: Editor,
        place: Place,
        stride: tuple[int, int],
        kept: tuple[int, int],
        frames: int,
        most_frames: int,
        first_frame: bool,
        shifted: bool,
    ) -> None:
        self.edit, self.place, self.stride, self.frames, self.shifted = edit, place, stride, frames, shifted
        self.every = greatest(frames, ceildiv(place.frames, most_frames)) if most_frames else frames
        self.kept = (min(kept[0], stride[0]), min(kept[1], stride[1]))
        self.first_frame = first_frame and place.from_first
        each = times(*place.grid)
        others = minus(place.keys, times(place.frames, each))
        self.first = others + (each if self.first_frame else 0)
        rows, columns = map(_lines, place.grid, stride, self.kept)
        turns = ceildiv(place.frames, self.every)
        if self.first_frame:
            turns = minus(greatest(turns, 1), 1)  # a tracer that cannot tell quotients sees it is not negative
        self.windows = PatchKeys(turns, (rows, columns), place.from_first and not first_frame)
        self.count = times(turns, rows, columns)
        self.dropped = minus(place.keys, self.first + self.count)

    def dropped_keys(self, x: Node) -> Node:
        """Whether each key of `x` [B, H, keys, D] is dropped, [keys] bool."""
        mask = self.edit.call(torch.ops.vggt_compile.dropped_tokens.default, self._framed(x), *self._arguments())
        if self.place.length == self.place.keys:
            return mask
        behind = minus(self.place.keys, self.place.start + self.place.length)
        return self.edit.call(F.pad, mask, (self.edit.size(self.place.start), self.edit.size(behind)))

    def surely_drops(self) -> bool:
        """Whether some patch is dropped whatever values the sizes take."""
        more, steps = self.edit.symbols.surely_more, (self.frames, *self.stride)
        sizes, stay = (self.place.frames, *self.place.grid), (1, *self.kept)
        thins = any(step > n and more(size, n) for size, step, n in zip(sizes, steps, stay, strict=True))
        return thins and (more(self.place.frames, 1) or not self.first_frame)

    def thinned(self, x: Node, mean: Node | None) -> Node:
        """[B, H, keys, D] → [B, H, kept, D]: special tokens and others, a whole first frame, the mean, windows."""
        edit, framed, first_frame = self.edit, self._framed(x), None
        if self.first_frame:
            start, count = map(edit.size, (self.place.special, times(*self.place.grid)))
            first_frame = edit.call(torch.narrow, framed, 2, start, count)
        # Views would guard on a distance that is a symbol, and on whether the first frame is the only one of every so
        # many.
        fixed = isinstance(self.every, int) and (self.every == 1 or not self.first_frame)
        gathers = self.shifted or self.kept != (1, 1) or not fixed
        windows = self._gathered(framed) if gathers else self._strided(framed)
        parts = (*self._others(x), first_frame, mean, windows)
        return edit.call(torch.cat, [part for part in parts if part is not None], 2)

    def _arguments(self) -> tuple[Any, ...]:
        """What the operators of `ops/key_grid.py` want to know beside the tokens."""
        special, rows, columns, every = map(self.edit.size, (self.place.special, *self.place.grid, self.every))
        return special, rows, columns, list(self.stride), list(self.kept), every, self.first_frame, self.shifted

    def _framed(self, x: Node) -> Node:
        if self.place.length == self.place.keys:
            return x
        return self.edit.call(torch.narrow, x, 2, *map(self.edit.size, (self.place.start, self.place.length)))

    def _others(self, x: Node) -> list[Node | None]:
        place, size = self.place, self.edit.size
        if place.length == place.keys:
            return [self._special(x)]
        end = place.start + place.length
        around = ((0, place.start), (end, minus(place.keys, end)))
        return [self.edit.call(torch.narrow, x, 2, size(start), size(n)) for start, n in around if n != 0]

    def _special(self, x: Node) -> Node | None:
        place, edit = self.place, self.edit
        if place.special == 0:
            return None
        frames = reshaped(edit, x, place.frames, place.special + times(*place.grid))
        special = edit.call(torch.narrow, frames, -2, 0, edit.size(place.special))
        return reshaped(edit, special, times(place.frames, place.special), over=2)

    def _gathered(self, framed: Node) -> Node:
        index = self.edit.call(torch.ops.vggt_compile.window_patches.default, framed, *self._arguments())
        return self.edit.call(torch.index_select, framed, 2, index)

    def _strided(self, framed: Node) -> Node:
        """The same as strided views: their one copy is part of the concatenation in the end."""
        edit, place = self.edit, self.place
        frames = reshaped(edit, framed, place.frames, place.special + times(*place.grid))
        patches = edit.call(torch.narrow, frames, -2, edit.size(place.special), edit.size(times(*place.grid)))
        every = slice(int(self.first_frame), None, self.every)
        down, right = (slice(None, None, step) for step in self.stride)
        grid = reshaped(edit, patches, *place.grid)
        stands = edit.call(operator.getitem, grid, (..., every, down, right, slice(None)))
        if self.every != 1:  # a view of all their patches would guard on whether more than one frame is left
            stands = edit.call(torch.clone, stands, memory_format=torch.contiguous_format)
        return reshaped(edit, stands, self.count, over=3)


def _lines(count: Size, stride: int, kept: int) -> Size:
    """How many of so many rows, or columns, are kept."""
    if kept == 1:
        return ceildiv(count, stride)
    whole = floordiv(count, stride)
    return times(whole, kept) + least(minus(count, times(whole, stride)), kept)
