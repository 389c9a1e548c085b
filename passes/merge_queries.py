"""Similar queries are merged inside groups of consecutive frames; keys and values stay for another axis to thin.

Spark3R (arXiv 2605.06270) finds that queries and keys bear compression differently: queries of neighbouring frames are
alike, and of the keys whole frames can be left out. A merged query is the mean over its group, and each token takes the
attention's result for its group.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from vggt_compile.graph.edit import Editor
from vggt_compile.graph.symbols import minus, times
from vggt_compile.passes.groups import Groups, Roles, features, matched, refusal
from vggt_compile.passes.merge_tokens import cell_order
from vggt_compile.registry import Stride, method
from vggt_compile.site import AttentionState, MergedTokens, Site, Skip

ops = torch.ops.vggt_compile


@method("tokens", "merge_queries")
def merge_queries(
    site: Site,
    state: AttentionState,
    edit: Editor,
    *,
    cell: tuple[Stride, Stride] = (2, 2),
    frames: Stride = 20,
    cells: Literal["fixed", "seeded"] = "fixed",
    seed: int = 0,
    reference: bool = False,
    metric: Literal["queries", "keys", "input"] = "queries",
) -> AttentionState | Skip:
    """Queries of patches merge into the most similar one of those that stand for a `cell` in the same few `frames`."""
    reason = refusal(site, state, reference)
    if reason is not None:
        return Skip(reason)
    assert site.layout is not None
    shown: dict[str, Any] = {"method": "merge_queries", "cell": list(cell), "frames": frames}
    shown |= {"cells": cells, "seed": seed} if cells != "fixed" else {}
    shown |= {"metric": metric}
    shown |= {"reference": True} if reference else {}
    roles = Roles.of(site.layout, cell, reference, protect=0.0, ratio=1.0)
    if roles.sources == 0:
        return state.then("tokens", shown)
    q, k = (edit.cast(x, site.dtype) for x in (state.q, state.k))
    compared = features(site, edit, k if metric == "keys" else q, from_input=metric == "input")
    if isinstance(compared, Skip):
        return compared
    order = cell_order(site, edit, q, cell, roles, seed if cells == "seeded" else None)
    first = roles.special + roles.reference
    runs = (times(frames, roles.sources), times(frames, *roles.cells))
    index, similarity = matched(edit, order, compared, first, roles.all_cells, roles.all_sources, runs)
    group = edit.call(ops.token_groups.default, order, index, similarity)
    groups = Groups(site, edit, group, minus(site.tokens, roles.all_sources))
    return state.then(
        "tokens",
        shown,
        groups.restored,
        q=groups.means(edit, q),
        pairs=times(site.batch, groups.count, site.tokens),
        merged=MergedTokens(special=roles.special, reference=roles.reference, queries=groups.count),
    )
