"""What a graph writes into is read off it only where that is all there is to know."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from operator import getitem
from typing import Any
from unittest import mock

import pytest
import torch
from alternating import build
from framed import SPEC
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves
from written import written

from vggt_compile.artifact import unchanged
from vggt_compile.artifact.program import program
from vggt_compile.artifact.request import Span
from vggt_compile.plan import Plan

CPU = torch.device("cpu")


class Runs(nn.Module):
    def __init__(self, code: Callable[..., Any]) -> None:
        super().__init__()
        self.code, self.linear = code, nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        made = self.code(self, x)
        return made if isinstance(made, tuple) else (made,)


def graph(code: Callable[..., Any]) -> GraphModule:
    """As an export has it before AOTAutograd: with writes, for any number of rows."""
    with torch.no_grad():
        traced = torch.export.export(Runs(code).eval(), (torch.rand(3, 4),), dynamic_shapes=({0: Dim("rows")},))
    return traced.module(check_guards=False)


def captured(gm: GraphModule, told: bool) -> tuple[list[Any], str, int]:
    """What AOTAutograd makes of a graph, what it says of it, and how often it ran the graph."""
    (example,) = (node.meta["val"] for node in gm.graph.find_nodes(op="placeholder"))
    runs = mock.Mock(side_effect=PropagateUnbackedSymInts.run_node)
    with (
        unchanged.read_off() if told else nullcontext(),
        mock.patch.object(PropagateUnbackedSymInts, "run_node", lambda self, node: runs(self, node)),
        torch.no_grad(),
    ):
        made, signature = aot_export_module(gm, (example,), trace_joint=False)
    return written(made), str(signature), runs.call_count


def check(gm: GraphModule, told: bool) -> None:
    made, signature, runs = captured(gm, told=True)
    plain, known, both_runs = captured(gm, told=False)
    assert made == plain
    assert signature == known
    assert (runs < both_runs) == told


def _fills_its_own(model: Runs, x: Tensor) -> Tensor:
    made = torch.zeros(2, 4)
    made[1:].copy_(x[:1])
    return made * 2


@pytest.mark.parametrize(
    "code",
    [
        lambda model, x: model.linear(x),
        lambda model, x: (x, model.linear(x), x),
        lambda model, x: (x * 2).reshape(-1)[:3],
        lambda model, x: torch.split(model.linear(x), 2, -1),
        lambda model, x: torch.ones(x.shape[0], 4).add_(x),
        _fills_its_own,
    ],
    ids=["plain", "input", "view", "split", "ones", "fills"],
)
def test_graphs_that_write_into_nothing_are_not_run(code: Callable[..., Any]) -> None:
    check(graph(code), told=True)


@pytest.mark.parametrize(
    "code",
    [
        lambda model, x: x.add_(1),
        lambda model, x: x[:, 1:].mul_(2),
        lambda model, x: model.count.add_(x.sum(0)) * 1,
        lambda model, x: model.linear(x).relu_() + 1,
        lambda model, x: (model.linear(x), model.count),
        lambda model, x: x.reshape(-1).zero_() + 1,
    ],
    ids=["input", "view", "buffer", "made", "hands-on", "reshaped"],
)
def test_graphs_that_may_write_are_run_as_ever(code: Callable[..., Any]) -> None:
    check(graph(code), told=False)


@pytest.mark.parametrize("target", ["torch.relu_(x)", "x.relu_()", "torch.add(x, 1, out=x)", "module(x)"])
def test_code_of_torch_that_writes_is_known_by_its_name(target: str) -> None:
    root = torch.fx.Graph()
    x = root.placeholder("x")
    x.meta["val"] = torch.zeros(2)
    made = {
        "torch.relu_(x)": lambda: root.call_function(torch.relu_, (x,)),
        "x.relu_()": lambda: root.call_method("relu_", (x,)),
        "torch.add(x, 1, out=x)": lambda: root.call_function(torch.add, (x, 1), {"out": x}),
        "module(x)": lambda: root.call_module("module", (x,)),
    }[target]()
    made.meta["val"] = torch.zeros(2)
    root.output((made,))
    assert unchanged.results(GraphModule({"module": nn.Identity()}, root), (torch.zeros(2),)) is None


def _calling(operator: Any, body: Callable[[Tensor], Tensor]) -> GraphModule:
    """A graph that hands its input to a sub-graph."""
    inner = make_fx(body)(torch.zeros(2))
    root = Graph()
    x = root.placeholder("x")
    made = root.call_function(operator, (root.get_attr("inner"), "inner", x))
    got = root.call_function(getitem, (made, 0))
    with FakeTensorMode() as mode:
        x.meta["val"] = got.meta["val"] = torch.zeros(2)
    root.output((got,))
    gm = GraphModule({"inner": inner}, root)
    gm.meta["mode"] = mode
    return gm


@pytest.mark.parametrize(
    ("operator", "body", "told"),
    [
        (torch.ops.higher_order.invoke_subgraph, lambda x: x + 1, True),
        (torch.ops.higher_order.invoke_subgraph, lambda x: x.add_(1), False),
        (torch.ops.higher_order.with_effects, lambda x: x + 1, False),
    ],
    ids=["adds", "writes", "unknown"],
)
def test_sub_graphs_are_looked_into(operator: Any, body: Callable[[Tensor], Tensor], told: bool) -> None:
    gm = _calling(operator, body)
    with gm.meta["mode"]:
        assert (unchanged.results(gm, (torch.zeros(2),)) is not None) == told


def test_the_graph_of_a_plan_is_not_run() -> None:
    blocks = {"method": "predict", "q_block": 16, "k_block": 16}
    plan = Plan.read({"layers": {"0": {"scope": "frame"}, "1": {"keys": "grid", "blocks": blocks}}})
    gm = program(build(SPEC).eval(), Span((3, 40), (1, 1), (4, 6)), plan, "autocast", CPU, strict=True).graph
    gm.graph.set_codegen(CodeGen())
    gm.graph.output_node().args = (tuple(tree_leaves(gm.graph.output_node().args)),)
    gm.recompile()
    check(gm, told=True)
