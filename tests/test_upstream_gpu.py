"""The published models on a GPU, through Inductor: one graph holds the attentions, a dense plan changes no bit.

Blocks that are compiled once have kernels of their own, whose sums may be in another order: that is compared up to
rounding.

With `VGGT_COMPILE_RECORD=DIR` the rows of docs/benchmarks/traces.md are written to DIR as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import upstream_models
from harness import Capture
from torch import Tensor, nn
from torch.fx import GraphModule
from upstream_models import SITES, same_bits, scene, tensors

from vggt_compile import collect_reports, vggt_sparse
from vggt_compile.artifact.check import BOUND, off
from vggt_compile.bench.traces import page
from vggt_compile.bench.versions import versions
from vggt_compile.families import trace
from vggt_compile.report import Report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.upstream,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Inductor's kernels are compared on a CUDA device"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

RECORD = "VGGT_COMPILE_RECORD"
SETTINGS = {
    "models": "tests/upstream_models.py, float32; fastvggt with merging=None under bf16 autocast",
    "input": "1 batch, 4 frames, 3 x 5 patches",
    "plan": "scope: frame on every global layer",
}


@dataclass(frozen=True)
class Traced:
    """What one model gave, run eagerly, with shims only, with the plan `dense`, with scope: frame, eagerly again.

    Attributes:
        graphs: number of nodes of each graph that Inductor got without rewriting.
        dense, framed: reports of the two plans, one for each graph.
        paths: every module of the model.
        once_is_off: how far outputs are off, of their norm, where the plan is `dense` and equal blocks are compiled
            once.
    """

    name: str
    graphs: list[int]
    dense: list[Report]
    framed: list[Report]
    paths: set[str]
    dense_equals_shims_only: bool
    eager_unchanged: bool
    once_is_off: list[float]

    def row(self) -> dict[str, Any]:
        trunk = next((i for i, report in enumerate(self.dense) if report.rows), 0)
        return {
            "model": self.name,
            "graphs": len(self.graphs),
            "nodes": self.graphs[trunk],
            "rewritten": sum(len(report.rewritten) for report in self.framed),
            "attentions": sum(len(report.rows) for report in self.framed),
            "dense_equals_shims_only": self.dense_equals_shims_only,
            "eager_unchanged": self.eager_unchanged,
        }


@pytest.fixture(scope="module")
def record() -> Iterator[list[dict[str, Any]]]:
    """Rows of all models that were traced; written at the end where $VGGT_COMPILE_RECORD names a folder."""
    rows: list[dict[str, Any]] = []
    yield rows
    if RECORD in os.environ and rows:
        folder = Path(os.environ[RECORD])
        folder.mkdir(parents=True, exist_ok=True)
        told = {"machine": versions(), "settings": SETTINGS, "rows": rows}
        (folder / "traces.json").write_text(json.dumps(told, indent=2) + "\n")
        (folder / "traces.md").write_text(page(told))


@pytest.fixture(scope="module", params=SITES)
def traced(request: pytest.FixtureRequest, record: list[dict[str, Any]]) -> Iterator[Traced]:
    """Compiling is slow, so each model is compiled once for all tests."""
    name = request.param
    precision: AbstractContextManager = nullcontext()
    if name == "fastvggt":  # it casts its images to bfloat16 itself, and its weights are in float32
        precision = torch.autocast("cuda", dtype=torch.bfloat16)
    with upstream_models.model(name) as net, torch.no_grad(), precision:
        seen = look(name, net.cuda(), scene(name, 1, 4, (3, 5)).cuda())
        record.append(seen.row())
        yield seen
    torch._dynamo.reset()


def look(name: str, net: nn.Module, x: Tensor) -> Traced:
    before = net(x)
    graphs: list[int] = []
    plain = compiled(net, x, shims_only(graphs))
    with collect_reports() as dense:
        rewritten = compiled(net, x, vggt_sparse, options={"plan": "dense", "outline": False})
    once = compiled(net, x, vggt_sparse, options={"plan": "dense"})
    capture = Capture()
    compiled(net, x, capture)
    same, kept = same_bits(rewritten, plain), same_bits(net(x), before)
    far = [off(got, want) for got, want in zip(tensors(once), tensors(plain), strict=True)]
    return Traced(name, graphs, dense, capture.reports, set(dict(net.named_modules())), same, kept, far)


def compiled(net: nn.Module, x: Tensor, backend: Callable[..., Any], **kwargs: Any) -> Any:
    torch._dynamo.reset()
    trace.arm()
    return torch.compile(net, backend=backend, dynamic=False, **kwargs)(x)


def shims_only(graphs: list[int]) -> Callable[..., Any]:
    """Inductor as it comes; the models are traceable because they are armed, and nothing is rewritten."""
    from torch._inductor.compile_fx import compile_fx

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(len(gm.graph.nodes))
        return compile_fx(gm, example_inputs)

    return backend


def test_one_graph_holds_every_attention_and_each_has_a_path(traced: Traced) -> None:
    trunks = [report for report in traced.dense if report.rows]
    assert len(trunks) == 1
    rows = trunks[0].rows
    assert {s: sum(row.scope == s for row in rows) for s in ("global", "frame", "other")} == SITES[traced.name]
    assert all(row.path in traced.paths for row in rows)
    assert len(traced.graphs) == 1


def test_the_dense_plan_has_the_bits_of_no_plan(traced: Traced) -> None:
    assert traced.dense_equals_shims_only


def test_equal_blocks_compiled_once_change_it_by_rounding_at_most(traced: Traced) -> None:
    bound = BOUND["autocast" if traced.name == "fastvggt" else "fp32"]
    assert max(traced.once_is_off) <= bound, traced.once_is_off


def test_eager_calls_keep_their_bits(traced: Traced) -> None:
    assert traced.eager_unchanged


def test_scope_frame_reaches_every_global_attention(traced: Traced) -> None:
    assert sum(len(report.rewritten) for report in traced.framed) == SITES[traced.name]["global"]
