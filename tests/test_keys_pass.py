"""Thinned keys in models: what they compute against a mask by hand, laws, what is refused, what the report says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import alternating
import keys_oracle as oracle
import pytest
import torch
from alternating import Spec, build
from axes import BareTrunk, attention_over_frames, by_hand, lowered, wide_queries
from harness import Capture, exported, nodes, run
from hypothesis import given, settings
from hypothesis import strategies as st
from keys_oracle import grids, kept
from modelutils import images as pictures
from modelutils import worst
from numerics import assert_as_accurate
from regions import small
from torch import Tensor
from torch._functorch._aot_autograd.autograd_cache import check_node_safe

from vggt_compile import collect_reports, explain, vggt_sparse
from vggt_compile.errors import NotRewritten, PlanError
from vggt_compile.plan import Plan
from vggt_compile.recipes import recipes
from vggt_compile.sources import _files

SPEC = Spec(head_dim=16)


def plan(layers: str = "*", **parameters: Any) -> dict:
    return {"layers": {layers: {"keys": {"method": "grid", **parameters}}}}


def scene(batch: int = 1, frames: int = 4, grid: tuple[int, int] = (5, 7), seed: int = 0) -> Tensor:
    return alternating.images(SPEC, batch, frames, grid, seed)


def thinned(frames: int, grid: tuple[int, int], setting: dict, special: int = 5) -> Callable:
    """All pairs in the model's own order of tokens, most of them masked, and one more column for the mean key."""
    read = kept(frames, grid, special, setting)

    def core(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return oracle.attention(q, k, v, read, read.expand(len(read), -1), setting, scale)

    return core


SETTINGS: list[dict[str, Any]] = [
    {},
    {"stride": [1, 2]},
    {"stride": [3, 3], "own_key": True},
    {"stride": [2, 3], "mean_key": "one"},
    {"mean_key": "count"},
    {"own_key": True, "mean_key": "one", "keep_first_frame": True},
    {"own_key": True, "mean_key": "count", "frames": 2},
    {"phase": "shifted"},
    {"stride": [3, 3], "kept": [2, 2], "phase": "shifted", "own_key": True, "mean_key": "count"},
    {"stride": [4, 3], "kept": [3, 5], "frames": 2},
    {"phase": "shifted", "stride": [2, 3], "own_key": True, "mean_key": "count", "keep_first_frame": True},
    {"phase": "shifted", "frames": 2, "own_key": True, "mean_key": "one"},
    {"stride": [1, 1], "frames": 3, "keep_first_frame": True},
    {"most_frames": 3},
    {"stride": [1, 2], "most_frames": 1, "own_key": True, "mean_key": "count", "phase": "shifted"},
    {"stride": [9, 9], "frames": 9, "own_key": True, "mean_key": "one", "keep_first_frame": True},
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("batch", "special"), [(2, 5), (1, 1), (1, 0)])
def test_thinned_keys_are_a_mask(setting: dict, batch: int, special: int) -> None:
    model, x = build(Spec(head_dim=16, pairs=1, special=special)).double(), scene(batch).double()
    out = run(model, x, capture=(capture := Capture(plan=plan(**setting), strict=True)))
    plain = not setting.get("own_key") and setting.get("mean_key") != "count"
    assert [row.implementation for row in capture.report.rewritten] == ["sdpa" if plain else "weighted"]
    hand = thinned(4, (5, 7), setting, special)
    torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-6, atol=1e-7)  # the log-weight is fp32
    with torch.no_grad():
        assert (out - model(x)).abs().max() > 1e-3


@given(case=grids(), own=st.booleans(), mean=st.sampled_from(["none", "one", "count"]), batch=st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_any_setting_is_a_mask(case: tuple, own: bool, mean: str, batch: int) -> None:
    frames, grid, special, setting = case
    setting = {**setting, "own_key": own, "mean_key": mean}
    frames = max(2, frames)
    model, x = build(Spec(pairs=1, special=special)).double(), scene(batch, frames, (grid[0], grid[1] + 1)).double()
    torch._dynamo.reset()
    out = run(model, x, capture=Capture(plan=plan(**setting), strict=True))
    hand = thinned(frames, (grid[0], grid[1] + 1), setting, special)
    torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("frames", "grid"), [(1, (5, 7)), (2, (1, 1)), (3, (3, 11))])
@pytest.mark.parametrize("phase", ["fixed", "shifted"])
def test_windows_of_one_patch_are_the_dense_attention(phase: str, frames: int, grid: tuple[int, int]) -> None:
    model, x = build(SPEC), scene(2, frames, grid)
    setting = plan(stride=[1, 1], phase=phase, own_key=True, mean_key="count")
    out = run(model, x, capture=(capture := Capture(plan=setting, strict=True)))
    assert capture.report.attention_left() == 1.0
    assert {row.implementation for row in capture.report.rewritten} == {"sdpa"}
    with torch.no_grad():
        assert_as_accurate(out, model(x), model.double()(x.double()))


def test_the_mean_of_equal_tokens_counted_as_often_loses_nothing() -> None:
    """Patches of one colour are equal tokens, in one frame as in the other."""
    model, x = build(SPEC).double(), torch.ones(2, 4, 3, 10, 14, dtype=torch.float64)
    out = run(model, x, capture=Capture(plan=plan(mean_key="count", stride=[3, 3]), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(out, model(x), rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()
    once = run(model, x, capture=Capture(plan=plan(mean_key="one", stride=[3, 3])))
    with torch.no_grad():
        assert (once - model(x)).abs().max() > 1e-3


def test_a_query_whose_key_is_kept_reads_it_once() -> None:
    """Where the own key is among the kept ones, asking for it changes nothing."""
    model, x = build(Spec(head_dim=16, pairs=1)).double(), scene().double()
    plain = run(model, x, capture=Capture(plan=plan()))
    torch._dynamo.reset()
    own = run(model, x, capture=Capture(plan=plan(own_key=True)))
    same = (plain - own).abs().amax(-1).flatten() < 1e-12
    assert torch.equal(same, kept(4, (5, 7), 5, {}))


def test_batch_items_do_not_mix() -> None:
    setting = plan(own_key=True, mean_key="count", phase="shifted")
    model, both = build(SPEC), torch.cat((scene(), scene(seed=1)))
    together = run(model, both, capture=Capture(plan=setting))
    for index in range(2):
        torch._dynamo.reset()
        alone = run(model, both[index : index + 1], capture=Capture(plan=setting))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_scale_is_carried() -> None:
    model, x = build(Spec(head_dim=16, core=alternating.scaled)).double(), scene().double()
    setting = {"own_key": True, "mean_key": "count"}
    out = run(model, x, capture=Capture(plan=plan(**setting)))
    hand = thinned(4, (5, 7), setting)
    torch.testing.assert_close(out, by_hand(model, x, lambda q, k, v: hand(q, k, v, scale=0.3)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("setting", [{}, {"own_key": True, "mean_key": "count", "phase": "shifted"}])
@pytest.mark.parametrize("core", [alternating.sdpa, wide_queries])
@pytest.mark.parametrize("context", [contextlib.nullcontext, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_dtypes_and_autocast(context: Callable, core: Callable, setting: dict) -> None:
    model, x = build(Spec(head_dim=16, core=core)), scene(2)
    hand = thinned(4, (5, 7), setting)
    with context(), torch.no_grad():
        out = run(model, x, capture=(capture := Capture(plan=plan(**setting), strict=True)))
        eager = by_hand(model, x, hand)
    want = by_hand(model.double(), x.double(), hand)
    # Sums in another order round elsewhere, so single numbers may be off by more; as a whole they are not.
    assert (out - want).norm() < 1.1 * (eager - want).norm() + 1e-6 * want.norm()
    for node in capture.graphs[0].graph.nodes:
        check_node_safe(node)  # raises for what AOTAutograd would not cache


DYNAMIC: list[dict[str, Any]] = [
    {},
    {"stride": [2, 3], "own_key": True, "mean_key": "count", "keep_first_frame": True},
    {"frames": 4, "keep_first_frame": True, "mean_key": "one"},
    {"frames": 5, "phase": "shifted", "own_key": True, "mean_key": "one", "keep_first_frame": True},
    {"most_frames": 3},
    {"most_frames": 4, "frames": 2, "phase": "shifted", "own_key": True, "mean_key": "one", "keep_first_frame": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("setting", DYNAMIC)
def test_one_graph_serves_all_frame_counts(setting: dict) -> None:
    model, capture = build(SPEC).double(), Capture(plan=plan(**setting), strict=True)
    for batch, frames, grid in ((2, 4, (5, 7)), (3, 9, (6, 5)), (2, 2, (8, 9)), (2, 5, (3, 4))):
        x = scene(batch, frames, grid).double()
        out = run(model, x, capture=capture, dynamic=True)
        hand = thinned(frames, grid, setting)
        torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-6, atol=1e-7)
    assert len(capture.graphs) <= 2
    assert capture.reports[0].dynamic


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_graphs_give_the_same_numbers(dynamic: bool) -> None:
    model, x, auto = build(SPEC), scene(2), torch.export.Dim.AUTO
    setting = {"own_key": True, "mean_key": "count", "keep_first_frame": True}
    gm, report = exported(model, x, plan(**setting), {0: auto, 1: auto, 3: auto, 4: auto} if dynamic else None)
    assert len(report.rewritten) == 2
    torch.testing.assert_close(gm(x), by_hand(model, x, thinned(4, (5, 7), setting)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vggt", "pi3"])
def test_the_models_of_this_package(name: str) -> None:
    model, x = small(name), pictures(1, 3, 3, 56, 70)
    setting = {"own_key": True, "mean_key": "one", "keep_first_frame": name == "vggt"}
    out = run(model, x, capture=(capture := Capture(plan=plan(**setting), strict=True)))
    assert all(row.implementation == "weighted" for row in capture.report.global_rows)
    assert all(row.flops_after < row.flops_before for row in capture.report.global_rows)
    with torch.no_grad(), attention_over_frames(3 * (4 * 5 + 5), thinned(3, (4, 5), setting)):
        want = model(x)
    assert worst(out, want) < 1e-3
    with torch.no_grad():
        assert worst(out, model(x)) > 1e-3


@pytest.mark.parametrize("setting", [{"own_key": True, "mean_key": "one"}, {"stride": [3, 3], "mean_key": "count"}])
def test_the_order_of_frames_does_not_matter(setting: dict) -> None:
    model, x, order = small("pi3", layers=1), pictures(1, 4, 3, 56, 70), [2, 0, 3, 1]
    out = run(model, x, capture=Capture(plan=plan(**setting), strict=True))
    torch._dynamo.reset()
    permuted = run(model, x[:, order], capture=Capture(plan=plan(**setting), strict=True))
    assert worst(permuted, {name: value[:, order] for name, value in out.items()}) < 1e-3


def test_keys_for_every_query_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Special ones, the first frame, the mean; axes that act later may choose among the others only."""
    setting = {"keep_first_frame": True, "mean_key": "count", "own_key": True}
    site, state, values = lowered(build(Spec(head_dim=16, pairs=1)), scene(), plan(**setting), monkeypatch)
    before, after = values[site.call.k.name], values[state.k.name]
    frames = before.unflatten(2, (4, 40))
    special = frames[:, :, :, :5].flatten(2, 3)
    mean = before[:, :, ~kept(4, (5, 7), 5, setting)].mean(2, keepdim=True)
    assert state.always == 20 + 35 + 1
    torch.testing.assert_close(after[:, :, : state.always], torch.cat((special, frames[:, :, 0, 5:], mean), 2))
    weight = values[state.key_log_weight.name]
    assert weight.nonzero().flatten().tolist() == [state.always - 1]
    assert weight[state.always - 1].exp().round() == 3 * 23


ERRORS = [
    ({"stride": [0, 2]}, "'stride' of method 'grid' of axis 'keys' must be 1 or more, not 0; the nearest is 1"),
    ({"stride": [2, -1]}, "must be 1 or more, not -1"),
    ({"stride": [2]}, "'stride' of method 'grid' of axis 'keys' must be a list of 2 values, not [2]"),
    ({"stride": 2}, "must be a list of 2 values, not 2"),
    ({"stride": [1.5, 2]}, "must be int, not 1.5"),
    ({"stride": [True, 2]}, "must be int, not True"),
    ({"frames": 0}, "'frames' of method 'grid' of axis 'keys' must be 1 or more, not 0; the nearest is 1"),
    ({"phase": "random"}, "unknown value for 'phase' of method 'grid' of axis 'keys': 'random'"),
    ({"mean_key": True}, "unknown value for 'mean_key' of method 'grid' of axis 'keys': True"),
    ({"own_key": 1}, "'own_key' of method 'grid' of axis 'keys' must be bool, not 1"),
    ({"strides": [2, 2]}, "did you mean 'stride'"),
]


@pytest.mark.parametrize(("setting", "says"), ERRORS)
def test_values_out_of_range_are_errors_of_the_plan(setting: dict, says: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.read(plan(**setting))
    assert says in str(error.value)


def test_keys_are_not_thinned_after_another_axis() -> None:
    both = {"layers": {"*": {"keys": "grid", "scope": "frame"}}}
    reason = "keys are not thinned after another axis yet, and scope acted before"
    run(build(SPEC), scene(), capture=(capture := Capture(plan=both)))
    assert nodes(capture.graphs[0]) == capture.before[0]
    assert all(reason in (row.reason or "") for row in capture.report.global_rows)
    with pytest.raises((NotRewritten, Exception), match="layer 0"), torch.no_grad():
        explain(build(SPEC), scene(), plan=both, strict=True)


def test_one_frame_cannot_be_kept_whole_and_thinned() -> None:
    run(build(SPEC), scene(frames=1), capture=(capture := Capture(plan=plan(keep_first_frame=True))))
    assert all("there is one frame only" in (row.reason or "") for row in capture.report.global_rows)
    assert capture.report.rewritten == []


@pytest.mark.parametrize("names", ["hidden", "vggt"])
def test_an_unknown_grid_is_refused(names: str) -> None:
    """Without the patch embedding in the graph nobody tells, though a family may know the special tokens."""
    run(BareTrunk(Spec(head_dim=16), names), torch.randn(2, 3, 9, 32), capture=(capture := Capture(plan=plan())))
    reasons = [row.reason for row in capture.report.global_rows]
    assert reasons == ["the grid of patches in a frame is unknown"] * 2


PAIRS = [
    ({}, 20 + 4 * 12, 0),  # ⌈5/2⌉·⌈7/2⌉ of 35 patches
    ({"phase": "shifted", "stride": [3, 3]}, 20 + 4 * 6, 0),
    ({"frames": 3}, 20 + 2 * 12, 0),
    ({"most_frames": 3}, 20 + 2 * 12, 0),
    ({"keep_first_frame": True, "frames": 3}, 20 + 35 + 12, 0),
    ({"mean_key": "one"}, 20 + 4 * 12 + 1, 0),
    ({"own_key": True, "mean_key": "count"}, 20 + 4 * 12 + 1, 4 * 23),
    ({"own_key": True, "keep_first_frame": True}, 20 + 35 + 3 * 12, 3 * 23),
    ({"stride": [1, 1], "own_key": True, "mean_key": "one"}, 160, 0),
]


@pytest.mark.parametrize(("setting", "keys", "own"), PAIRS)
def test_flops_count_kept_keys_the_mean_and_own_keys_of_dropped_tokens(setting: dict, keys: int, own: int) -> None:
    run(build(SPEC), scene(2), capture=(capture := Capture(plan=plan(**setting), strict=True)))
    row = capture.report.global_rows[0]
    assert row.flops_after == 2 * 4 * 2 * 16 * (160 * keys + own)
    assert row.keys == keys + own / 160
    assert row.flops_before == 2 * 4 * 2 * 16 * 160**2
    assert not row.at_least


def test_the_report_shows_what_was_chosen() -> None:
    run(build(SPEC), scene(), capture=(capture := Capture(plan=plan(stride=[2, 3], own_key=True))))
    assert capture.report.to_dict()["rows"][1]["axes"] == {
        "keys": {"method": "grid", "stride": [2, 3], "own_key": True}
    }
    assert "keys: grid(stride=[2, 3], own_key=True)" in capture.report.table()


AVGGT = {
    "avggt": [2, 2],
    "avggt-2": [1, 2],
    "avggt-4": [2, 2],
    "avggt-6": [2, 3],
    "avggt-9": [3, 3],
}


@pytest.mark.parametrize("name", AVGGT)
def test_recipes_turn_early_layers_to_frames_and_thin_the_keys_of_all_others(name: str) -> None:
    recipe = recipes()[name].plan
    for family, depth, early in (("vggt", 24, 9), ("pi3", 18, 10), ("generic", 24, 9)):
        placed = recipe.at(depth)
        for layer in range(depth):
            policy = placed.policy(layer, family).to_json()
            if layer < early:
                assert policy == {"scope": "frame"}
                continue
            assert policy["keys"]["stride"] == AVGGT[name]
            assert policy["keys"]["keep_first_frame"] == (family != "pi3")
            assert policy["keys"]["own_key"]


def test_recipes_rewrite_all_global_layers() -> None:
    for model in map(small, ("vggt", "pi3")):
        torch._dynamo.reset()
        with torch.no_grad():
            report = explain(model, pictures(1, 2, 3, 56, 70), plan="avggt", strict=True)
        assert len(report.rewritten) == len(report.global_rows) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        {"own_key": True, "mean_key": "count", "phase": "shifted"},
        {"keep_first_frame": True, "own_key": True, "mean_key": "one", "stride": [3, 3], "kept": [2, 2]},
    ],
)
def test_compiled_is_what_the_rewritten_graph_computes(setting: dict) -> None:
    model, x = build(Spec(head_dim=16, pairs=1)), scene(2)
    eager = run(model, x, capture=Capture(plan=plan(**setting)))
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as reports:
        options = {"plan": plan(**setting), "strict": True}
        compiled = torch.compile(model, backend=vggt_sparse, options=options)(x)
    assert len(reports[0].rewritten) == 1
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_operators_take_part_in_the_cache_key() -> None:
    import vggt_compile

    names = {name for name, _ in _files(vggt_compile)}
    assert {"vggt_compile:ops/key_grid.py", "vggt_compile.passes:subsample_keys.py"} <= names
