"""Special and patch tokens of a sequence over frames, taken apart where they are treated differently, and joined."""

from __future__ import annotations

import torch
from torch.fx import Node

from vggt_compile.graph.dialect import value
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.hilbert import hilbert_order
from vggt_compile.graph.symbols import minus, times
from vggt_compile.site import Site, Size, TokenLayout


class Parts:
    """Special and patch tokens of all frames: how many there are, taken apart, and put together again.

    With `hilbert` the patches of each frame lie along a walk through its grid, else row by row as the model has them.
    """

    def __init__(self, site: Site, layout: TokenLayout, hilbert: bool = False) -> None:
        assert layout.special is not None
        self.site, self.layout, self.hilbert = site, layout, hilbert
        self.per_frame = minus(layout.per_frame, layout.special)
        self.special, self.patches = times(layout.frames, layout.special), times(layout.frames, self.per_frame)

    def split(self, edit: Editor, x: Node) -> tuple[Node | None, Node]:
        """[B, H, F·P, D] → the special tokens of all frames [B, H, F·S, D], None where there are none, and patches."""
        if self.special == 0 and not self.hilbert:
            return None, x
        site, layout = self.site, self.layout
        frames = edit.reshape(x, site.batch, site.heads, layout.frames, layout.per_frame, site.head_dim)

        def part(start: Size, size: Size) -> Node:
            return edit.call(torch.narrow, frames, 3, edit.size(start), edit.size(size))

        def joined(x: Node, size: Size) -> Node:
            return edit.reshape(x, site.batch, site.heads, times(layout.frames, size), site.head_dim)

        assert layout.special is not None
        special = joined(part(0, layout.special), layout.special) if self.special != 0 else None
        return special, joined(self._ordered(edit, part(layout.special, self.per_frame)), self.per_frame)

    def special_first(self, edit: Editor, x: Node) -> Node:
        special, patches = self.split(edit, x)
        return patches if special is None else edit.call(torch.cat, (special, patches), 2)

    def in_model_order(self, edit: Editor, x: Node) -> Node:
        """Special tokens of all frames, then patches → each frame's special tokens before its patches."""
        if self.special == 0 and not self.hilbert:
            return x
        site, layout = self.site, self.layout
        assert layout.special is not None

        def part(start: Size, size: Size, each: Size) -> Node:
            tokens = edit.call(torch.narrow, x, 2, edit.size(start), edit.size(size))
            return edit.reshape(tokens, site.batch, site.heads, layout.frames, each, site.head_dim)

        whole = self._ordered(edit, part(self.special, self.patches, self.per_frame), back=True)
        if self.special != 0:
            whole = edit.call(torch.cat, (part(0, self.special, layout.special), whole), 3)
        return edit.reshape(whole, site.batch, site.heads, site.tokens, site.head_dim)

    def _ordered(self, edit: Editor, x: Node, *, back: bool = False) -> Node:
        """The patches of [B, H, F, P, D] from rows into the order of the walk, or back."""
        if not self.hilbert:
            return x
        rows, columns = self.layout.grid or (0, 0)
        assert isinstance(rows, int)
        assert isinstance(columns, int)
        device = value(x).device

        def order() -> torch.Tensor:
            walk = torch.tensor(hilbert_order(rows, columns), device=device)
            return walk.argsort() if back else walk

        name = f"{'rows_from' if back else ''}hilbert_{rows}x{columns}_{device.type}{device.index or 0}"
        return edit.call(torch.index_select, x, 3, edit.constant(name, order))
