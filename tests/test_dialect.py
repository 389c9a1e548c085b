"""What an operation is known to be: whose memory its value has, and whether what it checks is settled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_outline_blocks import noise, outlined
from torch import Tensor
from torch.fx import Graph

from vggt_compile.graph import dialect
from vggt_compile.graph.repeats import drop_unread, operations


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"dtype": torch.float32, "device": torch.device("cpu"), "layout": torch.strided}, 0),
        ({"dtype": torch.float64}, 1),  # as it was traced, this stops every run
        ({"device": torch.device("cuda")}, 1),
        ({"size": [4, 4]}, 1),  # holds for the trace, and perhaps for no other count
    ],
)
def test_a_check_goes_if_it_holds_of_all_that_it_will_see(asked: dict[str, Any], left: int) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 4)
    graph.call_function(torch.ops.aten._assert_tensor_metadata.default, (x,), asked)
    graph.output(x)
    drop_unread(graph)
    assert len(operations(graph)) == left


def test_a_method_that_only_python_knows_is_no_operator_of_aten() -> None:
    """torch 2.11 writes `x == 0` of a symbolic trace as a method; `aten.__eq__` compares namespaces."""
    graph = Graph()
    node = graph.call_method("__eq__", (graph.placeholder("x"), 0))
    assert not dialect.pure(node)


@pytest.mark.parametrize(
    ("function", "own"),
    [
        (lambda x: x.transpose(0, 1), False),
        (lambda x: x.to(torch.float32), False),
        (lambda x: x.unbind(0)[1], False),
        (lambda x: x.max(0)[1], True),
        (lambda x: F.linear(x, torch.eye(8)), True),
        (lambda x: x + 1, True),
    ],
)
def test_views_and_what_may_be_one_have_no_memory_of_their_own(function: Callable[[Tensor], Tensor], own: bool) -> None:
    _, gm, _ = outlined(function, noise())
    (result,) = gm.graph.output_node().args[0]  # type: ignore[misc, union-attr]
    assert dialect.owns(result) == own  # type: ignore[arg-type]
