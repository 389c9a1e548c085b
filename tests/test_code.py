"""Graphs get code when they are run, and give what they gave."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, symbolic_trace

from vggt_compile.graph import code
from vggt_compile.graph.code import written_when_run

X = torch.arange(4.0)


def doubled() -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.mul, (x, 2)))
    return GraphModule(nn.Module(), graph)


def add_one(gm: GraphModule) -> None:
    (made,) = gm.graph.output_node().all_input_nodes
    with gm.graph.inserting_after(made):
        gm.graph.output_node().args = (gm.graph.call_function(torch.add, (made, 1)),)
    gm.recompile()


def test_code_is_written_when_a_graph_is_run_and_after_each_change() -> None:
    with mock.patch.object(code, "_write", side_effect=code._write) as written, written_when_run():
        gm = doubled()
        add_one(gm)
        assert written.call_count == 0
        assert torch.equal(gm(X), 2 * X + 1)
        assert torch.equal(gm.forward(X), 2 * X + 1)
        assert written.call_count == 1
        add_one(gm)
        add_one(gm)
        assert torch.equal(gm(X), 2 * X + 3)
        assert written.call_count == 2


def test_graphs_of_the_block_run_behind_it() -> None:
    with written_when_run():
        gm = doubled()
    assert torch.equal(gm(X), 2 * X)
    with written_when_run():
        add_one(gm)
    assert torch.equal(gm(X), 2 * X + 1)
    add_one(gm)
    assert torch.equal(gm(X), 2 * X + 2)
    assert "torch.add" in gm.code


def test_graphs_within_graphs() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = doubled()

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.inner(x) - 1
            return made

    with written_when_run():
        outer = symbolic_trace(Outer())
        assert torch.equal(outer(X), 2 * X - 1)
    outer.recompile()
    assert outer.code


def test_exports_run_as_ever() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                made = x @ more["y"]
            return {"made": made}

    x, more = torch.rand(3, 3), {"y": torch.rand(3, 3)}
    with written_when_run():
        gm = torch.export.export(Model(), (x,), {"more": more}).module()
        inside = gm(x, more=more)
    torch.testing.assert_close(inside, Model()(x, more=more))
    torch.testing.assert_close(gm(x, more=more), inside)


def test_what_is_wrong_is_said_as_ever() -> None:
    with written_when_run():
        gm = doubled()
    with pytest.raises(TypeError, match="positional argument"):
        gm(X, X)
    with written_when_run():
        gm = doubled()
        with pytest.raises(TypeError):
            gm("x", 1)
