"""Sizes as expressions: compared without guards, valued by their hints, and computed inside the graph on demand."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv, Max, Min
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from vggt_compile.graph.dialect import value
from vggt_compile.site import Size


def size_of(dim: int | torch.SymInt) -> Size:
    """A dimension of a fake tensor as int or expression, fully expanded so that equal sizes look alike."""
    if isinstance(dim, int):
        return dim
    return simplify(dim.node.expr)


def simplify(size: Size) -> Size:
    expr = sympy.expand(size)
    return int(expr) if expr.is_Integer else expr


def times(*sizes: Size) -> Size:
    product: Size = 1
    for size in sizes:
        product = product * size
    return simplify(product)


def minus(left: Size, right: Size) -> Size:
    return simplify(left - right)


def floordiv(left: Size, right: Size) -> Size:
    return simplify(FloorDiv(sympy.sympify(left), sympy.sympify(right)))


def ceildiv(left: Size, right: Size) -> Size:
    return floordiv(left + right - 1, right)


def portion(size: Size, share: Fraction) -> Size:
    """⌊share · size⌋."""
    return floordiv(times(size, share.numerator), share.denominator)


def least(left: Size, right: Size) -> Size:
    return simplify(Min(sympy.sympify(left), sympy.sympify(right)))


def greatest(left: Size, right: Size) -> Size:
    return simplify(Max(sympy.sympify(left), sympy.sympify(right)))


def equal(left: Size, right: Size) -> bool:
    """Whether two sizes are equal for all values of their symbols, as far as expansion shows."""
    return minus(left, right) == 0


def quotient(left: Size, right: Size) -> Size | None:
    """left / right where that is a whole number for all values of the symbols, else None."""
    ratio = sympy.cancel(sympy.sympify(left) / sympy.sympify(right))
    if ratio.is_number:
        return int(ratio) if ratio.is_Integer else None
    return simplify(ratio) if sympy.denom(sympy.together(ratio)) == 1 else None


def form(seen: Any) -> Hashable:
    """All of a value that code for it depends on: shape, strides, dtype, device of a tensor; sizes as expressions."""
    if isinstance(seen, torch.Tensor):
        return _exact(seen.shape), _exact(seen.stride()), seen.dtype, seen.device, seen.requires_grad
    if isinstance(seen, torch.SymInt):
        return torch.SymInt, seen.node.expr
    if isinstance(seen, (tuple, list)):
        return type(seen), tuple(map(form, seen))
    if isinstance(seen, dict):
        return tuple((name, form(entry)) for name, entry in seen.items())
    if isinstance(seen, slice):
        return slice, form((seen.start, seen.stop, seen.step))
    return type(seen), repr(seen)


def _exact(sizes: Iterable[int | torch.SymInt]) -> Hashable:
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


class Symbols:
    """Where the symbols of one graph can be read: from scalar inputs, or from a dimension of a tensor input."""

    def __init__(self, graph: Graph) -> None:
        self._sources: dict[sympy.Symbol, tuple[Node, int | None, torch.SymInt]] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                self._read(node)

    def _read(self, node: Node) -> None:
        seen = value(node)
        if isinstance(seen, torch.SymInt):
            self._bind(seen, node, None)
        elif isinstance(seen, torch.Tensor):
            for dim, size in enumerate(seen.shape):
                if isinstance(size, torch.SymInt):
                    self._bind(size, node, dim)

    def _bind(self, size: torch.SymInt, node: Node, dim: int | None) -> None:
        if isinstance(size.node.expr, sympy.Symbol):
            self._sources.setdefault(size.node.expr, (node, dim, size))

    def unknown(self, size: Size) -> set[str]:
        """Names of symbols in `size` that no input of this graph gives."""
        return {str(s) for s in sympy.sympify(size).free_symbols if s not in self._sources}

    def symint(self, size: Size) -> int | torch.SymInt:
        """The size as the shape environment's own number."""
        return self._interpret(size, lambda symbol: self._sources[symbol][2])

    def surely_more(self, size: Size, than: int) -> bool:
        """Whether the size is larger whatever values its symbols take, as far as is known without a guard."""
        return statically_known_true(self.symint(size) > than)

    def hinted(self, size: Size) -> int:
        """The size for the inputs that were traced with; computed with numbers, so that no guard is added."""
        return int(self._interpret(size, lambda symbol: self._sources[symbol][2].node.hint))

    def node(self, size: Size, create: Callable[..., Node]) -> int | Node:
        """The size as a node that computes it; `create(function, *args)` makes nodes."""
        if isinstance(size, int):
            return size

        def read(symbol: sympy.Symbol) -> Node:
            source, dim, _ = self._sources[symbol]
            return source if dim is None else create(torch.ops.aten.sym_size.int, source, dim)

        env = {symbol: _Traced(read(symbol), create) for symbol in sorted(size.free_symbols, key=str)}
        return sympy_interp(PythonReferenceAnalysis, env, size).node

    def _interpret(self, size: Size, read: Callable[[sympy.Symbol], Any]) -> Any:
        if isinstance(size, int):
            return size
        return sympy_interp(PythonReferenceAnalysis, {s: read(s) for s in size.free_symbols}, size)


class _Traced:
    """Integer arithmetic that leaves nodes behind: what sympy's interpreter calculates with."""

    def __init__(self, node: Node, create: Callable[..., Node]) -> None:
        self.node = node
        self._create = create

    def _apply(self, function: Callable[..., Any], *operands: Any) -> _Traced:
        plain = [x.node if isinstance(x, _Traced) else x for x in operands]
        return _Traced(self._create(function, *plain), self._create)

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any, kwargs: Any = None) -> _Traced:
        """torch.sym_min and torch.sym_max, which are no operators of Python."""
        traced = next(x for x in args if isinstance(x, _Traced))
        return traced._apply(function, *args)


def _operator(name: str, *, swapped: bool = False) -> Callable[..., _Traced]:
    import operator

    function = getattr(operator, name)

    def apply(self: _Traced, other: Any) -> _Traced:
        return self._apply(function, other, self) if swapped else self._apply(function, self, other)

    return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow"):
    setattr(_Traced, f"__{_name}__", _operator(_name))
    setattr(_Traced, f"__r{_name}__", _operator(_name, swapped=True))


def hint(size: Size, symbols: Symbols) -> int:
    """The size for the inputs that were traced with, 0 where they do not tell it."""
    if symbols.unknown(size):
        return 0
    return symbols.hinted(size)
