"""What AOTAutograd knows of an operation is kept where nothing about it has changed.

After its first passes Inductor evaluates all of a graph with fake tensors, since a pass may have given an operation
other inputs. Most are as they were: those keep the values that they were traced with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
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

State = tuple[Any, tuple[Any, ...], dict[str, Any]]
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
        untouched = node in traced and _untouched(node, traced[node])
        known = value(node)
        if untouched and same.issuperset(node.all_input_nodes) and _keeps(node, known, prop):
            same.add(node)
            return known
        result = run_node(prop, node)
        if untouched and ((node.op == "get_attr" and known is None) or form(known) == form(value(node))):
            same.add(node)
        return result

    with (
        mock.patch.object(compile_fx, "_recursive_joint_graph_passes", joint_graph_passes),
        mock.patch.object(FakeTensorProp, "run_node", run),
    ):
        yield


def _state(node: Node) -> State:
    return node.target, node._args, node._kwargs


def _untouched(node: Node, before: State) -> bool:
    """Whether nobody has set what a node calls, or with what."""
    target, args, kwargs = before
    return node.target in (target, MAY_VIEW.get(target)) and node._args is args and node._kwargs is kwargs


def _keeps(node: Node, known: Any, prop: FakeTensorProp) -> bool:
    """Whether an operation gives what it gave before, in memory of its own, or in that of its input."""
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return node.target is scan or (node.target is invoke_subgraph and node.args[1] in prop.seen_subgraphs)
    if not isinstance(known, FakeTensor) or known.fake_mode is not prop._mode:
        return False
    if all(made.alias_info is None for made in node.target._schema.returns):
        return True
    (source,) = (prop.env[one] for one in node.all_input_nodes[:1])
    return isinstance(source, Tensor) and source.untyped_storage()._cdata == known.untyped_storage()._cdata
