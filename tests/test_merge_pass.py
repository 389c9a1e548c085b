"""Merged tokens in models: what they compute against loops by hand, laws, what is refused, what the report says."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import alternating
import pytest
import torch
import upstream
from alternating import Spec, build
from harness import Capture, exported, nodes, run, swapped
from hypothesis import given, settings
from hypothesis import strategies as st
from modelutils import images as pictures
from modelutils import randomized, worst
from torch import Tensor, nn
from torch._functorch._aot_autograd.autograd_cache import check_node_safe

from vggt_compile import collect_reports, explain, vggt_sparse
from vggt_compile.errors import PlanError
from vggt_compile.models import pi3, vggt
from vggt_compile.ops.token_groups import from_groups, group_means, group_sizes, token_groups
from vggt_compile.ops.token_roles import merge_order
from vggt_compile.plan import Plan
from vggt_compile.recipes import recipes
from vggt_compile.rewrite import _GraphRewrite
from vggt_compile.site import AttentionState, Site
from vggt_compile.sources import _files

SPEC = Spec(head_dim=16)
ONE = Spec(head_dim=16, pairs=1)
GRID = (5, 7)


def plan(layers: str = "*", **parameters: Any) -> dict:
    return {"layers": {layers: {"tokens": {"method": "merge", **parameters}}}}


def scene(batch: int = 1, frames: int = 4, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    return alternating.images(SPEC, batch, frames, grid, seed)


# What becomes of each token, in the words of the documentation.


def roles(frames: int, grid: tuple[int, int], special: int, setting: dict) -> list[str]:
    found = []
    for frame in range(frames):
        found += ["special"] * special
        if frame == 0 and setting.get("reference", True):
            found += ["reference"] * (grid[0] * grid[1])
            continue
        patches = drawn(frame, frames, grid, special, setting)
        others = [i for i, role in enumerate(patches) if role != "cell"]
        number = int(round(setting.get("protect", 0.1) * 10_000) * len(others) / 10_000)
        for i in range(number):
            patches[others[math.ceil(i * len(others) / number)]] = "protected"
        found += patches
    return found


def drawn(frame: int, frames: int, grid: tuple[int, int], special: int, setting: dict) -> list[str]:
    """Patches of one frame, those that stand for a cell told from the others."""
    (rows, columns), (down, right) = grid, setting.get("cell", (2, 2))
    if setting.get("cells", "fixed") == "fixed":
        stand = [r % down == 0 and c % right == 0 for r in range(rows) for c in range(columns)]
    else:  # as the operator has drawn them; the laws of drawing have tests of their own
        stand = list(standing(frames, grid, special, setting)[frame])
    return ["cell" if it else "source" for it in stand]


def standing(frames: int, grid: tuple[int, int], special: int, setting: dict) -> list[list[bool]]:
    """Which patches stand for a cell, for each frame, where nothing but that tells them from others."""
    order = merge_order(*layout(frames, grid, special, {**setting, "protect": 0.0, "reference": False}))
    cells = frames * math.prod(-(-n // by) for n, by in zip(grid, setting.get("cell", (2, 2)), strict=True))
    stand = torch.zeros(len(order), dtype=torch.bool)
    stand[order[frames * special :][:cells]] = True
    return stand.view(frames, -1)[:, special:].tolist()


def layout(frames: int, grid: tuple[int, int], special: int, setting: dict) -> tuple:
    """Arguments of `merge_order`."""
    cell = setting.get("cell", (2, 2))
    others = math.prod(grid) - math.prod(-(-n // by) for n, by in zip(grid, cell, strict=True))
    protected = int(round(setting.get("protect", 0.1) * 10_000) * others / 10_000)
    seed = setting.get("seed", 0) if setting.get("cells") == "seeded" else None
    x = torch.empty(1, 1, frames * (special + math.prod(grid)), 1)
    return x, special, *grid, cell, protected, setting.get("reference", True), seed


# Attention over merged tokens, token by token.


def merging(
    frames: int, grid: tuple[int, int], setting: dict, special: int = 5, features: Callable | None = None
) -> Callable:
    """The core of an attention; `features(q, k)` [B, N, C] is what tokens are compared by."""
    role = roles(frames, grid, special, setting)
    merging_frames = frames - int(setting.get("reference", True))
    limit = merging_frames * int(round(setting.get("ratio", 0.9) * 10_000) * (special + math.prod(grid)) / 10_000)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)
        compared = compared_by(setting, q, k) if features is None else features(q, k)
        outs = []
        for item in range(len(q)):
            groups = grouped(role, unit(compared[item].to(v.dtype)), limit)
            outs.append(attended(q[item], k[item], v[item], groups, setting.get("weight") == "log_count"))
        return torch.stack(outs).to(v.dtype)

    return core


def compared_by(setting: dict, q: Tensor, k: Tensor) -> Tensor:
    return (q if setting.get("metric") == "queries" else k).double().mean(1)


def unit(x: Tensor) -> Tensor:
    return (x.double() / x.double().norm(dim=-1, keepdim=True)).to(x.dtype).double()


def grouped(role: list[str], compared: Tensor, limit: int) -> list[list[int]]:
    """Tokens that become one, the one that stays first."""
    sources = [i for i, name in enumerate(role) if name == "source"]
    destinations = [i for i, name in enumerate(role) if name in ("special", "reference", "cell")]
    similarity = compared[sources] @ compared[destinations].T
    best = {token: destinations[int(row.argmax())] for token, row in zip(sources, similarity, strict=True)}
    ranked = sorted(zip((-similarity.amax(1)).tolist(), sources, strict=True))
    joins = {token for _, token in ranked[:limit]}
    groups = {i: [i] for i in range(len(role)) if i not in joins}
    for token in joins:
        groups[best[token]].append(token)
    return list(groups.values())


def attended(q: Tensor, k: Tensor, v: Tensor, groups: list[list[int]], counted: bool) -> Tensor:
    """Attention [H, N, D] of one item in float64."""
    means = [torch.stack([x[:, group].double().mean(1) for group in groups], 1).to(v.dtype) for x in (q, k, v)]
    q, k, v = (x.double() for x in means)
    bias = torch.tensor([math.log(len(group)) if counted else 0.0 for group in groups])
    out = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
    result = torch.empty(out.shape[0], sum(map(len, groups)), out.shape[2], dtype=out.dtype)
    for i, group in enumerate(groups):
        result[:, group] = out[:, i : i + 1]
    return result


def by_hand(model: nn.Module, x: Tensor, core: Callable) -> Tensor:
    with torch.no_grad(), swapped(model, core):
        return model(x)


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
    model, x = build(Spec(head_dim=16, special=special)).double(), scene(batch).double()
    out = run(model, x, capture=(capture := Capture(plan=plan(**setting), strict=True)))
    weighted = setting.get("weight") == "log_count"
    assert [row.implementation for row in capture.report.rewritten] == ["weighted" if weighted else "sdpa"] * 2
    want = by_hand(model, x, merging(4, GRID, setting, special))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)  # weights are fp32
    with torch.no_grad():
        assert (out - model(x)).abs().max() > 1e-3


def input_of(model: nn.Module) -> Callable:
    """Features that are what the attention's projections read."""
    seen = {}
    for block in model.global_blocks:
        block.attn.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    return lambda q, k: seen["x"]


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


# Roles.


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, tuple[int, int], int, dict]:
    """Frames, grid, special tokens, and a setting."""
    size = st.integers(1, 6)
    setting = {
        "cell": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "cells": draw(st.sampled_from(["fixed", "seeded"])),
        "seed": draw(st.integers(-5, 5)),
        "protect": draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])),
        "reference": draw(st.booleans()),
    }
    return draw(size), (draw(size), draw(size)), draw(st.integers(0, 3)), setting


@given(layouts())
@settings(max_examples=200)
def test_tokens_are_ordered_by_their_role(case: tuple) -> None:
    """Every token once; special ones first, sources last, and of each role in the order of the model."""
    role = roles(*case)
    names = ("special", "reference", "cell", "protected", "source")
    want = sorted(range(len(role)), key=lambda i: names.index(role[i]))
    assert merge_order(*layout(*case)).tolist() == want


@given(layouts())
@settings(max_examples=100)
def test_one_patch_stands_for_each_cell(case: tuple) -> None:
    _, grid, _, setting = case
    down, right = setting["cell"]
    cells = {(r // down, c // right) for r in range(grid[0]) for c in range(grid[1])}
    for stand in standing(*case):
        places = [divmod(i, grid[1]) for i, it in enumerate(stand) if it]
        assert Counter((r // down, c // right) for r, c in places) == Counter(cells)


def test_drawn_patches_are_told_by_their_seed_and_cover_a_cell_evenly() -> None:
    def drawn(seed: int) -> Tensor:
        return torch.tensor(standing(300, (5, 7), 1, {"cell": (2, 3), "cells": "seeded", "seed": seed}))

    often = drawn(0).double().mean(0).view(5, 7)
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert not torch.equal(drawn(0)[1:], drawn(1)[:-1])
    want = torch.full((5, 7), 1 / 6)
    want[4], want[:, 6], want[4, 6] = 1 / 3, 1 / 2, 1.0
    spread = (want * (1 - want) / 300).sqrt()
    assert ((often - want).abs() <= 4 * spread).all()
    assert len(drawn(0).view(300, -1).unique(dim=0)) > 290


# Groups.


@given(layouts(), st.integers(1, 3), st.integers(0, 99), st.floats(0, 1))
@settings(max_examples=100)
def test_only_sources_merge_and_every_token_is_in_one_group(case: tuple, batch: int, seed: int, part: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    order, role = merge_order(*layout(*case)), roles(*case)
    sources = role.count("source")
    kept, merged = len(role) - sources, int(part * sources)
    destinations = kept - role.count("protected")
    index = torch.randint(destinations, (batch, sources), generator=generator)
    similarity = torch.randint(5, (batch, sources), generator=generator).float()
    group = token_groups(order, index, similarity, merged)
    groups = len(role) - merged
    assert torch.equal(group[:, order[:kept]], torch.arange(kept).expand(batch, -1))
    for item in range(batch):
        ranked = sorted(range(sources), key=lambda i: (-similarity[item, i], i))
        joins = set(ranked[:merged])
        alone = [i for i in range(sources) if i not in joins]
        want = {i: int(index[item, i]) for i in joins} | {i: kept + n for n, i in enumerate(alone)}
        assert group[item, order[kept:]].tolist() == [want[i] for i in range(sources)]
    size = group_sizes(group, groups)
    assert torch.equal(size.sum(1), torch.full((batch,), float(len(role))))
    assert size.min() >= 1
    if merged == sources:
        assert torch.equal(token_groups(order, index, similarity), group)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_groups_give_means_and_their_tokens_get_them_back(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 40, 8, generator=generator).to(dtype)
    group = torch.stack([torch.randperm(40, generator=generator) % 25 for _ in range(2)])
    size = group_sizes(group, 25)
    means = group_means(x, group, size)
    back = from_groups(means, group)
    assert means.dtype == back.dtype == dtype
    assert back.transpose(1, 2).is_contiguous()
    for item in range(2):
        assert size[item].tolist() == torch.bincount(group[item], minlength=25).tolist()
        for i in range(25):
            members = group[item] == i
            mean = x[item][:, members].double().mean(1)
            if members.sum() == 1:
                assert torch.equal(means[item, :, i].double(), mean)
            torch.testing.assert_close(means[item, :, i], mean.to(dtype))
            assert (back[item][:, members] == means[item, :, i : i + 1]).all()


def test_the_operators_are_ones_that_torch_knows() -> None:
    ops = torch.ops.vggt_compile
    for seed in (None, 3):
        torch.library.opcheck(ops.merge_order.default, (*layout(3, GRID, 2, {})[:-1], seed))
    order = merge_order(*layout(3, (3, 4), 1, {}))
    x, index, similarity = torch.randn(2, 2, 39, 8), torch.randint(9, (2, 13)), torch.rand(2, 13)
    for merged in (None, 5):
        torch.library.opcheck(ops.token_groups.default, (order, index, similarity, merged))
    group = token_groups(order, index, similarity)
    torch.library.opcheck(ops.group_sizes.default, (group, 26))
    size = group_sizes(group, 26)
    torch.library.opcheck(ops.group_means.default, (x, group, size))
    torch.library.opcheck(ops.from_groups.default, (x[:, :, :26], group))


# Laws of the pass.


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


@given(case=layouts(), ratio=st.sampled_from([0.2, 0.5, 0.9]), weight=st.sampled_from(["none", "log_count"]))
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


def wide_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q and k come out of a norm in float32, v stays in what autocast made of it."""
    return alternating.sdpa(q.float() * 1.0, k.float() * 1.0, v)


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
    model, capture = build(SPEC).double(), Capture(plan=plan(**setting), strict=True)
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


@pytest.mark.parametrize("make", [vggt, pi3])
@pytest.mark.parametrize("metric", ["keys", "input"])
def test_the_models_of_this_package(make: Callable, metric: str) -> None:
    model, x = randomized(make("tiny")), pictures(1, 3, 3, 56, 70)
    setting = plan(metric=metric, reference=make is vggt)
    out = run(model, x, capture=(capture := Capture(plan=setting, strict=True)))
    assert all(row.axes["tokens"]["metric"] == metric for row in capture.report.global_rows)
    assert all(row.flops_after < row.flops_before for row in capture.report.global_rows)
    with torch.no_grad():
        assert 1e-3 < worst(out, model(x)) < 100


def test_special_tokens_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axes that act later may choose among the others only."""
    states, values = [], {}
    lower = _GraphRewrite._lower

    def watch(self: _GraphRewrite, site: Site, state: AttentionState) -> None:
        states.append((site.call.k, state))
        lower(self, site, state)

    class Watch(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            values[node.name] = super().run_node(node)
            return values[node.name]

    monkeypatch.setattr(_GraphRewrite, "_lower", watch)
    gm, _ = exported(build(ONE), scene(2), plan(weight="log_count"))
    Watch(gm).run(scene(2))
    ((old, state),) = states
    before, after, weight = (values[node.name] for node in (old, state.k, state.key_log_weight))
    assert state.always == 20
    assert weight.shape == (2, 1, after.shape[2])
    for item in range(2):
        groups = grouped(roles(4, GRID, 5, {}), unit(before[item].double().mean(0)), limit=160)
        special = [group for group in groups if group[0] % 40 < 5]
        want = torch.stack([before[item][:, group].mean(1) for group in special], 1)
        torch.testing.assert_close(after[item, :, :20], want)
        assert weight[item, 0, :20].exp().round().tolist() == list(map(len, special))


PAIRS = [
    ({}, 20 + 35 + 3 * (12 + 2)),  # ⌈5/2⌉·⌈7/2⌉ of 35 patches stand for a cell, a tenth of 23 is protected
    ({"protect": 0}, 20 + 35 + 3 * 12),
    ({"reference": False}, 20 + 4 * (12 + 2)),
    ({"cell": [9, 9], "protect": 0}, 20 + 35 + 3),
    ({"ratio": 0.25}, 160 - 3 * 10),
    ({"ratio": 0.0}, 160),
]


@pytest.mark.parametrize(("setting", "tokens"), PAIRS)
def test_flops_count_the_tokens_that_are_left(setting: dict, tokens: int) -> None:
    run(build(SPEC), scene(2), capture=(capture := Capture(plan=plan(**setting), strict=True)))
    row = capture.report.global_rows[0]
    assert row.flops_after == 2 * 4 * 2 * 16 * tokens**2
    assert row.flops_before == 2 * 4 * 2 * 16 * 160**2
    assert not row.at_least


def test_the_report_shows_what_was_chosen() -> None:
    setting = plan(cells="seeded", weight="log_count")
    run(build(SPEC), scene(), capture=(capture := Capture(plan=setting)))
    assert capture.report.to_dict()["rows"][1]["axes"]["tokens"] == {
        "method": "merge",
        "ratio": 0.9,
        "cell": [2, 2],
        "cells": "seeded",
        "seed": 0,
        "protect": 0.1,
        "metric": "keys",
        "weight": "log_count",
    }


# Refusals.


@pytest.mark.parametrize(
    ("axis", "other", "reason"),
    [
        ("keys", "grid", "tokens acted before"),
        ("blocks", "predict", "blocks are not chosen after tokens yet"),
        ("scope", "frame", "scope acted before"),
    ],
)
def test_another_axis_neither_acts_before_nor_after(axis: str, other: str, reason: str) -> None:
    both = {"layers": {"*": {"tokens": "merge", axis: other}}}
    run(build(SPEC), scene(), capture=(capture := Capture(plan=both)))
    assert nodes(capture.graphs[0]) == capture.before[0]
    assert all(reason in (row.reason or "") for row in capture.report.global_rows)


def test_one_frame_is_all_reference_or_merges_alone() -> None:
    model, x = build(SPEC).double(), scene(2, frames=1).double()
    run(model, x, capture=(capture := Capture(plan=plan())))
    assert all("there is one frame only" in (row.reason or "") for row in capture.report.global_rows)
    assert capture.report.rewritten == []
    torch._dynamo.reset()
    out = run(model, x, capture=Capture(plan=plan(reference=False), strict=True))
    want = by_hand(model, x, merging(1, GRID, {"reference": False}))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("names", ["hidden", "vggt"])
def test_an_unknown_grid_is_refused(names: str) -> None:
    """Without the patch embedding in the graph nobody tells, though a family may know the special tokens."""

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            source = build(SPEC)
            inner, outer = ("frame_blocks", "global_blocks") if names == "vggt" else ("a", "b")
            self.add_module(inner, source.frame_blocks)
            self.add_module(outer, source.global_blocks)
            self.inner, self.outer = inner, outer

        def forward(self, x: Tensor) -> Tensor:
            batch, frames, tokens, width = x.shape
            for inner, outer in zip(getattr(self, self.inner), getattr(self, self.outer), strict=True):
                x = inner(x.reshape(batch * frames, tokens, width))
                x = outer(x.reshape(batch, frames * tokens, width)).reshape(batch, frames, tokens, width)
            return x

    run(Trunk(), torch.randn(2, 3, 9, 32), capture=(capture := Capture(plan=plan())))
    reasons = [row.reason for row in capture.report.global_rows]
    assert reasons == ["the grid of patches in a frame is unknown"] * 2


ERRORS = [
    ({"ratio": 1.5}, "'ratio' of method 'merge' of axis 'tokens' must lie in 0 … 1, not 1.5; the nearest is 1"),
    ({"protect": -0.1}, "must lie in 0 … 1, not -0.1"),
    ({"cell": [0, 2]}, "must be 1 or more, not 0"),
    ({"cell": 2}, "must be a list of 2 values, not 2"),
    ({"cells": "random"}, "unknown value for 'cells' of method 'merge' of axis 'tokens': 'random'"),
    ({"metric": "values"}, "unknown value for 'metric'"),
    ({"weight": True}, "unknown value for 'weight'"),
    ({"reference": 1}, "must be bool, not 1"),
]


@pytest.mark.parametrize(("setting", "says"), ERRORS)
def test_values_out_of_range_are_errors_of_the_plan(setting: dict, says: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.read(plan(**setting))
    assert says in str(error.value)


# Recipe, published code, compiler.


def test_the_recipe_merges_in_all_global_layers() -> None:
    placed = recipes()["fastvggt"].plan
    for family, depth in (("vggt", 24), ("pi3", 18), ("generic", 7)):
        for layer in range(depth):
            policy = placed.at(depth).policy(layer, family).to_json()
            assert set(policy) == {"tokens"}
            assert policy["tokens"]["reference"] == (family != "pi3")
            assert (policy["tokens"]["ratio"], policy["tokens"]["protect"]) == (0.9, 0.1)
    for model in (vggt("tiny", outputs=("depth",)), pi3("tiny")):
        torch._dynamo.reset()
        with torch.no_grad():
            report = explain(model.eval(), pictures(1, 2, 3, 56, 70), plan="fastvggt", strict=True)
        assert len(report.rewritten) == len(report.global_rows) > 0


@contextlib.contextmanager
def drawing(places: Tensor) -> Iterator[None]:
    """Within the block, random integers of this shape are these."""
    randint = torch.randint

    def given(*args: Any, size: Any = None, **kwargs: Any) -> Tensor:
        return places if tuple(size) == places.shape else randint(*args, size=size, **kwargs)

    torch.randint = given  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randint = randint


@pytest.mark.upstream
@pytest.mark.parametrize("cells", ["fixed", "seeded"])
@pytest.mark.parametrize(("ratio", "frames"), [(0.9, 3), (0.2, 4)])
def test_the_published_code_merges_the_same_tokens(ratio: float, frames: int, cells: str) -> None:
    """On its ground: batch 1, whole cells, nothing protected. Its similarities are rounded to bf16, so not here."""
    grid, setting = (6, 10), {"ratio": ratio, "cells": cells, "protect": 0.0, "metric": "input"}
    model, x = build(SPEC).double(), scene(1, frames, grid).double()
    stand = torch.tensor(standing(frames, grid, 5, setting))[1:].view(frames - 1, 3, 2, 5, 2)
    places = stand.permute(0, 1, 3, 2, 4).reshape(frames - 1, 3, 5, 4).int().argmax(-1)
    features = input_of(model)

    with upstream.imported("FastVGGT", "merging.merge") as [merge]:

        def published(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            compared = features(q, k)
            count = (frames - 1) * int(ratio * 65)  # it asks for a number
            with drawing(places):
                enter, leave = merge.token_merge_bipartite2d(
                    compared, grid[1], grid[0], 2, 2, count, False, torch.Generator(), enable_protection=False
                )
            flat = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
            q, k, v = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in map(enter, flat))
            out = leave(alternating.sdpa(q, k, v).transpose(1, 2).flatten(2))
            return out.unflatten(2, (2, -1)).transpose(1, 2)

        def exactly(a: Tensor, b: Tensor, size: int) -> tuple[Tensor, Tensor]:
            best = (a @ b).max(2)
            return best.values, best.indices

        merge.fast_similarity_chunks = exactly
        want = by_hand(model, x, published)
    out = run(model, x, capture=Capture(plan=plan(**setting), strict=True))
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"metric": "input"}, {"ratio": 0.4, "weight": "log_count", "cells": "seeded"}])
def test_compiled_is_what_the_rewritten_graph_computes(setting: dict) -> None:
    model, x = build(ONE), scene(2)
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
