"""What blocks are cut from: queries and keys with those of special tokens told from those of patches.

It offers no choice of its own. Tokens are the model's, or have merged, or their keys are thinned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from vggt_compile.graph.edit import Editor
from vggt_compile.graph.parts import Parts, patch_keys_along_walk
from vggt_compile.graph.symbols import minus, times
from vggt_compile.site import AttentionState, OwnKeys, Size


@dataclass(frozen=True)
class Queries:
    """Special queries and those of patches, by their numbers: in the model's order, or special ones first."""

    special: Size
    patches: Size
    parts: Parts | None

    @classmethod
    def of(cls, state: AttentionState, parts: Parts) -> Queries:
        if state.merged is None or state.merged.queries is None:
            return cls(parts.special, parts.patches, parts)
        return cls(parts.special, minus(state.merged.queries, parts.special), None)

    def special_ones(self, edit: Editor, x: Node) -> Node | None:
        if self.parts is not None:
            return self.parts.special_tokens(edit, x)
        return None if self.special == 0 else edit.call(torch.narrow, x, -2, 0, edit.size(self.special))

    def patch_ones(self, edit: Editor, x: Node) -> Node:
        if self.parts is not None:
            return self.parts.patch_tokens(edit, x)
        return edit.call(torch.narrow, x, -2, edit.size(self.special), edit.size(self.patches))

    def own_of_patches(self, edit: Editor, own: OwnKeys) -> OwnKeys:
        """Own keys of the patch queries alone, in their order: special tokens have none."""
        k, v = (self.patch_ones(edit, x) for x in (own.k, own.v))
        read = self.patch_ones(edit, edit.call(torch.unsqueeze, own.read, 1))
        return OwnKeys(k, v, edit.call(torch.squeeze, read, 1), own.reads)


@dataclass(frozen=True)
class Keys:
    """How many there are: `always` that every query reads, then `frames` of `per_frame` patches to choose among."""

    always: Size
    frames: Size
    per_frame: Size

    @property
    def listed(self) -> Size:
        return times(self.frames, self.per_frame)

    @classmethod
    def of(cls, state: AttentionState, parts: Parts, first_frame: bool) -> Keys:
        thin, merged = state.patch_keys, state.merged
        if thin is None and merged is not None and merged.keys is not None:
            keys = cls(state.always, 1, minus(merged.keys, state.always))
        elif thin is None:
            keys = cls(parts.special, parts.layout.frames, parts.per_frame)
        else:
            keys = cls(state.always, thin.frames, times(*thin.grid))
            first_frame = first_frame and thin.from_first
        return cls(keys.always + keys.per_frame, keys.frames - 1, keys.per_frame) if first_frame else keys


def ordered_keys(edit: Editor, x: Node, state: AttentionState, parts: Parts) -> Node:
    """Keys or values with those first that every query reads, and the patches in the order of which blocks are cut."""
    if state.patch_keys is not None:
        return patch_keys_along_walk(edit, x, state.always, state.patch_keys) if parts.hilbert else x
    return x if state.merged is not None and state.merged.keys is not None else parts.special_first(edit, x)
