"""The body of a loop is copied into the loop that Inductor makes of a scan, where it would be traced once more.

Inductor knows `while_loop` only, and traces a function that counts turns, takes slices, and runs the body of the scan.
What the body does stands in its graph already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._inductor.fx_passes import post_grad
from torch.fx import GraphModule, Node, Proxy
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree

from vggt_compile.graph.dialect import value
from vggt_compile.graph.symbols import form
from vggt_compile.graph.writes import gives_new_tensors


@contextmanager
def bodies_copied() -> Iterator[None]:
    """For one compile."""
    decompose = post_grad.decompose_scan_to_while_loop

    def decompose_scan_to_while_loop(gm: GraphModule) -> None:
        with ExitStack() as stack:
            for call in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan):
                reference: Any = call.args[0]
                body = getattr(gm, reference.target)
                stack.enter_context(mock.patch.object(body, "forward", _copying(body)))
            decompose(gm)

    with mock.patch.object(post_grad, "decompose_scan_to_while_loop", decompose_scan_to_while_loop):
        yield


def _copying(body: GraphModule) -> Callable[..., Any]:
    """What runs a graph, and in a trace writes its operations down, where they need no more than its inputs."""

    def run(*args: Any) -> Any:
        return type(body).forward(body, *args)  # looked up late: code of a graph may be written when it is first run

    def forward(*args: Any) -> Any:
        mode = get_proxy_mode()
        if mode is None or not _can_be_copied(body, args):
            return run(*args)
        tracer: Any = mode.tracer
        operands = [one.node if isinstance(one, Proxy) else one for one in map(tracer.unwrap_proxy, args)]
        if not all(isinstance(one, Node | int) for one in operands):
            return run(*args)
        at = dict(zip(_inputs(body), operands, strict=True))
        for node in _operations(body):
            at[node] = tracer.graph.node_copy(node, at.__getitem__)
        gives: Any = body.graph.output_node().args[0]
        return [_new(node, at[node], tracer) for node in gives]

    return forward


def _can_be_copied(body: GraphModule, args: tuple[Any, ...]) -> bool:
    """Whether a graph needs nothing but its inputs, is given what it was traced with, and gives tensors of its own."""
    alike = list(map(form, args)) == [form(value(node)) for node in _inputs(body)]
    return alike and all(node.op == "call_function" for node in _operations(body)) and gives_new_tensors(body)


def _inputs(body: GraphModule) -> list[Node]:
    return list(body.graph.find_nodes(op="placeholder"))


def _operations(body: GraphModule) -> list[Node]:
    return [node for node in body.graph.nodes if node.op not in ("placeholder", "output")]


def _new(like: Node, node: Node, tracer: Any) -> Any:
    """A tensor in memory of its own, which a trace knows by a node."""
    x = value(like)
    with disable_proxy_modes_tracing():
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    track_tensor_tree(made, Proxy(node, tracer), constant=None, tracer=tracer)
    return made
