"""Each head merges tokens that are alike to it, in blocks of neighbouring patches over many frames; queries that fit
badly stay alone.

HTTM (arXiv 2511.21317) finds that heads of a global attention see likeness differently, and that most of it lies
between frames. Queries merge by themselves, keys by themselves, and values follow their keys. A merged one is the mean
over its group, and each token takes the attention's result for the group of its query.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.fx import Node

from vggt_compile.graph.edit import Editor
from vggt_compile.graph.symbols import floordiv, least, minus, portion, times
from vggt_compile.ops import temporal_order as _order  # noqa: F401  # registers an operator
from vggt_compile.ops.sizes import ratio as fraction
from vggt_compile.passes.groups import Groups, matched, refusal
from vggt_compile.registry import Share, Stride, method
from vggt_compile.site import AttentionState, MergedTokens, Site, Size, Skip

ops = torch.ops.vggt_compile


@method("tokens", "merge_heads")
def merge_heads(
    site: Site,
    state: AttentionState,
    edit: Editor,
    *,
    queries: Share = 0.9,
    outliers: Share = 0.1,
    keys: Share = 0.7,
    patches: Stride = 128,
    frames: Stride = 30,
    reference: bool = False,
    weight: Literal["none", "log_count"] = "none",
) -> AttentionState | Skip:
    """In each head, shares of `queries` and `keys` merge inside blocks of `patches` × `frames`, save `outliers`."""
    reason = refusal(site, state, reference)
    if reason is not None:
        return Skip(reason)
    shown: dict[str, Any] = {"method": "merge_heads", "queries": queries, "outliers": outliers, "keys": keys}
    shown |= {"patches": patches, "frames": frames}
    shown |= {"reference": True} if reference else {}
    shown |= {"weight": weight} if weight != "none" else {}
    q, k, v = (edit.cast(x, site.dtype) for x in (state.q, state.k, state.v))  # before they are copied
    blocks = _Blocks(site, patches, frames, reference)
    query_groups = blocks.groups(edit, q, queries, outliers)
    key_groups = blocks.groups(edit, k, keys)
    if query_groups is None and key_groups is None:
        return state.then("tokens", shown)
    changes: dict[str, Any] = {}
    if query_groups is not None:
        changes |= {"q": query_groups.means(edit, q)}
    if key_groups is not None:
        changes |= {"k": key_groups.means(edit, k), "v": key_groups.means(edit, v), "always": blocks.special}
        changes |= {"key_log_weight": key_groups.log_sizes(edit)} if weight == "log_count" else {}
    left = [None if groups is None else groups.count for groups in (query_groups, key_groups)]
    return state.then(
        "tokens",
        shown,
        None if query_groups is None else query_groups.restored,
        pairs=times(site.batch, *(site.tokens if count is None else count for count in left)),
        merged=MergedTokens(blocks.special, blocks.reference, queries=left[0], keys=left[1]),
        **changes,
    )


class _Blocks:
    """Patches in their temporal order, cut into runs of so many that merge among themselves.

    Attributes:
        special, reference: tokens that come first, in all frames and in the first one if it is the reference.
    """

    def __init__(self, site: Site, patches: int, frames: int, reference: bool) -> None:
        layout = site.layout
        assert layout is not None
        assert layout.special is not None
        self._site, self._frames, self._run = site, frames, patches * frames
        self._each_special, self._per_frame = layout.special, minus(layout.per_frame, layout.special)
        self.special, self.reference = times(layout.frames, layout.special), self._per_frame if reference else 0
        self._rest = minus(site.tokens, self.special + self.reference)

    def groups(self, edit: Editor, x: Node, share: float, outliers: float = 0.0) -> Groups | None:
        """The groups of each head of `x` [B, H, N, D] once a share of every run has merged, None where nothing does."""
        stay = max(1, self._run - portion(self._run, fraction(share)))
        stand = floordiv(times(minus(self._rest, 1), stay), self._run) + 1
        sources = minus(self._rest, stand)
        if stay == self._run or sources == 0:
            return None
        sizes = map(edit.size, (self._each_special, self._per_frame, self._frames))
        order = edit.call(ops.temporal_order.default, x, *sizes, self.reference != 0, self._run, stay)
        heads = edit.reshape(x, times(self._site.batch, self._site.heads), self._site.tokens, self._site.head_dim)
        first, runs = self.special + self.reference, (self._run - stay, stay)
        index, _ = matched(edit, order, heads, first, stand, sources, runs)
        group = edit.call(ops.token_groups.default, order, index, index)  # all merge, however similar they are
        groups = Groups(self._site, edit, group, minus(self._site.tokens, sources), per_head=True)
        alone = least(sources, portion(self._rest, fraction(outliers)))
        if alone == 0:
            return groups
        merged = minus(sources, alone)
        fit = self._fit(edit, x, groups, order, sources)
        group = edit.call(ops.token_groups.default, order, index, fit, edit.size(merged))
        return Groups(self._site, edit, group, minus(self._site.tokens, merged), per_head=True)

    def _fit(self, edit: Editor, x: Node, groups: Groups, order: Node, sources: Size) -> Node:
        """How near the last `sources` are to the mean of their group, over all heads, [B·H, sources]."""
        apart = edit.call(torch.sub, x, groups.restored(edit, groups.means(edit, x)))
        apart = edit.cast(apart, torch.promote_types(self._site.dtype, torch.float32))
        far = edit.call(torch.sum, edit.call(torch.square, apart), (1, 3))  # [B, N]
        far = edit.call(torch.index_select, far, 1, order)
        start = edit.size(minus(self._site.tokens, sources))
        near = edit.call(torch.neg, edit.call(torch.narrow, far, 1, start, edit.size(sources)))
        return edit.call(torch.repeat_interleave, near, edit.size(self._site.heads), 0)
