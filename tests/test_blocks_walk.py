"""Blocks that follow a walk through the grid of patches are blocks of neighbours, and everything else is as without."""

from __future__ import annotations

import functools
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from axes import BareTrunk, by_hand
from blocks_model import BLOCKS, SPEC, confined, plan, scene
from harness import Capture, exported, nodes, run
from torch.fx import GraphModule

from vggt_compile import registry
from vggt_compile.graph.hilbert import hilbert_order
from vggt_compile.ops.select_blocks import select_blocks
from vggt_compile.site import Skip


def constants(gm: GraphModule) -> list[str]:
    return [name for name in vars(gm) if name.startswith("_vggt_compile")]


@pytest.mark.parametrize("setting", [{"keep": 0.25}, {"keep": 0.1, "cdf": 0.6, "keep_first_frame": True}])
@pytest.mark.parametrize(("special", "grid"), [(5, (5, 7)), (0, (8, 8)), (1, (1, 30))])
def test_blocks_along_a_walk_are_a_mask(setting: dict, special: int, grid: tuple[int, int]) -> None:
    spec = Spec(head_dim=16, special=special)
    model, x = build(spec), alternating.images(spec, 2, 4, grid)
    out = run(model, x, capture=(capture := Capture(plan=plan(order="hilbert", **setting), strict=True)))
    assert capture.report.rewritten[0].axes["blocks"]["order"] == "hilbert"
    given = {name: value for name, value in setting.items() if name != "keep_first_frame"}
    choose = functools.partial(select_blocks, **given, **BLOCKS)
    hand = confined(4, special, choose, "keep_first_frame" in setting, hilbert_order(*grid))
    torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-4, atol=1e-5)
    assert sum("get_attr" in line for line in nodes(capture.graphs[0]).splitlines()) == 2
    assert len(constants(capture.graphs[0])) == 2  # the walk and the way back, for all layers


def test_all_blocks_along_a_walk_are_the_dense_attention() -> None:
    model, x = build(SPEC), scene(2)
    out = run(model, x, capture=Capture(plan=plan(order="hilbert", keep=1.0), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


def test_a_walk_keeps_frames_symbolic_and_needs_a_grid_of_numbers() -> None:
    model, capture = build(SPEC), Capture(plan=plan(order="hilbert"))
    hand = functools.partial(confined, special=5, choose=functools.partial(select_blocks, keep=0.25, **BLOCKS))
    for frames in (3, 6):
        x = scene(frames=frames)
        torch._dynamo.mark_dynamic(x, 1)
        out = run(model, x, capture=capture, dynamic=None)
        want = by_hand(model, x, hand(frames, walk=hilbert_order(5, 7)))
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert len(capture.reports) == 1
    torch._dynamo.reset()
    run(model, scene(), capture=(symbolic := Capture(plan=plan(order="hilbert"))), dynamic=True)
    reasons = [row.reason or "" for row in symbolic.report.global_rows]
    assert all("the rows and columns of its patches are symbols; keep image sizes static" in why for why in reasons)
    assert nodes(symbolic.graphs[0]) == symbolic.before[0]


def test_a_walk_needs_to_know_the_grid() -> None:
    """A family tells the special tokens, but the patch embedding is in another graph."""

    capture = Capture(plan=plan(order="hilbert"))
    run(BareTrunk(SPEC, "vggt"), torch.randn(2, 3, 9, 32), capture=capture)
    reason = "the rows and columns of its patches are unknown, which order='hilbert' walks through"
    assert [row.reason for row in capture.report.global_rows] == [reason] * 2


def test_exported_graphs_carry_the_walk_with_them(tmp_path: Any) -> None:
    model, x = build(SPEC), scene(2)
    gm, report = exported(model, x, plan(order="hilbert"))
    assert len(report.rewritten) == 2
    want = gm(x)
    torch.export.save(torch.export.export(gm, (x,)), tmp_path / "walk.pt2")
    assert torch.equal(torch.export.load(tmp_path / "walk.pt2").module()(x), want)
    hand = confined(4, 5, functools.partial(select_blocks, keep=0.25, **BLOCKS), walk=hilbert_order(5, 7))
    torch.testing.assert_close(want, by_hand(model, x, hand), rtol=1e-4, atol=1e-5)


def test_a_walk_that_is_refused_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict_and_refuse(site: Any, state: Any, edit: Any, **parameters: Any) -> Skip:
        predict = registry.find_method("blocks", "predict").run
        assert not isinstance(predict(site, state, edit, order="hilbert", refresh=2, **parameters), Skip)
        return Skip("on second thoughts")

    entry = registry.Method("blocks", "refuse", predict_and_refuse)
    registry.methods()
    monkeypatch.setitem(registry._methods, ("blocks", "refuse"), entry)
    capture = Capture(plan={"layers": {"0": {"blocks": "refuse"}, "1": {"blocks": {"method": "predict", **BLOCKS}}}})
    model, x = build(SPEC), scene()
    out = run(model, x, capture=capture)
    assert constants(capture.graphs[0]) == []
    assert [row.reason for row in capture.report.global_rows] == ["on second thoughts", None]
    torch._dynamo.reset()
    assert torch.equal(out, run(model, x, capture=Capture(plan=plan(layers="1"))))


# One choice for several layers
