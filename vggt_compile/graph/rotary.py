"""Rotary embeddings that a trace holds as one operation become the operations that they stand for.

Passes then see them: angles that all layers share, keys that are taken before they turn. Fake values of equal calls are
found once, so that 96 of them cost little.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from vggt_compile.graph import dialect
from vggt_compile.graph.dialect import value
from vggt_compile.graph.edit import Editor


def expand_rotations(graph: Graph, edit: Editor) -> None:
    for node in list(graph.nodes):
        if dialect.operation(node) == "vggt_compile.rotate":
            with edit.before(node):
                edit.replace(node, _written_out(*node.args, edit=edit))


def _written_out(tokens: Node, positions: Node, base: float, *, edit: Editor) -> Node:
    """`vggt_compile.ops.rotate.rotate`, operation for operation."""
    half = value(tokens).shape[-1] // 2
    count = edit.cast(edit.call(torch.arange, 0, half, 2, device=value(tokens).device), torch.float32)
    powers = edit.call(operator.pow, base, edit.call(operator.truediv, count, half))
    frequency = edit.call(operator.truediv, 1.0, powers)
    places = edit.cast(edit.call(operator.getitem, positions, (..., None)), torch.float32)
    angle = edit.cast(edit.call(operator.mul, places, frequency), value(tokens).dtype)
    angle = edit.call(operator.getitem, angle, (slice(None), None))
    angle = edit.call(torch.cat, (angle, angle), -1)
    cos, sin = edit.call(torch.cos, angle), edit.call(torch.sin, angle)
    axes = edit.call(torch.unflatten, tokens, -1, (2, half))
    parts = edit.call(torch.chunk, axes, 2, -1)
    first, second = (edit.call(operator.getitem, parts, index) for index in (0, 1))
    turned = edit.call(torch.cat, (edit.call(torch.neg, second), first), -1)
    sum_ = edit.call(operator.add, edit.call(operator.mul, axes, cos), edit.call(operator.mul, turned, sin))
    return edit.call(torch.flatten, sum_, -2)
