"""What happened at one attention, as a row of the report: sizes as numbers, what was done, and why no more."""

from __future__ import annotations

import sympy
from torch.fx import Node

from vggt_compile.graph import dialect
from vggt_compile.graph.symbols import Symbols, hint, size_of, times
from vggt_compile.growth import Growth
from vggt_compile.report import Row
from vggt_compile.site import LOST, AttentionState, Site, Size


def row_of(
    site: Site,
    state: AttentionState,
    before: Size,
    reason: str | None,
    symbols: Symbols,
    *,
    lifted: bool = False,
    measured: bool = False,
) -> Row:
    """A site and the state that it is left in.

    Args:
        before: pairs of a query and a key in the model as it is.
        lifted: an attention that was spelled out is one call now.
        measured: the graph hands out its density.
    """

    def number(size: Size) -> int:
        return hint(size, symbols)

    layout, per_pair = site.layout, 4 * number(site.heads) * number(site.head_dim)
    return Row(
        path=site.path,
        layer=site.layer,
        scope=site.scope,
        batch=number(site.batch),
        frames=None if layout is None else number(layout.frames),
        per_frame=None if layout is None else number(layout.per_frame),
        special=None if layout is None or layout.special is None else number(layout.special),
        heads=number(site.heads),
        head_dim=number(site.head_dim),
        dtype=str(site.dtype).removeprefix("torch."),
        axes=state.axes,
        implementation="spelled out" if site.call.spelled_out and not lifted else _implementation(state),
        flops_before=per_pair * number(before),
        flops_after=per_pair * number(state.pairs),
        reason=reason,
        at_least=state.at_least,
        measured=measured,
        dense_below=state.dense_below,
        keys=number(state.pairs) / queries if (queries := _queries(state, symbols)) else None,
        growth=growth_of(None if layout is None else layout.frames, before, state.pairs, per_pair, symbols),
    )


def growth_of(frames: Size | None, before: Size, after: Size, per_pair: int, symbols: Symbols) -> Growth:
    """FLOPs of so many pairs, each as an expression; 0 where inputs do not tell it, as in the row."""
    known = [0 if symbols.unknown(size) else times(per_pair, size) for size in (before, after)]
    free = {symbol for size in known for symbol in sympy.sympify(size).free_symbols}
    return Growth(frames, known[0], known[1], {symbol: symbols.hinted(symbol) for symbol in free})


def refused_row(node: Node, reason: str) -> Row:
    """What looks like attention and cannot be read as one call."""
    seen = dialect.value(node)
    path = dialect.module_path(node) or LOST
    dtype = str(seen.dtype).removeprefix("torch.")
    return Row(path, None, "other", 0, None, None, None, 0, 0, dtype, {}, "spelled out", 0, 0, reason)


def _implementation(state: AttentionState) -> str:
    if state.blocks is not None:
        return "block-sparse"
    if state.own is not None or state.key_log_weight is not None:
        return "weighted"
    return "hopper" if state.hopper else "sdpa"


def _queries(state: AttentionState, symbols: Symbols) -> int:
    """How many, over all batch items; 0 where inputs do not tell it."""
    shapes = [dialect.value(x).shape for x in (state.q, state.dense_q) if x is not None]
    return sum(hint(times(size_of(shape[0]), size_of(shape[2])), symbols) for shape in shapes)
