"""The calls of `attention` in a graph, as the operands that they have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vggt_compile.graph.dialect import named_operands, value
from vggt_compile.ops import attention  # noqa: F401  # the operator that is looked for
from vggt_compile.ops.operands import Operands


def attentions(gm: GraphModule) -> Iterator[Operands]:
    """Fake operands of every attention of ours, sub-graphs included."""
    ours = torch.ops.vggt_compile.attention.default
    for part in gm.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            if node.target is ours:
                yield _operands(node)


def _operands(node: Node) -> Operands:
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    usual = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    seen: dict[str, Any] = {name: map_arg(one, value) for name, one in (usual | named_operands(node)).items()}
    return Operands(**seen | {"scale": seen["scale"] or 1.0})
