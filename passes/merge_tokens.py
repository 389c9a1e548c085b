"""Similar tokens are merged around an attention: few queries, keys and values go in, and every token gets a result.

FastVGGT (arXiv 2509.02560) finds that tokens of a global attention grow alike, and lets most of them join the most
similar one of a few that cover all frames. A merged query, key or value is the mean over its group, and each token
takes the attention's result for its group.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from vggt_compile.graph.dialect import projection_input, value
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.symbols import ceildiv, equal, least, minus, portion, size_of, times
from vggt_compile.ops import match_tokens, token_groups, token_roles  # noqa: F401  # register operators
from vggt_compile.ops.sizes import ratio as fraction
from vggt_compile.registry import Share, Stride, method
from vggt_compile.site import AttentionState, Site, Size, Skip, TokenLayout

ops = torch.ops.vggt_compile


@method("tokens", "merge")
def merge_tokens(
    site: Site,
    state: AttentionState,
    edit: Editor,
    *,
    ratio: Share = 0.9,
    cell: tuple[Stride, Stride] = (2, 2),
    cells: Literal["fixed", "seeded"] = "fixed",
    seed: int = 0,
    protect: Share = 0.1,
    reference: bool = True,
    metric: Literal["keys", "queries", "input"] = "keys",
    weight: Literal["none", "log_count"] = "none",
) -> AttentionState | Skip:
    """Patches merge into the most similar special token, patch of the first frame, or one patch of each `cell`."""
    refusal = _refusal(site, state, reference)
    if refusal is not None:
        return Skip(refusal)
    assert site.layout is not None
    assert site.layout.special is not None
    assert site.layout.grid is not None
    shown: dict[str, Any] = {"method": "merge", "ratio": ratio, "cell": list(cell)}
    shown |= {"cells": cells, "seed": seed} if cells != "fixed" else {}
    shown |= {"protect": protect, "metric": metric}
    shown |= {"reference": False} if not reference else {}
    shown |= {"weight": weight} if weight != "none" else {}
    counts = _Counts.of(site.layout, cell, reference, protect, ratio)
    if counts.merged == 0:
        return state.then("tokens", shown)
    q, k, v = (edit.cast(x, site.dtype) for x in (state.q, state.k, state.v))  # before they are copied
    features = _features(site, edit, q if metric == "queries" else k, from_input=metric == "input")
    if isinstance(features, Skip):
        return features
    sizes = map(edit.size, (site.layout.special, *site.layout.grid))
    roles = (list(cell), edit.size(counts.protected), reference, seed if cells == "seeded" else None)
    order = edit.call(ops.merge_order.default, k, *sizes, *roles)
    group = _group(edit, order, features, counts)
    groups = minus(site.tokens, counts.merged)
    size = edit.call(ops.group_sizes.default, group, edit.size(groups))
    members = edit.call(ops.group_members.default, group)
    q, k, v = (edit.call(ops.group_means.default, x, members, size) for x in (q, k, v))
    log_weight = None
    if weight == "log_count":
        log_weight = edit.call(torch.unsqueeze, edit.call(torch.log, size), 1)

    def restore(edit: Editor, x: Node) -> Node:
        return edit.call(ops.from_groups.default, x, group)

    return state.then(
        "tokens",
        shown,
        restore,
        q=q,
        k=k,
        v=v,
        pairs=times(site.batch, groups, groups),
        always=counts.special,
        key_log_weight=log_weight,
    )


def _refusal(site: Site, state: AttentionState, reference: bool) -> str | None:
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
class _Counts:
    """How many tokens there are of what, over all frames but for `protected`.

    Attributes:
        special: special tokens.
        destinations: these, the reference's patches, and those that stand for cells.
        protected: patches of a frame that are kept and no destination.
        sources: what may merge.
        merged: what does.
    """

    special: Size
    destinations: Size
    protected: Size
    sources: Size
    merged: Size

    @classmethod
    def of(cls, layout: TokenLayout, cell: tuple[int, int], reference: bool, protect: float, ratio: float) -> _Counts:
        assert layout.special is not None
        assert layout.grid is not None
        frames, patches = layout.frames - int(reference), times(*layout.grid)
        stand = times(*(ceildiv(lines, step) for lines, step in zip(layout.grid, cell, strict=True)))
        special = times(layout.frames, layout.special)
        protected = portion(minus(patches, stand), fraction(protect))
        sources = minus(patches, stand + protected)
        return cls(
            special=special,
            destinations=special + (patches if reference else 0) + times(frames, stand),
            protected=protected,
            sources=times(frames, sources),
            merged=times(frames, least(sources, portion(layout.per_frame, fraction(ratio)))),
        )


def _features(site: Site, edit: Editor, x: Node, *, from_input: bool) -> Node | Skip:
    """What tokens are compared by, [B, N, C]: means over the heads of `x`, or what the values were projected from."""
    if not from_input:
        wide = torch.promote_types(site.dtype, torch.float32)
        return edit.cast(edit.call(torch.mean, x, 1, dtype=wide), site.dtype)
    source = projection_input(site.call.v)
    shape = [] if source is None else [size_of(dim) for dim in value(source).shape]
    if source is None or len(shape) != 3 or not (equal(shape[0], site.batch) and equal(shape[1], site.tokens)):
        return Skip("its values are no projection of [batch, tokens, width], which metric='input' compares tokens by")
    return edit.cast(source, site.dtype)


def _group(edit: Editor, order: Node, features: Node, counts: _Counts) -> Node:
    """The group of each token, [B, N], where `order` has destinations first and sources last."""
    tokens = size_of(value(order).shape[0])
    ordered = edit.call(torch.index_select, features, 1, order)
    sources, destinations = edit.size(counts.sources), edit.size(counts.destinations)
    source = edit.call(torch.narrow, ordered, 1, edit.size(minus(tokens, counts.sources)), sources)
    destination = edit.call(torch.narrow, ordered, 1, 0, destinations)
    matched = edit.call(ops.match_tokens.default, source, destination)
    index, similarity = (edit.call(operator.getitem, matched, i) for i in range(2))
    merged = None if counts.merged == counts.sources else edit.size(counts.merged)
    return edit.call(ops.token_groups.default, order, index, similarity, merged)
