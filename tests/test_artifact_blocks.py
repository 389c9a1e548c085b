"""Equal blocks in a library: compiled once, called where each of them is, with the numbers of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import sympy
import torch
import torch.nn.functional as F
from alternating import Attention, Block
from bare import bare
from torch import Tensor, nn
from torch._dynamo.utils import compilation_time_metrics
from torch._inductor.codecache import AotCodeCompiler
from torch._inductor.codegen.wrapper import EnterSubgraphLine, ExitSubgraphLine
from torch._inductor.exc import InductorError
from torch.utils._ordered_set import OrderedSet

import vggt_compile
from vggt_compile.artifact import blocks, scopes
from vggt_compile.artifact.library import library, outlined
from vggt_compile.artifact.program import program
from vggt_compile.artifact.request import Span
from vggt_compile.plan import Plan

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
WIDTH, HEADS, CPU = 32, 2, torch.device("cpu")


def casting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention after a cast to what is there; an export writes down a check of what it casts."""
    return F.scaled_dot_product_attention(q.to(torch.float32).contiguous(), k, v)


class Trunk(nn.Module):
    """Images [B, S, 3, H, W]; attention inside frames and over all of them in turn. One layer is an output too.

    A `stem` sees one token more of each frame, in attention over all of them.
    """

    def __init__(self, pairs: int, stem: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(12, WIDTH)
        self.stem = Block(Attention(HEADS, WIDTH // HEADS, casting), WIDTH) if stem else None
        self.blocks = nn.ModuleList(Block(Attention(HEADS, WIDTH // HEADS, casting), WIDTH) for _ in range(2 * pairs))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        batch, frames = images.shape[:2]
        x = self.embed(F.unfold(images.flatten(0, 1), 2, stride=2).transpose(1, 2))
        tokens, kept = x.shape[1], x
        if self.stem is not None:
            more = torch.cat([x.mean(1, keepdim=True), x], 1).reshape(batch, frames * (tokens + 1), WIDTH)
            x = self.stem(more).reshape(-1, tokens + 1, WIDTH)[:, 1:]
        for index, block in enumerate(self.blocks):
            x = block(x.reshape(batch, frames * tokens, WIDTH) if index % 2 else x.reshape(-1, tokens, WIDTH))
            kept = x if index == 3 else kept
        return x.reshape(batch, frames, tokens, WIDTH), kept.reshape(batch, frames, tokens, WIDTH)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_block_is_written_once(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    define = blocks._define
    monkeypatch.setattr(blocks, "_define", lambda writer, graph: written.append(graph.name) or define(writer, graph))
    model, path = Trunk(3).eval().to(device), tmp_path / "model.pt2"
    images = torch.rand(1, 5, 3, 4, 6, device=device)
    made = vggt_compile.export(model, images, plan={}, frames=(3, 40), batch=(1, 3), path=path)
    (entry,) = made.entries
    (region,) = [one for one in entry.report["regions"] if one["name"] == "outline_blocks"]
    assert region["count"] >= 1, region
    assert len(written) == 1
    run = vggt_compile.load(path)
    scenes = [torch.rand(items, frames, 3, 4, 6, device=device) for items in (1, 3) for frames in (3, 8, 40)]
    alone = bare(path, scenes, tmp_path) if device == "cpu" else map(run, scenes)
    for given, other in zip(scenes, alone, strict=True):
        with torch.no_grad():
            want = model(given)
        for answer in (run(given), other):
            for one, wanted in zip(answer, want, strict=True):
                torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


def test_sizes_of_a_block_are_not_those_of_the_code_around() -> None:
    """Inductor names sizes anew in each graph: what `ps0` is outside says nothing of what it is inside."""

    class Writer:
        def __init__(self) -> None:
            self.computed_sizes, self.kept = OrderedSet([sympy.Symbol("ps0")]), list[OrderedSet[Any]]()

        def push_computed_sizes(self, sizes: OrderedSet[Any]) -> None:
            self.kept.append(OrderedSet(sizes))

        def pop_computed_sizes(self) -> OrderedSet[Any]:
            return self.kept.pop()

    writer: Any = Writer()
    with scopes.apart():
        EnterSubgraphLine(writer, cast(Any, None))
        assert not writer.computed_sizes
        writer.computed_sizes.add(sympy.Symbol("ps1"))
        ExitSubgraphLine(writer)
        assert writer.computed_sizes == {sympy.Symbol("ps0")}


@pytest.mark.gpu
def test_a_block_beside_attention_of_another_size(tmp_path: Path) -> None:
    """Kernels for a GPU are given sizes by name, which C++ for a CPU has none of."""
    model, path = Trunk(3, stem=True).eval().cuda(), tmp_path / "model.pt2"
    vggt_compile.export(model, torch.rand(1, 5, 3, 4, 6, device="cuda"), plan={}, frames=(3, 40), path=path)
    run = vggt_compile.load(path)
    for frames in (3, 8, 40):
        images = torch.rand(1, frames, 3, 4, 6, device="cuda")
        with torch.no_grad():
            want = model(images)
        for one, wanted in zip(run(images), want, strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("off", "calls"), [({}, 2), ({"disabled_passes": "outline_blocks"}, 0)])
def test_blocks_stay_where_the_pass_is_switched_off(off: dict[str, str], calls: int) -> None:
    span = Span((3, 40), (1, 1), (4, 6))
    made = program(Trunk(3).eval(), span, Plan.read({}), "fp32", CPU, strict=False)
    gm = outlined(made, off)
    assert sum("invoke_subgraph" in str(node.target) for node in gm.graph.nodes) == calls
    assert [region.name for region in made.report.regions] == ["outline_blocks"]


@torch._dynamo.config.patch(fake_tensor_cache_enabled=True)  # which other tests go without
def test_calls_of_a_block_are_evaluated_once_whatever_weights_they_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enough(*_: object, **__: object) -> None:
        raise AssertionError("the code is written")

    monkeypatch.setattr(AotCodeCompiler, "compile", enough)
    counts = []
    for pairs in (3, 5):
        made = program(Trunk(pairs).eval(), Span((3, 40), (1, 1), (4, 6)), Plan.read({}), "fp32", CPU, strict=False)
        before = evaluations()
        with pytest.raises(InductorError, match="the code is written"):
            library(made, "model", tmp_path, [], {})
        counts.append(evaluations() - before)
    assert counts[0] == counts[1] > 0


def evaluations() -> int:
    """How often sub-graphs were evaluated with fake tensors in this process."""
    return len(compilation_time_metrics.get("invoke_subgraph_fake_tensor", ()))
