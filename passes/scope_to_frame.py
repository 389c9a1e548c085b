"""Attention over all frames becomes attention inside each frame: same weights, tokens and positions, fewer pairs.

AVGGT (arXiv 2512.02541) finds that early global layers do no matching between views yet and runs them so ("G2F").
Equal to reshaping [B, H, F·P, D] to [B·F, H, P, D] around the same attention, exactly.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from vggt_compile.graph.edit import Editor
from vggt_compile.graph.symbols import times
from vggt_compile.registry import method
from vggt_compile.site import AttentionState, Site, Skip


@method("scope", "frame")
def scope_to_frame(site: Site, state: AttentionState, edit: Editor) -> AttentionState | Skip:
    """Every token attends inside its own frame only."""
    layout = site.layout
    if layout is None:
        return Skip("the number of frames is unknown")
    if layout.frames == 1:
        return Skip("there is one frame only, so global attention is frame attention already")
    frames, per_frame = layout.frames, layout.per_frame

    def split(x: Node) -> Node:
        x = edit.reshape(x, site.batch, site.heads, frames, per_frame, site.head_dim)
        return edit.reshape(_swap(edit, x), times(site.batch, frames), site.heads, per_frame, site.head_dim)

    def join(edit: Editor, x: Node) -> Node:
        x = edit.reshape(x, site.batch, frames, site.heads, per_frame, site.head_dim)
        return edit.reshape(_swap(edit, x), site.batch, site.heads, times(frames, per_frame), site.head_dim)

    pairs = times(site.batch, frames, per_frame, per_frame)
    return state.then("scope", "frame", join, q=split(state.q), k=split(state.k), v=split(state.v), pairs=pairs)


def _swap(edit: Editor, x: Node) -> Node:
    return edit.call(torch.transpose, x, 1, 2)
