"""Who computes an attention that was rewritten: PyTorch, or on Hopper GPUs this package's kernel.

The kernel takes less time. On an H200 that holds for all keys and for thinned ones, from 16 frames to 300
(docs/benchmarks/provider.md).
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from vggt_compile.graph.dialect import value
from vggt_compile.graph.edit import Editor
from vggt_compile.ops import hopper
from vggt_compile.ops.operands import Operands
from vggt_compile.site import AttentionState, Site


def provided(site: Site, state: AttentionState, edit: Editor) -> AttentionState:
    """The state with `hopper` set where our kernel does what PyTorch's attention could do.

    Attention inside frames or groups stays PyTorch's: many short sequences were not timed.
    """
    weighted = state.own is not None or state.key_log_weight is not None
    same_batch = statically_known_true(value(state.q).shape[0] == value(site.call.q).shape[0])
    if weighted or state.blocks is not None or "scope" in state.axes or not same_batch:
        return state
    q, k, v = (edit.cast(x, site.dtype) for x in (state.q, state.k, state.v))
    return replace(state, q=q, k=k, v=v, hopper=refusal(q, k, v) is None)


def refusal(q: Node, k: Node, v: Node) -> str | None:
    """Why PyTorch's attention is to compute these."""
    tensors = (value(q), value(k), value(v))
    if not hopper.here(tensors[0].device):
        return "PyTorch's attention stays: the kernel that is faster is for Hopper GPUs"
    if not hopper.suits(Operands(*tensors, None, None, 0, 128, 64, None, None, None, None, 1.0)):
        return "PyTorch's attention stays: the kernel for Hopper GPUs is for aligned 16-bit heads of 32, 64 or 128"
    return None
