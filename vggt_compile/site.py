"""The vocabulary: what a pass may know of an attention call, and what it hands on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import sympy
import torch
from torch.fx import Node

if TYPE_CHECKING:
    from vggt_compile.graph.edit import Editor

Size: TypeAlias = int | sympy.Expr
"""A size known at compile time, or an expression in the symbols of the graph's shape environment."""

Scope = Literal["global", "frame", "other"]

LOST = "(module path lost)"
"""The path of a site whose module Dynamo no longer knows, after a graph break inside it."""

SPECIAL_ONLY = "it sees the special tokens of all frames only"
"""Why a block that a family counts among its global ones is not attention over frames."""


@dataclass(frozen=True)
class AttentionCall:
    """softmax(scale · q kᵀ + mask) v as one dialect-free record.

    `node` is the value that a rewrite replaces; q, k, v are [B, H, N, D]. `spelled_out` tells that the graph has the
    softmax and its two products instead of one attention call.
    """

    node: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    gqa: bool = False
    spelled_out: bool = False


@dataclass(frozen=True)
class TokenLayout:
    """How the sequence of a global attention is made: `frames` runs of `per_frame` tokens, special tokens first.

    `special` and `grid` (patch rows, patch columns) are None where the graph does not hold the patch embedding.
    """

    frames: Size
    per_frame: Size
    special: Size | None = None
    grid: tuple[Size, Size] | None = None


@dataclass(frozen=True)
class Site:
    """One attention call of the traced graph and the facts about it.

    `layer` counts the global attentions of the model from 0 and is None elsewhere. `dtype` is that of the attention's
    output: under autocast its inputs may still be of another one. `refusal` is why no pass may touch the site.
    `dense_below` is the plan's `min_tokens` where one graph serves fewer tokens and more, else 0: a pass that can
    leaves the attention dense for fewer, as the graph runs, and says so in its state.
    """

    call: AttentionCall
    path: str
    scope: Scope
    batch: Size
    tokens: Size
    heads: Size
    head_dim: Size
    dtype: torch.dtype
    layout: TokenLayout | None = None
    layer: int | None = None
    family: str = "generic"
    refusal: str | None = None
    dense_below: int = 0


@dataclass(frozen=True)
class Skip:
    """A refusal. Every refusal has a reason, and the reason reaches the report."""

    reason: str


Restore = Callable[["Editor", Node], Node]


@dataclass(frozen=True)
class BlockLists:
    """Which keys each query reads, by blocks: those of `q_block` queries, and of `k_block` keys after the first ones.

    Attributes:
        index, count: [B', H, query blocks, slots] and [B', H, query blocks] nodes, int32: ascending key blocks, and how
            many of the slots count.
        always: the first keys, which every query reads and which belong to no block.
    """

    index: Node
    count: Node
    always: Size
    q_block: int
    k_block: int


@dataclass(frozen=True)
class OwnKeys:
    """A key and value of each query's own, for patches whose key was dropped. Special tokens keep theirs.

    Attributes:
        k, v: [B', H, N', D] nodes, in the order of the queries.
        read: [N'] bool node, which queries read theirs.
        reads: how many these are.
    """

    k: Node
    v: Node
    read: Node
    reads: Size


@dataclass(frozen=True)
class PatchKeys:
    """How the keys after the first ones, which all queries read, lie: frame by frame in a grid.

    Attributes:
        frames: that have keys here.
        grid: rows and columns in each, one for every patch or every window of patches.
        from_first: whether the first frame is one of them; else all its patches are among the first keys.
    """

    frames: Size
    grid: tuple[Size, Size]
    from_first: bool


@dataclass(frozen=True)
class MergedTokens:
    """How queries and keys lie once similar ones have merged: special ones first, then a first frame that is whole.

    Attributes:
        special, reference: how many these are; no reference where the first frame merges as the others do.
        queries, keys: how many are left of each, None where they are the model's, in its order.
        cells: where, among the keys, those begin that stand for cells of a grid, and how these lie; None without any.
    """

    special: Size
    reference: Size
    queries: Size | None = None
    keys: Size | None = None
    cells: tuple[Size, PatchKeys] | None = None


@dataclass(frozen=True)
class Taken:
    """Keys and values that are those of some of the model's tokens.

    Attributes:
        parts: of keys and of values, [B', H, N', D] of all tokens → what was taken, [B', H, n, D].
        take: does that for whatever lies as they do.
    """

    parts: dict[Node, Node]
    take: Restore


@dataclass(frozen=True)
class AttentionState:
    """What a pass receives and returns: the operands of the attention to come, and the way back to the query order.

    Attributes:
        q, k, v: [B', H, N', D] nodes; a pass may change batch and length.
        restores: applied to the attention's output, last first, until it has the shape of the original output.
        axes: what was done so far, axis → setting, for the report.
        pairs: query-key pairs that the attention computes, over all batch items, for one head.
        always: so many of the keys, the first ones, are for every query, whatever an axis chooses among the others.
        merged: how queries and keys lie where tokens have merged, None where none have.
        patch_keys: what the keys after those are, once an axis has put them in that order; the queries are still the
            model's. None for keys in the model's order, and for any other order.
        own: what single queries read beside the keys `k`, None where nothing.
        key_log_weight: [keys] or [B', 1 or H, keys] fp32 node that is added to the logits, None where all keys weigh
            the same.
        blocks: what the queries `q` read of the keys, None where they read all.
        dense_q: [B', H, M, D] node of queries that read all keys `k` and no others. Their rows come first in the output
            that `restores` see.
        at_least: `pairs` is a lower bound, because how many there are depends on the data.
        taken: how keys and values were thinned, where that is all; a Skip says what needs those of all tokens.
        hopper: the kernel for Hopper computes it, although PyTorch's attention could.
        dense_below: for fewer tokens of the model it is what the model computes, 0 where it never is.
    """

    q: Node
    k: Node
    v: Node
    pairs: Size
    restores: tuple[Restore, ...] = ()
    axes: dict[str, Any] = field(default_factory=dict)
    always: Size = 0
    merged: MergedTokens | None = None
    patch_keys: PatchKeys | None = None
    own: OwnKeys | None = None
    key_log_weight: Node | None = None
    blocks: BlockLists | None = None
    dense_q: Node | None = None
    at_least: bool = False
    taken: Taken | Skip | None = None
    hopper: bool = False
    dense_below: int = 0

    def then(self, axis: str, setting: Any, restore: Restore | None = None, **changes: Any) -> AttentionState:
        """This state after one more axis has acted; without `restore` its queries are those of this one."""
        restores = self.restores if restore is None else (*self.restores, restore)
        return replace(self, restores=restores, axes={**self.axes, axis: setting}, **changes)


@dataclass(frozen=True)
class Lowered:
    """A site that was rewritten, and the state whose attention took its place."""

    site: Site
    state: AttentionState


@dataclass(frozen=True)
class Outcome:
    """What a pass over regions did to a graph.

    Attributes:
        count: how often it was applied, of what `did` says in words.
        left: where it might have been, module path → why it was not.
    """

    count: int = 0
    did: str = ""
    left: dict[str, str] = field(default_factory=dict)
