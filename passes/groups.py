"""What the methods of the tokens axis share: how many tokens have which role, what they are compared by, and groups.

It offers no choice of its own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from vggt_compile.graph.dialect import projection_input, value
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.symbols import ceildiv, equal, least, minus, portion, size_of, times
from vggt_compile.ops import match_tokens, token_groups  # noqa: F401  # register operators
from vggt_compile.ops.sizes import ratio as fraction
from vggt_compile.site import AttentionState, Site, Size, Skip, TokenLayout

ops = torch.ops.vggt_compile


def refusal(site: Site, state: AttentionState, reference: bool) -> str | None:
    """Why tokens cannot merge at all; `reference` is whether the first frame keeps its own."""
    if state.axes:
        return f"tokens are not merged after another axis yet, and {', '.join(state.axes)} acted before"
    if site.layout is None:
        return "the number of frames is unknown"
    if site.layout.grid is None:
        return "the grid of patches in a frame is unknown"
    if reference and site.layout.frames == 1:
        return "there is one frame only, and none of the reference's tokens merges"
    return None


@dataclass(frozen=True)
class Roles:
    """How many tokens there are of what, where one patch of each cell of a grid stays; see `ops/token_roles.py`.

    Attributes:
        special, reference: in all frames, and in the first one if it is the reference.
        frames: whose patches merge; what follows is for each of them.
        cells: rows and columns of cells.
        protected: patches that are kept and stand for no cell.
        sources: what may merge.
        merged: what does, on average.
    """

    special: Size
    reference: Size
    frames: Size
    cells: tuple[Size, Size]
    protected: Size
    sources: Size
    merged: Size

    @classmethod
    def of(cls, layout: TokenLayout, cell: tuple[int, int], reference: bool, protect: float, ratio: float) -> Roles:
        assert layout.special is not None
        assert layout.grid is not None
        patches = times(*layout.grid)
        rows, columns = (ceildiv(lines, step) for lines, step in zip(layout.grid, cell, strict=True))
        protected = portion(minus(patches, times(rows, columns)), fraction(protect))
        sources = minus(patches, times(rows, columns) + protected)
        return cls(
            special=times(layout.frames, layout.special),
            reference=patches if reference else 0,
            frames=layout.frames - int(reference),
            cells=(rows, columns),
            protected=protected,
            sources=sources,
            merged=least(sources, portion(layout.per_frame, fraction(ratio))),
        )

    @property
    def all_cells(self) -> Size:
        return times(self.frames, *self.cells)

    @property
    def all_sources(self) -> Size:
        return times(self.frames, self.sources)

    @property
    def all_merged(self) -> Size:
        return times(self.frames, self.merged)


def features(site: Site, edit: Editor, x: Node, *, from_input: bool) -> Node | Skip:
    """What tokens are compared by, [B, N, C]: means over the heads of `x`, or what the values were projected from."""
    if not from_input:
        wide = torch.promote_types(site.dtype, torch.float32)
        return edit.cast(edit.call(torch.mean, x, 1, dtype=wide), site.dtype)
    source = projection_input(site.call.v)
    shape = [] if source is None else [size_of(dim) for dim in value(source).shape]
    if source is None or len(shape) != 3 or not (equal(shape[0], site.batch) and equal(shape[1], site.tokens)):
        return Skip("its values are no projection of [batch, tokens, width], which metric='input' compares tokens by")
    return edit.cast(source, site.dtype)


def matched(
    edit: Editor, order: Node, x: Node, first: Size, count: Size, sources: Size, runs: tuple[Size, Size] | None = None
) -> tuple[Node, Node]:
    """Which of `count` tokens from `first` on each of the last `sources` is most similar to, and how much, [B, S].

    Tokens are those of `x` [B, N, C] in `order`; the index counts from the first one of all.
    """
    tokens = size_of(value(order).shape[0])
    ordered = edit.call(torch.index_select, x, 1, order)
    source = edit.call(torch.narrow, ordered, 1, edit.size(minus(tokens, sources)), edit.size(sources))
    destination = edit.call(torch.narrow, ordered, 1, edit.size(first), edit.size(count))
    found = edit.call(ops.match_tokens.default, source, destination, *map(edit.size, runs or ()))
    index, similarity = (edit.call(operator.getitem, found, i) for i in range(2))
    return (index if first == 0 else edit.call(torch.add, index, edit.size(first))), similarity


class Groups:
    """Tokens in `count` groups: `group` [B, N], or [B·H, N] where each head has its own."""

    def __init__(self, site: Site, edit: Editor, group: Node, count: Size, *, per_head: bool = False) -> None:
        self.site, self.count, self.per_head, self._group = site, count, per_head, group
        self.size = edit.call(ops.group_sizes.default, group, edit.size(count))
        self._members = edit.call(ops.group_members.default, group)

    def means(self, edit: Editor, x: Node) -> Node:
        """[B, H, N, D] → [B, H, groups, D]."""
        means = edit.call(ops.group_means.default, folded(edit, x) if self.per_head else x, self._members, self.size)
        return self._unfolded(edit, means)

    def restored(self, edit: Editor, x: Node) -> Node:
        """[B, H, groups, D] → [B, H, N, D], each token with what its group has."""
        x = edit.call(ops.from_groups.default, folded(edit, x) if self.per_head else x, self._group)
        return self._unfolded(edit, x)

    def log_sizes(self, edit: Editor) -> Node:
        """The logarithm of how many tokens are in each group, [B, 1 or H, groups] fp32."""
        heads = self.site.heads if self.per_head else 1
        return edit.reshape(edit.call(torch.log, self.size), self.site.batch, heads, self.count)

    def _unfolded(self, edit: Editor, x: Node) -> Node:
        if not self.per_head:
            return x
        return edit.reshape(x, self.site.batch, self.site.heads, *map(size_of, value(x).shape[2:]))


def folded(edit: Editor, x: Node) -> Node:
    """[B, H, N, D] → [B·H, 1, N, D]."""
    batch, heads, *rest = map(size_of, value(x).shape)
    return edit.reshape(x, times(batch, heads), 1, *rest)
