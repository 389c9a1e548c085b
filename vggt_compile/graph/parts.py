"""Special and patch tokens of a sequence over frames, taken apart where they are treated differently, and joined."""

from __future__ import annotations

import torch
from torch.fx import Node

from vggt_compile.graph.dialect import value
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.hilbert import hilbert_order
from vggt_compile.graph.symbols import minus, size_of, times
from vggt_compile.site import PatchKeys, Size, TokenLayout


class Parts:
    """Special and patch tokens of all frames: how many there are, taken apart, and put together again.

    Tokens are the last but one dimension. With `hilbert` the patches of each frame lie along a walk through its grid,
    else row by row as the model has them.
    """

    def __init__(self, layout: TokenLayout, hilbert: bool = False) -> None:
        assert layout.special is not None
        self.layout, self.hilbert, self.each_special = layout, hilbert, layout.special
        self.per_frame = minus(layout.per_frame, layout.special)
        self.special, self.patches = times(layout.frames, layout.special), times(layout.frames, self.per_frame)

    def special_tokens(self, edit: Editor, x: Node) -> Node | None:
        """[..., F·P, D] → the special tokens of all frames [..., F·S, D], None where there are none."""
        if self.special == 0:
            return None
        return reshaped(edit, self._of_frames(edit, x, 0, self.each_special), self.special, over=2)

    def framed_patches(self, edit: Editor, x: Node) -> Node:
        """[..., F·P, D] → [..., F, patches of a frame, D], a view where x can be viewed so and there is no walk."""
        return self._ordered(edit, self._of_frames(edit, x, self.each_special, self.per_frame))

    def patch_tokens(self, edit: Editor, x: Node) -> Node:
        """[..., F·P, D] → the patches of all frames, [..., F · patches of a frame, D]."""
        if self.special == 0 and not self.hilbert:
            return x
        return reshaped(edit, self.framed_patches(edit, x), self.patches, over=2)

    def special_first(self, edit: Editor, x: Node) -> Node:
        special, patches = self.special_tokens(edit, x), self.patch_tokens(edit, x)
        return patches if special is None else edit.call(torch.cat, (special, patches), -2)

    def in_model_order(self, edit: Editor, x: Node) -> Node:
        """Special tokens of all frames, then patches → each frame's special tokens before its patches."""
        if self.special == 0 and not self.hilbert:
            return x

        def part(start: Size, each: Size) -> Node:
            tokens = edit.call(torch.narrow, x, -2, edit.size(start), edit.size(times(self.layout.frames, each)))
            return reshaped(edit, tokens, self.layout.frames, each)

        whole = self._ordered(edit, part(self.special, self.per_frame), back=True)
        if self.special != 0:
            whole = edit.call(torch.cat, (part(0, self.each_special), whole), -2)
        return reshaped(edit, whole, times(self.layout.frames, self.layout.per_frame), over=2)

    def _of_frames(self, edit: Editor, x: Node, start: Size, size: Size) -> Node:
        frames = reshaped(edit, x, self.layout.frames, self.layout.per_frame)
        return edit.call(torch.narrow, frames, -2, edit.size(start), edit.size(size))

    def _ordered(self, edit: Editor, x: Node, *, back: bool = False) -> Node:
        return along_walk(edit, x, self.layout.grid or (0, 0), back=back) if self.hilbert else x


def patch_keys_along_walk(edit: Editor, x: Node, first: Size, keys: PatchKeys) -> Node:
    """[..., first + patch keys, D] with the patch keys of each frame along a walk through their own grid."""
    per_frame = times(*keys.grid)
    count = times(keys.frames, per_frame)
    patches = edit.call(torch.narrow, x, -2, edit.size(first), edit.size(count))
    walked = along_walk(edit, reshaped(edit, patches, keys.frames, per_frame), keys.grid)
    head = edit.call(torch.narrow, x, -2, 0, edit.size(first))
    return edit.call(torch.cat, (head, reshaped(edit, walked, count, over=2)), -2)


def along_walk(edit: Editor, x: Node, grid: tuple[Size, Size], *, back: bool = False) -> Node:
    """The patches of [..., rows · columns, D] from rows into the order of the walk, or back."""
    rows, columns = grid
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    device = value(x).device

    def order() -> torch.Tensor:
        walk = torch.tensor(hilbert_order(rows, columns), device=device)
        return walk.argsort() if back else walk

    name = f"{'rows_from' if back else ''}hilbert_{rows}x{columns}_{device.type}{device.index or 0}"
    return edit.call(torch.index_select, x, -2, edit.constant(name, order))


def reshaped(edit: Editor, x: Node, *sizes: Size, over: int = 1) -> Node:
    """[..., D] with `sizes` in place of the `over` dimensions before the last."""
    *shape, width = map(size_of, value(x).shape)
    return edit.reshape(x, *shape[:-over], *sizes, width)
