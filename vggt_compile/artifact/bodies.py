"""Bodies of loops in an export: traced as the rest of the model is, and copied where torch would trace them again.

Outside of `torch.compile`, torch's `scan` has Dynamo trace the body, to have all that it reads as operands: a third of
the trace of VGGT-1B. Here the tracer that is at work does it, and what it could not know stands in the body's graph as
a constant, which becomes an operand.

Inductor makes another loop of a scan, `while_loop`, for which it traces a function that counts turns, takes slices, and
runs the body. What the body does stands in its graph already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import SymInt, Tensor, nn
from torch._higher_order_ops.scan import scan, scan_op
from torch._higher_order_ops.utils import reenter_make_fx
from torch._inductor.fx_passes import post_grad
from torch.fx import GraphModule, Node, Proxy
from torch.fx.experimental.proxy_tensor import (
    _AttrProxy,
    _ModuleStackTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from vggt_compile.families import frame_loop
from vggt_compile.graph.dialect import value
from vggt_compile.graph.symbols import form
from vggt_compile.graph.writes import gives_new_tensors

log = logging.getLogger(__name__)

Turn = Callable[[Tensor, Tensor], tuple[Tensor, Any]]


@contextmanager
def traced_directly() -> Iterator[None]:
    """For one export."""
    with mock.patch.object(frame_loop, "scan", _scan):
        yield


@contextmanager
def copied() -> Iterator[None]:
    """For one compile."""
    decompose = post_grad.decompose_scan_to_while_loop

    def decompose_scan_to_while_loop(gm: GraphModule) -> None:
        with ExitStack() as stack:
            for call in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan):
                reference: Any = call.args[0]
                stack.enter_context(_copying(getattr(gm, reference.target)))
            decompose(gm)

    with mock.patch.object(post_grad, "decompose_scan_to_while_loop", decompose_scan_to_while_loop):
        yield


def _scan(turn: Turn, init: Tensor, xs: Tensor) -> tuple[Tensor, Any]:
    """As torch's `scan`, for one tensor that is carried and one that is sliced."""
    mode = get_proxy_mode()
    if mode is not None and not torch.compiler.is_dynamo_compiling():
        sizes = _sizes(mode.tracer, turn)
        try:
            body, spec = _body(mode.tracer, turn, init, xs, sizes)
        except RuntimeError as error:  # the code of the body may know a size in a way that a trace of it does not
            log.info("the body of a loop is traced by Dynamo: %s", error)
        else:
            read = _read(body)
            with _copying(body):
                carried, *leaves = scan_op(body, [init], [xs], (*sizes, *read))
            return carried, tree_unflatten(leaves, spec)
    carried, parts = scan(turn, init, xs)
    return carried, parts


def _sizes(tracer: Any, turn: Turn) -> list[SymInt]:
    """Symbols, of which a trace of the body can compute all other sizes, and those that its code knows already."""
    symbols = [known.value for size, known in tracer.sympy_expr_tracker.items() if size.is_Symbol]
    computed = [cell.cell_contents for cell in getattr(turn, "__closure__", None) or ()]
    sizes = [*symbols, *(size for size in computed if isinstance(size, SymInt) and not size.node.expr.is_Symbol)]
    return [size for size in sizes if not free_unbacked_symbols(size)]


def _body(tracer: Any, turn: Turn, init: Tensor, xs: Tensor, sizes: list[SymInt]) -> tuple[GraphModule, TreeSpec]:
    specs: list[TreeSpec] = []

    def flat(carried: Tensor, one: Tensor, *sizes: SymInt) -> list[Any]:
        carried, made = turn(carried, one)
        leaves, spec = tree_flatten(made)
        specs.append(spec)
        return [carried, *leaves]

    with _paths_of(tracer), disable_proxy_modes_tracing():
        body: GraphModule = reenter_make_fx(flat)(init.clone(), xs[0].clone(), *sizes)
    return body, specs[-1]


@contextmanager
def _paths_of(outer: Any) -> Iterator[None]:
    """Traces inside the block know where modules are that another one has wrapped."""
    path_of_module = _ModuleStackTracer.path_of_module

    def path(tracer: Any, module: nn.Module) -> str:
        wrapped = isinstance(module, _AttrProxy) and module not in tracer.proxy_paths
        return path_of_module(outer if wrapped else tracer, module)

    with mock.patch.object(_ModuleStackTracer, "path_of_module", path):
        yield


def _read(body: GraphModule) -> list[Tensor]:
    """Tensors that a body reads beside its inputs, which become the last of these."""
    given, operands = list[Tensor](), list[Node]()
    last = _inputs(body)[-1]
    for node in body.graph.find_nodes(op="get_attr"):
        tensor = getattr(body, node.target)
        at = next((index for index, one in enumerate(given) if one is tensor), len(given))
        if at == len(given):
            with body.graph.inserting_after(last):
                last = body.graph.placeholder(f"read_{at}")
            last.meta["val"] = tensor
            given.append(tensor)
            operands.append(last)
        node.replace_all_uses_with(operands[at])
        body.graph.erase_node(node)
    body.recompile()
    return given


@contextmanager
def _copying(body: GraphModule) -> Iterator[None]:
    """Traces inside the block write down the operations of a graph that they run, where these need only its inputs."""

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

    with mock.patch.object(body, "forward", forward):
        yield


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
