"""Modules that are alike are traced once: an export copies for the others what it wrote for the first.

A trace runs each module with fake tensors, which took it 6 of 17 seconds for the 72 blocks of VGGT-1B on a CPU; they
differ in the values of their weights, which no trace reads. What is copied are nodes, with other inputs, weights and
module paths. A module is traced as ever where anything else could be another: see `Call.of` and `Trace.may_be_copied`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import Node, Proxy
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer, disable_proxy_modes_tracing, get_proxy_slot
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from vggt_compile.artifact.likeness import PLAIN, described, likeness, weights

Forward = Callable[..., Any]


@contextmanager
def traced_once(model: nn.Module) -> Iterator[Known]:
    """Exports of the model inside the block trace members of its lists once where they are alike."""
    known = Known()
    with ExitStack() as stack:
        for cls in _classes_of_members(model):
            stack.enter_context(mock.patch.object(cls, "forward", known.copying(vars(cls)["forward"])))
        yield known


def _classes_of_members(model: nn.Module) -> set[type]:
    """Where the code of modules is that stand in lists, and are made of others; none of torch's own."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential))
    members = {type(child) for one in lists for child in one.children() if any(child.children())}
    owners = {next(base for base in cls.__mro__ if "forward" in vars(base)) for cls in members}
    return {owner for owner in owners if not owner.__module__.startswith("torch.")}


class Known:
    """What was traced.

    Attributes:
        copied: paths of the modules whose operations were copied.
    """

    def __init__(self) -> None:
        self._traces: dict[Hashable, Trace] = {}
        self.copied: list[str] = []

    def copying(self, original: Forward) -> Forward:
        """The forward of a class, which copies where it can."""

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                return original(module, *args, **kwargs)  # the body of a loop
            call = Call.of(original, module, args, kwargs)
            if call is None:
                return original(module, *args, **kwargs)
            if call.key in self._traces:
                self.copied.append(call.path)
                return self._traces[call.key].repeated(call)
            return self._traced(call, original, module, args, kwargs)

        return forward

    def _traced(self, call: Call, original: Forward, module: nn.Module, args: Any, kwargs: Any) -> Any:
        graph, calls = call.tracer.graph, dict(call.tracer.num_calls)
        before = graph._root.prev
        result = original(module, *args, **kwargs)
        leaves, spec = tree_flatten(result)
        nodes = list(_after(before, graph._root))
        made_by = [_node(leaf, call.tracer) if isinstance(leaf, Tensor) else None for leaf in leaves]
        trace = Trace(call, calls, nodes, leaves, made_by, spec)
        if trace.may_be_copied() and likeness(_base(module)) == call.seen:
            self._traces[call.key] = trace
        return result


@dataclass(frozen=True)
class Call:
    """A call of a module while an export traces.

    Attributes:
        key: equal for calls that give the same nodes but for their operands and paths.
        around: the modules that are being called, this one last, by path and call.
        operands: nodes of inputs and weights.
        tensors: inputs and weights, of which operands are the nodes.
        seen: the module as its code sees it.
    """

    key: Hashable
    tracer: Any
    path: str
    around: dict[str, tuple[str, str]]
    operands: list[Node]
    tensors: list[Tensor]
    seen: Hashable

    @staticmethod
    def of(code: Forward, module: nn.Module, args: Any, kwargs: Any) -> Call | None:
        """None outside of a trace, and where an input is neither plain nor a tensor that the trace knows."""
        mode = proxy_tensor.get_proxy_mode()
        if mode is None or not isinstance(mode.tracer, _ModuleStackTracer):
            return None
        leaves, spec = tree_flatten((args, kwargs))
        if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
            return None
        base = _base(module)
        tensors = [*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *weights(base)]
        operands = [node for tensor in tensors if (node := _node(tensor, mode.tracer)) is not None]
        if len(operands) < len(tensors):
            return None
        seen = likeness(base)
        given = tuple(described(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)
        shared = tuple(map(operands.index, operands))
        key = (code, seen, spec, given, shared, _switches())
        path = mode.tracer.path_of_module(module)
        return Call(key, mode.tracer, path, _around(mode.tracer), operands, tensors, seen)


@dataclass(frozen=True)
class Trace:
    """What a call wrote.

    Attributes:
        calls: how often each module was called before, by path.
        nodes: what was written, in order.
        results: the leaves of what came out, and `spec` their nest.
        made_by: the node of each leaf that is a tensor; later a trace may know another one for it.
    """

    call: Call
    calls: dict[str, int]
    nodes: list[Node]
    results: list[Any]
    made_by: list[Node | None]
    spec: TreeSpec

    def may_be_copied(self) -> bool:
        """Whether nodes depend on nothing but operands and sizes, and give new tensors."""
        own = {*self.nodes, *self.call.operands}
        outer = {node for one in self.nodes for node in one.all_input_nodes} - own
        return (
            all(node.op == "call_function" and not free_unbacked_symbols(node.meta.get("val")) for node in self.nodes)
            and not any(isinstance(node.meta.get("val"), Tensor) for node in outer)
            and self._gives_new_tensors()
        )

    def _gives_new_tensors(self) -> bool:
        tensors = [leaf for leaf in self.results if isinstance(leaf, Tensor)]
        makers = [node for node in self.made_by if node is not None]
        storages = [tensor.untyped_storage()._cdata for tensor in (*tensors, *self.call.tensors)]
        return (
            all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in self.results)
            and len(makers) == len(tensors)
            and {*makers} <= {*self.nodes}
            and all(not tensor.requires_grad and tensor.storage_offset() == 0 for tensor in tensors)
            and len({*storages[: len(tensors)]} - {*storages[len(tensors) :]}) == len(tensors)
        )

    def repeated(self, call: Call) -> Any:
        """The same nodes for another call, and new tensors as its results."""
        tracer, place = call.tracer, Place(self, call)
        at = dict(zip(self.call.operands, call.operands, strict=True))
        for node in self.nodes:
            at[node] = tracer.graph.node_copy(node, lambda operand: at.get(operand, operand))
            at[node].meta = {**node.meta, "nn_module_stack": place.stack(node)}
        results = zip(self.results, self.made_by, strict=True)
        made = [leaf if node is None else _new(leaf, at[node], tracer) for leaf, node in results]
        return tree_unflatten(made, self.spec)


class Place:
    """Where the copied nodes of a trace are: modules by path, and which of their calls it is."""

    def __init__(self, trace: Trace, call: Call) -> None:
        self._first, self._call, self._before = trace.call, call, trace.calls
        self._calls = dict(call.tracer.num_calls)

    def stack(self, node: Node) -> dict[str, tuple[str, str]]:
        """The modules around a node, outermost first, as a trace would have written them."""
        inside = list(node.meta["nn_module_stack"].items())[len(self._first.around) :]
        return self._call.around | dict(self._entry(*entry) for entry in inside)

    def _entry(self, key: str, entry: tuple[str, str]) -> tuple[str, tuple[str, str]]:
        """A module that is called inside: its path here, and the number of this call, which the trace then knows of."""
        path, cls = entry
        here = self._path(path)
        nth = int(key[len(path) + 1 :] or 0) - self._before.get(path, 0) + self._calls.get(here, 0)
        self._call.tracer.num_calls[here] = max(nth + 1, self._call.tracer.num_calls.get(here, 0))
        return f"{here}@{nth}" if nth else here, (here, cls)

    def _path(self, path: str) -> str:
        inside = path.startswith(self._first.path + ".")
        return self._call.path + path[len(self._first.path) :] if inside else path


def _after(node: Node, end: Node) -> Iterator[Node]:
    while (node := node.next) is not end:
        yield node


def _node(tensor: Tensor, tracer: Any) -> Node | None:
    """What a trace wrote for a tensor; None where it does not know it."""
    slot: Any = get_proxy_slot(tensor, tracer, None)
    return None if slot is None else slot.proxy.node


def _new(like: Tensor, node: Node, tracer: Any) -> Tensor:
    """A tensor in memory of its own, which a trace knows by a node."""
    with disable_proxy_modes_tracing():
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    proxy_tensor.track_tensor_tree(made, Proxy(node, tracer), constant=None, tracer=tracer)
    return made


def _base(module: Any) -> nn.Module:
    """A module itself, where a trace has put something before it that remembers a path."""
    proxied: Any = proxy_tensor._AttrProxy
    base: nn.Module = module.get_base() if isinstance(module, proxied) else module
    return base


def _around(tracer: Any) -> dict[str, tuple[str, str]]:
    named = tracer.module_stack.items()
    return {
        key: (path, cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}")
        for key, (path, cls) in named
    }


def _switches() -> Hashable:
    """What of torch's state a trace depends on, and code may change while it goes on."""
    cast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), cast
