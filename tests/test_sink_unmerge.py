"""Merged tokens are told apart after the output projection: the same values, from a projection of fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from harness import Capture, exported, run
from modelutils import images as pictures
from modelutils import worst
from regions import DIALECTS, Program, editor, graph_of, outputs, run_again, small
from torch import Tensor, nn

from vggt_compile.graph import dialect
from vggt_compile.graph.axes import sizes
from vggt_compile.ops import token_groups  # noqa: F401  # registers the operator
from vggt_compile.passes.sink_unmerge import sink_unmerge

PLAN = {"layers": {"*": {"tokens": "merge"}}}
BATCH, HEADS, GROUPS, TOKENS, WIDTH = 2, 2, 3, 6, 4
GROUP = torch.tensor([[0, 1, 2, 0, 0, 1], [2, 1, 0, 0, 2, 2]])


def spread(x: Tensor) -> Tensor:
    """[B, H, groups, D] → [B, H, N, D]."""
    return torch.ops.vggt_compile.from_groups.default(x, GROUP.to(x.device))


def flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, HEADS * WIDTH)


def block(x: Tensor, residual: Tensor, proj: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    out = nn.functional.dropout(proj(flat(spread(x))), 0.1, False) * 0.3
    return residual + out.to(residual.dtype)


def twice_read(x: Tensor, residual: Tensor, proj: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    out = proj(flat(spread(x)))
    return residual + out + norm(out)


def no_projection(x: Tensor, residual: Tensor, proj: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    return residual + flat(spread(x))


def batch_behind(x: Tensor, residual: Tensor, proj: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    out = spread(x).permute(2, 0, 1, 3).flatten(2)
    return residual + proj(out).transpose(0, 1)


def program(function: Callable) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    width = HEADS * WIDTH
    made = Program(function, nn.Linear(width, width), nn.LayerNorm(width))
    return made, torch.randn(BATCH, HEADS, GROUPS, WIDTH), torch.randn(BATCH, TOKENS, width)


@pytest.mark.parametrize("dialect_name", DIALECTS)
def test_all_that_acts_on_tokens_by_themselves_acts_on_groups(dialect_name: str) -> None:
    made, x, residual = program(block)
    gm = graph_of(made, x, residual, dialect_name=dialect_name)
    assert sink_unmerge(gm.graph, [], editor(gm)).count == 1
    (out,) = outputs(gm)
    (late,) = [n for n in gm.graph.nodes if n.target is torch.ops.vggt_compile.from_groups.default]
    for node in gm.graph.nodes:
        if dialect.operation(node) in ("linear", "dropout", "mul"):
            assert sizes(node) == (BATCH, GROUPS, HEADS * WIDTH)
    assert sizes(late) == (BATCH, 1, TOKENS, HEADS * WIDTH)
    assert dialect.operation(out) == "add"
    (got,) = (
        run_again(gm, x, residual) if isinstance(run_again(gm, x, residual), tuple) else [run_again(gm, x, residual)]
    )
    torch.testing.assert_close(got, made(x, residual))


@pytest.mark.parametrize("dialect_name", DIALECTS)
def test_the_projection_alone_where_its_result_is_read_twice(dialect_name: str) -> None:
    made, x, residual = program(twice_read)
    gm = graph_of(made, x, residual, dialect_name=dialect_name)
    assert sink_unmerge(gm.graph, [], editor(gm)).count == 1
    (norm,) = [n for n in gm.graph.nodes if dialect.operation(n) == "layer_norm"]
    assert sizes(norm) == (BATCH, TOKENS, HEADS * WIDTH)
    got = run_again(gm, x, residual)
    torch.testing.assert_close(got[0] if isinstance(got, tuple) else got, made(x, residual))


@pytest.mark.parametrize(
    ("function", "reason"),
    [(no_projection, "add reads other tokens too"), (batch_behind, "permute moves the batch")],
)
def test_where_no_projection_follows_it_stays(function: Callable, reason: str) -> None:
    made, x, residual = program(function)
    gm = graph_of(made, x, residual, dialect_name="dynamo")
    before = [str(node) for node in gm.graph.nodes]
    done = sink_unmerge(gm.graph, [], editor(gm))
    told = f"no linear map follows that acts on each token by itself: {reason}"
    assert (done.count, list(done.left.values())) == (0, [told])
    assert [str(node) for node in gm.graph.nodes] == before


def captured(model: nn.Module, x: Tensor, off: str, dynamic: bool = False) -> tuple[Any, Capture]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(disabled_passes=off):
        out = run(model, x, capture=(capture := Capture(plan=PLAN, strict=True)), dynamic=dynamic)
    return out, capture


@pytest.mark.parametrize("name", ["vggt", "pi3"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_models_compute_the_same(name: str, dynamic: bool) -> None:
    model = small(name, layers=1 if name == "pi3" else 2)  # cameras of VGGT see what patches became a layer later
    x = pictures(2, 4, 3, 56, 70)
    plain, _ = captured(model, x, "regions", dynamic)
    out, capture = captured(model, x, "", dynamic)
    regions = {region.name: region for region in capture.report.regions}
    assert regions["sink_unmerge"].count == len(capture.report.rewritten) > 0
    assert worst(out, plain) < 1e-5


def test_under_autocast_shapes_and_dtypes_are_the_models() -> None:
    model, x = small("vggt"), pictures(1, 4, 3, 56, 70)
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = captured(model, x, "regions")
        out, capture = captured(model, x, "")
    assert capture.report.regions[0].count == len(capture.report.rewritten) == 2
    assert [x.dtype for x in out["pose_enc_list"]] == [x.dtype for x in plain["pose_enc_list"]]
    exact = captured(model, x, "regions")[0]
    assert worst(out, exact) <= 1.5 * worst(plain, exact) + 2**-8


def test_one_graph_serves_all_frame_counts_and_exports() -> None:
    spec = Spec()
    model = build(spec)
    capture = Capture(plan=PLAN, strict=True)
    compiled = torch.compile(model, backend=capture)
    gm, report = exported(
        model, alternating.images(spec, 1, 4, (4, 6)), PLAN, {1: torch.export.Dim("frames", min=3, max=64)}
    )
    assert report.regions[0].count == 2
    for frames in (3, 5, 8):
        x = alternating.images(spec, 1, frames, (4, 6))
        torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), gm(x), rtol=1e-5, atol=1e-5)
    assert len(capture.graphs) == 1
