"""What AOTAutograd knows of an operation is kept where nothing about it has changed.

After its first passes Inductor evaluates all of a graph with fake tensors, since a pass may have given an operation
other inputs. Most are as they were: those keep the values that they were traced with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.scan import scan_op as scan
from torch._inductor import compile_fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from vggt_compile.graph.dialect import value
from vggt_compile.graph.symbols import form


class State(NamedTuple):
    """A node as it was traced."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any


MAY_VIEW = {torch.ops.aten.view.default: torch.ops.aten.reshape.default}
"""What Inductor puts in the place of an operation; of the same inputs it gives the same."""


@contextmanager
def values_kept() -> Iterator[None]:
    """For one compile."""
    passes, run_node = compile_fx._recursive_joint_graph_passes, FakeTensorProp.run_node
    traced: dict[Node, State] = {}
    same = set[Node]()

    def joint_graph_passes(gm: GraphModule, *given: Any, **named: Any) -> GraphModule:
        if not traced:
            parts = (part for part in gm.modules() if isinstance(part, GraphModule))
            traced.update((node, _state(node)) for part in parts for node in part.graph.nodes)
        return passes(gm, *given, **named)

    def run(prop: FakeTensorProp, node: Node) -> Any:
        if node not in traced:
            return run_node(prop, node)
        before = traced[node]
        if _untouched(node, before) and same.issuperset(node.all_input_nodes) and _keeps(node, before.value, prop):
            same.add(node)
            return before.value
        result = run_node(prop, node)
        if _gives_the_same(node, before):
            same.add(node)
        return result

    with (
        mock.patch.object(compile_fx, "_recursive_joint_graph_passes", joint_graph_passes),
        mock.patch.object(FakeTensorProp, "run_node", run),
    ):
        yield


def _state(node: Node) -> State:
    return State(node.target, node._args, node._kwargs, value(node))


def _untouched(node: Node, before: State) -> bool:
    """Whether nobody has set what a node calls, with what, or what it gives."""
    same_call = node.target in (before.target, MAY_VIEW.get(before.target))
    return same_call and node._args is before.args and node._kwargs is before.kwargs and value(node) is before.value


def _gives_the_same(node: Node, before: State) -> bool:
    """Whether what a node was found to give now is as it was traced; a weight has no value in a trace."""
    return (node.op == "get_attr" and before.value is None) or form(before.value) == form(value(node))


def _keeps(node: Node, known: Any, prop: FakeTensorProp) -> bool:
    """Whether an operation gives what it gave before, in memory of its own, or in that of its input."""
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        again = node.target is scan or (node.target is invoke_subgraph and node.args[1] in prop.seen_subgraphs)
        return known is not None and again
    if not isinstance(known, FakeTensor) or known.fake_mode is not prop._mode:
        return False
    if all(made.alias_info is None for made in node.target._schema.returns):
        return True
    (source,) = (prop.env[one] for one in node.all_input_nodes[:1])
    return isinstance(source, Tensor) and source.untyped_storage()._cdata == known.untyped_storage()._cdata
