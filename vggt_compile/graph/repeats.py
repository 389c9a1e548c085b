"""Runs of consecutive operations that compute the same from different operands: the blocks of a transformer.

Two runs are equal if operation for operation they have the same arguments, shapes, strides, dtypes, autocast and
allowed kernels of attention, and read each other's values alike. A run that says which kernels are allowed takes it
back. A run starts and ends just after a linear map, or a convolution where that is asked for: what crosses its border
then lies in memory anyway, so no fusion is lost there. What is consecutive in the order of a graph is convex.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from vggt_compile.graph import dialect
from vggt_compile.graph.dialect import value
from vggt_compile.graph.enclosing import autocasts
from vggt_compile.graph.symbols import form

Span = tuple[int, int]
"""First and past the last of a run of operations."""

MAPS = 12
"""A run holds at most so many linear maps: three blocks of a transformer. Convolutions are not counted."""

CONVOLUTIONS = frozenset(("conv2d", "conv_transpose2d"))


def operations(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op in ("call_function", "call_method")]


def symbols(graph: Graph) -> list[Node]:
    """Inputs of the graph that are sizes."""
    return [node for node in graph.nodes if node.op == "placeholder" and isinstance(value(node), torch.SymInt)]


def drop_unread(graph: Graph) -> None:
    """Erase what nothing reads: layers that heads leave out, conditions that the trace has decided, checks that hold.

    They lie between the blocks of a model and would tell them apart.
    """
    for node in reversed(operations(graph)):
        if not node.users and (_movable(node) or dialect.settled(node)):
            graph.erase_node(node)


def sink_results(graph: Graph) -> None:
    """Move what is computed from a block's values, and read far below only, to where it is read.

    A model keeps what some of its layers have computed for its heads; between the blocks that would tell them apart.
    """
    made: set[Node] = set()
    for node in graph.nodes:
        if _linear(node) or not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    for node in reversed(operations(graph)):
        if node not in made or not node.users or not _movable(node):
            continue
        place, passed = node.next, 0
        while place not in node.users and (place.op == "get_attr" or _movable(place)):
            passed += _linear(place)
            place = place.next
        if passed >= MAPS // 3:
            place.prepend(node)


def repeats(graph: Graph, *, convolutions: bool = False) -> list[list[Span]]:
    """Classes of equal runs of a graph's operations that do not overlap, those first that spare the most operations.

    Args:
        convolutions: they may begin and end a run, too.
    """
    return _Repeats(graph, convolutions).classes()


class _Repeats:
    def __init__(self, graph: Graph, convolutions: bool) -> None:
        self.nodes, self.convolutions = operations(graph), CONVOLUTIONS if convolutions else frozenset()
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.sizes = {node: index for index, node in enumerate(symbols(graph))}
        around, self.allowed = autocasts(graph), dialect.attention_choices(graph)
        self.forms = {node: form(value(node)) for node in graph.nodes}
        self.labels: list[Hashable] = []
        self.operands: list[list[Node]] = []
        known: dict[Hashable, int] = {}
        for node in self.nodes:
            met: list[Node] = []
            region = around[node], repr(self.allowed[node])
            label = node.op, node.target, self.forms[node], region, _written((node.args, node.kwargs), met)
            self.labels.append(known.setdefault(label, len(known)))
            self.operands.append(met)

    def classes(self) -> list[list[Span]]:
        groups, taken, found = self._equal(), [False] * len(self.nodes), []
        while groups:
            free = (_apart(spans, taken) for spans in groups.values())
            best = max(free, key=_spared, default=[])
            if len(best) < 2:
                break
            found.append(best)
            for start, end in best:
                taken[start:end] = [True] * (end - start)
        return found

    def _equal(self) -> dict[Hashable, list[Span]]:
        """All equal runs, overlapping ones too.

        Runs that begin alike have a number together, up to where they begin to differ: so each run that starts in one
        place is met while the longest of them is read.
        """
        equal: dict[Hashable, list[Span]] = defaultdict(list)
        known: dict[Hashable, int] = {}
        maps = [_linear(node) for node in self.nodes]
        ends = [_linear(node) or dialect.operation(node) in self.convolutions for node in self.nodes]
        movable = [_movable(node) or dialect.chooses_attention(node) for node in self.nodes]
        for start in (index + 1 for index, end in enumerate(ends) if end):
            alike, left, met = 0, MAPS, dict[Node, int]()
            for index in range(start, len(self.nodes)):
                left -= maps[index]
                if not movable[index] or left < 0:
                    break
                alike = known.setdefault((alike, self.labels[index], self._reads(index, start, met)), len(known) + 1)
                if ends[index] and self.allowed[self.nodes[index]] == self.allowed[self.nodes[start]]:
                    equal[alike].append((start, index + 1))
        return {key: spans for key, spans in equal.items() if len(spans) > 1}

    def _reads(self, index: int, start: int, met: dict[Node, int]) -> Hashable:
        """Operands by their place in the run; those from outside by form and the order in which they are met."""

        def key(given: Node) -> Hashable:
            place = self.place.get(given, -1)
            if place >= start:
                return place - start
            if given in self.sizes:
                return "size", self.sizes[given]
            return "other", met.setdefault(given, len(met)), self.forms[given]

        return tuple(map(key, self.operands[index]))


def _written(given: Any, operands: list[Node]) -> Hashable:
    """All arguments of an operation but its operands, which are listed."""
    if isinstance(given, Node):
        operands.append(given)
        return Node
    if isinstance(given, (tuple, list)):
        return tuple(_written(entry, operands) for entry in given)
    if isinstance(given, dict):
        return tuple((name, _written(entry, operands)) for name, entry in given.items())
    if isinstance(given, slice):
        return "slice", _written((given.start, given.stop, given.step), operands)
    return type(given), repr(given)


def _linear(node: Node) -> bool:
    return dialect.operation(node) == "linear"


def _movable(node: Node) -> bool:
    """Whether the node may be computed elsewhere: it changes nothing, and draws nothing at random."""
    if node.op not in ("call_function", "call_method"):
        return False
    attention = dialect.attention_call(node)
    return dialect.pure(node) if attention is None else attention.dropout == 0


def _apart(spans: Sequence[Span], taken: Sequence[bool]) -> list[Span]:
    """Those that neither overlap each other nor what is taken."""
    found: list[Span] = []
    for start, end in spans:
        if (not found or start >= found[-1][1]) and not any(taken[start:end]):
            found.append((start, end))
    return found


def _spared(spans: Sequence[Span]) -> int:
    return (len(spans) - 1) * (spans[0][1] - spans[0][0]) if spans else 0
