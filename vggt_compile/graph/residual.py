"""The residual connection around an attention: what comes of it is added to the tokens that it came from.

Followed from the attention alone: through steps with one reader each, to the first sum with a tensor of its shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from vggt_compile.graph import dialect
from vggt_compile.graph.symbols import equal, size_of
from vggt_compile.site import Site, Skip


@dataclass(frozen=True)
class Residual:
    """`total` = `stream` + `update`, all nodes of [B, N, C]; stream are the tokens before the attention."""

    stream: Node
    update: Node
    total: Node


def residual_around(site: Site) -> Residual | Skip:
    """The residual connection of a site."""
    node = site.call.node
    while True:
        users = dialect.tensor_users(node)
        if len(users) != 1 or users[0].op == "output":
            return Skip("no residual connection follows its attention")
        terms = dialect.addition(users[0])
        if terms is not None and terms[0] is not terms[1]:
            other = terms[1] if terms[0] is node else terms[0]
            if _shape(other) == _shape(node):
                return _checked(site, Residual(other, node, users[0]))
        node = users[0]


def _checked(site: Site, found: Residual) -> Residual | Skip:
    shape = _shape(found.stream)
    if len(shape) == 3 and equal(shape[0], site.batch) and equal(shape[1], site.tokens):
        return found
    return Skip("its residual connection is not of [batch, tokens, width]")


def _shape(node: Node) -> list:
    return [size_of(size) for size in dialect.value(node).shape]
