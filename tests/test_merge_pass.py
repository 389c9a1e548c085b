"""Merged tokens in models: what they compute against loops by hand, laws, dtypes, symbolic sizes, and compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from axes import by_hand, lowered, wide_queries
from harness import Capture, exported, nodes, run
from hypothesis import given, settings
from hypothesis import strategies as st
from modelutils import images as pictures
from modelutils import worst
from regions import small
from tokens_oracle import grouped, input_of, merges, merging, roles, unit
from torch import Tensor
from torch._functorch._aot_autograd.autograd_cache import check_node_safe

from vggt_compile import collect_reports, vggt_sparse
from vggt_compile.sources import _files

SPEC = Spec(head_dim=16)
ONE = Spec(head_dim=16, pairs=1)
GRID = (5, 7)


def plan(layers: str = "*", **parameters: Any) -> dict:
    return {"layers": {layers: {"tokens": {"method": "merge", **parameters}}}}


def scene(batch: int = 1, frames: int = 4, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    return alternating.images(SPEC, batch, frames, grid, seed)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"ratio": 0.4},
    {"ratio": 0.25, "protect": 0.33, "metric": "queries"},
    {"cell": [1, 3], "weight": "log_count"},
    {"cell": [9, 9], "protect": 0.0, "ratio": 1.0},
    {"cells": "seeded", "seed": 3, "weight": "log_count", "ratio": 0.5},
    {"reference": False, "cells": "seeded"},
    {"reference": False, "cell": [3, 2], "protect": 0.5, "metric": "queries"},
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("batch", "special"), [(2, 5), (1, 1), (1, 0)])
def test_merged_tokens_are_what_loops_give(setting: dict, batch: int, special: int) -> None:
    model, x = build(Spec(head_dim=16, pairs=1, special=special)).double(), scene(batch).double()
    out = run(model, x, capture=(capture := Capture(plan=plan(**setting), strict=True)))
    weighted = setting.get("weight") == "log_count"
    assert [row.implementation for row in capture.report.rewritten] == ["weighted" if weighted else "sdpa"]
    want = by_hand(model, x, merging(4, GRID, setting, special))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)  # weights are fp32
    with torch.no_grad():
        assert (out - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_may_be_compared_by_the_input_of_the_attention(batch: int) -> None:
    model, x = build(SPEC).double(), scene(batch).double()
    out = run(model, x, capture=Capture(plan=plan(metric="input"), strict=True))
    want = by_hand(model, x, merging(4, GRID, {}, features=input_of(model)))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)


def test_a_projection_that_is_not_found_is_refused() -> None:
    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return alternating.sdpa(q, k, v + q)

    run(build(Spec(core=mixed)), scene(), capture=(capture := Capture(plan=plan(metric="input"))))
    assert all("its values are no projection" in (row.reason or "") for row in capture.report.global_rows)
    assert nodes(capture.graphs[0]) == capture.before[0]


@pytest.mark.parametrize("setting", [{"ratio": 0}, {"protect": 1}, {"cell": [1, 1]}])
@pytest.mark.parametrize("reference", [True, False])
def test_nothing_that_merges_is_the_dense_attention(setting: dict, reference: bool) -> None:
    model, x = build(SPEC), scene(2)
    capture = Capture(plan=plan(**setting, reference=reference, weight="log_count"), strict=True)
    out = run(model, x, capture=capture)
    assert capture.report.attention_left() == 1.0
    with torch.no_grad():
        assert torch.equal(out, model(x))


def test_equal_tokens_counted_as_often_lose_nothing() -> None:
    """Patches of one colour are equal tokens, in one frame as in the other."""
    model, x = build(SPEC).double(), torch.ones(2, 4, 3, 10, 14, dtype=torch.float64)
    out = run(model, x, capture=Capture(plan=plan(weight="log_count"), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(out, model(x), rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()
    once = run(model, x, capture=Capture(plan=plan(weight="none")))
    with torch.no_grad():
        assert (once - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("setting", [{"ratio": 0.4}, {"weight": "log_count", "cells": "seeded"}])
def test_batch_items_do_not_mix(setting: dict) -> None:
    model, both = build(SPEC), torch.cat((scene(), scene(seed=1)))
    together = run(model, both, capture=Capture(plan=plan(**setting)))
    for index in range(2):
        torch._dynamo.reset()
        alone = run(model, both[index : index + 1], capture=Capture(plan=plan(**setting)))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_order_of_frames_does_not_matter_without_a_reference() -> None:
    model, x, order = small("pi3", layers=1), pictures(1, 4, 3, 56, 70), [2, 0, 3, 1]
    out = run(model, x, capture=Capture(plan=plan(reference=False), strict=True))
    torch._dynamo.reset()
    permuted = run(model, x[:, order], capture=Capture(plan=plan(reference=False), strict=True))
    assert worst(permuted, {name: value[:, order] for name, value in out.items()}) < 1e-3


@given(case=merges(), ratio=st.sampled_from([0.2, 0.5, 0.9]), weight=st.sampled_from(["none", "log_count"]))
@settings(max_examples=15)
def test_any_setting_is_what_loops_give(case: tuple, ratio: float, weight: str) -> None:
    frames, (rows, columns), special, setting = case
    setting, frames, grid = {**setting, "ratio": ratio, "weight": weight}, max(2, frames), (rows, columns + 1)
    model, x = build(Spec(pairs=1, special=special)).double(), scene(2, frames, grid).double()
    torch._dynamo.reset()
    out = run(model, x, capture=Capture(plan=plan(**setting), strict=True))
    want = by_hand(model, x, merging(frames, grid, setting, special))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)


def test_scale_is_carried() -> None:
    """Of a model whose logits are scaled by 0.3, as if its queries were longer."""
    model, x = build(Spec(head_dim=16, pairs=1, core=alternating.scaled)).double(), scene().double()
    out = run(model, x, capture=Capture(plan=plan()))
    hand = merging(4, GRID, {})
    want = by_hand(model, x, lambda q, k, v: hand(q * 0.3 * 4, k, v))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("setting", [{}, {"ratio": 0.4, "weight": "log_count", "metric": "queries"}])
@pytest.mark.parametrize("core", [alternating.sdpa, wide_queries])
@pytest.mark.parametrize("context", [contextlib.nullcontext, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_dtypes_and_autocast(context: Callable, core: Callable, setting: dict) -> None:
    """In one layer: after a rounding the next may find other tokens alike."""
    model, x = build(Spec(head_dim=16, pairs=1, core=core)), scene(2)
    with context(), torch.no_grad():
        out = run(model, x, capture=(capture := Capture(plan=plan(**setting), strict=True)))
        want = by_hand(model, x, merging(4, GRID, setting))
        dense = model(x)
    assert out.dtype == dense.dtype
    assert (out - want).norm() < 2e-3 * want.norm() < 0.1 * (dense - want).norm()
    for node in capture.graphs[0].graph.nodes:
        check_node_safe(node)  # raises for what AOTAutograd would not cache


DYNAMIC: list[dict[str, Any]] = [
    {"cells": "seeded"},
    {"ratio": 0.4, "weight": "log_count", "metric": "input"},
    {"reference": False, "cell": [3, 2]},
]


@pytest.mark.slow
@pytest.mark.parametrize("setting", DYNAMIC)
def test_one_graph_serves_all_frame_counts(setting: dict) -> None:
    model, capture = build(ONE).double(), Capture(plan=plan(**setting), strict=True)
    for batch, frames, grid in ((2, 4, GRID), (3, 9, (6, 5)), (2, 2, (8, 9)), (2, 5, (3, 4))):
        x = scene(batch, frames, grid).double()
        out = run(model, x, capture=capture, dynamic=True)
        features = input_of(model) if setting.get("metric") == "input" else None
        want = by_hand(model, x, merging(frames, grid, setting, features=features))
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)
        for block in model.global_blocks:
            block.attn._forward_pre_hooks.clear()
    assert len(capture.graphs) == 1
    assert capture.reports[0].dynamic


def test_whether_all_sources_merge_is_known_without_the_number_of_frames() -> None:
    model, x, auto = build(SPEC), scene(2), torch.export.Dim.AUTO
    for ratio, chooses in ((0.9, False), (0.4, True)):
        gm, _ = exported(model, x, plan(ratio=ratio), {1: auto})
        calls = [n for n in gm.graph.nodes if n.target is torch.ops.vggt_compile.token_groups.default]
        assert [call.args[3] is not None for call in calls] == [chooses] * 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_graphs_give_the_same_numbers(dynamic: bool) -> None:
    model, x, auto = build(SPEC), scene(2), torch.export.Dim.AUTO
    setting = {"ratio": 0.4, "weight": "log_count"}
    gm, report = exported(model, x, plan(**setting), {0: auto, 1: auto, 3: auto, 4: auto} if dynamic else None)
    assert len(report.rewritten) == 2
    torch.testing.assert_close(gm(x), by_hand(model, x, merging(4, GRID, setting)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vggt", "pi3"])
@pytest.mark.parametrize("metric", ["keys", "input"])
def test_the_models_of_this_package(name: str, metric: str) -> None:
    model, x = small(name), pictures(1, 3, 3, 56, 70)
    setting = plan(metric=metric, reference=name == "vggt")
    out = run(model, x, capture=(capture := Capture(plan=setting, strict=True)))
    assert all(row.axes["tokens"]["metric"] == metric for row in capture.report.global_rows)
    assert all(row.flops_after < row.flops_before for row in capture.report.global_rows)
    with torch.no_grad():
        assert 1e-3 < worst(out, model(x)) < 100


def test_special_tokens_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axes that act later may choose among the others only."""
    site, state, values = lowered(build(ONE), scene(2), plan(weight="log_count"), monkeypatch)
    before, after, weight = (values[node.name] for node in (site.call.k, state.k, state.key_log_weight))
    assert state.always == 20
    assert weight.shape == (2, 1, after.shape[2])
    for item in range(2):
        groups = grouped(roles(4, GRID, 5, {}), unit(before[item].double().mean(0)), limit=160)
        special = [group for group in groups if group[0] % 40 < 5]
        want = torch.stack([before[item][:, group].mean(1) for group in special], 1)
        torch.testing.assert_close(after[item, :, :20], want)
        assert weight[item, 0, :20].exp().round().tolist() == list(map(len, special))


@pytest.mark.slow
def test_compiled_is_what_the_rewritten_graph_computes() -> None:
    model, x, setting = build(ONE), scene(2), {"metric": "input"}
    eager = run(model, x, capture=Capture(plan=plan(**setting)))
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as reports:
        options = {"plan": plan(**setting), "strict": True}
        compiled = torch.compile(model, backend=vggt_sparse, options=options)(x)
    assert len(reports[0].rewritten) == 1
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_compile_serves_all_frame_counts() -> None:
    setting = {"ratio": 0.4, "weight": "log_count", "cells": "seeded"}
    model = build(ONE)
    compiled = torch.compile(model, backend=vggt_sparse, options={"plan": plan(**setting), "strict": True})
    with torch.no_grad(), collect_reports() as reports:
        for frames in (6, 4, 9):
            x = scene(2, frames)
            torch._dynamo.mark_dynamic(x, 1)
            want = by_hand(model, x, merging(frames, GRID, setting))
            torch.testing.assert_close(compiled(x), want.float(), rtol=1e-4, atol=1e-5)
    assert len(reports) == 1


def test_operators_take_part_in_the_cache_key() -> None:
    import vggt_compile

    names = {name for name, _ in _files(vggt_compile)}
    assert {f"vggt_compile:ops/{name}.py" for name in ("match_tokens", "token_groups", "token_roles")} <= names
