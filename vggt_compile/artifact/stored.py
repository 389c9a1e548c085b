"""Weights are stored as a graph reads them: rounded where it rounds them, channels last where it convolves with them.

A library that rounds or lays out a weight does so at each call, in a loop at each turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from vggt_compile.graph.dialect import named_operands, value
from vggt_compile.graph.loops import loops
from vggt_compile.graph.views import copy_what_cannot_be_viewed

aten = torch.ops.aten

CASTS = aten.to.dtype, aten._to_copy.default
CONVOLUTIONS = aten.conv2d.default, aten.conv2d.padding, aten.conv_transpose2d.input, aten.convolution.default


class Read(NamedTuple):
    """An operation, and by which node of its graph it knows a weight."""

    by: Node
    weight: Node


def store_rounded(gm: GraphModule) -> None:
    """Keep in bf16 the weights that a graph reads in bf16 only: the same numbers in half the memory."""
    for name, nodes in _weights(gm).items():
        casts = [user for node in nodes for user in node.users]
        if not casts or not all(map(_rounds, casts)):
            continue
        _replace(gm, name, _attribute(gm, name).to(torch.bfloat16))
        for cast in casts:
            node = cast.args[0]
            assert isinstance(node, Node)
            node.meta["val"] = value(cast)
            cast.replace_all_uses_with(node)
            gm.graph.erase_node(cast)
    gm.graph.lint()
    gm.recompile()


def store_channels_last(gm: GraphModule) -> None:
    """Lay out the weights of convolutions as `model.to(memory_format=torch.channels_last)` would: the same numbers.

    What a convolution gives is laid out as its weight is. GPUs have kernels for this order, and copy what comes in the
    other one. Inductor chooses it by itself, but not where a number of images is a symbol. Convolutions with groups
    keep their weights, since some of these are slower so.
    """
    laid_out = False
    for name, nodes in _weights(gm).items():
        tensor, reads = _attribute(gm, name), [read for node in nodes for read in _reads(gm, node)]
        if tensor.dim() == 4 and reads and all(_convolves(*read) for read in reads):
            _replace(gm, name, channels_last(tensor))
            for node in {*nodes, *(read.weight for read in reads)}:
                node.meta["val"] = channels_last(value(node))
            laid_out = True
    if laid_out:
        copy_what_cannot_be_viewed(gm)


def channels_last(x: Tensor) -> Tensor:
    """A tensor `[A, B, H, W]` with strides that no other order has, also where H and W are 1."""
    _, b, h, w = x.shape
    return x.new_empty_strided(x.shape, (b * h * w, 1, w * b, b)).copy_(x)


def _weights(gm: GraphModule) -> dict[str, list[Node]]:
    """The nodes of each tensor that a graph has as an attribute, by its name."""
    found: dict[str, list[Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(_attribute(gm, node.target), Tensor):
            found.setdefault(node.target, []).append(node)
    return found


def _attribute(gm: GraphModule, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(gm.get_submodule(owner), last)


def _replace(gm: GraphModule, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = gm.get_submodule(owner)
    delattr(module, last)
    module.register_parameter(last, nn.Parameter(tensor.detach(), requires_grad=False))  # AOTInductor copies buffers


def _rounds(node: Node) -> bool:
    """Whether a node is its first argument in bf16."""
    dtype = node.args[1] if len(node.args) > 1 else node.kwargs.get("dtype")
    return node.target in CASTS and dtype == torch.bfloat16


def _reads(gm: GraphModule, weight: Node) -> Iterator[Read]:
    """Who reads a weight as it is or cast, here and in loops that get it at every turn."""
    inside = {loop.call: loop for loop in loops(gm)}
    for user in weight.users:
        loop = inside.get(user)
        if loop is not None and weight not in (*loop.operands[0], *loop.operands[1]):
            for operand, given in zip(loop.operands[2], loop.inputs[2], strict=True):
                if operand is weight:
                    yield from _reads(loop.body, given)
        elif user.target in CASTS:
            yield from _reads(gm, user)
        else:
            yield Read(user, weight)


def _convolves(node: Node, weight: Node) -> bool:
    """Whether a node is a convolution without groups, by this weight."""
    if node.target not in CONVOLUTIONS:
        return False
    operands = named_operands(node)
    reads = [name for name, operand in operands.items() if operand is weight]
    return reads == ["weight"] and operands.get("groups", 1) == 1
