"""An operation that writes over a value which nobody else sees gives the same as the plain one.

Plain operations can be told equal, and so be computed once.
"""

from __future__ import annotations

from collections.abc import Container
from typing import cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vggt_compile.graph.dialect import in_place, owns, value
from vggt_compile.graph.enclosing import parts
from vggt_compile.graph.symbols import form
from vggt_compile.graph.trial import among_fakes


def plain(gm: GraphModule) -> None:
    """Write `x.add_(y)` as `x + y` where that is the same, in the graph and in its sub-graphs."""
    for part in parts(gm):
        done: set[object] = set()
        for node in part.gm.graph.nodes:
            target = _counterpart(node) if node.op == "call_function" and in_place(node) else None
            if target is not None and _unseen(node, done) and _same(node, target):
                node.target = target
                done.add(node)
        part.gm.recompile()


def _counterpart(node: Node) -> OpOverload | None:
    """The operation of the same name and arguments that writes over nothing."""
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    packet = getattr(torch.ops.aten, target.overloadpacket.__name__.removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    if found is None or found._schema.is_mutable:
        return None
    takes, took = ([argument.name for argument in one._schema.arguments] for one in (found, target))
    return found if takes == took else None


def _unseen(node: Node, done: Container[object]) -> bool:
    """Whether only this node reads what it writes over, and nothing shares its memory; plain by now, `done` do not."""
    first, target = node.args[0], cast(OpOverload, node.target)
    written = [argument.name for argument in target._schema.arguments if argument.is_write]
    return len(written) == 1 and isinstance(first, Node) and len(first.users) == 1 and (first in done or owns(first))


def _same(node: Node, target: OpOverload) -> bool:
    """Whether the plain operation gives the dtype, sizes and strides of what is written over."""
    operands = [value(source) for source in node.all_input_nodes]
    args, kwargs = map_arg((node.args, dict(node.kwargs)), value)
    if not isinstance(args[0], Tensor):
        return False
    with among_fakes(operands):
        return form(target(*args, **kwargs)) == form(args[0])
