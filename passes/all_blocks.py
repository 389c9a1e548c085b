"""Nothing is left out: every query reads all keys that are there, by the faster of two ways to compute that.

On Hopper GPUs the kernel of this package does in less time what PyTorch's attention does
(docs/benchmarks/kernel-log.md). Elsewhere PyTorch's stays, and other axes act as they do alone.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from vggt_compile.graph.dialect import value
from vggt_compile.graph.edit import Editor
from vggt_compile.ops import hopper
from vggt_compile.ops.operands import Operands
from vggt_compile.registry import method
from vggt_compile.site import AttentionState, Site, Skip


@method("blocks", "all")
def all_blocks(site: Site, state: AttentionState, edit: Editor) -> AttentionState | Skip:
    """Every query reads all keys, so nothing is lost; on Hopper GPUs this package's kernel computes it."""
    if "scope" in state.axes:
        return Skip("blocks are not chosen after scope yet")
    if state.own is not None or state.key_log_weight is not None:  # PyTorch's attention could not do that anyway
        return state.then("blocks", "all")
    q, k, v = (edit.cast(x, site.dtype) for x in (state.q, state.k, state.v))
    refusal = _refusal(q, k, v)
    if refusal is None:
        return state.then("blocks", "all", q=q, k=k, v=v, hopper=True)
    return replace(state, q=q, k=k, v=v, left=refusal) if state.axes else Skip(refusal)


def _refusal(q: Node, k: Node, v: Node) -> str | None:
    """Why PyTorch's attention is to compute these."""
    tensors = (value(q), value(k), value(v))
    if not hopper.here(tensors[0].device):
        return "PyTorch's attention stays: the kernel that is faster is for Hopper GPUs"
    if not hopper.suits(Operands(*tensors, None, None, 0, 128, 64, None, None, None, None, 1.0)):
        return "PyTorch's attention stays: the kernel for Hopper GPUs is for aligned 16-bit heads of 32, 64 or 128"
    return None
