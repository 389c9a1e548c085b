"""What a graph writes into, and whether it gives new tensors, as far as its operations show."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from vggt_compile.graph.writes import changes_no_input, gives_new_tensors


def calling(function: Any, *args: Any, **kwargs: Any) -> GraphModule:
    """A graph that calls a function of its input and of other arguments."""
    root = Graph()
    root.call_function(function, (root.placeholder("x"), *args), kwargs)
    return GraphModule({}, root)


@pytest.mark.parametrize(
    ("graph", "changes"),
    [
        (calling(torch.ops.aten.add.Tensor, 1), False),
        (calling(torch.ops.aten.add_.Tensor, 1), True),
        (calling(torch.clone), False),
        (calling(torch.relu_), True),
        (calling(torch.abs, out="x"), True),
        (calling(operator.add, 1), False),
        (calling(operator.getitem, 0), False),
        (calling(operator.iadd, 1), True),
        (calling(operator.setitem, 0, 1), True),
        (calling(F.relu), False),
        (calling(F.relu, True), True),
        (calling(F.relu, inplace=True), True),
        (calling(torch.ops.higher_order.with_effects), True),
    ],
)
def test_operations_that_write(graph: GraphModule, changes: bool) -> None:
    assert changes_no_input(graph) is not changes


def test_an_operand_that_is_left_out_is_not_written_into() -> None:
    with torch.library._scoped_library("test_writes", "DEF") as operators:
        operators.define("into(Tensor x, Tensor(a!)? out=None) -> Tensor")
        into = torch.ops.test_writes.into.default
        assert changes_no_input(calling(into))
        assert not changes_no_input(calling(into, "out"))


@pytest.mark.parametrize(
    ("code", "new"),
    [
        (lambda x, y: (x + y, x - y), True),
        (lambda x, y: ((x + y)[1:].t(), y.clone()), True),
        (lambda x, y: tuple(torch.max(x, 0)), True),
        (lambda x, y: (x + y, x), False),
        (lambda x, y: (x[1:],), False),
        (lambda x, y: (x.add_(1),), False),
        (lambda x, y: (lambda z: (z, z))(x + y), False),
        (lambda x, y: (lambda z: (z[:1], z[1:]))(x + y), False),
        (lambda x, y: tuple(torch.split(x + y, 1)), False),
        (lambda x, y: (x + y, 3), False),
    ],
    ids=["two", "view", "max", "input", "of input", "written", "twice", "halves", "split", "number"],
)
def test_results_in_memory_of_their_own(code: Callable[[Tensor, Tensor], Any], new: bool) -> None:
    assert gives_new_tensors(make_fx(code)(torch.rand(2, 2), torch.rand(2, 2))) is new
