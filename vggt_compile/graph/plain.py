"""An operation that writes over a value which nobody else sees gives the same as the plain one.

Plain operations can be told equal, and so be computed once.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vggt_compile.graph.dialect import Plainly, in_place, owns, plainly, value
from vggt_compile.graph.enclosing import parts
from vggt_compile.graph.symbols import form
from vggt_compile.graph.trial import among_fakes, tensors


def plain(gm: GraphModule) -> None:
    """Write `x.add_(y)` as `x + y` where that is the same, in the graph and in its sub-graphs."""
    for part in parts(gm):
        done: set[object] = set()
        place = {node: index for index, node in enumerate(part.gm.graph.nodes)}
        for node in place:
            instead, written = plainly(node) if in_place(node) else None, next(iter(node.args), None)
            if instead is None or not isinstance(written, Node):
                continue
            before = [user for user in written.users if place[user] < place[node]]
            later = [user for user in written.users if place[user] > place[node]]
            if _unseen(written, before, done) and _same(node, instead):
                node.target, node.kwargs = instead
                written.replace_all_uses_with(node, delete_user_cb=later.__contains__)
                done.add(node)
        if done:
            part.gm.recompile()


def _unseen(written: Node, before: list[Node], done: Container[object]) -> bool:
    """Whether a value has memory of its own, be it as `done` have it by now, and nobody who has read it shares that."""
    return (written in done or owns(written)) and not any(_may_share(user) for user in before)


def _may_share(node: Node) -> bool:
    return bool(tensors(value(node))) and not owns(node)


def _same(node: Node, instead: Plainly) -> bool:
    """Whether the plain operation gives the dtype, sizes and strides of what is written over.

    Of a trace of Dynamo this holds with autocast and without, as who calls the graph may switch it on.
    """
    args: Any
    args, kwargs = map_arg((node.args, instead.kwargs), value)
    if not isinstance(args[0], Tensor):
        return False
    device = args[0].device.type
    with among_fakes([value(source) for source in node.all_input_nodes]):
        for autocast in (False,) if isinstance(node.target, OpOverload) else (False, True):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                if form(instead(*args, **kwargs)) != form(args[0]):
                    return False
    return True
