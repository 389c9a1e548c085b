"""Block-sparse attention in models: what it computes against a mask by hand, what it refuses, what the report says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from axes import BareTrunk, attention_over_frames, by_hand, wide_queries
from blocks_model import BLOCKS, SPEC, confined, plan, scene
from harness import Capture, exported, nodes, run
from modelutils import images as pictures
from modelutils import worst
from numerics import assert_as_accurate
from regions import small
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import check_node_safe

from vggt_compile import collect_reports, explain, vggt_sparse
from vggt_compile.errors import NotRewritten, PlanError
from vggt_compile.ops.random_blocks import random_blocks
from vggt_compile.ops.select_blocks import select_blocks
from vggt_compile.plan import Plan
from vggt_compile.recipes import recipes
from vggt_compile.sources import _files

SETTINGS: list[dict[str, Any]] = [
    {"keep": 0.25},
    {"keep": 0.0},
    {"keep": 0.1, "cdf": 0.6, "coverage": "reach", "most": 1.0},
    {"keep": 0.3, "pool": "max"},
    {"keep": 0.2, "keep_first_frame": True},
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("batch", "special"), [(2, 5), (1, 1), (1, 0)])
def test_predicted_blocks_are_a_mask(setting: dict, batch: int, special: int) -> None:
    spec = Spec(head_dim=16, pairs=1, special=special)
    model, x = build(spec), scene(batch)
    out = run(model, x, capture=(capture := Capture(plan=plan(**setting), strict=True)))
    assert [row.implementation for row in capture.report.rewritten] == ["block-sparse"]
    first_frame = setting.get("keep_first_frame", False)
    given = {name: value for name, value in setting.items() if name != "keep_first_frame"}
    hand = confined(4, special, lambda q, k: select_blocks(q, k, **given, **BLOCKS), first_frame)
    torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert (out - model(x)).abs().max() > 1e-3


def test_random_blocks_are_a_mask_of_another_kind_in_each_layer() -> None:
    model, x = build(SPEC), scene(2)
    out = run(model, x, capture=Capture(plan=plan("random", seed=3), strict=True))
    layer = iter((3000, 3001))
    hand = confined(4, 5, lambda q, k: random_blocks(q, k, 0.25, next(layer), **BLOCKS))
    torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    assert not torch.equal(out, run(model, x, capture=Capture(plan=plan("random", seed=4))))


@pytest.mark.parametrize(("frames", "grid"), [(1, (5, 7)), (2, (1, 1)), (3, (3, 11)), (5, (4, 4))])
@pytest.mark.parametrize("method", ["predict", "random"])
def test_all_blocks_are_the_dense_attention(method: str, frames: int, grid: tuple[int, int]) -> None:
    model, x = build(SPEC), scene(2, frames, grid)
    out = run(model, x, capture=(capture := Capture(plan=plan(method, keep=1.0))))
    assert len(capture.report.rewritten) == len(capture.report.global_rows)
    assert capture.report.attention_left() == 1.0
    with torch.no_grad():
        dense = model(x)
        assert_as_accurate(out, dense, model.double()(x.double()))


def test_scale_is_carried_to_scores_and_attention() -> None:
    model, x = build(Spec(head_dim=16, core=alternating.scaled)), scene()
    out = run(model, x, capture=Capture(plan=plan(cdf=0.5, keep=0.0, most=1.0)))

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hand = confined(4, 5, lambda q, k: select_blocks(q, k, 0.0, 0.5, most=1.0, scale=0.25, **BLOCKS))
        return hand(q * (0.3 / 0.25), k, v)  # 0.25 is the scale of 16 numbers

    torch.testing.assert_close(out, by_hand(model, x, core), rtol=1e-4, atol=1e-5)


def test_batch_items_do_not_mix() -> None:
    model, both = build(SPEC), torch.cat((scene(), scene(seed=1)))
    together = run(model, both, capture=Capture(plan=plan()))
    for index in range(2):
        torch._dynamo.reset()
        alone = run(model, both[index : index + 1], capture=Capture(plan=plan()))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("core", [alternating.sdpa, wide_queries])
@pytest.mark.parametrize("context", [contextlib.nullcontext, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_dtypes_and_autocast(context: Callable, core: Callable) -> None:
    model, x = build(Spec(head_dim=16, core=core)), scene(2)
    with context(), torch.no_grad():
        out = run(model, x, capture=(capture := Capture(plan=plan(keep=1.0))))
        eager = model(x)
    assert len(capture.report.rewritten) == 2
    assert out.dtype == eager.dtype
    with torch.no_grad():
        want = by_hand(model.double(), x.double(), alternating.sdpa)
    # Split sums round elsewhere, so the largest error of a low precision is another one; as a whole it is no larger.
    assert (out - want).norm() < 1.1 * (eager - want).norm() + 1e-6 * want.norm()
    for node in capture.graphs[0].graph.nodes:
        check_node_safe(node)  # raises for what AOTAutograd would not cache


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"keep": 0.1, "cdf": 0.7}, {"keep": 0.2, "keep_first_frame": True}])
def test_one_graph_serves_all_frame_counts(setting: dict) -> None:
    model, capture = build(SPEC), Capture(plan=plan(**setting), strict=True)
    for batch, frames, grid in ((2, 4, (5, 7)), (3, 6, (6, 5)), (2, 3, (8, 9))):
        x = scene(batch, frames, grid)
        out = run(model, x, capture=capture, dynamic=True)
        given = {name: value for name, value in setting.items() if name != "keep_first_frame"}
        hand = confined(
            frames, 5, lambda q, k, given=given: select_blocks(q, k, **given, **BLOCKS), "keep_first_frame" in setting
        )
        torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-4, atol=1e-5)
    assert len(capture.graphs) <= 2
    assert capture.reports[0].dynamic


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_graphs_give_the_same_numbers(dynamic: bool) -> None:
    model, x, auto = build(SPEC), scene(2), torch.export.Dim.AUTO
    gm, report = exported(model, x, plan(), {0: auto, 1: auto, 3: auto, 4: auto} if dynamic else None)
    assert len(report.rewritten) == 2
    hand = confined(4, 5, lambda q, k: select_blocks(q, k, 0.25, **BLOCKS))
    torch.testing.assert_close(gm(x), by_hand(model, x, hand), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "setting",
    [{}, {"cdf": 0.6}, {"keep_first_frame": True}, {"order": "hilbert"}, {"special_dense": False}, {"refresh": 2}],
    ids=str,
)
def test_one_exported_graph_is_dense_for_few_tokens_and_not_for_many(setting: dict) -> None:
    """`min_tokens` adds no guard then: for fewer tokens the lists are of all blocks."""
    model, x = build(SPEC), scene(1, 7)
    per_frame, frames = 5 + 5 * 7, {1: torch.export.Dim("frames", min=3, max=64)}
    below = {**plan(**setting), "min_tokens": 5 * per_frame}
    gm, report = exported(model, x, below, frames)
    always, _ = exported(model, x, plan(**setting), frames)
    assert [row.dense_below for row in report.rewritten] == [5 * per_frame] * 2
    for count in (3, 4, 5, 11):
        x = scene(1, count)
        with torch.no_grad():
            want = model(x) if count < 5 else always(x)
        torch.testing.assert_close(gm(x), want, rtol=1e-4, atol=1e-5)
        assert torch.allclose(model(x), want, rtol=1e-3, atol=1e-3) == (count < 5)
    assert report.attention_left(4) == 1.0
    assert report.attention_left(5) < 1.0


def test_what_other_axes_have_thinned_is_not_dense_for_few_tokens() -> None:
    layers = {"*": {"keys": {"method": "grid", "stride": [1, 2]}, "blocks": {"method": "predict", **BLOCKS}}}
    frames = {1: torch.export.Dim("frames", min=3, max=64)}
    _, report = exported(build(SPEC), scene(1, 7), {"layers": layers, "min_tokens": 200}, frames)
    assert [(len(row.axes), row.dense_below) for row in report.rewritten] == [(2, 0)] * 2


@pytest.mark.parametrize("name", ["vggt", "pi3"])
def test_the_models_of_this_package(name: str) -> None:
    model, x = small(name), pictures(1, 3, 3, 56, 84)
    tokens = 3 * (4 * 6 + 5)
    out = run(model, x, capture=(capture := Capture(plan=plan(keep=0.3), strict=True)))
    assert all(row.implementation == "block-sparse" for row in capture.report.global_rows)
    assert all(row.flops_after < row.flops_before for row in capture.report.global_rows)
    hand = confined(3, 5, lambda q, k: select_blocks(q, k, 0.3, **BLOCKS))
    with torch.no_grad(), attention_over_frames(tokens, hand):
        want = model(x)
    assert worst(out, want) < 1e-3
    with torch.no_grad():
        assert worst(out, model(x)) > 1e-3


def test_the_order_of_frames_does_not_matter_where_all_is_kept() -> None:
    model, x, order = small("pi3", layers=1), pictures(1, 4, 3, 28, 42), [2, 0, 3, 1]
    out = run(model, x, capture=Capture(plan=plan(keep=1.0), strict=True))
    torch._dynamo.reset()
    permuted = run(model, x[:, order], capture=Capture(plan=plan(keep=1.0)))
    assert worst(permuted, {name: value[:, order] for name, value in out.items()}) < 1e-3


# The order of patches


ERRORS = [
    ({"method": "predict", "keep": 1.5}, "'keep' of method 'predict' of axis 'blocks' must lie in 0 … 1, not 1.5"),
    ({"method": "random", "keep": -0.1}, "must lie in 0 … 1, not -0.1; the nearest is 0"),
    ({"method": "predict", "keep": float("nan")}, "must lie in 0 … 1, not nan"),
    ({"method": "predict", "cdf": 2.0}, "'cdf' of method 'predict' of axis 'blocks' must lie in 0 … 1, not 2.0"),
    ({"method": "predict", "most": -1.0}, "'most' of method 'predict' of axis 'blocks' must lie in 0 … 1"),
    ({"method": "predict", "q_block": 100}, "unknown value for 'q_block' of method 'predict' of axis 'blocks': 100"),
    ({"method": "random", "k_block": 8}, "(known: 128, 16, 256, 32, 64)"),
    ({"method": "predict", "refresh": 0}, "must lie in 1 … 100, not 0; the nearest is 1"),
    ({"method": "predict", "refresh": 1.5}, "'refresh' of method 'predict' of axis 'blocks' must be int, not 1.5"),
    ({"method": "predict", "order": "hilbrt"}, "did you mean 'hilbert'?"),
]


@pytest.mark.parametrize(("setting", "says"), ERRORS)
def test_values_out_of_range_are_errors_of_the_plan(setting: dict, says: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.read({"layers": {"*": {"blocks": setting}}})
    assert says in str(error.value)


def test_no_blocks_are_chosen_inside_frames() -> None:
    reason = "blocks are not chosen after scope yet"
    both = {"layers": {"*": {"blocks": "predict", "scope": "frame"}}}
    capture = Capture(plan=both)
    run(build(SPEC), scene(), capture=capture)
    assert nodes(capture.graphs[0]) == capture.before[0]
    assert all(reason in (row.reason or "") for row in capture.report.global_rows)
    with pytest.raises((NotRewritten, Exception), match="layer 0"), torch.no_grad():
        explain(build(SPEC), scene(), plan=both, strict=True)


def test_one_frame_cannot_be_kept_whole_and_chosen_from() -> None:
    capture = Capture(plan=plan(keep_first_frame=True))
    run(build(SPEC), scene(frames=1), capture=capture)
    assert all("there is one frame only" in (row.reason or "") for row in capture.report.global_rows)


def test_unknown_special_tokens_are_refused() -> None:
    """Without the patch embedding in the graph, and without a family, nobody tells."""

    capture = Capture(plan=plan())
    run(BareTrunk(SPEC, "hidden"), torch.randn(2, 3, 9, 32), capture=capture)
    assert [row.reason for row in capture.report.global_rows] == [
        "the number of special tokens in a frame is unknown"
    ] * 2


def test_cross_attention_is_left_alone() -> None:
    capture = Capture(plan=plan())
    run(build(Spec(head_dim=16, core=alternating.crossing)), scene(), capture=capture)
    assert capture.report.rewritten == []
    assert all("cross-attention" in (row.reason or "") for row in capture.report.global_rows)


def test_flops_count_special_rows_always_keys_and_kept_blocks() -> None:
    capture = Capture(plan=plan(keep=0.25))
    run(build(SPEC), scene(2), capture=capture)
    row = capture.report.global_rows[0]
    special, patches = 4 * 5, 4 * 35
    pairs = special * (special + patches) + patches * (special + 2 * 16)  # 2 of 9 blocks
    assert row.flops_after == 2 * 4 * 2 * 16 * pairs
    assert row.flops_before == 2 * 4 * 2 * 16 * (special + patches) ** 2
    assert not row.at_least


def test_the_report_says_where_the_data_decide() -> None:
    capture = Capture(plan=plan(keep=0.25, cdf=0.9))
    run(build(SPEC), scene(), capture=capture)
    report = capture.report
    assert all(row.at_least for row in report.global_rows)
    assert "→ ≥ " in report.table()
    assert "at least" in str(report)
    assert report.to_dict()["rows"][1]["axes"]["blocks"] == {
        "method": "predict", "keep": 0.25, "pool": "mean", "cdf": 0.9, "coverage": "reference", "most": 0.5
    }  # fmt: skip
    torch._dynamo.reset()
    run(build(SPEC), scene(), capture=(fixed := Capture(plan=plan(keep=0.25))))
    assert "at least" not in str(fixed.report)


@pytest.mark.parametrize("name", ["faster_vggt-25", "faster_vggt-50", "faster_vggt-75"])
def test_recipes_rewrite_all_global_layers_above_their_threshold(name: str) -> None:
    recipe = recipes()[name].plan
    assert recipe.min_tokens > 0
    for model in (small("vggt"), small("pi3", layers=1)):
        torch._dynamo.reset()
        x = pictures(1, 2, 3, 28, 42)
        with torch.no_grad():
            report = explain(model, x, plan=recipe)
            assert report.rewritten == []
            assert all("min_tokens" in (row.reason or "") for row in report.global_rows)
            large = {**recipe.to_json(), "min_tokens": 0}
            report = explain(model, x, plan=large, strict=True)
        assert len(report.rewritten) == len(report.global_rows) > 0


@pytest.mark.slow
def test_compiled_is_what_the_rewritten_graph_computes(tmp_path: Path) -> None:
    model, x, pairs = build(Spec(head_dim=16, pairs=2)), scene(2), 2
    chosen = plan(keep=0.2, cdf=0.6, order="hilbert", refresh=2)
    eager = run(model, x, capture=Capture(plan=chosen))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        for hits in (0, 1):
            torch._dynamo.reset()
            counters.clear()
            with torch.no_grad(), collect_reports() as reports:
                options = {"plan": chosen, "strict": True}
                compiled = torch.compile(model, backend=vggt_sparse, options=options)(x)
            assert len(reports[0].rewritten) == pairs
            assert counters["aot_autograd"]["autograd_cache_hit"] == hits
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_operators_take_part_in_the_cache_key() -> None:
    import vggt_compile

    names = {name for name, _ in _files(vggt_compile)}
    for file in ("select_blocks", "select_blocks_kernel", "random_blocks"):
        assert f"vggt_compile:ops/{file}.py" in names
    assert "vggt_compile.passes:select_blocks.py" in names
