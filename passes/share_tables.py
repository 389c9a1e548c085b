"""Values that are computed in the same way from the same values exist once: the tables of rotary embeddings.

A model computes the angles of its positions in every attention, for queries and for keys. Nothing removes that from a
graph for inference, and Inductor computes a cosine anew in each kernel that reads it. So there is one table, and it
is in memory. Two values are equal here if one operation made them from equal operands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from vggt_compile.graph import dialect
from vggt_compile.graph.axes import arranges, names_sizes, sizes
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.enclosing import autocasts
from vggt_compile.graph.region import after
from vggt_compile.graph.symbols import equal, size_of, times
from vggt_compile.registry import region
from vggt_compile.site import Lowered, Outcome


@region
def share_tables(graph: Graph, lowered: Sequence[Lowered], edit: Editor) -> Outcome:
    """Equal values are computed once: one table of each kind for the rotary embeddings of all layers."""
    _share(graph, edit, (Tensor, torch.SymInt))
    tables = _tables(graph)
    for table in tables:
        _keep(table, edit)
    _share(graph, edit, torch.SymInt)  # each table was told its sizes and strides anew
    return Outcome(len(tables), "tables computed once for all layers")


def _share(graph: Graph, edit: Editor, kinds: type | tuple[type, ...]) -> None:
    """Let what reads a value of these kinds read the first one that is equal to it."""
    numbers = _Numbers(graph)
    first: dict[Hashable, Node] = {}
    repeated = []
    for node in graph.nodes:
        kept = first.setdefault(numbers.of(node), node)
        if kept is not node and isinstance(dialect.value(node), kinds):
            node.replace_all_uses_with(kept)
            repeated.append(node)
    edit.sweep(*repeated)


def _tables(graph: Graph) -> list[Node]:
    """Angles and what is made of them, where only sizes decide them and several computations on tensors read them."""
    given: set[Node] = set()
    turned: set[Node] = set()
    readers: Counter[Node] = Counter()
    for node in graph.nodes:
        seen = dialect.value(node)
        tensor = node.op == "placeholder" and isinstance(seen, Tensor) and seen.ndim > 0  # numbers may be inputs too
        if tensor or not given.isdisjoint(node.all_input_nodes):
            given.add(node)
            readers.update(_in_memory(source) for source in node.all_input_nodes if source in turned)
        elif dialect.operation(node) in ("cos", "sin") or not turned.isdisjoint(node.all_input_nodes):
            turned.add(node)
    return [node for node, count in readers.items() if count > 1 and _once_each(dialect.value(node))]


def _in_memory(node: Node) -> Node:
    """The value whose memory this one is a view of."""
    while (arranges(node) or dialect.operation(node) in _REPEAT) and not dialect.fresh(node):
        node = node.all_input_nodes[0]
    return node


_REPEAT = {"expand", "expand_as", "broadcast_to"}


def _once_each(seen: Tensor) -> bool:
    """Whether the strides reach as many places as there are elements.

    Compiled code lays out the value that it keeps without repeats and gaps. Strides that have some, as those of one
    table for all frames, would read other numbers from it.
    """
    shape, strides = tuple(map(size_of, seen.shape)), map(size_of, seen.stride())
    last = sum(((size - 1) * stride for size, stride in zip(shape, strides, strict=True)), start=0)
    return equal(last + 1, times(*shape))


def _keep(table: Node, edit: Editor) -> None:
    """Have compiled code keep a value instead of computing it wherever it is read: a view by strides needs memory."""
    seen = dialect.value(table)
    with edit.before(after(table)):
        shape, stride = (tuple(edit.size(size_of(size)) for size in sizes) for sizes in (seen.shape, seen.stride()))
        kept = edit.call(torch.as_strided, table, shape, stride)
    table.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)


class _Numbers:
    """A number for each value: values of one number are equal."""

    def __init__(self, graph: Graph) -> None:
        self.autocasts = autocasts(graph)
        self.changing = _changing(graph)
        self.numbers: dict[Node, Hashable] = {}
        self.known: dict[Hashable, int] = {}

    def of(self, node: Node) -> Hashable:
        number = self.known.setdefault(self._how(node), len(self.known))
        self.numbers[node] = number
        return number

    def _how(self, node: Node) -> Hashable:
        """How the value was computed."""
        seen = dialect.value(node)
        if isinstance(seen, torch.SymInt) and node not in self.changing:
            return "size", seen.node.expr
        if node.op == "get_attr":
            return "attribute", node.target
        if node.op not in ("call_function", "call_method") or node in self.changing or not dialect.pure(node):
            return node
        around = self.autocasts.get(node)
        if names_sizes(node) and arranges(node):
            source = node.args[0]
            while isinstance(source, Node) and names_sizes(source) and arranges(source) and source not in self.changing:
                source = source.args[0]
            return "reshape", self._key(source), sizes(node)
        return node.op, node.target, self._key(node.args), self._key(node.kwargs), around

    def _key(self, given: Any) -> Hashable:
        if isinstance(given, Node):
            return "number", self.numbers[given]
        if isinstance(given, (list, tuple)):
            return tuple(map(self._key, given))
        if isinstance(given, dict):
            return tuple((name, self._key(entry)) for name, entry in sorted(given.items()))
        if isinstance(given, slice):
            return "slice", self._key((given.start, given.stop, given.step))
        return type(given), repr(given)


def _changing(graph: Graph) -> set[Node]:
    """Values that something writes into, those that may share memory with them, and all that is computed from these."""
    changing: set[Node] = set()
    for writer in filter(dialect.in_place, graph.nodes):
        waiting = [writer.kwargs.get("out", *writer.args[:1])]
        while waiting:
            target = waiting.pop()
            if isinstance(target, Node) and target not in changing:
                changing.add(target)
                waiting += [] if dialect.fresh(target) else target.all_input_nodes
    for node in graph.nodes:
        if not changing.isdisjoint(node.all_input_nodes):
            changing.add(node)
    return changing
