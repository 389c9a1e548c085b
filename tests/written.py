"""What a graph says, to be compared: names of nodes are numbers, addresses are left out."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vggt_compile.graph.dialect import value


def written(gm: GraphModule, modules: bool = False) -> list[Any]:
    """Each operation of a graph and of its sub-graphs, with what it gives; and in which modules, if that is asked."""
    parts = [part for part in gm.modules() if isinstance(part, GraphModule)]
    return [line for part in parts for line in _lines(part, modules)]


def _lines(gm: GraphModule, modules: bool) -> list[Any]:
    number = {node: f"%{index}" for index, node in enumerate(gm.graph.nodes)}
    return [(*_line(node, number), *([node.meta.get("nn_module_stack")] if modules else [])) for node in gm.graph.nodes]


def _line(node: Node, number: dict[Node, str]) -> tuple[str, ...]:
    called = "" if node.op in ("placeholder", "get_attr") else str(node.target)
    operands = str(map_arg((node.args, node.kwargs), number.get))
    return node.op, re.sub("0x[0-9a-f]+", "", called), operands, str(_seen(value(node)))


def _seen(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return tuple(map(_seen, x))
    if isinstance(x, Tensor):
        return tuple(map(str, x.shape)), x.dtype, tuple(map(str, x.stride())), x.device.type
    return x
