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
from torch._subclasses import FakeTensor
from torch.export import Dim
from torch.fx import GraphModule
from written import written

from vggt_compile.artifact import bodies
from vggt_compile.artifact.program import program
from vggt_compile.artifact.request import Span
from vggt_compile.families.frame_loop import over_frames
from vggt_compile.plan import Plan


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


def prepared(blocks: bool) -> tuple[GraphModule, FakeTensor]:
    """As it is before Inductor makes another loop of it."""
    x = torch.rand(12, 4)
    with torch.no_grad():
        rows = 3 * Dim("runs", min=2, max=9)
        traced = torch.export.export(Loop(blocks).eval(), (x,), dynamic_shapes=({0: rows},))
        gm = traced.module(check_guards=False)
        (example,) = (node.meta["val"] for node in gm.graph.find_nodes(op="placeholder"))
        flat, _ = aot_export_module(gm, (example,), trace_joint=False, decompositions=select_decomp_table())
    return flat, example


def decomposed(gm: GraphModule, example: FakeTensor, copied: bool) -> tuple[list[Any], int]:
    """What is made of it, and how often the body of its loop ran."""
    body = next(part for name, part in gm.named_modules() if "scan_combine" in name)
    ran = mock.Mock(side_effect=type(body).forward)
    with (
        mock.patch.object(type(body), "forward", lambda self, *args: ran(self, *args)),
        bodies.copied() if copied else nullcontext(),
        V.set_fake_mode(example.fake_mode),
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


class Maps(nn.Module):
    """Of each frame, made by a head that is shared, with a table of its own and sizes that its code knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.shared = nn.ModuleList([self.conv])
        self.register_buffer("table", torch.arange(8.0), persistent=False)

    def head(self, images: Tensor, rows: Tensor, frames: Any) -> dict[str, Tensor]:
        batch, last = images.shape[0], 2 * frames + 1
        seen = self.shared[0](images.index_select(1, rows).flatten(0, 1)).unflatten(0, (batch, -1))
        return {"maps": seen * self.table, "of": (rows / last).expand(batch, -1).clone()}

    def forward(self, images: Tensor) -> Any:
        frames = images.shape[1]
        made: Any = over_frames(lambda rows: self.head(images, rows, frames), frames, 4, images.device, equal=True)
        return made


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("fails", [False, True], ids=["traced", "by Dynamo"])
def test_bodies_are_traced_without_dynamo(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a trace fails; for any number of scenes and frames they give what the model gives."""
    compiles: list[str] = []
    compile_ = torch.compile

    def counted(*args: Any, **kwargs: Any) -> Any:
        compiles.append("Dynamo")
        return compile_(*args, **kwargs)

    def failing(*_: Any) -> Any:
        raise RuntimeError("a size is not tracked")

    monkeypatch.setattr(torch, "compile", counted)
    if fails:
        monkeypatch.setattr(bodies, "_body", failing)
    model, images = Maps().eval(), torch.rand(2, 21, 3, 6, 8)
    span = Span((3, 21), (1, 2), (6, 8))
    run = program(model, span, Plan.read({}), "fp32", images.device, strict=False).graph
    assert bool(compiles) == fails
    with torch.no_grad():
        for scenes, frames in ((1, 3), (2, 4), (2, 9), (1, 21)):
            given = images[:scenes, :frames]
            want = model.head(given, torch.arange(frames), frames)
            torch.testing.assert_close(run(given), want)
