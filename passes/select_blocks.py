"""Patch queries read some blocks of keys only: those that pooled scores point at, or random ones as a control.

Faster VGGT (arXiv 2509.07120) finds that most of a global attention's mass lies in few pairs of places, and that means
over neighbouring tokens are enough to find them. Special tokens stay out of it: they read all keys, and every query
reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

import torch
from torch.fx import Node

from vggt_compile.graph.dialect import value
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.parts import Parts
from vggt_compile.graph.symbols import ceildiv, greatest, least, minus, portion, size_of, times
from vggt_compile.ops import random_blocks as _random  # noqa: F401  # registers an operator
from vggt_compile.ops.sizes import ratio
from vggt_compile.passes.block_operands import Keys, Queries, ordered_keys
from vggt_compile.registry import Range, Share, method
from vggt_compile.site import AttentionState, BlockLists, OwnKeys, Site, Size, Skip

BlockSize: TypeAlias = Literal[16, 32, 64, 128, 256]
"""Tokens of a block: what the kernels have tiles for."""

Layers: TypeAlias = Annotated[int, Range(1, 100)]

Choose: TypeAlias = Callable[[Node, Callable[[], Node]], tuple[Node, Node]]
"""Patch queries and a way to the keys in blocks → block_index, block_count."""


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
    order: Literal["raster", "hilbert"] = "raster",
    refresh: Layers = 1,
    special_dense: bool = True,
) -> AttentionState | Skip:
    """Patch queries read the key blocks with the best pooled scores: a share `keep`, and mass `cdf` up to `most`."""
    given = (keep, cdf, pool, coverage, most, q_block, k_block)
    few = 0 if state.axes else site.dense_below
    sizes = (site.batch, site.heads, site.layout, few)
    asked = (state.axes, given, keep_first_frame, order, refresh, special_dense, site.call.scale, sizes)
    earlier = _Choice.before(site, edit, asked, refresh)
    setting: dict[str, Any] = {"keep": keep, "pool": pool}
    setting |= {"cdf": cdf, "coverage": coverage, "most": most} if cdf else {}
    setting |= {"order": order} if order != "raster" else {}
    setting |= {"refresh": refresh} if refresh > 1 else {}
    setting |= {} if special_dense else {"special_dense": False}
    setting |= {"chosen_at": earlier.layer} if earlier else {}
    setting |= {"all_below": few} if few else {}
    blocks = _Blocks(
        "predict",
        keep,
        keep_first_frame,
        q_block,
        k_block,
        setting,
        at_least=cdf > 0,
        hilbert=order == "hilbert",
        special_dense=special_dense,
        all_below=few,
    )

    def choose(q: Node, k: Callable[[], Node]) -> tuple[Node, Node]:
        if earlier is not None:
            return earlier.lists
        keys, wanted = k(), dict[str, Any](scale=site.call.scale)
        if few:
            wanted["least"] = edit.size(blocks.fewest(site.tokens, size_of(value(keys).shape[2])))
        return _lists(edit, torch.ops.vggt_compile.select_blocks.default, q, keys, *given, **wanted)

    outcome = _confine(site, state, edit, blocks, choose)
    if isinstance(outcome, AttentionState) and outcome.blocks is not None:
        chosen = earlier or _Choice(asked, (outcome.blocks.index, outcome.blocks.count), site.layer or 0)
        edit.bequeath(_Choice.NAME, replace(chosen, reads=chosen.reads + 1))
    return outcome


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

    def choose(q: Node, k: Callable[[], Node]) -> tuple[Node, Node]:
        given = (keep, seed * 1000 + (site.layer or 0), q_block, k_block)  # layers draw different ones
        return _lists(edit, torch.ops.vggt_compile.random_blocks.default, q, k(), *given)

    blocks = _Blocks("random", keep, keep_first_frame, q_block, k_block, {"keep": keep, "seed": seed})
    return _confine(site, state, edit, blocks, choose)


def _lists(edit: Editor, choice: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Node, Node]:
    """block_index and block_count of an operator that gives both."""
    both = edit.call(choice, *args, **kwargs)
    return edit.call(operator.getitem, both, 0), edit.call(operator.getitem, both, 1)


@dataclass(frozen=True)
class _Choice:
    """Lists that the next layers may read too.

    Attributes:
        asked: what they depend on besides queries and keys; a layer that differs in it has to choose anew.
        layer: which chose them.
        reads: how many layers read them so far.
    """

    NAME = "chosen blocks"
    asked: tuple[Any, ...]
    lists: tuple[Node, Node]
    layer: int
    reads: int = 0

    @classmethod
    def before(cls, site: Site, edit: Editor, asked: tuple[Any, ...], refresh: int) -> _Choice | None:
        """What the layer before this one read, if this one may read it too."""
        last: _Choice | None = edit.inherit(cls.NAME)
        if last is None or last.asked != asked or last.reads == refresh:
            return None
        return last if (site.layer or 0) > last.layer else None  # else the model runs once more, on other tokens


@dataclass(frozen=True)
class _Blocks:
    """What both methods share; `setting` is the rest of what the report shows.

    Without `special_dense` special tokens are in blocks among the patches, in the model's order, as an experiment.
    Attentions over fewer than `all_below` tokens read all blocks.
    """

    method: str
    keep: float
    keep_first_frame: bool
    q_block: int
    k_block: int
    setting: dict[str, Any]
    at_least: bool = False
    hilbert: bool = False
    special_dense: bool = True
    all_below: int = 0

    def refusal(self, site: Site, state: AttentionState) -> str | None:
        if state.axes.keys() - {"tokens", "keys"} or (state.axes and state.patch_keys is None and state.merged is None):
            return f"blocks are not chosen after {', '.join(state.axes)} yet"
        if site.layout is None:
            return "the number of frames is unknown"
        if site.layout.special is None:
            return "the number of special tokens in a frame is unknown"
        if self.keep_first_frame and site.layout.frames == 1:
            return "there is one frame only, and keep_first_frame keeps all of it"
        if not self.special_dense and (state.axes or self.hilbert or self.keep_first_frame):
            return "special_dense=False goes with no other axis, no order='hilbert' and no keep_first_frame"
        if self.hilbert and state.merged is not None:
            return "order='hilbert' walks through a grid of patches, and merged tokens have left it"
        if self.keep_first_frame and state.merged is not None and state.merged.keys is not None:
            return "keep_first_frame knows the patches of the first frame no more once keys have merged"
        grid = site.layout.grid
        if self.hilbert and grid is None:
            return "the rows and columns of its patches are unknown, which order='hilbert' walks through"
        if self.hilbert and not all(isinstance(side, int) for side in grid or ()):
            return "the rows and columns of its patches are symbols; keep image sizes static, or take order='raster'"
        return None

    def fewest(self, tokens: Size, keys: Size) -> Size:
        """Blocks that a query reads at least, whatever the share: all where the model has so few tokens, else one."""
        if not self.all_below:
            return 1
        beyond = times(self.all_below, minus(self.all_below, tokens))  # more than there are blocks, or not above 0
        return greatest(least(ceildiv(keys, self.k_block), beyond), 1)

    def kept(self, tokens: Size, keys: Size) -> Size:
        """Keys that a query reads at least of so many in blocks."""
        floor = portion(ceildiv(keys, self.k_block), ratio(self.keep))
        return least(times(greatest(floor, self.fewest(tokens, keys)), self.k_block), keys)

    def pairs(self, tokens: Size, queries: Queries, keys: Keys, own: OwnKeys | None) -> Size:
        """Pairs of queries and keys that are computed at least, for one batch item and head."""
        special = times(queries.special, keys.always + keys.listed)
        patches = times(queries.patches, keys.always + self.kept(tokens, keys.listed))
        return special + patches + (0 if own is None else own.reads)


def _confine(site: Site, state: AttentionState, edit: Editor, blocks: _Blocks, choose: Choose) -> AttentionState | Skip:
    """The state in which patch queries read the blocks that `choose` finds for them; special queries read all keys."""
    refusal = blocks.refusal(site, state)
    if refusal is not None:
        return Skip(refusal)
    assert site.layout is not None
    layout = site.layout if blocks.special_dense else replace(site.layout, special=0)
    parts = Parts(layout, blocks.hilbert)
    keys = Keys.of(state, parts, blocks.keep_first_frame)
    q, k, v = (edit.cast(x, site.dtype) for x in (state.q, state.k, state.v))  # before they are copied
    queries = Queries.of(state, parts)
    special_q, patch_q = queries.special_ones(edit, q), queries.patch_ones(edit, q)
    k, v = (ordered_keys(edit, x, state, parts) for x in (k, v))
    always, listed = keys.always, keys.listed
    index, count = choose(patch_q, lambda: edit.call(torch.narrow, k, 2, edit.size(always), edit.size(listed)))
    shown = {"method": blocks.method, **blocks.setting}
    shown |= {"keep_first_frame": True} if blocks.keep_first_frame else {}
    return state.then(
        "blocks",
        shown,
        parts.in_model_order if queries.parts is not None else None,
        q=patch_q,
        k=k,
        v=v,
        pairs=times(site.batch, blocks.pairs(site.tokens, queries, keys, state.own)),
        own=None if state.own is None else queries.own_of_patches(edit, state.own),
        blocks=BlockLists(index, count, always, blocks.q_block, blocks.k_block),
        dense_q=special_q,
        at_least=blocks.at_least,
        dense_below=blocks.all_below,
    )
