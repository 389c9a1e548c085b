"""What a graph writes into, read off its operations, where torch runs or traces it to find out."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.scan import scan_op as scan
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node

from vggt_compile.graph.dialect import named_operands, value

RUN_SUBGRAPHS = (invoke_subgraph, scan)
"""Operators that do what their sub-graphs do, and nothing else."""
IN_PLACE = {name.strip("_") for name in dir(operator) if name.startswith("__i") and f"__{name[3:]}" in dir(operator)}
"""Of Python's operators: `iadd` beside `add`, and so on."""


def changes_no_input(gm: GraphModule) -> bool:
    """Whether a graph, with its sub-graphs, is seen to write into none of its inputs."""
    nodes = (node for part in gm.modules() if isinstance(part, GraphModule) for node in part.graph.nodes)
    return all(map(_writes_into_no_input, nodes))


def gives_new_tensors(gm: GraphModule) -> bool:
    """Whether each of a graph's results is seen to be a tensor in memory of its own."""
    made = [_made(node) for node in gm.graph.output_node().all_input_nodes]
    given: Any = gm.graph.output_node().args[0]
    return None not in made and len(set(made)) == len(made) == len(given)


def _writes_into_no_input(node: Node) -> bool:
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return all(map(_own, _written(node, node.target)))
    if isinstance(node.target, HigherOrderOperator):
        return node.target in RUN_SUBGRAPHS
    return _is_plain(node)


def _is_plain(node: Node) -> bool:
    """Whether a function, by torch's and Python's ways of naming such, writes into nothing."""
    name, owner = (getattr(node.target, key, "_") for key in ("__name__", "__module__"))
    if owner == operator.getitem.__module__:
        return name not in IN_PLACE | {"setitem", "delitem"}
    said = "out" in node.kwargs or node.kwargs.get("inplace") or any(one is True for one in node.args)
    return not said and not name.endswith("_")


def _written(node: Node, target: OpOverload) -> list[Any]:
    operands = named_operands(node)
    written = (one.name for one in target._schema.arguments if one.alias_info is not None and one.alias_info.is_write)
    return [operands[name] for name in written if name in operands]  # what is left out is none


def _own(node: Any) -> bool:
    """Whether a tensor, or what it is a view of, was made from nothing."""
    made = _made(node)
    return isinstance(made, Node) and not any(isinstance(value(one), Tensor) for one in made.all_input_nodes)


def _made(node: Any) -> Node | tuple[Node, Any] | None:
    """What has made the memory that a tensor is in, and which of its results it is; None where that is not seen."""
    if not isinstance(node, Node) or not isinstance(value(node), Tensor):
        return None
    if node.target is operator.getitem:
        source, index = node.args
        return (source, index) if isinstance(source, Node) and _makes(source) and isinstance(index, int) else None
    if not isinstance(node.target, OpOverload):
        return None
    if any(made.alias_info is not None for made in node.target._schema.returns):
        return _made(node.args[0])
    return node


def _makes(node: Node) -> bool:
    """Whether an operation gives several tensors in memory of their own."""
    if not isinstance(node.target, OpOverload) or not isinstance(value(node), tuple | list):
        return False
    return all(made.alias_info is None for made in node.target._schema.returns)
