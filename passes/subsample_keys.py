"""Keys and values are thinned on the grid of patches; all queries stay, and all keys of special tokens.

AVGGT (arXiv 2512.02541, "SGA") finds that one patch of a small window is enough to match against in late global layers.
What is dropped leaves two traces there, under the one softmax: each query reads the key of its own token in any case,
and one more key and value are the means of all dropped ones. Spark3R (arXiv 2605.06270) drops the patches of whole
frames, RegimeVGGT (arXiv 2606.18439) lets the kept place move from frame to frame.
"""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.fx import Node

from vggt_compile.graph.dialect import value
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.parts import Parts, reshaped
from vggt_compile.graph.symbols import ceildiv, minus, times
from vggt_compile.ops import key_grid as _key_grid  # noqa: F401  # registers operators
from vggt_compile.registry import Stride, method
from vggt_compile.site import AttentionState, OwnKeys, PatchKeys, Site, Skip, Taken


@method("keys", "grid")
def subsample_keys(
    site: Site,
    state: AttentionState,
    edit: Editor,
    *,
    stride: tuple[Stride, Stride] = (2, 2),
    phase: Literal["fixed", "shifted"] = "fixed",
    frames: Stride = 1,
    keep_first_frame: bool = False,
    own_key: bool = False,
    mean_key: Literal["none", "one", "count"] = "none",
) -> AttentionState | Skip:
    """Queries read special tokens, and one patch of each window of `stride` patches, in every n-th of `frames`."""
    refusal = _refusal(site, state, keep_first_frame)
    if refusal is not None:
        return Skip(refusal)
    grid = _Grid(site, edit, stride, frames, keep_first_frame, phase == "shifted")
    k, v = (edit.cast(x, site.dtype) for x in (state.k, state.v))  # before they are copied
    own, weight, means = None, None, None
    if grid.dropped != 0 and (own_key or mean_key != "none"):
        dropped = edit.call(torch.ops.vggt_compile.dropped_tokens.default, k, *grid.arguments())
        own = OwnKeys(k, v, dropped, grid.dropped) if own_key else None
        if mean_key != "none":
            means, weight = _means(edit, grid, k, v, dropped, many=mean_key == "count")
    thin_k, thin_v = (grid.thinned(x, mean) for x, mean in zip((k, v), means or (None, None), strict=True))
    always = grid.first + (0 if means is None else 1)
    pairs = times(site.tokens, always + grid.count) + (0 if own is None else own.reads)
    shown: dict[str, Any] = {"method": "grid", "stride": list(stride)}
    shown |= {"phase": phase} if phase != "fixed" else {}
    shown |= {"frames": frames} if frames != 1 else {}
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
        taken=_taken(grid, {k: thin_k, v: thin_v}, own is not None, means is not None),
    )


def _taken(grid: _Grid, parts: dict[Node, Node], own_key: bool, mean_key: bool) -> Taken | Skip:
    """How the kept keys are taken from all, for `hoist_keys`; or what reads the others."""
    if own_key or mean_key:
        return Skip(f"{'own_key' if own_key else 'mean_key'} reads the keys of all tokens")
    if grid.dropped == 0:
        return Skip("every token keeps its key")
    return Taken(parts, lambda edit, x: grid.thinned(x, None))


def _refusal(site: Site, state: AttentionState, keep_first_frame: bool) -> str | None:
    if state.axes:
        return f"keys are not thinned after another axis yet, and {', '.join(state.axes)} acted before"
    if site.layout is None:
        return "the number of frames is unknown"
    if site.layout.grid is None:
        return "the grid of patches in a frame is unknown"
    if keep_first_frame and site.layout.frames == 1:
        return "there is one frame only, and keep_first_frame keeps all of it"
    return None


class _Grid:
    """How many keys are kept and dropped, and how the kept ones are taken out of the model's order of tokens.

    Attributes:
        first: special keys of all frames, and the patches of the first frame if it is whole.
        windows: the other keys, one for each window of patches.
        count: how many windows that is.
        dropped: patches without a key.
    """

    def __init__(
        self, site: Site, edit: Editor, stride: tuple[int, int], every: int, first_frame: bool, shifted: bool
    ) -> None:
        layout = site.layout
        assert layout is not None
        assert layout.grid is not None
        self.edit, self.parts, self.frames, self.grid = edit, Parts(layout), layout.frames, layout.grid
        self.stride, self.every, self.first_frame, self.shifted = stride, every, first_frame, shifted
        self.first = self.parts.special + (self.parts.per_frame if first_frame else 0)
        rows, columns = map(ceildiv, layout.grid, stride)
        self.windows = PatchKeys(ceildiv(layout.frames, every) - int(first_frame), (rows, columns), not first_frame)
        self.count = times(self.windows.frames, rows, columns)
        self.dropped = minus(site.tokens, self.first + self.count)

    def arguments(self) -> tuple[Any, ...]:
        """What the operators of `ops/key_grid.py` want to know beside the tokens."""
        special, rows, columns = map(self.edit.size, (self.parts.each_special, *self.grid))
        return special, rows, columns, list(self.stride), self.every, self.first_frame, self.shifted

    def surely_drops(self) -> bool:
        """Whether some patch is dropped whatever values the sizes take."""
        several = [self.edit.symbols.surely_more(size, 1) for size in (self.frames, *self.grid)]
        thins = any(many and step > 1 for many, step in zip(several, (self.every, *self.stride), strict=True))
        return thins and (several[0] or not self.first_frame)

    def thinned(self, x: Node, mean: Node | None) -> Node:
        """[B, H, F·P, D] → [B, H, kept, D]: special tokens, the first frame's patches if whole, the mean, windows."""
        edit, first_frame = self.edit, None
        if self.first_frame:
            start, count = map(edit.size, (self.parts.each_special, self.parts.per_frame))
            first_frame = edit.call(torch.narrow, x, 2, start, count)
        # Views would guard on whether the first frame is the only one of every so many.
        gathers = self.shifted or (self.first_frame and self.every > 1)
        windows = self._gathered(x) if gathers else self._strided(x)
        parts = (self.parts.special_tokens(edit, x), first_frame, mean, windows)
        return edit.call(torch.cat, [part for part in parts if part is not None], 2)

    def _gathered(self, x: Node) -> Node:
        index = self.edit.call(torch.ops.vggt_compile.window_patches.default, x, *self.arguments())
        return self.edit.call(torch.index_select, x, 2, index)

    def _strided(self, x: Node) -> Node:
        """The same as strided views: their one copy is part of the concatenation in the end."""
        edit = self.edit
        grid = reshaped(edit, self.parts.framed_patches(edit, x), *self.grid)
        every = slice(int(self.first_frame), None, self.every)
        down, right = (slice(None, None, step) for step in self.stride)
        kept = edit.call(operator.getitem, grid, (..., every, down, right, slice(None)))
        return reshaped(edit, kept, self.count, over=3)


def _means(
    edit: Editor, grid: _Grid, k: Node, v: Node, dropped: Node, *, many: bool
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
