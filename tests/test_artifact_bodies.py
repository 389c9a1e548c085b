"""The body of a loop is copied into the loop that is made of it, which is the one that a trace makes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.scan import scan
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import post_grad
from torch._inductor.virtualized import V
from torch.export import Dim
from torch.fx import GraphModule
from written import written

from vggt_compile.artifact import bodies


class Loop(nn.Module):
    """Runs of rows, with a weight, a number of rows, and something that is carried."""

    def __init__(self, blocks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.blocks = nn.Linear(4, 4), blocks

    def forward(self, x: Tensor) -> Any:
        rows = x.shape[0]

        def turn(carried: Tensor, one: Tensor) -> tuple[Tensor, Any]:
            made = torch.cond(one.sum() > 0, torch.sin, torch.cos, (one,)) if self.blocks else self.linear(one)
            made = made.softmax(-1) + rows
            return carried + made.sum(), (made.t(), made.mean(-1))

        return scan(turn, torch.zeros(()), x.unflatten(0, (-1, 3)))


def prepared(blocks: bool) -> tuple[GraphModule, Tensor]:
    """As it is before Inductor makes another loop of it."""
    x = torch.rand(12, 4)
    with torch.no_grad():
        rows = 3 * Dim("runs", min=2, max=9)
        traced = torch.export.export(Loop(blocks).eval(), (x,), dynamic_shapes=({0: rows},))
        gm = traced.module(check_guards=False)
        (example,) = (node.meta["val"] for node in gm.graph.find_nodes(op="placeholder"))
        flat, _ = aot_export_module(gm, (example,), trace_joint=False, decompositions=select_decomp_table())
    return flat, example


def decomposed(gm: GraphModule, example: Tensor, copied: bool) -> tuple[list[Any], int]:
    """What is made of it, and how often the body of its loop ran."""
    body = next(part for name, part in gm.named_modules() if "scan_combine" in name)
    ran = mock.Mock(side_effect=type(body).forward)
    with (
        mock.patch.object(type(body), "forward", lambda self, *args: ran(self, *args)),
        bodies.copied() if copied else nullcontext(),
        V.set_fake_mode(example.fake_mode),  # type: ignore[attr-defined]
        torch.no_grad(),
    ):
        post_grad.decompose_scan_to_while_loop(gm)
    gm.graph.eliminate_dead_code()
    return written(gm), ran.call_count


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("blocks", [False, True], ids=["plain", "sub-graphs"])
def test_the_loop_is_that_of_a_trace(blocks: bool) -> None:
    """A body that has sub-graphs is traced as ever."""
    plain, ran = decomposed(*prepared(blocks), copied=False)
    assert ran == 1
    seen, ran = decomposed(*prepared(blocks), copied=True)
    assert seen == plain
    assert ran == blocks
