"""Regions of a graph that act on each token by itself, found by dataflow: what lies above a value, and below one.

Such a region computes of some tokens what it computes of them among all. So tokens may be taken out above it instead of
below, or spread below it instead of above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import networkx as nx
from torch import Tensor
from torch.fx import Graph, Node

from vggt_compile.graph.axes import arranges, names_sizes, onward, origins, sizes
from vggt_compile.graph.dialect import inspects, operation
from vggt_compile.graph.dialect import value as value_of
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.projection import Projection
from vggt_compile.graph.symbols import times

Take = Callable[[Editor, Node], Node]
"""[B, H, N, D] → the same of other tokens, [B, H, n, D]."""


_END = "end"


class Readers:
    """Which values nothing but one value reads, through however many steps."""

    def __init__(self, graph: Graph) -> None:
        flow: nx.DiGraph = nx.DiGraph()
        flow.add_node(_END)
        for node in graph.nodes:
            readers: list[object] = [user for user in node.users if not inspects(user)]
            flow.add_edges_from((reader, node) for reader in readers or [_END])
        self._next = nx.immediate_dominators(flow, _END)

    def only(self, node: Node, reader: Node) -> bool:
        """Whether every way from the node's value to the end of the graph goes through the reader's."""
        place: object = node
        while place is not reader and place not in (_END, None):
            place = self._next.get(place)
        return place is reader


@dataclass(frozen=True)
class Above:
    """A value as a function of others, one token at a time.

    Attributes:
        value, axis: and where its tokens lie.
        steps: the nodes in between, in the order of the graph, each with its axis.
        projections: features of linear maps over tokens that it starts from, each with the axis of tokens of the input.
        leaves: other values that it starts from, each with its axis of tokens.
    """

    value: Node
    axis: int
    steps: dict[Node, int] = field(default_factory=dict)
    projections: list[tuple[Projection, int]] = field(default_factory=list)
    leaves: dict[Node, int] = field(default_factory=dict)


def above(value: Node, axis: int, readers: Readers) -> Above:
    """The largest region above a value that acts on each token by itself and that nothing else reads."""
    found, places, waiting = Above(value, axis), {value: axis}, [value]
    while waiting:
        node = waiting.pop()
        at, step = places[node], origins(node, places[node])
        projection = _start(node, value, readers)
        if projection is not None and at in projection.kept:
            found.projections.append((projection, projection.kept[at]))
        elif step is None or not readers.only(node, value):
            found.leaves[node] = at
        else:
            found.steps[node] = at
            fresh = {x: origin for x, origin in step.items() if origin is not None and x not in places}
            places |= fresh
            waiting += fresh
    return found if _agrees(found, places) else Above(value, axis, leaves={value: axis})


def _start(node: Node, value: Node, readers: Readers) -> Projection | None:
    """The node as a linear map of its own, where that is all that has to be computed of what lies above it."""
    if not readers.only(node, value):
        return None
    fused = arranges(node) and not readers.only(node.all_input_nodes[0], value)
    return Projection.of(node) if fused or operation(node) == "linear" else None


def _agrees(region: Above, places: dict[Node, int]) -> bool:
    """Whether every step reads each value along the axis that it has tokens in."""
    steps = (origins(node, axis) or {} for node, axis in region.steps.items())
    return all(origin == places.get(x) for step in steps for x, origin in step.items())


def rerun(
    edit: Editor, nodes: Iterable[Node], axes: Mapping[Node, int], given: Mapping[Node, Node]
) -> dict[Node, Node]:
    """Nodes once more, each before itself, from other tokens of the values in `given`; `axes` tell where tokens lie."""
    now = dict(given)
    for node in nodes:
        with edit.before(node):
            operands = {x: now[x] for x in node.all_input_nodes if x in now}
            now[node] = _resized(edit, node, axes, operands) if names_sizes(node) else edit.again(node, operands)
    return now


def _resized(edit: Editor, node: Node, axes: Mapping[Node, int], operands: Mapping[Node, Node]) -> Node:
    ((source, other),) = operands.items()
    step = origins(node, axes[node])
    assert step is not None
    at = step[source]
    assert at is not None
    shape = list(sizes(node))
    shape[axes[node]] = sizes(other)[at]
    return edit.reshape(other, *shape)


def along(edit: Editor, x: Node, axis: int, take: Take) -> Node:
    """`take` along any axis of a value, whichever axes lie before it and after it."""
    shape = sizes(x)
    if len(shape) == 4 and axis == 2:
        return take(edit, x)
    before, after = shape[:axis], shape[axis + 1 :]
    heads = (before[0], 1) if len(before) == 1 else (times(*before[:-1]), times(*before[-1:]))
    out = take(edit, edit.reshape(x, *heads, shape[axis], times(*after)))
    return edit.reshape(out, *before, sizes(out)[2], *after)


def after(node: Node) -> Node:
    """Where calls go that read this value, before all that have done so."""
    place = node.next
    while place.op == "placeholder":
        place = place.next
    return place


@dataclass(frozen=True)
class Below:
    """What is done to a value's tokens one by one after it.

    Attributes:
        steps: nodes in the order of the graph, each the only reader of the one before, with the axis of tokens.
        stop: why it ends there.
    """

    steps: dict[Node, int]
    stop: str


def below(value: Node, batch: int, axis: int) -> Below:
    """The chain of steps below a value that act on each token by itself, while the batch stays the first axis."""
    steps: dict[Node, int] = {}
    while True:
        if len(value.users) != 1:
            return Below(steps, f"{len(value.users)} read {value}")
        (user,) = value.users
        at = onward(user, value, axis)
        first = batch if sizes(value)[batch] == 1 else onward(user, value, batch)
        if at is None or not isinstance(value_of(user), Tensor):
            return Below(steps, f"{operation(user) or user} reads other tokens too")
        if first != 0 or at not in (1, 2):
            return Below(steps, f"{operation(user)} moves the batch")
        steps[user], value, axis = at, user, at
