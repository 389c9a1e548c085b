"""Loops of as many turns that follow each other become one, whose turn does what theirs did, one after the other.

What they do alike then stands in one graph, where it can be found.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from vggt_compile.graph import dialect
from vggt_compile.graph.dialect import value
from vggt_compile.graph.symbols import form


class Loop:
    """A call of `scan`: what it carries from turn to turn, what each turn gets a slice of, what every turn reads."""

    def __init__(self, gm: GraphModule, call: Node) -> None:
        args: Any = call.args
        self.call, (self.reference, *operands) = call, args
        self.name = str(self.reference.target)
        self.body: GraphModule = getattr(gm, self.name)
        self.operands: list[list[Node]] = [list(nodes) for nodes in operands]
        carried, sliced = len(self.operands[0]), len(self.operands[1])
        given: list[Node] = self.body.graph.find_nodes(op="placeholder")
        gives: Any = self.body.graph.output_node().args[0]
        self.inputs = given[:carried], given[carried : carried + sliced], given[carried + sliced :]
        self.outputs: tuple[list[Node], list[Node]] = list(gives[:carried]), list(gives[carried:])

    def length(self) -> Any:
        """The number of its turns, to be compared."""
        return form(value(self.operands[1][0]).shape[0])

    def carries_nothing(self) -> bool:
        """Whether what it carries, one value or more as a scan has to, is handed on as it is, and nobody reads it."""
        pairs = zip(self.inputs[0], self.outputs[0], strict=True)
        idle = all(dialect.inert_source(gives) is given and len(given.users) == 1 for given, gives in pairs)
        return idle and all(index >= len(self.outputs[0]) for _, index in self.results())

    def results(self) -> list[tuple[Node, int]]:
        """Who takes which of its results; -1 where somebody takes them all."""
        return [(user, _taken(user)) for user in self.call.users if not _idle(user)]


def _idle(user: Node) -> bool:
    """Whether it takes a result that nobody reads."""
    return user.target is operator.getitem and not user.users


def _taken(user: Node) -> int:
    index: Any = user.args[1] if user.target is operator.getitem else -1
    return int(index)


def loops(gm: GraphModule) -> list[Loop]:
    return [Loop(gm, call) for call in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan)]


def groups(gm: GraphModule) -> list[list[Loop]]:
    """Loops that can be one, two or more each."""
    found: list[list[Loop]] = []
    for loop in loops(gm):
        if found and _can_be_one([*found[-1], loop]):
            found[-1].append(loop)
        else:
            found.append([loop])
    return [group for group in found if len(group) > 1]


def _can_be_one(group: Sequence[Loop]) -> bool:
    """Whether they have as many turns, none needs a turn before or another loop, and nothing happens between them."""
    calls = {loop.call for loop in group}
    return (
        len({loop.length() for loop in group}) == 1
        and all(loop.carries_nothing() for loop in group)
        and calls.isdisjoint(_waiting(group))
        and all(node in calls or _changes_nothing(node) for node in _span(group))
        and not any(loop.body.graph.find_nodes(op="get_attr") for loop in group)
    )


def _changes_nothing(node: Node) -> bool:
    return node.op == "get_attr" or dialect.pure(node) or dialect.checks(node)


def _span(group: Sequence[Loop]) -> list[Node]:
    """All nodes from the first loop to the last."""
    nodes = list(group[0].call.graph.nodes)
    return nodes[nodes.index(group[0].call) : nodes.index(group[-1].call) + 1]


def _waiting(group: Sequence[Loop]) -> list[Node]:
    """What of these nodes needs a result of one of the loops."""
    calls, waiting = {loop.call for loop in group}, dict[Node, None]()
    for node in _span(group):
        if any(source in calls or source in waiting for source in node.all_input_nodes):
            waiting[node] = None
    return list(waiting)


def joined(group: Sequence[Loop]) -> GraphModule:
    """One body: a turn of each loop after the other. What several of them read is one input."""
    graph, now, shared = Graph(), dict[Node, Node](), dict[Node, Node]()

    def given(loop: Loop, old: Node) -> Node:
        new = graph.placeholder(f"{loop.call.name}_{old.name}")
        new.meta = dict(old.meta)
        return new

    first = group[0]
    now.update({old: given(first, old) for old in first.inputs[0]})
    now.update({old: now[first.inputs[0][0]] for loop in group[1:] for old in loop.inputs[0]})
    now.update({old: given(loop, old) for loop in group for old in loop.inputs[1]})
    for loop in group:
        for old, operand in zip(loop.inputs[2], loop.operands[2], strict=True):
            now[old] = shared[operand] if operand in shared else shared.setdefault(operand, given(loop, old))
    for loop in group:
        for node in loop.body.graph.nodes:
            if node.op not in ("placeholder", "output"):
                now[node] = graph.node_copy(node, now.__getitem__)
    gives = [*first.outputs[0], *(node for loop in group for node in loop.outputs[1])]
    graph.output([now[node] for node in gives])
    return GraphModule(first.body, graph)


def join(gm: GraphModule, group: Sequence[Loop], body: GraphModule) -> None:
    """Put one loop where the last one is, and what waits for the others behind it."""
    graph, first, last = gm.graph, group[0], group[-1].call
    for node in reversed(_waiting(group)):
        last.append(node)
    sliced, read = ([node for loop in group for node in loop.operands[kind]] for kind in (1, 2))
    setattr(gm, first.name, body)
    with graph.inserting_before(last):
        operands = graph.get_attr(first.name), first.operands[0], sliced, list(dict.fromkeys(read))
        one = graph.call_function(torch.ops.higher_order.scan, operands)
    gives = list(value(first.call)[: len(first.outputs[0])])
    for loop in group:
        before, carried = len(gives), len(loop.outputs[0])
        for user, index in loop.results():
            user.args = one, before + index - carried
        gives += value(loop.call)[carried:]
        for idle in list(loop.call.users):
            graph.erase_node(idle)
        graph.erase_node(loop.call)
        graph.erase_node(loop.reference)
        if loop is not first:
            delattr(gm, loop.name)
    one.meta = {dialect.value_key(graph): tuple(gives)}
