"""Values that are kept are those that would be found out again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from alternating import build
from framed import SPEC
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves
from written import written

from vggt_compile.artifact import kept
from vggt_compile.artifact.program import program
from vggt_compile.artifact.request import Span
from vggt_compile.graph.outline import outline_blocks
from vggt_compile.plan import Plan

Change = Callable[[GraphModule], None]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = (x + 1).relu()
        low, high = torch.max(self.linear(made).view(-1, 2, 2), -1)
        return made.t(), low + high, made.sum(0)


def small() -> GraphModule:
    with torch.no_grad():
        traced = torch.export.export(Model().eval(), (torch.rand(3, 4),), dynamic_shapes=({0: Dim("rows")},))
    return traced.module(check_guards=False)


def of_a_plan() -> GraphModule:
    """With equal blocks as calls of one."""
    blocks = {"method": "predict", "q_block": 16, "k_block": 16}
    plan = Plan.read({"layers": {"1": {"keys": "grid", "blocks": blocks}}})
    cpu = torch.device("cpu")
    gm = program(build(SPEC).eval(), Span((3, 40), (1, 1), (4, 6)), plan, "autocast", cpu, strict=True).graph
    outline_blocks(gm)
    gm.graph.set_codegen(CodeGen())
    gm.graph.output_node().args = (tuple(tree_leaves(gm.graph.output_node().args)),)
    gm.recompile()
    return gm


def propagated(graph: Callable[[], GraphModule], change: Change, keep: bool) -> tuple[list[Any], int]:
    """What a graph says after Inductor has evaluated it, and how many operations were run for it."""
    gm = graph()
    (example,) = (node.meta["val"] for node in gm.graph.find_nodes(op="placeholder"))
    run = mock.Mock(side_effect=FakeTensorProp.run_node)
    with torch.no_grad():
        flat, _ = aot_export_module(gm, (example,), trace_joint=False, decompositions=select_decomp_table())
        given = [node.meta["val"] for node in flat.graph.find_nodes(op="placeholder")]
        with (
            mock.patch.object(FakeTensorProp, "run_node", lambda prop, node: run(prop, node)),
            kept.values_kept() if keep else nullcontext(),
        ):
            compile_fx._recursive_joint_graph_passes(flat)
            change(flat)
            view_to_reshape(flat)
            compile_fx.fake_tensor_prop(flat, given)
    return written(flat), run.call_count


def _nothing(gm: GraphModule) -> None: ...


def _another_input(gm: GraphModule) -> None:
    """Twice as many rows."""
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with gm.graph.inserting_before(relu):
        twice = gm.graph.call_function(torch.ops.aten.cat.default, ([relu.args[0], relu.args[0]],))
    relu.args = (twice,)


def _other_strides(gm: GraphModule) -> None:
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with gm.graph.inserting_before(relu):
        given, memory = relu.args[0], {"memory_format": torch.contiguous_format}
        turned = gm.graph.call_function(torch.ops.aten.permute.default, (given, [1, 0]))
        copied = gm.graph.call_function(torch.ops.aten.clone.default, (turned,), memory)
        relu.args = (gm.graph.call_function(torch.ops.aten.permute.default, (copied, [1, 0])),)


def _alike(gm: GraphModule) -> None:
    """What is another operation, and gives the same."""
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with gm.graph.inserting_before(relu):
        relu.args = (gm.graph.call_function(torch.ops.aten.neg.default, relu.args),)


def _another_function(gm: GraphModule) -> None:
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.isnan.default


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("graph", "change"),
    [
        (small, _nothing),
        (small, _another_input),
        (small, _other_strides),
        (small, _another_function),
        (small, _alike),
        (of_a_plan, _nothing),
    ],
    ids=["small", "rows", "strides", "function", "alike", "plan"],
)
def test_values_are_those_of_a_run(graph: Callable[[], GraphModule], change: Change) -> None:
    plain, all_runs = propagated(graph, change, keep=False)
    seen, runs = propagated(graph, change, keep=True)
    assert seen == plain
    assert runs < all_runs * (0.7 if change in (_nothing, _alike) else 1)
