"""Nothing is left out: every query reads all keys that are there, by the faster of two ways to compute that.

So a layer is rewritten that would otherwise stay as the model has it, and `provider` gives it to the kernel of this
package where that is faster. Elsewhere the model's own attention stays, which reads all keys too.
"""

from __future__ import annotations

from vggt_compile.graph.edit import Editor
from vggt_compile.provider import refusal
from vggt_compile.registry import method
from vggt_compile.site import AttentionState, Site, Skip


@method("blocks", "all")
def all_blocks(site: Site, state: AttentionState, edit: Editor) -> AttentionState | Skip:
    """Every query reads all keys, so nothing is lost; on Hopper GPUs this package's kernel computes it."""
    if "scope" in state.axes:
        return Skip("blocks are not chosen after scope yet")
    if not state.axes:
        q, k, v = (edit.cast(x, site.dtype) for x in (state.q, state.k, state.v))
        if (reason := refusal(q, k, v)) is not None:
            return Skip(reason)
    return state.then("blocks", "all")
