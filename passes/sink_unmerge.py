"""Merged tokens are told apart as late as can be: after the output projection and its scale, not before.

What follows an attention until the residual sum acts on each token by itself, and tokens of one group have the same
result. So it is computed for groups, and its result is spread over the tokens. The residual differs between the tokens
of a group, so there it ends.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from vggt_compile.graph.dialect import module_path, operation
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.region import along, below, rerun
from vggt_compile.ops import token_groups  # noqa: F401  # registers the operator
from vggt_compile.registry import region
from vggt_compile.site import Lowered, Outcome

SPREAD = torch.ops.vggt_compile.from_groups.default


@region
def sink_unmerge(graph: Graph, lowered: Sequence[Lowered], edit: Editor) -> Outcome:
    """The output projection and its scale act on merged tokens, which are told apart after them."""
    count, left = 0, {}
    for spread in [node for node in graph.nodes if node.target is SPREAD]:
        path = module_path(spread) or str(spread)
        merged, group = spread.args
        chain = below(spread, 0, 2)
        if not any(operation(node) == "linear" for node in chain.steps):
            left[path] = f"no linear map follows that acts on each token by itself: {chain.stop}"
            continue
        last = list(chain.steps)[-1]
        grouped = rerun(edit, chain.steps, {spread: 2, **chain.steps}, {spread: merged})[last]
        with edit.before(last):
            spread_late = along(edit, grouped, chain.steps[last], functools.partial(_spread, group))
        edit.replace(last, spread_late)
        count += 1
    return Outcome(count, "output projections of merged tokens", left)


def _spread(group: Node, edit: Editor, x: Node) -> Node:
    return edit.call(SPREAD, x, group)
