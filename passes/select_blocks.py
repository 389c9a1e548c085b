"""Patch queries read some blocks of keys only: those that pooled scores point at, or random ones as a control.

Faster VGGT (arXiv 2509.07120) finds that most of a global attention's mass lies in few pairs of places, and that means
over neighbouring tokens are enough to find them. Special tokens stay out of it: they read all keys, and every query
reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch.fx import Node

from vggt_compile.graph.edit import Editor
from vggt_compile.graph.symbols import floordiv, greatest, least, minus, times
from vggt_compile.ops import random_blocks as _random  # noqa: F401  # registers an operator
from vggt_compile.ops.select_blocks import ratio
from vggt_compile.registry import Share, method
from vggt_compile.site import AttentionState, BlockLists, Site, Size, Skip, TokenLayout

BlockSize: TypeAlias = Literal[16, 32, 64, 128, 256]
"""Tokens of a block: what the kernels have tiles for."""


@method("blocks", "predict")
def select_blocks(
    site: Site,
    state: AttentionState,
    edit: Editor,
    *,
    keep: Share = 0.25,
    cdf: Share = 0.0,
    pool: Literal["mean", "max"] = "mean",
    coverage: Literal["reference", "reach"] = "reference",
    most: Share = 0.5,
    keep_first_frame: bool = False,
    q_block: BlockSize = 128,
    k_block: BlockSize = 64,
) -> AttentionState | Skip:
    """Patch queries read the key blocks with the best pooled scores: a share `keep`, and mass `cdf` up to `most`."""
    setting = {"keep": keep, "pool": pool} | ({"cdf": cdf, "coverage": coverage, "most": most} if cdf else {})

    def choose(q: Node, k: Node) -> Node:
        shape = (q_block, k_block)
        given = (keep, cdf, pool, coverage, most, *shape)
        return edit.call(torch.ops.vggt_compile.select_blocks.default, q, k, *given, scale=site.call.scale)

    blocks = _Blocks("predict", keep, keep_first_frame, q_block, k_block, setting, at_least=cdf > 0)
    return _confine(site, state, edit, blocks, choose)


@method("blocks", "random")
def random_blocks(
    site: Site,
    state: AttentionState,
    edit: Editor,
    *,
    keep: Share = 0.25,
    seed: int = 0,
    keep_first_frame: bool = False,
    q_block: BlockSize = 128,
    k_block: BlockSize = 64,
) -> AttentionState | Skip:
    """Patch queries read as many key blocks as with `predict`, drawn at random: a control for experiments."""

    def choose(q: Node, k: Node) -> Node:
        given = (keep, seed * 1000 + (site.layer or 0), q_block, k_block)  # layers draw different ones
        return edit.call(torch.ops.vggt_compile.random_blocks.default, q, k, *given)

    blocks = _Blocks("random", keep, keep_first_frame, q_block, k_block, {"keep": keep, "seed": seed})
    return _confine(site, state, edit, blocks, choose)


@dataclass(frozen=True)
class _Blocks:
    """What both methods share; `setting` is the rest of what the report shows."""

    method: str
    keep: float
    keep_first_frame: bool
    q_block: int
    k_block: int
    setting: dict[str, Any]
    at_least: bool = False

    def refusal(self, site: Site, state: AttentionState) -> str | None:
        before = [axis for axis in state.axes if axis != "blocks"]
        if before:
            return f"blocks are not chosen after another axis yet, and {', '.join(before)} acted before"
        if site.layout is None:
            return "the number of frames is unknown"
        if site.layout.special is None:
            return "the number of special tokens in a frame is unknown"
        if self.keep_first_frame and site.layout.frames == 1:
            return "there is one frame only, and keep_first_frame keeps all of it"
        return None

    def kept(self, keys: Size) -> Size:
        """Keys that a query reads at least of so many in blocks."""
        share, blocks = ratio(self.keep), floordiv(keys + self.k_block - 1, self.k_block)
        floor = floordiv(times(blocks, share.numerator), share.denominator)
        return least(times(greatest(floor, 1), self.k_block), keys)


def _confine(
    site: Site, state: AttentionState, edit: Editor, blocks: _Blocks, choose: Callable[[Node, Node], Node]
) -> AttentionState | Skip:
    """The state in which patch queries read the blocks that `choose` finds for them; keys are special ones, patches."""
    refusal = blocks.refusal(site, state)
    if refusal is not None:
        return Skip(refusal)
    assert site.layout is not None
    parts = _Parts(site, site.layout)
    q, k, v = (edit.cast(x, site.dtype) for x in (state.q, state.k, state.v))  # before they are copied
    special_q, patch_q = parts.split(edit, q)
    always = parts.special if not blocks.keep_first_frame else parts.special + parts.per_frame
    listed = minus(site.tokens, always)
    k, v = (parts.special_first(edit, x) for x in (k, v))
    lists = choose(patch_q, edit.call(torch.narrow, k, 2, edit.size(always), edit.size(listed)))
    index, count = (edit.call(operator.getitem, lists, i) for i in range(2))
    pairs = times(parts.special, site.tokens) + times(parts.patches, always + blocks.kept(listed))
    shown = {"method": blocks.method, **blocks.setting}
    shown |= {"keep_first_frame": True} if blocks.keep_first_frame else {}
    return state.then(
        "blocks",
        shown,
        parts.in_model_order,
        q=patch_q,
        k=k,
        v=v,
        pairs=times(site.batch, pairs),
        blocks=BlockLists(index, count, always, blocks.q_block, blocks.k_block),
        dense_q=special_q,
        at_least=blocks.at_least,
    )


class _Parts:
    """Special and patch tokens of all frames: how many there are, taken apart, and put together again."""

    def __init__(self, site: Site, layout: TokenLayout) -> None:
        assert layout.special is not None
        self.site, self.layout = site, layout
        self.per_frame = minus(layout.per_frame, layout.special)
        self.special, self.patches = times(layout.frames, layout.special), times(layout.frames, self.per_frame)

    def split(self, edit: Editor, x: Node) -> tuple[Node | None, Node]:
        """[B, H, F·P, D] → the special tokens of all frames [B, H, F·S, D], None where there are none, and patches."""
        if self.special == 0:
            return None, x
        site, layout = self.site, self.layout
        frames = edit.reshape(x, site.batch, site.heads, layout.frames, layout.per_frame, site.head_dim)

        def part(start: Size, size: Size) -> Node:
            x = edit.call(torch.narrow, frames, 3, edit.size(start), edit.size(size))
            return edit.reshape(x, site.batch, site.heads, times(layout.frames, size), site.head_dim)

        assert layout.special is not None
        return part(0, layout.special), part(layout.special, self.per_frame)

    def special_first(self, edit: Editor, x: Node) -> Node:
        special, patches = self.split(edit, x)
        return patches if special is None else edit.call(torch.cat, (special, patches), 2)

    def in_model_order(self, edit: Editor, x: Node) -> Node:
        """Special tokens of all frames, then patches → each frame's special tokens before its patches."""
        if self.special == 0:
            return x
        site, layout = self.site, self.layout
        assert layout.special is not None

        def part(start: Size, size: Size, each: Size) -> Node:
            tokens = edit.call(torch.narrow, x, 2, edit.size(start), edit.size(size))
            return edit.reshape(tokens, site.batch, site.heads, layout.frames, each, site.head_dim)

        parts = part(0, self.special, layout.special), part(self.special, self.patches, self.per_frame)
        return edit.reshape(edit.call(torch.cat, parts, 3), site.batch, site.heads, site.tokens, site.head_dim)
