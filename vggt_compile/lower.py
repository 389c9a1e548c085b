"""A state of attention becomes the cheapest attention that computes it, in the dtype of the site's output.

That is PyTorch's own wherever it can do all of it, else our operator; ours too where a method knows that it is faster.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from vggt_compile.graph import dialect
from vggt_compile.graph.edit import Editor, verify
from vggt_compile.graph.symbols import size_of
from vggt_compile.ops import attention, density  # noqa: F401  # what a state is lowered to where PyTorch's cannot do it
from vggt_compile.site import AttentionState, BlockLists, Site


class Lowering:
    """The last step at the sites of one graph; `densities` are the nodes that measure them, None where unasked."""

    def __init__(self, edit: Editor, *, densities: bool) -> None:
        self.edit = edit
        self.densities: list[Node] | None = [] if densities else None

    def lower(self, site: Site, state: AttentionState) -> None:
        """Replace the site by the cheapest attention that computes the state."""
        out = self._attention(site, state)
        for restore in reversed(state.restores):
            out = restore(self.edit, out)
        verify(site.path, site.call.node, out)
        site.call.node.replace_all_uses_with(out)
        site.call.node.graph.erase_node(site.call.node)

    def _attention(self, site: Site, state: AttentionState) -> Node:
        """Under autocast q and k may be wider than the attention's output; ask for what the model computes in."""
        q, k, v = (self.edit.cast(x, site.dtype) for x in (state.q, state.k, state.v))
        scale = site.call.scale
        given = self._beyond_sdpa(site, state)
        function = torch.ops.vggt_compile.attention.default if given or state.hopper else F.scaled_dot_product_attention
        out = self.edit.call(function, q, k, v, **given, scale=scale)
        if state.blocks is not None:
            self._measure(site, state, state.blocks)
        if state.dense_q is None:
            return out
        dense = replace(state, q=state.dense_q, k=k, v=v, dense_q=None, blocks=None, own=None)
        return self.edit.call(torch.cat, (self._attention(site, dense), out), 2)

    def _measure(self, site: Site, state: AttentionState, lists: BlockLists) -> None:
        """Note the density of an attention as an output of the graph, where those are asked for."""
        if self.densities is None:
            return
        given = (self._length(state.q), self._length(state.k), self.edit.size(lists.always))
        beside = (
            0 if state.dense_q is None else self._length(state.dense_q),
            0 if state.own is None else self.edit.size(state.own.reads),
            self.edit.size(site.tokens),
        )
        blocks = (lists.q_block, lists.k_block)
        share = torch.ops.vggt_compile.density.default
        self.densities.append(self.edit.call(share, lists.index, lists.count, *given, *blocks, *beside))

    def _length(self, x: Node) -> int | Node:
        """Tokens of [B, H, N, D] as an argument."""
        return self.edit.size(size_of(dialect.value(x).shape[2]))

    def _beyond_sdpa(self, site: Site, state: AttentionState) -> dict[str, Any]:
        """Arguments of our own operator for what PyTorch's attention cannot do, none where it can do all."""
        given: dict[str, Any] = {}
        if state.blocks is not None:
            lists, always = state.blocks, self.edit.size(state.blocks.always)
            given |= {"block_index": lists.index, "block_count": lists.count, "always": always}
            given |= {"q_block": lists.q_block, "k_block": lists.k_block}
        if state.own is not None:
            own_k, own_v = (self.edit.cast(x, site.dtype) for x in (state.own.k, state.own.v))
            given |= {"own_k": own_k, "own_v": own_v, "own": state.own.read}
        if state.key_log_weight is not None:
            given |= {"key_log_weight": state.key_log_weight}
        return given
