"""Which attention sees several frames, and how its tokens are arranged, from module paths and shapes.

Attention over frames and attention inside a frame read the same tokens: [B, H, F·P, D] and [B·F, H, P, D]. Where a
graph holds both, their shapes alone give the frames F, the tokens of a frame P and the batch B.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from vggt_compile.graph import dialect
from vggt_compile.graph.symbols import Symbols, equal, hint, minus, quotient, size_of, times
from vggt_compile.registry import Family, Place
from vggt_compile.site import LOST, SPECIAL_ONLY, AttentionCall, Scope, Site, Size, TokenLayout

GENERIC = Family("generic", re.compile("$^"), lambda match: None)


@dataclass(frozen=True)
class _Shape:
    """The query of one call: [rows, heads, tokens, head_dim], and what its family says of its path."""

    call: AttentionCall
    path: str | None
    rows: Size
    heads: Size
    tokens: Size
    head_dim: Size
    claim: Place | None


@dataclass(frozen=True)
class _Trunk:
    """What the trunk's frame attention shows: `images` = B·F rows of `per_frame` tokens."""

    images: Size
    per_frame: Size


def find_sites(
    gm: GraphModule, calls: Sequence[AttentionCall], families: Sequence[Family], symbols: Symbols
) -> list[Site]:
    """Every attention call as a Site, in graph order."""
    paths = [dialect.module_path(call.node) for call in calls]
    family = _family_of(paths, families)
    shapes = [_shape(call, path, family) for call, path in zip(calls, paths, strict=True)]
    trunk = _trunk(shapes, symbols)
    grids = [grid for node in gm.graph.nodes if (grid := dialect.patch_grid(node)) is not None]
    sites: list[Site] = []
    for shape in shapes:
        layer = sum(site.scope == "global" for site in sites)
        sites.append(_site(shape, trunk, grids, family, layer))
    return sites


def _family_of(paths: Sequence[str | None], families: Sequence[Family]) -> Family:
    """The family that knows most of the paths; relatives share some names."""
    known = {family: sum(family.knows(path) for path in paths if path) for family in families}
    best = max(known, key=lambda family: known[family], default=GENERIC)
    return best if known.get(best) else GENERIC


def _shape(call: AttentionCall, path: str | None, family: Family) -> _Shape:
    sizes = [size_of(dim) for dim in dialect.value(call.q).shape]
    rows, heads, tokens, head_dim = sizes if len(sizes) == 4 else (times(*sizes[:-2]), 1, *sizes[-2:])
    return _Shape(call, path, rows, heads, tokens, head_dim, family.claim(path) if path else None)


def _trunk(shapes: Sequence[_Shape], symbols: Symbols) -> _Trunk | None:
    """The frame attention that shares its tokens with an attention over frames; a family's own claim comes first.

    Where several do, the one with most tokens: blocks that see special tokens only may match an encoder by coincidence.
    """
    claimed = [s for s in shapes if s.claim and s.claim[0] == "frame"]
    if claimed:
        return _Trunk(claimed[-1].rows, claimed[-1].tokens)
    sizes = dict.fromkeys((s.rows, s.tokens) for s in shapes)
    trunks = [_Trunk(*inner) for inner in sizes for outer in sizes if _same_tokens(inner, outer, symbols)]
    return max(trunks, key=lambda trunk: hint(trunk.per_frame, symbols), default=None)


def _same_tokens(inner: tuple[Size, Size], outer: tuple[Size, Size], symbols: Symbols) -> bool:
    """Whether `outer` reads the tokens of several rows of `inner` as one row; both are (rows, tokens)."""
    if inner[1] == outer[1] or not equal(times(*outer), times(*inner)):
        return False
    frames = quotient(inner[0], outer[0])
    return frames is not None and hint(frames, symbols) > 1 and hint(inner[1], symbols) > 1


def _site(shape: _Shape, trunk: _Trunk | None, grids: list, family: Family, next_layer: int) -> Site:
    scope, frames = _scope(shape, trunk)
    layout, layer, refusal = None, None, None
    if scope == "global":
        assert trunk is not None
        layout = _layout(frames, trunk.per_frame, grids, family)
        layer = next_layer if shape.claim is None or shape.claim[1] is None else shape.claim[1]
        refusal = _unusual(shape.call)
    if trunk is None and shape.claim and shape.claim[0] == "global":
        refusal = "no attention inside frames in this graph, so the tokens of one frame are unknown"
    if scope == "other" and _special_only(shape, trunk, family):
        refusal = SPECIAL_ONLY
    return Site(
        call=shape.call,
        path=shape.path or LOST,
        scope=scope,
        batch=shape.rows,
        tokens=shape.tokens,
        heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=dialect.value(shape.call.node).dtype,
        layout=layout,
        layer=layer,
        family=family.name,
        refusal=refusal,
    )


def _scope(shape: _Shape, trunk: _Trunk | None) -> tuple[Scope, Size]:
    """Scope and frames of one attention; a family's claim holds only where the shapes agree."""
    if trunk is None:
        return "other", 1
    claim = shape.claim[0] if shape.claim else None
    frames = quotient(trunk.images, shape.rows)
    spans = frames is not None and equal(shape.tokens, times(frames, trunk.per_frame))
    if frames is not None and spans and (claim == "global" or (claim is None and frames != 1)):
        return "global", frames
    return ("frame", 1) if equal(shape.rows, trunk.images) else ("other", 1)


def _special_only(shape: _Shape, trunk: _Trunk | None, family: Family) -> bool:
    """Whether what a family calls global reads all frames, and of each only what is no patch."""
    if trunk is None or family.special is None or shape.claim is None or shape.claim[0] != "global":
        return False
    frames = quotient(trunk.images, shape.rows)
    return frames is not None and equal(shape.tokens, times(frames, family.special))


def _layout(frames: Size, per_frame: Size, grids: list, family: Family) -> TokenLayout:
    for rows, columns in grids:
        grid = size_of(rows), size_of(columns)
        special = minus(per_frame, times(*grid))
        if isinstance(special, int) and special >= 0:
            return TokenLayout(frames, per_frame, special, grid)
    return TokenLayout(frames, per_frame, family.special)


def _unusual(call: AttentionCall) -> str | None:
    """Why an attention is not plain self-attention, None where it is."""
    q, k, v = (dialect.value(node) for node in (call.q, call.k, call.v))
    if q.ndim != 4:
        return f"its queries have {q.ndim} dimensions, not [batch, heads, tokens, width]"
    if call.mask is not None:
        return "it has an attention mask"
    if call.causal:
        return "it is causal"
    if call.dropout:
        return f"it drops out attention weights (p={call.dropout})"
    if call.gqa or size_of(q.shape[1]) != size_of(k.shape[1]):
        return "its keys have fewer heads than its queries (grouped-query attention)"
    if not (equal(size_of(q.shape[-2]), size_of(k.shape[-2])) and equal(size_of(k.shape[-2]), size_of(v.shape[-2]))):
        return "its keys are other tokens than its queries (cross-attention)"
    if size_of(q.shape[-1]) != size_of(v.shape[-1]):
        return "its values are of another width than its queries"
    if dialect.value(call.node).requires_grad:
        return "autograd records it; call the model under torch.no_grad() or torch.inference_mode()"
    return None
