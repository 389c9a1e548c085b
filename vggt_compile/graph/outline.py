"""Equal blocks of a graph become calls of one sub-graph, which Inductor lowers, fuses and schedules once.

The values of a block that others read become outputs of the sub-graph, the same ones for all of its calls. An output
must have memory of its own, so what is a view, or may be, is made once more outside.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from vggt_compile.graph import dialect
from vggt_compile.graph.dialect import value
from vggt_compile.graph.loops import groups, join, joined
from vggt_compile.graph.plain import plain
from vggt_compile.graph.repeats import Span, drop_unread, operations, repeats, sink_results, symbols
from vggt_compile.graph.switches import DISABLED, disabled_passes
from vggt_compile.site import Outcome

NAMES = {"outline_blocks", "regions"}
"""What switches it off in `torch._inductor.config.disabled_passes`."""

DID = "blocks of the model compiled by way of an equal one"


def outline_blocks(gm: GraphModule, *, heads: bool = False) -> Outcome:
    """Equal blocks call one sub-graph; with `heads` what dense heads do alike too, in one loop where they are loops."""
    refusal = _refusal(gm)
    if refusal is not None:
        return Outcome(did=DID, left={"": refusal})
    if heads:
        plain(gm)
    drop_unread(gm.graph)
    count = _in_loops(gm) if heads else 0
    count += _equal_blocks(gm, "block", _found(gm, convolutions=heads))
    gm.graph.lint()
    gm.recompile()
    return Outcome(count, DID)


def _in_loops(gm: GraphModule) -> int:
    """Equal parts of loops next to each other; where there are any, the loops become one."""
    count = 0
    for group in groups(gm):
        body = joined(group)
        drop_unread(body.graph)
        spans = _found(body, convolutions=True)
        if spans:
            count += _equal_blocks(body, f"{group[0].name}_block", spans)
            body.recompile()
            join(gm, group, body)
    return count


def _found(gm: GraphModule, convolutions: bool) -> list[list[Span]]:
    sink_results(gm.graph)
    return repeats(gm.graph, convolutions=convolutions)


def _equal_blocks(gm: GraphModule, name: str, found: Sequence[Sequence[Span]]) -> int:
    """Calls in the place of equal runs; how many runs are not compiled for that."""
    nodes, sizes, count = operations(gm.graph), symbols(gm.graph), 0
    for spans in found:
        _outline(gm, [_Block(nodes[start:end], sizes) for start, end in spans], f"{name}_{count}")
        count += len(spans) - 1
    return count


def _refusal(gm: GraphModule) -> str | None:
    if disabled_passes() & NAMES:
        return DISABLED
    if torch._inductor.config.cpp_wrapper:
        return "Inductor's C++ wrapper calls no sub-graphs"
    seen = [value(node) for node in gm.graph.nodes if node.op == "placeholder"]
    if len(symbols(gm.graph)) > 1 or any(isinstance(x, torch.SymFloat) for x in seen):
        return "more than the number of frames is symbolic"  # Inductor fails on such sub-graphs
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in seen):
        return "gradients are asked for"
    return None


class _Block:
    """One run of operations: its operands, and what others read of it."""

    def __init__(self, nodes: Sequence[Node], sizes: Sequence[Node]) -> None:
        self.nodes, self.sizes = list(nodes), list(sizes)
        self.place = {node: index for index, node in enumerate(nodes)}
        self.given: set[int] = set()
        self.again: set[int] = set()
        for node in nodes:
            if any(user not in self.place for user in node.users):
                self._give(node)

    def operands(self) -> list[Node]:
        """What it reads now, in the order in which it reads it; sizes first, as not every shape tells those it has."""
        read = dict.fromkeys(self.sizes)
        for node in self.nodes:
            map_arg((node.args, node.kwargs), lambda x: x if x in self.place else read.setdefault(x))
        return list(read)

    def _give(self, node: Node) -> None:
        """Let others read a value: as an output, or made once more from outputs where it may share memory."""
        if isinstance(value(node), Tensor) and dialect.owns(node):
            self.given.add(self.place[node])
        elif self.place[node] not in self.again:
            self.again.add(self.place[node])
            for source in node.all_input_nodes:
                if source in self.place:
                    self._give(source)


def _outline(gm: GraphModule, blocks: Sequence[_Block], name: str) -> None:
    outputs = sorted(set().union(*(block.given for block in blocks)))
    setattr(gm, name, GraphModule(gm, _sub_graph(blocks[0], outputs)))
    for block in blocks:
        _call(gm.graph, block, outputs, name)


def _sub_graph(block: _Block, outputs: Sequence[int]) -> Graph:
    graph, now = Graph(), {}
    for operand in block.operands():
        now[operand] = graph.placeholder(operand.name)
        now[operand].meta = {key: seen for key, seen in operand.meta.items() if key in ("example_value", "val")}
    for node in block.nodes:
        now[node] = graph.node_copy(node, now.__getitem__)
    graph.output(tuple(now[block.nodes[index]] for index in outputs))
    return graph


def _call(graph: Graph, block: _Block, outputs: Sequence[int], name: str) -> None:
    """Put a call where the last operation of a block is, and erase the block."""
    key = dialect.value_key(graph)
    now: dict[Node, Node] = {}
    with graph.inserting_before(block.nodes[-1].next):
        called = graph.call_function(invoke_subgraph, (graph.get_attr(name), name, *block.operands()))
        called.meta[key] = tuple(value(block.nodes[index]) for index in outputs)
        for number, index in enumerate(outputs):
            now[block.nodes[index]] = graph.call_function(operator.getitem, (called, number))
            now[block.nodes[index]].meta = dict(block.nodes[index].meta)
        for index in sorted(block.again):
            now[block.nodes[index]] = graph.node_copy(block.nodes[index], lambda node: now.get(node, node))
    for old, new in now.items():
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in block.place)
    for node in reversed(block.nodes):
        graph.erase_node(node)
    _sweep(now.values())


def _sweep(made: Any) -> None:
    for node in reversed(list(made)):
        if not node.users:
            node.graph.erase_node(node)
