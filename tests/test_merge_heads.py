"""Queries and keys that merge in each head by itself: the order of tokens, against loops, laws, refusals, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from axes import by_hand, wide_queries
from harness import Capture, exported, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tokens_oracle import attended_apart, joined, unit
from torch import Tensor

from vggt_compile.ops.temporal_order import temporal_order

SPEC = Spec(head_dim=16)
GRID = (5, 7)
SMALL = {"patches": 6, "frames": 3}


def plan(**parameters: Any) -> dict:
    return {"layers": {"*": {"tokens": {"method": "merge_heads", **SMALL, **parameters}}}}


def scene(batch: int = 1, frames: int = 5, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    return alternating.images(SPEC, batch, frames, grid, seed)


def sequence(frames: int, patches: int, special: int, each: int, reference: bool) -> list[int]:
    """Patches window by window, in a window place by place, at a place frame by frame."""
    found = []
    for start in range(int(reference), frames, each):
        for patch in range(patches):
            window = range(start, min(start + each, frames))
            found += [frame * (special + patches) + special + patch for frame in window]
    return found


def stay(share: float, run: int) -> int:
    return max(1, run - int(round(share * 10_000) * run / 10_000))


def blocks(tokens: list[int], share: float, run: int) -> list[tuple[list[int], list[int]]]:
    """Sources and destinations of each run of a sequence."""
    found, number = [], stay(share, run)
    for start in range(0, len(tokens), run):
        block = tokens[start : start + run]
        stands = [i * number % run < number for i in range(len(block))]
        sources = [token for token, it in zip(block, stands, strict=True) if not it]
        found.append((sources, [token for token, it in zip(block, stands, strict=True) if it]))
    return found


def merging(frames: int, grid: tuple[int, int], setting: dict, special: int = 5) -> Callable:
    setting = {"queries": 0.9, "outliers": 0.1, "keys": 0.7, "reference": False, **SMALL, **setting}
    order = sequence(frames, grid[0] * grid[1], special, setting["frames"], setting["reference"])
    run = setting["patches"] * setting["frames"]
    q_parts, k_parts = (blocks(order, setting[name], run) for name in ("queries", "keys"))
    sources = [i for mine, _ in q_parts for i in mine]
    alone = min(len(sources), int(round(setting["outliers"] * 10_000) * len(order) / 10_000))

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)
        return torch.stack([item(*operands) for operands in zip(q, k, v, strict=True)]).to(v.dtype)

    def item(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[1]
        q_groups, k_groups = (
            [joined(unit(head), parts, tokens) for head in x] for x, parts in ((q, q_parts), (k, k_parts))
        )
        far = torch.zeros(tokens, dtype=torch.float64)
        for head, groups in zip(q.double(), q_groups, strict=True):
            for group in groups:
                far[group] += (head[group] - head[group].mean(0)).square().sum(-1)
        leave = set(sorted(sources, key=lambda i: float(far[i]))[len(sources) - alone :])
        outs = []
        for h, (queries, keys) in enumerate(zip(q_groups, k_groups, strict=True)):
            left = [[i for i in group if i not in leave] for group in queries] + [[i] for i in leave]
            heads = (x[h : h + 1] for x in (q, k, v))
            outs.append(attended_apart(*heads, left, keys, setting.get("weight") == "log_count"))
        return torch.cat(outs)

    return core


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 2), st.integers(1, 4), st.booleans(), st.integers(1, 8))
@settings(max_examples=100)
def test_tokens_lie_special_first_then_destinations_then_sources(
    frames: int, patches: int, special: int, each: int, reference: bool, run: int
) -> None:
    x = torch.empty(1, 1, frames * (special + patches), 1)
    tokens = sequence(frames, patches, special, each, reference)
    for number in range(1, run + 1):
        order = temporal_order(x, special, patches, each, reference, run, number).tolist()
        stands = [i for place, i in enumerate(tokens) if place * number % run < number]
        first = [i for i in range(x.shape[2]) if i % (special + patches) < special]
        first += [special + i for i in range(patches)] if reference else []
        assert order == first + stands + [i for i in tokens if i not in stands]
        assert len(stands) == (len(tokens) - 1) * number // run + 1


def test_the_operator_is_one_that_torch_knows() -> None:
    torch.library.opcheck(
        torch.ops.vggt_compile.temporal_order.default, (torch.empty(1, 1, 33, 1), 1, 10, 2, True, 7, 3)
    )


SETTINGS: list[dict[str, Any]] = [
    {},
    {"outliers": 0.0},
    {"queries": 0.5, "keys": 0.5, "weight": "log_count"},
    {"queries": 0.0, "keys": 0.8},
    {"queries": 0.8, "keys": 0.0, "reference": True},
    {"queries": 1.0, "keys": 1.0, "outliers": 0.3, "patches": 128, "frames": 30},
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("batch", "special"), [(2, 5), (1, 0)])
def test_heads_merge_as_loops_do(setting: dict, batch: int, special: int) -> None:
    model, x = build(Spec(head_dim=16, pairs=1, special=special)).double(), scene(batch).double()
    out = run(model, x, capture=(capture := Capture(plan=plan(**setting), strict=True)))
    weighted = setting.get("weight") == "log_count"
    assert [row.implementation for row in capture.report.rewritten] == ["weighted" if weighted else "sdpa"]
    torch.testing.assert_close(out, by_hand(model, x, merging(5, GRID, setting, special)), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        assert (out - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("setting", [{"queries": 0.0, "keys": 0.0}, {"patches": 1, "frames": 1}])
def test_nothing_that_merges_is_the_dense_attention(setting: dict) -> None:
    model, x = build(SPEC), scene(2)
    out = run(model, x, capture=(capture := Capture(plan=plan(**setting), strict=True)))
    assert capture.report.attention_left() == 1.0
    with torch.no_grad():
        assert torch.equal(out, model(x))


def test_equal_tokens_counted_as_often_lose_nothing() -> None:
    """Patches of one colour are equal tokens, in one frame as in the other."""
    model, x = build(SPEC).double(), torch.ones(2, 4, 3, 10, 14, dtype=torch.float64)
    out = run(model, x, capture=Capture(plan=plan(weight="log_count"), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(out, model(x), rtol=1e-6, atol=1e-7)


def test_batch_items_do_not_mix() -> None:
    model, both = build(SPEC), torch.cat((scene(), scene(seed=1)))
    together = run(model, both, capture=Capture(plan=plan()))
    for index in range(2):
        torch._dynamo.reset()
        alone = run(model, both[index : index + 1], capture=Capture(plan=plan()))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("core", [alternating.sdpa, wide_queries])
def test_autocast(core: Callable) -> None:
    """In one layer: after a rounding the next may find other tokens alike."""
    model, x = build(Spec(head_dim=16, pairs=1, core=core)), scene(2)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = run(model, x, capture=Capture(plan=plan(), strict=True))
        want, dense = by_hand(model, x, merging(5, GRID, {})), model(x)
    assert out.dtype == dense.dtype
    assert (out - want).norm() < 5e-3 * want.norm() < 0.1 * (dense - want).norm()


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_graphs_give_the_same_numbers(dynamic: bool) -> None:
    model, x, auto = build(SPEC), scene(2), torch.export.Dim.AUTO
    gm, report = exported(model, x, plan(), {0: auto, 1: auto, 3: auto, 4: auto} if dynamic else None)
    assert len(report.rewritten) == 2
    torch.testing.assert_close(gm(x), by_hand(model, x, merging(5, GRID, {})), rtol=1e-4, atol=1e-5)


def test_flops_count_what_is_left_of_queries_and_keys() -> None:
    run(build(SPEC), scene(2), capture=(capture := Capture(plan=plan(), strict=True)))
    row = capture.report.global_rows[0]
    patches, each = 5 * 35, 6 * 3
    queries = 25 + (patches - 1) * (each - 16) // each + 1 + 17  # 16 of 18 merge, and a tenth of 175 is left alone
    keys = 25 + (patches - 1) * (each - 12) // each + 1
    assert row.flops_after == 2 * 4 * 2 * 16 * queries * keys
    assert row.axes["tokens"] == {
        "method": "merge_heads", "queries": 0.9, "outliers": 0.1, "keys": 0.7, "patches": 6, "frames": 3
    }  # fmt: skip
