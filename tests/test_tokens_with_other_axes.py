"""Merged tokens whose keys are then thinned, or read by blocks: against a mask over what has merged, laws, refusals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import alternating
import blocks_oracle
import keys_oracle
import pytest
import test_merge_queries
import torch
from alternating import Spec, build
from axes import by_hand
from harness import Capture, exported, nodes, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokens_oracle import compared_by, grouped, joined, merges, one_by_one, roles, unit
from torch import Tensor

from vggt_compile import collect_densities, collect_reports, vggt_sparse
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.ops.select_blocks import select_blocks

SPEC = Spec(head_dim=16)
ONE = Spec(head_dim=16, pairs=1)
GRID = (5, 7)
SIZES = {"q_block": 32, "k_block": 16}
ROLES = ("special", "reference", "cell", "protected", "source")


def plan(tokens: dict | None, keys: dict | None = None, blocks: dict | None = None) -> dict:
    policy: dict[str, Any] = {} if tokens is None else {"tokens": {"method": "merge", **tokens}}
    policy |= {} if keys is None else {"keys": {"method": "grid", **keys}}
    policy |= {} if blocks is None else {"blocks": {"method": "predict", **SIZES, **blocks}}
    return {"layers": {"*": policy}}


def scene(batch: int = 1, frames: int = 4, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    return alternating.images(SPEC, batch, frames, grid, seed)


def thinned(names: list[str], frames: int, grid: tuple[int, int], tokens: dict, keys: dict | None) -> Tensor:
    """Which merged keys are read, where those that stand for cells are thinned as patches are without merging."""
    read = torch.ones(len(names), dtype=torch.bool)
    if keys is None:
        return read
    whole = tokens.get("reference", True)
    cells = tuple(-(-lines // step) for lines, step in zip(grid, tokens.get("cell", (2, 2)), strict=True))
    setting = {**keys, "keep_first_frame": keys.get("keep_first_frame", False) and not whole}
    read[[name == "cell" for name in names]] = keys_oracle.kept(frames - int(whole), cells, 0, setting)
    return read


def together(
    frames: int, grid: tuple[int, int], tokens: dict, keys: dict | None, blocks: dict | None, special: int = 5
) -> Callable:
    """Attention between what has merged, as a mask over all of its pairs."""
    if tokens.get("method") == "merge_queries":
        return between(frames, grid, tokens, keys, blocks, special)
    role = roles(frames, grid, special, tokens)
    merging = frames - int(tokens.get("reference", True))
    limit = merging * int(round(tokens.get("ratio", 0.9) * 10_000) * (special + math.prod(grid)) / 10_000)

    def item(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        compared = compared_by(tokens, q[None], k[None])[0]
        groups = grouped(role, unit(compared.to(v.dtype)), limit)
        groups.sort(key=lambda group: (ROLES.index(role[group[0]]), group[0]))
        names = [role[group[0]] for group in groups]
        read = thinned(names, frames, grid, tokens, keys)
        bias = torch.tensor([math.log(len(group)) for group in groups]) if tokens.get("weight") else None
        first = frames * special
        always = [i for i, name in enumerate(names) if (name != "cell" if keys is not None else i < first)]
        listed = [i for i in range(len(names)) if i not in set(always) and read[i]]
        q, k, v = (torch.stack([x[:, group].mean(1) for group in groups], 1)[None] for x in (q, k, v))
        allowed = visible(q, k, list(range(first, len(groups))), listed, read, blocks)
        out = keys_oracle.attention(q, k, v, read, allowed, keys or {}, bias=bias)
        return spread(out[0], groups)

    return lambda q, k, v: torch.stack([item(*operands) for operands in zip(q, k, v, strict=True)])


def between(
    frames: int, grid: tuple[int, int], tokens: dict, keys: dict | None, blocks: dict | None, special: int
) -> Callable:
    """The same where only queries have merged, and keys are the model's."""
    parts = test_merge_queries.parts(frames, grid, special, tokens)
    role = roles(frames, grid, special, {**tokens, "protect": 0.0, "reference": tokens.get("reference", False)})
    count = frames * (special + math.prod(grid))
    read = torch.ones(count, dtype=torch.bool) if keys is None else keys_oracle.kept(frames, grid, special, keys)
    listed = [i for i in range(count) if i % (special + math.prod(grid)) >= special and read[i]]

    def item(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = joined(unit(compared_by({"metric": "queries"}, q[None], k[None])[0]), parts, count)
        groups.sort(key=lambda group: (ROLES.index(role[group[0]]), group[0]))
        q, k, v = (
            torch.stack([x[:, group].mean(1) for group in merged], 1)[None]
            for x, merged in ((q, groups), (k, one_by_one(count)), (v, one_by_one(count)))
        )
        allowed = visible(q, k, list(range(frames * special, len(groups))), listed, read, blocks)
        return spread(keys_oracle.attention(q, k, v, read, allowed, keys or {})[0], groups)

    return lambda q, k, v: torch.stack([item(*operands) for operands in zip(q, k, v, strict=True)])


def visible(q: Tensor, k: Tensor, patches: list[int], listed: list[int], read: Tensor, blocks: dict | None) -> Tensor:
    """Which pairs are read, [1, H, queries, keys]: lists of blocks spread out pair by pair."""
    allowed = read.expand(*q.shape[:3], -1).clone()
    if blocks is None:
        return allowed
    choose = functools.partial(select_blocks, **{"keep": 0.25, **blocks}, **SIZES)
    pairs = blocks_oracle.mask(*choose(q[:, :, patches], k[:, :, listed]), -(-len(listed) // SIZES["k_block"]))
    pairs = pairs.repeat_interleave(SIZES["q_block"], 2).repeat_interleave(SIZES["k_block"], 3)
    allowed[:, :, torch.tensor(patches)[:, None], torch.tensor(listed)] = pairs[:, :, : len(patches), : len(listed)]
    return allowed


def spread(out: Tensor, groups: list[list[int]]) -> Tensor:
    result = torch.empty(out.shape[0], sum(map(len, groups)), out.shape[2], dtype=out.dtype)
    for i, group in enumerate(groups):
        result[:, group] = out[:, i : i + 1]
    return result


SPARK: dict[str, Any] = {"method": "merge_queries", "frames": 2}
CASES: list[tuple[dict, dict | None, dict | None]] = [
    ({}, {}, None),
    ({"ratio": 0.4}, {"own_key": True, "mean_key": "one"}, None),
    ({"weight": "log_count"}, {"stride": [3, 3], "kept": [2, 2], "phase": "shifted"}, None),
    ({"reference": False}, {"keep_first_frame": True, "own_key": True, "mean_key": "count"}, None),
    ({"reference": False, "cells": "seeded"}, {"frames": 2, "stride": [1, 2]}, None),
    ({}, None, {"keep": 0.3}),
    ({"ratio": 0.3, "weight": "log_count"}, None, {"keep": 0.0, "cdf": 0.6, "coverage": "reach", "most": 1.0}),
    ({"cell": [1, 2], "weight": "log_count"}, {"stride": [1, 2]}, {"keep": 0.4}),
    ({"cell": [1, 2]}, {"stride": [2, 1], "own_key": True, "mean_key": "one"}, {"keep": 0.4}),
    (SPARK, {"stride": [1, 1], "frames": 2}, None),
    (SPARK, {"stride": [2, 2], "mean_key": "count", "phase": "shifted", "keep_first_frame": True}, None),
    (SPARK, None, {"keep": 0.3}),
    ({**SPARK, "reference": True}, {"stride": [1, 2]}, {"keep": 0.3}),
]


@pytest.mark.parametrize(("tokens", "keys", "blocks"), CASES)
@pytest.mark.parametrize(("batch", "special"), [(2, 5), (1, 0)])
def test_axes_after_merged_tokens_are_a_mask(
    tokens: dict, keys: dict | None, blocks: dict | None, batch: int, special: int
) -> None:
    model, x = build(Spec(head_dim=16, pairs=1, special=special)).double(), scene(batch).double()
    out = run(model, x, capture=Capture(plan=plan(tokens, keys, blocks), strict=True))
    want = by_hand(model, x, together(4, GRID, tokens, keys, blocks, special))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)  # weights are fp32


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, tuple[int, int], int, dict, dict]:
    """Frames, grid, special tokens, and parameters of both axes."""
    frames, grid, special, tokens = draw(merges())
    tokens |= {"ratio": draw(st.sampled_from([0.2, 0.9]))}
    keys = {
        "stride": [draw(st.integers(1, 3)), draw(st.integers(1, 3))],
        "kept": [draw(st.integers(1, 2)), draw(st.integers(1, 2))],
        "frames": draw(st.integers(1, 3)),
        "phase": draw(st.sampled_from(["fixed", "shifted"])),
        "keep_first_frame": draw(st.booleans()),
        "own_key": draw(st.booleans()),
        "mean_key": draw(st.sampled_from(["none", "one", "count"])),
    }
    return max(2, frames), (grid[0], grid[1] + 1), special, tokens, keys


@given(case=cases())
@settings(max_examples=20)
def test_any_setting_of_tokens_and_keys_is_a_mask(case: tuple) -> None:
    frames, grid, special, tokens, keys = case
    assume("source" in roles(frames, grid, special, tokens) and int(tokens["ratio"] * (special + math.prod(grid))))
    model, x = build(Spec(pairs=1, special=special)).double(), scene(1, frames, grid).double()
    torch._dynamo.reset()
    out = run(model, x, capture=Capture(plan=plan(tokens, keys), strict=True))
    want = by_hand(model, x, together(frames, grid, tokens, keys, None, special))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)


HEADS: dict[str, Any] = {"method": "merge_heads", "patches": 6, "frames": 3}
FULL: list[tuple[dict, dict | None]] = [
    ({}, None),
    ({"ratio": 0.3, "weight": "log_count"}, None),
    ({"cell": [1, 2]}, {"own_key": True, "mean_key": "one"}),
    (SPARK, {"mean_key": "count"}),
    (HEADS, None),
    ({**HEADS, "weight": "log_count", "reference": True}, None),
    ({**HEADS, "keys": 0.0}, {"stride": [2, 2]}),
]


@pytest.mark.parametrize(("tokens", "keys"), FULL)
def test_all_blocks_are_the_other_axes_alone(tokens: dict, keys: dict | None) -> None:
    model, x = build(ONE).double(), scene(2).double()
    alone = run(model, x, capture=(few := Capture(plan=plan(tokens, keys), strict=True)))
    torch._dynamo.reset()
    both = run(model, x, capture=(capture := Capture(plan=plan(tokens, keys, {"keep": 1.0}), strict=True)))
    torch.testing.assert_close(both, alone, rtol=1e-9, atol=1e-10)
    assert capture.report.attention_left() == few.report.attention_left() < 1


@pytest.mark.parametrize("tokens", [{"ratio": 0.0}, {**SPARK, "cell": [1, 1]}, {**HEADS, "queries": 0.0, "keys": 0.0}])
def test_tokens_that_do_not_merge_leave_the_other_axes_alone(tokens: dict) -> None:
    model, x = build(ONE).double(), scene(2).double()
    keys, blocks = {"own_key": True, "mean_key": "one"}, {"keep": 0.3, "order": "hilbert"}
    alone = run(model, x, capture=Capture(plan=plan(None, keys, blocks), strict=True))
    torch._dynamo.reset()
    both = run(model, x, capture=Capture(plan=plan(tokens, keys, blocks), strict=True))
    assert torch.equal(both, alone)


@pytest.mark.parametrize("tokens", [{}, SPARK])
def test_windows_of_one_cell_leave_merged_tokens_alone(tokens: dict) -> None:
    model, x = build(ONE).double(), scene(2).double()
    alone = run(model, x, capture=Capture(plan=plan(tokens), strict=True))
    torch._dynamo.reset()
    both = run(model, x, capture=Capture(plan=plan(tokens, {"stride": [1, 1], "mean_key": "count"}), strict=True))
    torch.testing.assert_close(both, alone, rtol=1e-6, atol=1e-7)


REFUSED: list[tuple[dict, str]] = [
    (plan({}, None, {"order": "hilbert"}), "order='hilbert' walks through a grid of patches, and merged tokens have"),
    (plan({}, None, {"keep_first_frame": True}), "keep_first_frame knows the patches of the first frame no more"),
    (plan(HEADS, {}), "its keys have merged in each head by itself, and those that are left lie in no grid"),
    (plan(SPARK, {"own_key": True}), "own_key asks for the key of a query's own token, and its queries have merged"),
    (plan({"weight": "log_count"}, {"mean_key": "one"}), "own_key and mean_key count every key once, and its merged"),
    (
        {"layers": {"*": {"scope": "frame", "tokens": "merge"}}},
        "tokens are not merged after another axis yet, and scope",
    ),
]


@pytest.mark.parametrize(("both", "reason"), REFUSED)
def test_what_has_no_clear_meaning_is_refused(both: dict, reason: str) -> None:
    run(build(SPEC), scene(), capture=(capture := Capture(plan=both)))
    assert all((row.reason or "").startswith(reason) for row in capture.report.global_rows)
    assert nodes(capture.graphs[0]) == capture.before[0]


@pytest.mark.parametrize(("tokens", "keys"), [({}, {"stride": [2, 1]}), (SPARK, {"stride": [1, 1], "frames": 2})])
def test_report_and_density_count_pairs_against_all_tokens(tokens: dict, keys: dict) -> None:
    options = {"plan": plan(tokens, keys, {"keep": 1.0}), "densities": True, "strict": True}
    with torch.no_grad(), collect_reports() as reports, collect_densities() as densities:
        torch.compile(build(SPEC), backend=vggt_sparse_eager, dynamic=False, options=options)(scene(2))
    joint = (20 + 35 + 3 * 14) * (20 + 35 + 3 * (2 + 8))  # 3·4 cells and 2 protected; every second row of cells
    pairs = joint if tokens == {} else (20 + 4 * 12) * (20 + 2 * 35)
    for row, found in zip(reports[0].rewritten, densities.rows, strict=True):
        assert row.flops_after == 2 * 4 * 2 * 16 * pairs
        assert found.density == pytest.approx(pairs / 160**2)


@pytest.mark.parametrize(("tokens", "keys", "blocks"), [CASES[2], CASES[7], CASES[12]])
def test_exported_graphs_give_the_same_numbers(tokens: dict, keys: dict, blocks: dict | None) -> None:
    model, x, auto = build(ONE).double(), scene(2).double(), torch.export.Dim.AUTO
    gm, report = exported(model, x, plan(tokens, keys, blocks), {0: auto, 1: auto, 3: auto, 4: auto})
    assert len(report.rewritten) == 1
    want = by_hand(model, x, together(4, GRID, tokens, keys, blocks))
    torch.testing.assert_close(gm(x), want, rtol=1e-6, atol=1e-7)


COMPILED = [CASES[7], CASES[12], (HEADS, None, {"keep": 0.4})]


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "keys", "blocks"), COMPILED)
def test_compiled_is_what_the_rewritten_graph_computes(tokens: dict, keys: dict | None, blocks: dict | None) -> None:
    model, x = build(ONE), scene(2)
    eager = run(model, x, capture=Capture(plan=plan(tokens, keys, blocks)))
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as reports:
        options = {"plan": plan(tokens, keys, blocks), "strict": True}
        compiled = torch.compile(model, backend=vggt_sparse, options=options)(x)
    assert len(reports[0].rewritten) == 1
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_compile_serves_all_frame_counts() -> None:
    model, setting = build(ONE), plan(SPARK, {"stride": [1, 1], "frames": 3})
    compiled = torch.compile(model, backend=vggt_sparse, options={"plan": setting, "strict": True})
    with torch.no_grad():
        wanted = [run(model, scene(2, frames), capture=Capture(plan=setting)) for frames in (7, 4, 9)]
        with collect_reports() as reports:
            for frames, want in zip((7, 4, 9), wanted, strict=True):
                x = scene(2, frames)
                torch._dynamo.mark_dynamic(x, 1)
                torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
    assert len(reports) == 1
