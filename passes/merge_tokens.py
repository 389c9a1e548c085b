"""Similar tokens are merged around an attention: few queries, keys and values go in, and every token gets a result.

FastVGGT (arXiv 2509.02560) finds that tokens of a global attention grow alike, and lets most of them join the most
similar one of a few that cover all frames. A merged query, key or value is the mean over its group, and each token
takes the attention's result for its group.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.fx import Node

from vggt_compile.graph.edit import Editor
from vggt_compile.graph.symbols import minus, times
from vggt_compile.ops import token_roles as _roles  # noqa: F401  # registers an operator
from vggt_compile.passes.groups import Groups, Roles, features, matched, refusal
from vggt_compile.registry import Share, Stride, method
from vggt_compile.site import AttentionState, MergedTokens, PatchKeys, Site, Skip

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
    reason = refusal(site, state, reference)
    if reason is not None:
        return Skip(reason)
    assert site.layout is not None
    shown: dict[str, Any] = {"method": "merge", "ratio": ratio, "cell": list(cell)}
    shown |= {"cells": cells, "seed": seed} if cells != "fixed" else {}
    shown |= {"protect": protect, "metric": metric}
    shown |= {"reference": False} if not reference else {}
    shown |= {"weight": weight} if weight != "none" else {}
    roles = Roles.of(site.layout, cell, reference, protect, ratio)
    if roles.all_merged == 0:
        return state.then("tokens", shown)
    q, k, v = (edit.cast(x, site.dtype) for x in (state.q, state.k, state.v))  # before they are copied
    compared = features(site, edit, q if metric == "queries" else k, from_input=metric == "input")
    if isinstance(compared, Skip):
        return compared
    order = cell_order(site, edit, k, cell, roles, seed if cells == "seeded" else None)
    destinations = roles.special + roles.reference + roles.all_cells
    index, similarity = matched(edit, order, compared, 0, destinations, roles.all_sources)
    some = None if roles.merged == roles.sources else edit.size(roles.all_merged)
    group = edit.call(ops.token_groups.default, order, index, similarity, some)
    groups = Groups(site, edit, group, minus(site.tokens, roles.all_merged))
    first_cell = roles.special + roles.reference
    return state.then(
        "tokens",
        shown,
        groups.restored,
        q=groups.means(edit, q),
        k=groups.means(edit, k),
        v=groups.means(edit, v),
        pairs=times(site.batch, groups.count, groups.count),
        always=roles.special,
        key_log_weight=groups.log_sizes(edit) if weight == "log_count" else None,
        merged=MergedTokens(
            special=roles.special,
            reference=roles.reference,
            queries=groups.count,
            keys=groups.count,
            cells=(first_cell, PatchKeys(roles.frames, roles.cells, from_first=not reference)),
        ),
    )


def cell_order(site: Site, edit: Editor, x: Node, cell: tuple[int, int], roles: Roles, seed: int | None) -> Node:
    """Tokens by their role: special, reference, those that stand for cells, protected, sources."""
    assert site.layout is not None
    assert site.layout.special is not None
    assert site.layout.grid is not None
    sizes = map(edit.size, (site.layout.special, *site.layout.grid))
    return edit.call(
        ops.merge_order.default, x, *sizes, list(cell), edit.size(roles.protected), roles.reference != 0, seed
    )
