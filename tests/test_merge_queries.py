"""Queries that merge inside groups of frames, alone and with thinned keys: against loops, laws, refusals, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from axes import by_hand, lowered, wide_queries
from harness import Capture, exported, run
from hypothesis import given, settings
from hypothesis import strategies as st
from modelutils import images as pictures
from modelutils import randomized, worst
from tokens_oracle import attended_apart, compared_by, input_of, joined, merges, one_by_one, roles, unit
from torch import Tensor

from vggt_compile.models import pi3

SPEC = Spec(head_dim=16)
ONE = Spec(head_dim=16, pairs=1)
GRID = (5, 7)


def plan(**parameters: Any) -> dict:
    return {"layers": {"*": {"tokens": {"method": "merge_queries", **parameters}}}}


def scene(batch: int = 1, frames: int = 5, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    return alternating.images(SPEC, batch, frames, grid, seed)


def parts(frames: int, grid: tuple[int, int], special: int, setting: dict) -> list[tuple[list[int], list[int]]]:
    """Sources and destinations of each group of frames."""
    reference = setting.get("reference", False)
    role = roles(frames, grid, special, {**setting, "protect": 0.0, "reference": reference})
    per_frame, each = special + grid[0] * grid[1], setting.get("frames", 20)
    found = []
    for start in range(int(reference), frames, each):
        tokens = range(start * per_frame, min(start + each, frames) * per_frame)
        found.append(([i for i in tokens if role[i] == "source"], [i for i in tokens if role[i] == "cell"]))
    return found


def merging(
    frames: int, grid: tuple[int, int], setting: dict, special: int = 5, features: Callable | None = None
) -> Callable:
    groups_of = parts(frames, grid, special, setting)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)
        named = {"metric": "queries", **setting}
        compared = compared_by(named, q, k) if features is None else features(q, k)
        outs, tokens = [], q.shape[2]
        for item in range(len(q)):
            queries = joined(unit(compared[item].to(v.dtype)), groups_of, tokens)
            outs.append(attended_apart(q[item], k[item], v[item], queries, one_by_one(tokens)))
        return torch.stack(outs).to(v.dtype)

    return core


SETTINGS: list[dict[str, Any]] = [
    {},
    {"frames": 2},
    {"frames": 3, "cell": [1, 3], "metric": "keys"},
    {"frames": 1, "cells": "seeded", "seed": 3},
    {"frames": 2, "reference": True, "cell": [3, 2]},
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("batch", "special"), [(2, 5), (1, 0)])
def test_merged_queries_are_what_loops_give(setting: dict, batch: int, special: int) -> None:
    model, x = build(Spec(head_dim=16, pairs=1, special=special)).double(), scene(batch).double()
    out = run(model, x, capture=(capture := Capture(plan=plan(**setting), strict=True)))
    assert [row.implementation for row in capture.report.rewritten] == ["sdpa"]
    torch.testing.assert_close(out, by_hand(model, x, merging(5, GRID, setting, special)), rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        assert (out - model(x)).abs().max() > 1e-3


@given(case=merges(), each=st.integers(1, 4))
@settings(max_examples=15)
def test_any_setting_is_what_loops_give(case: tuple, each: int) -> None:
    frames, (rows, columns), special, setting = case
    setting = {name: value for name, value in setting.items() if name != "protect"} | {"frames": each}
    frames, grid = max(2, frames), (rows, columns + 1)
    model, x = build(Spec(pairs=1, special=special)).double(), scene(2, frames, grid).double()
    torch._dynamo.reset()
    out = run(model, x, capture=Capture(plan=plan(**setting), strict=True))
    torch.testing.assert_close(out, by_hand(model, x, merging(frames, grid, setting, special)), rtol=1e-9, atol=1e-10)


def test_tokens_may_be_compared_by_the_input_of_the_attention() -> None:
    model, x = build(SPEC).double(), scene().double()
    out = run(model, x, capture=Capture(plan=plan(metric="input", frames=2), strict=True))
    want = by_hand(model, x, merging(5, GRID, {"frames": 2}, features=input_of(model)))
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)


def test_cells_of_one_patch_are_the_dense_attention() -> None:
    model, x = build(SPEC), scene(2)
    out = run(model, x, capture=(capture := Capture(plan=plan(cell=[1, 1]), strict=True)))
    assert capture.report.attention_left() == 1.0
    with torch.no_grad():
        assert torch.equal(out, model(x))


def test_equal_queries_lose_nothing() -> None:
    """Patches of one colour are equal tokens, in one frame as in the other."""
    model, x = build(SPEC).double(), torch.ones(2, 4, 3, 10, 14, dtype=torch.float64)
    out = run(model, x, capture=Capture(plan=plan(cell=[3, 3]), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(out, model(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["merge_queries", "merge_heads"])
@pytest.mark.parametrize("reference", [False, True])
def test_queries_of_special_tokens_and_of_a_reference_stay_alone(
    method: str, reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = {"layers": {"*": {"tokens": {"method": method, "reference": reference}}}}
    site, state, values = lowered(build(ONE), scene(2), setting, monkeypatch)
    before, after = values[site.call.q.name].unflatten(2, (5, 40)), values[state.q.name]
    special = before[:, :, :, :5].flatten(2, 3)
    want = torch.cat((special, before[:, :, 0, 5:]), 2) if reference else special
    assert (state.merged.special, state.merged.reference) == (25, 35 * reference)
    assert torch.equal(after[:, :, : want.shape[2]], want)
    assert after.shape[2] == state.merged.queries


def test_one_frame_is_all_reference() -> None:
    run(build(SPEC), scene(frames=1), capture=(capture := Capture(plan=plan(reference=True))))
    assert all("there is one frame only" in (row.reason or "") for row in capture.report.global_rows)


def test_batch_items_do_not_mix() -> None:
    model, both = build(SPEC), torch.cat((scene(), scene(seed=1)))
    together = run(model, both, capture=Capture(plan=plan(frames=2)))
    for index in range(2):
        torch._dynamo.reset()
        alone = run(model, both[index : index + 1], capture=Capture(plan=plan(frames=2)))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_order_of_frames_does_not_matter_inside_a_group() -> None:
    model, x, order = randomized(pi3("tiny")), pictures(1, 4, 3, 56, 70), [2, 0, 3, 1]
    out = run(model, x, capture=Capture(plan=plan(), strict=True))
    torch._dynamo.reset()
    permuted = run(model, x[:, order], capture=Capture(plan=plan(), strict=True))
    assert worst(permuted, {name: value[:, order] for name, value in out.items()}) < 1e-3


@pytest.mark.parametrize("core", [alternating.sdpa, wide_queries])
def test_autocast(core: Callable) -> None:
    """In one layer: after a rounding the next may find other tokens alike."""
    model, x = build(Spec(head_dim=16, pairs=1, core=core)), scene(2)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = run(model, x, capture=Capture(plan=plan(frames=2), strict=True))
        want, dense = by_hand(model, x, merging(5, GRID, {"frames": 2})), model(x)
    assert out.dtype == dense.dtype
    assert (out - want).norm() < 2e-3 * want.norm() < 0.1 * (dense - want).norm()


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_graphs_give_the_same_numbers(dynamic: bool) -> None:
    model, x, auto = build(SPEC), scene(2), torch.export.Dim.AUTO
    gm, report = exported(model, x, plan(frames=2), {0: auto, 1: auto, 3: auto, 4: auto} if dynamic else None)
    assert len(report.rewritten) == 2
    torch.testing.assert_close(gm(x), by_hand(model, x, merging(5, GRID, {"frames": 2})), rtol=1e-4, atol=1e-5)


PAIRS = [({}, 25 + 5 * 12), ({"reference": True}, 25 + 35 + 4 * 12), ({"cell": [9, 9]}, 25 + 5)]


@pytest.mark.parametrize(("setting", "queries"), PAIRS)
def test_flops_count_the_queries_that_are_left(setting: dict, queries: int) -> None:
    run(build(SPEC), scene(2), capture=(capture := Capture(plan=plan(**setting), strict=True)))
    row = capture.report.global_rows[0]
    assert row.flops_after == 2 * 4 * 2 * 16 * queries * 200
    assert row.keys == 200
    assert row.flops_before == 2 * 4 * 2 * 16 * 200**2


def test_the_report_shows_what_was_chosen() -> None:
    run(build(SPEC), scene(), capture=(capture := Capture(plan=plan(frames=4, cells="seeded"))))
    shown = capture.report.to_dict()["rows"][1]["axes"]["tokens"]
    want = {"method": "merge_queries", "cell": [2, 2], "frames": 4, "cells": "seeded", "seed": 0, "metric": "queries"}
    assert shown == want
