"""What a compiler took for granted of sizes, and the frame counts for which that is true.

Where Inductor cannot tell how two symbolic sizes compare, it looks at the example and notes what it saw. A compile in a
process checks its notes at each call and compiles anew where one is wrong. Nobody checks those of a library: it would
compute something else without a word.
"""

from __future__ import annotations

import itertools
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from vggt_compile.artifact.request import Range, Span
from vggt_compile.errors import ExportFailed
from vggt_compile.graph.dialect import value

MOST_RUNS = 6


def runs(gm: GraphModule, span: Span) -> list[Range]:
    """The frame counts of a span in runs, in every second one of which all notes of a compile are true.

    A library serves its span if there is one run, the whole range.

    Raises:
        ExportFailed: a size was taken to be the example's, or the notes are true for no count, or for counts in too
            many runs to compile each.
    """
    frames, batch, notes = _notes(gm)
    for name, symbol in (("batch", batch), ("frames", frames)):
        if symbol is not None and not symbol.is_Symbol:
            raise ExportFailed(str(span), f"its code is right only where {name} is {symbol}")
    low, high = span.frames
    items = {max(2, number) for number in span.batch}  # tracing, too, takes for one scene what holds for two

    def false(count: int) -> list[str]:
        sizes = [{frames: count, batch: number} for number in items]
        return sorted({str(note) for note in notes for known in sizes if not _true(note, known)})

    found = {count: false(count) for count in range(low, high + 1)}
    parts = [list(run) for _, run in itertools.groupby(found, key=lambda count: not found[count])]
    if len(parts) > MOST_RUNS or all(found.values()):
        wrong = next(filter(None, found.values()))
        raise ExportFailed(str(span), f"its code is right only where {' and '.join(wrong)}")
    return [(run[0], run[-1]) for run in parts]


def _notes(gm: GraphModule) -> tuple[Any, Any, list[Any]]:
    """The symbols of frames and batch, None for a number, and what was noted of sizes that code depends on."""
    seen = value(gm.graph.find_nodes(op="placeholder")[0])
    symbols = [size.node if isinstance(size, torch.SymInt) else None for size in seen.shape[:2]]
    known: list[Any] = next((node.shape_env.guards for node in symbols if node is not None), [])
    batch, frames = (None if node is None else node.expr for node in symbols)
    return frames, batch, [note for note in {guard.expr for guard in known} if not _general(note)]


def _general(note: Any) -> bool:
    """That two sizes differ, or that one is above one, keeps from a shortcut: code without it is right for one as well.

    So an export takes it of a batch, too. Six rows for each of some frames are more than six where there is more than
    one frame.
    """
    if isinstance(note, sympy.Ne):
        return True
    if isinstance(note, (sympy.Lt, sympy.Gt)):
        times, _ = note.gts.as_coeff_Mul()
        return note.lts in (1, times)
    return isinstance(note, (sympy.Le, sympy.Ge)) and bool(note.lts == 2)


def _true(note: Any, sizes: dict[Any, int]) -> bool:
    return bool(note.xreplace({symbol: sympy.Integer(n) for symbol, n in sizes.items() if symbol is not None}))
