"""Kernels that a compiler cannot take into its own code, as C++ for one program: what its artifact takes along."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vggt_compile.graph.dialect import value
from vggt_compile.ops import attention, hopper  # noqa: F401  # the operator that is looked for
from vggt_compile.ops.hopper_variant import variant
from vggt_compile.ops.operands import Operands

Functions = dict[torch._ops.OpOverload, list[str]]
"""C functions by the operators that they are, for `aot_inductor.custom_ops_to_c_shims`."""


def c_functions(gm: GraphModule) -> Functions:
    """The kernel for Hopper in the variants that a program may run; none where it runs none."""
    attentions = (x for x in _attentions(gm) if hopper.here(x.q.device))
    variants = dict.fromkeys(made_for for x in attentions if (made_for := variant(x)) is not None)
    if not variants:
        return {}
    from vggt_compile.ops.hopper_code_kernel import code  # Gluon may be missing where there is no GPU
    from vggt_compile.ops.hopper_launch import c_function

    return {torch.ops.vggt_compile.attention_hopper.default: [c_function(map(code, variants))]}


def _attentions(gm: GraphModule) -> Iterator[Operands]:
    """The operands of every attention of ours, sub-graphs included."""
    ours = torch.ops.vggt_compile.attention.default
    for part in gm.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            if node.target is ours:
                yield _operands(node)


def _operands(node: Node) -> Operands:
    """Of a call of `attention`, as fake values."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given |= dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    seen: dict[str, Any] = {name: map_arg(one, value) for name, one in given.items()}
    return Operands(**seen | {"scale": seen["scale"] or 1.0})
