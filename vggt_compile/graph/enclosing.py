"""What is around an operation: the graph that it is in, calls of that, regions of autocast and of grad mode.

A trace of Dynamo opens and closes regions by nodes; an export makes most of them graphs of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch.fx import GraphModule, Node


class Autocast(NamedTuple):
    """Arguments of torch.autocast, in its order."""

    device: str
    dtype: torch.dtype | None
    enabled: bool
    cache: bool | None


class Enclosure(NamedTuple):
    """A call of a region that an export made a graph of its own; `autocast` is None where it is of grad mode."""

    autocast: Autocast | None
    body: Node
    operands: tuple[Any, ...]


@dataclass(frozen=True)
class Part:
    """A graph or one of its sub-graphs, the number of calls that share it, and the autocast regions around it."""

    gm: GraphModule
    calls: int = 1
    autocast: tuple[Autocast, ...] = ()


def parts(gm: GraphModule) -> Iterator[Part]:
    """The graph and its sub-graphs: autocast regions of an export, regions that several calls share."""
    yield Part(gm)
    uses: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(gm, str(node.target), None), GraphModule):
            uses.setdefault(str(node.target), []).extend(node.users)
    for name, calls in uses.items():
        around = autocast_at(calls[0]) if calls else ()
        region = enclosure(calls[0]) if calls else None
        if region is not None and region.autocast is not None:
            around = (*around, region.autocast)
        for inner in parts(getattr(gm, name)):
            yield Part(inner.gm, len(calls) * inner.calls, (*around, *inner.autocast))


def enclosure(node: Node) -> Enclosure | None:
    """The region that a node runs."""
    args: Any = node.args
    if node.target is wrap_with_autocast:
        return Enclosure(Autocast(*args[:4]), args[4], args[5:])
    if node.target is wrap_with_set_grad_enabled:
        return Enclosure(None, args[1], args[2:])
    return None


def autocast_at(node: Node) -> tuple[Autocast, ...]:
    """The autocast regions that the graph opens before a node and closes after it, outermost first."""
    return autocasts(node.graph)[node]


def autocasts(graph: torch.fx.Graph) -> dict[Node, tuple[Autocast, ...]]:
    """`autocast_at` of every node."""
    opened: dict[Node, Autocast] = {}
    found = {}
    for node in graph.nodes:
        found[node] = tuple(opened.values())
        if node.target is torch.amp.autocast_mode._enter_autocast:
            opened[node] = Autocast(*node.args)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            opened.pop(node.args[0], None)
    return found


def switches_autocast(node: Node) -> bool:
    """Whether the node opens or closes an autocast region."""
    return node.target in (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
