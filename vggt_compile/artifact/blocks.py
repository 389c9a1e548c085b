"""Equal blocks in a library are one function: its code is made once, and called where each of them is.

Inductor's writer of C++ calls no sub-graphs. It writes those of loops and branches in place, in a scope of their own;
here the scope is the body of a lambda, which stands before the first call of `invoke_subgraph` on it. Operands are
handed over, so that the block frees what nobody else will read.

Before that Inductor evaluates all calls with fake tensors. Equal ones have a value together, but for weights, which
are no inputs in a library and come to it as they are: it knows no two calls equal that read such. They come as fakes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import EnterSubgraphLine, ExitSubgraphLine
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from vggt_compile.graph.dialect import value
from vggt_compile.graph.schemas import asked_once

TENSOR = "RAIIAtenTensorHandle"
LENT = """
static inline torch::aot_inductor::RAIIAtenTensorHandle lent(AtenTensorHandle tensor) {
    AtenTensorHandle handle;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors_out(tensor, &handle));
    return torch::aot_inductor::RAIIAtenTensorHandle(handle);
}
"""
"""A handle of its own for a tensor."""


@contextmanager
def called(gm: GraphModule) -> Iterator[None]:
    """A compile of a graph inside the block traces each sub-graph once, and writes calls of it."""
    known: set[str] = set()

    def codegen_invoke_subgraph(writer: Any, call: Any) -> None:
        graph = call.subgraph.graph
        if not known:
            writer.header.splice(LENT)
        if graph.name not in known:
            known.add(graph.name)
            _define(writer, graph)
        _call(writer, call)

    tracing = torch._guards.TracingContext(_mode(gm))  # where a trace keeps the sub-graphs that it has met
    with (
        mock.patch.object(CppWrapperCpu, "codegen_invoke_subgraph", codegen_invoke_subgraph),
        mock.patch.object(FakeTensorProp, "get_attr", _fake_weight),
        torch._guards.tracing(tracing),
        asked_once(),
    ):
        yield


def _mode(gm: GraphModule) -> FakeTensorMode:
    seen = (value(node) for node in gm.graph.find_nodes(op="placeholder"))
    mode: FakeTensorMode = next(x.fake_mode for x in seen if isinstance(x, FakeTensor))
    return mode


def _fake_weight(self: FakeTensorProp, target: Any, args: Any, kwargs: Any) -> Any:
    found = Interpreter.get_attr(self, target, args, kwargs)
    real = isinstance(found, Tensor) and not isinstance(found, FakeTensor)
    return self._mode.from_tensor(found, static_shapes=True) if real else found


def _define(writer: Any, graph: Any) -> None:
    around, results = V.graph, [f"{graph.name}_result_{index}" for index in range(len(graph.graph_outputs))]
    parameters = [f"{TENSOR} {name}" for name in _tensors(graph)] + [f"{TENSOR}& {name}" for name in results]
    writer.writeline(f"auto {graph.name} = [&]({', '.join(parameters)}) {{")
    writer.writeline(EnterSubgraphLine(writer, graph))
    writer.push_codegened_graph(graph)
    try:
        with V.set_graph_handler(graph):
            graph.codegen_subgraph(parent_graph=around)
            for name, output in zip(results, graph.graph_outputs, strict=True):
                writer.writeline(f"{name} = std::move({output.codegen_reference()});")
    finally:
        writer.pop_codegened_graph()
    writer.writeline(ExitSubgraphLine(writer))
    writer.writeline("};")


def _call(writer: Any, call: Any) -> None:
    """Operands as handles of their own; what is read here for the last time is then freed on this side."""
    graph, given = call.subgraph.graph, list[str]()
    for operand, wanted in zip(call.inputs, graph.graph_inputs.values(), strict=True):
        if isinstance(wanted, ir.TensorBox):
            lent = f"lent({operand.codegen_reference()})"
            if operand.get_name() in V.graph.constants:
                given.append(lent)  # nobody frees a weight: it needs no name, which is a fifth of what g++ has to do
                continue
            name = f"{call.get_name()}_operand_{len(given)}"
            writer.writeline(f"{TENSOR} {name} = {lent};")
            given.append(f"std::move({name})")
    results = [result.get_name() for result in call.outputs]
    for name in results:
        writer.writeline(f"{TENSOR} {name};")
    V.graph.scheduler.free_buffers()
    writer.writeline(f"{graph.name}({', '.join([*given, *results])});")


def _tensors(graph: Any) -> list[str]:
    """Inputs of a block that are no sizes: these it knows from the code around it."""
    return [name for name, wanted in graph.graph_inputs.items() if isinstance(wanted, ir.TensorBox)]
