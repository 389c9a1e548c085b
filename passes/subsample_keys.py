"""Keys and values are thinned on the grid of patches; all queries stay, and all keys of special tokens.

AVGGT (arXiv 2512.02541, "SGA") finds that one patch of a small window is enough to match against in late global layers.
What is dropped leaves two traces there, under the one softmax: each query reads the key of its own token in any case,
and one more key and value are the means of all dropped ones. Spark3R (arXiv 2605.06270) drops the patches of whole
frames, the more the longer the sequence is, RegimeVGGT (arXiv 2606.18439) lets the kept place move from frame to frame.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.fx import Node

from vggt_compile.graph.dialect import value
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.symbols import times
from vggt_compile.ops import key_grid as _key_grid  # noqa: F401  # registers operators
from vggt_compile.passes.windows import Windows, of_cells, of_model
from vggt_compile.registry import Limit, Stride, method
from vggt_compile.site import AttentionState, OwnKeys, Site, Skip, Taken


@method("keys", "grid")
def subsample_keys(
    site: Site,
    state: AttentionState,
    edit: Editor,
    *,
    stride: tuple[Stride, Stride] = (2, 2),
    kept: tuple[Stride, Stride] = (1, 1),
    phase: Literal["fixed", "shifted"] = "fixed",
    frames: Stride = 1,
    most_frames: Limit = 0,
    keep_first_frame: bool = False,
    own_key: bool = False,
    mean_key: Literal["none", "one", "count"] = "none",
) -> AttentionState | Skip:
    """Queries read special tokens, and one patch of each window of `stride` patches, in every n-th of `frames`.

    The distance of frames grows where more than `most_frames` would keep patches; 0 sets no limit.
    """
    refusal = _refusal(site, state, keep_first_frame, own_key, mean_key != "none")
    if refusal is not None:
        return Skip(refusal)
    place = of_cells(state) if state.merged is not None and state.merged.keys is not None else of_model(site)
    grid = Windows(edit, place, stride, kept, frames, most_frames, keep_first_frame, phase == "shifted")
    k, v = (edit.cast(x, site.dtype) for x in (state.k, state.v))  # before they are copied
    own, weight, means = None, None, None
    if grid.dropped != 0 and (own_key or mean_key != "none"):
        dropped = grid.dropped_keys(k)
        own = OwnKeys(k, v, dropped, grid.dropped) if own_key else None
        if mean_key != "none":
            means, weight = _means(edit, grid, k, v, dropped, many=mean_key == "count")
    thin_k, thin_v = (grid.thinned(x, mean) for x, mean in zip((k, v), means or (None, None), strict=True))
    if state.key_log_weight is not None:
        weight = edit.call(torch.unsqueeze, state.key_log_weight, -1)
        weight = edit.call(torch.squeeze, grid.thinned(weight, None), -1)
    always = grid.first + (0 if means is None else 1)
    queries = site.tokens if state.merged is None or state.merged.queries is None else state.merged.queries
    pairs = times(queries, always + grid.count) + (0 if own is None else own.reads)
    shown: dict[str, Any] = {"method": "grid", "stride": list(stride)}
    shown |= {"kept": list(kept)} if kept != (1, 1) else {}
    shown |= {"phase": phase} if phase != "fixed" else {}
    shown |= {"frames": frames} if frames != 1 else {}
    shown |= {"most_frames": most_frames} if most_frames else {}
    shown |= {"keep_first_frame": True} if keep_first_frame else {}
    shown |= {"own_key": True} if own_key else {}
    shown |= {"mean_key": mean_key} if mean_key != "none" else {}
    return state.then(
        "keys",
        shown,
        k=thin_k,
        v=thin_v,
        pairs=times(site.batch, pairs),
        always=always,
        patch_keys=grid.windows,
        own=own,
        key_log_weight=weight,
        taken=_taken(state, grid, {k: thin_k, v: thin_v}, own is not None, means is not None),
    )


def _taken(state: AttentionState, grid: Windows, parts: dict[Node, Node], own: bool, mean: bool) -> Taken | Skip:
    """How the kept keys are taken from all, for `hoist_keys`; or what reads the others."""
    if own or mean:
        return Skip(f"{'own_key' if own else 'mean_key'} reads the keys of all tokens")
    if state.merged is not None and state.merged.keys is not None:
        return Skip("merged keys are means over those of all tokens")
    if grid.dropped == 0:
        return Skip("every token keeps its key")
    return Taken(parts, lambda edit, x: grid.thinned(x, None))


def _refusal(site: Site, state: AttentionState, keep_first_frame: bool, own: bool, mean: bool) -> str | None:
    if state.axes.keys() - {"tokens"}:
        return f"keys are not thinned after another axis yet, and {', '.join(state.axes)} acted before"
    if site.layout is None:
        return "the number of frames is unknown"
    if site.layout.grid is None:
        return "the grid of patches in a frame is unknown"
    if keep_first_frame and site.layout.frames == 1:
        return "there is one frame only, and keep_first_frame keeps all of it"
    merged = state.merged
    if merged is not None and merged.keys is not None and merged.cells is None:
        return "its keys have merged in each head by itself, and those that are left lie in no grid"
    if own and merged is not None and merged.queries is not None and merged.keys is None:
        return "own_key asks for the key of a query's own token, and its queries have merged"
    if (own or mean) and state.key_log_weight is not None:
        return "own_key and mean_key count every key once, and its merged keys weigh as much as their tokens"
    return None


def _means(
    edit: Editor, grid: Windows, k: Node, v: Node, dropped: Node, *, many: bool
) -> tuple[tuple[Node, Node], Node | None]:
    """Means [B, H, 1, D] of the dropped keys and values, and log-weights [keys], None where all are 0.

    The dropped ones are counted on the device, since sizes that are symbols may leave none: a mean of nothing is
    zeros of weight log 0.
    """
    count = edit.call(torch.sum, dropped, dtype=torch.float32)
    some = edit.call(torch.clamp, count, min=1)
    rows = edit.call(torch.unsqueeze, dropped, 1)

    def mean(x: Node) -> Node:
        dtype = value(x).dtype
        masked = edit.call(torch.where, rows, x, 0.0)
        total = edit.call(torch.sum, masked, 2, keepdim=True, dtype=torch.promote_types(dtype, torch.float32))
        return edit.cast(edit.call(torch.div, total, some), dtype)

    if not many and grid.surely_drops():
        return (mean(k), mean(v)), None
    weight = count if many else edit.call(torch.clamp, count, max=1)
    log = edit.call(torch.unsqueeze, edit.call(torch.log, weight), 0)
    return (mean(k), mean(v)), edit.call(F.pad, log, (edit.size(grid.first), edit.size(grid.count)))
