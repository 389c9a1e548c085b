"""FLOPs of an attention grow with the frames: one graph serves many numbers of them, and its report knows each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy

from vggt_compile.errors import BadInput


@dataclass(frozen=True)
class Growth:
    """FLOPs of one attention as expressions in the symbols of its graph.

    Attributes:
        frames: how many an attention over frames has; None for others.
        hints: what the symbols were for the inputs that were traced with.
    """

    frames: int | sympy.Expr | None
    before: int | sympy.Expr
    after: int | sympy.Expr
    hints: Mapping[sympy.Symbol, int]

    def at(self, symbol: sympy.Symbol | None, frames: int) -> tuple[int, int]:
        """FLOPs before and after with another number of frames, which is what the symbol stands for."""
        values = dict(self.hints) if symbol is None else {**self.hints, symbol: frames}
        return int(sympy.sympify(self.before).subs(values)), int(sympy.sympify(self.after).subs(values))


def frames_symbol(growths: Iterable[Growth], frames: int) -> sympy.Symbol | None:
    """The symbol that is the number of frames; None where that is fixed to `frames` in all attentions over them."""
    found = {growth.frames for growth in growths} - {None}
    if found == {frames}:
        return None
    symbol = found.pop() if len(found) == 1 else None
    if not isinstance(symbol, sympy.Symbol):
        raise BadInput(
            f"this graph does not serve {frames} frames: their number is {symbol or 'not one number'} in it; "
            "trace with dynamic=True, or with as many frames"
        )
    return symbol
