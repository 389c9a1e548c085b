"""Regions of autocast and grad mode become part of the graph around them: what autocast casts stands in the graph.

An export makes graphs of such regions, which a plan could not see through; where a region has a loop in it, it may
leave nodes that open and close it. Each operation of a region gets the casts that autocast makes before it as nodes,
and so do bodies of loops and branches inside.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vggt_compile.graph.casts import Unclear, casts_at
from vggt_compile.graph.dialect import in_place, inspects, operation, value
from vggt_compile.graph.enclosing import Autocast, autocasts, enclosure, switches_autocast
from vggt_compile.graph.symbols import form
from vggt_compile.graph.trial import NOTHING, Casts, dtypes

_BODIES = {"scan", "cond", "while_loop", "map_impl"}
"""Operations on graphs that do nothing with autocast but run their bodies in it."""

Regions = tuple[Autocast, ...]


def flatten(gm: GraphModule) -> None:
    """Write regions out in the graph and in the bodies of its loops.

    Raises:
        Unclear: for some operation casts cannot say what autocast does. The graph is half done then.
    """
    _Flatten(gm, (), {}).run()


class _Flatten:
    """One graph that runs inside some regions, outermost first; `asked` is what autocast does where, for all graphs."""

    def __init__(self, gm: GraphModule, around: Regions, asked: dict[Hashable, Casts]) -> None:
        self.gm, self.around, self.asked = gm, around, asked
        self.inside: dict[Node, Regions] = {}
        self.cast: dict[tuple[Node, torch.dtype], Node] = {}

    def run(self) -> None:
        for node, opened in autocasts(self.gm.graph).items():
            self._write_out(node, (*self.around, *opened))
        for node in reversed(self.gm.graph.nodes):
            if switches_autocast(node):
                self.gm.graph.erase_node(node)
        for node in list(self.gm.graph.nodes):
            if node.op == "call_function":
                self._state(node, self.inside[node])
        _drop_unused(self.gm)
        self.gm.graph.lint()
        self.gm.recompile()

    def _write_out(self, node: Node, around: Regions) -> None:
        """A region's nodes in its place, and those of regions in it."""
        self.inside[node] = around
        found = enclosure(node)
        if found is None:
            return
        inner = _attribute(self.gm, found.body)
        copies: dict[Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), found.operands, strict=True))
        with self.gm.graph.inserting_before(node):
            out = self.gm.graph.graph_copy(inner.graph, copies)
        for old in inner.graph.find_nodes(op="get_attr"):
            copies[old].target = _adopt(self.gm, _attribute(inner, old))
        _replace(node, out)
        self.gm.graph.erase_node(node)
        if not found.body.users:
            self.gm.graph.erase_node(found.body)
        autocast = around if found.autocast is None else (*around, found.autocast)
        for old, opened in autocasts(inner.graph).items():
            if old.op not in ("placeholder", "output"):
                self._write_out(copies[old], (*autocast, *opened))

    def _state(self, node: Node, around: Regions) -> None:
        """The casts of autocast at a node before it."""
        if isinstance(node.target, HigherOrderOperator):
            self._run_bodies(node, around)
        elif isinstance(node.target, OpOverload) and _on(around):
            self._cast_operands(node, self._ask(node, around))
        if in_place(node):
            self.cast.clear()  # what was cast may be something else now

    def _run_bodies(self, node: Node, around: Regions) -> None:
        target: Any = node.target
        if _on(around) and target.name() not in _BODIES:
            raise Unclear(f"{target} may do more under autocast than run a graph")
        for body in node.all_input_nodes:
            inner = _attribute(self.gm, body) if body.op == "get_attr" else None
            if isinstance(inner, GraphModule):
                with self.gm.graph.inserting_before(node):
                    own = self.gm.graph.get_attr(_adopt(self.gm, copy.deepcopy(inner)))
                own.meta = copy.copy(body.meta)
                _Flatten(_attribute(self.gm, own), around, self.asked).run()
                out = _attribute(self.gm, own).graph.output_node().args[0]
                if isinstance(out, (tuple, list)):  # the condition of a while loop is one node
                    _agree(node, dtypes([value(each) for each in out if isinstance(each, Node)]))
                node.replace_input_with(body, own)
                if not body.users:
                    self.gm.graph.erase_node(body)

    def _ask(self, node: Node, around: Regions) -> Casts:
        sources = node.all_input_nodes
        operands = [value(source) for source in sources]
        if inspects(node) or not any(isinstance(operand, Tensor) for operand in operands):
            return NOTHING

        def call(given: Sequence[Any]) -> Any:
            place = dict(zip(sources, given, strict=True))
            return map_arg((node.args, dict(node.kwargs)), place.__getitem__)

        numbered = map_arg((node.args, node.kwargs), lambda source: ("operand", sources.index(source)))
        key = node.target, around, form(operands), form(numbered)
        if key not in self.asked:
            assert isinstance(node.target, OpOverload)
            self.asked[key] = casts_at(node.target, operands, call, around)
        _agree(node, self.asked[key].gives)
        return self.asked[key]

    def _cast_operands(self, node: Node, casts: Casts) -> None:
        sources = node.all_input_nodes
        for index, dtype in casts.operands.items():
            node.replace_input_with(sources[index], self._cast(sources[index], dtype, node))
        node.kwargs = {**node.kwargs, **casts.stated}

    def _cast(self, source: Node, dtype: torch.dtype, reader: Node) -> Node:
        if (source, dtype) not in self.cast:
            with self.gm.graph.inserting_before(reader):
                made = self.gm.graph.call_function(torch.ops.aten._to_copy.default, (source,), {"dtype": dtype})
            made.meta = {key: reader.meta[key] for key in ("nn_module_stack", "stack_trace") if key in reader.meta}
            made.meta["val"] = value(source).to(dtype)
            self.cast[source, dtype] = made
        return self.cast[source, dtype]


def _on(around: Regions) -> bool:
    """Whether autocast does anything inside the regions."""
    return any({region.device: region.enabled for region in around}.values())


def _agree(node: Node, gives: tuple[torch.dtype, ...]) -> None:
    """Whether the trace saw what autocast does: inside bodies of loops it may not have seen regions."""
    if dtypes(value(node)) != gives:
        raise Unclear(f"{node.target} gives {gives}, and the trace says {dtypes(value(node))}")


def _attribute(gm: GraphModule, node: Node) -> Any:
    owner, _, last = str(node.target).rpartition(".")
    return getattr(gm.get_submodule(owner), last)


def _adopt(gm: GraphModule, given: Any) -> str:
    """The name under which a graph keeps what a region had."""
    kind = "body" if isinstance(given, GraphModule) else "constant"
    name = next(name for index in count() if not hasattr(gm, name := f"{kind}_{index}"))
    setattr(gm, name, given)
    return name


def _replace(node: Node, out: Any) -> None:
    """Results of a region by what its graph gave."""
    if isinstance(out, Node):
        node.replace_all_uses_with(out)
        return
    for user in list(node.users):
        assert operation(user) == "getitem", f"{user} reads all results of a region at once"
        user.replace_all_uses_with(out[user.args[1]])
        user.graph.erase_node(user)


def _drop_unused(gm: GraphModule) -> None:
    """Graphs of regions that nobody calls any more."""
    used = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    for name, child in list(gm.named_children()):
        if isinstance(child, GraphModule) and name not in used:
            delattr(gm, name)
