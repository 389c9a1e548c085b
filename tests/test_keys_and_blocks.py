"""Blocks of thinned keys: what both axes compute together against one mask, laws, what is refused, what is counted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import alternating
import blocks_oracle
import keys_oracle
import pytest
import torch
from alternating import Spec, build
from axes import by_hand, wide_queries
from harness import Capture, exported, run
from hypothesis import given, settings
from hypothesis import strategies as st
from modelutils import images as pictures
from modelutils import worst
from regions import small
from torch import Tensor
from torch._functorch._aot_autograd.autograd_cache import check_node_safe

from vggt_compile import collect_densities, collect_reports, vggt_sparse
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.graph.hilbert import hilbert_order
from vggt_compile.ops.random_blocks import random_blocks
from vggt_compile.ops.select_blocks import select_blocks

SPEC = Spec(head_dim=16)
ONE = Spec(head_dim=16, pairs=1)
SIZES = {"q_block": 32, "k_block": 16}
Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def plan(keys: dict | None, blocks: dict | None, layers: str = "*") -> dict:
    policy: dict[str, Any] = {} if keys is None else {"keys": {"method": "grid", **keys}}
    policy |= {} if blocks is None else {"blocks": {"method": "predict", **SIZES, **blocks}}
    return {"layers": {layers: policy}}


def scene(batch: int = 1, frames: int = 4, grid: tuple[int, int] = (5, 7), seed: int = 0) -> Tensor:
    return alternating.images(SPEC, batch, frames, grid, seed)


def joined(frames: int, grid: tuple[int, int], keys: dict, blocks: dict, special: int = 5) -> Callable:
    """Attention under a mask in the model's own token order: lists of blocks of kept keys, spread out pair by pair."""
    read = keys_oracle.kept(frames, grid, special, keys)
    place = torch.arange(len(read)).view(frames, -1)
    walks = blocks.get("order") == "hilbert"
    down, right = keys.get("stride", (2, 2))
    windows = (math.ceil(grid[0] / down), math.ceil(grid[1] / right))
    patches = place[:, special:]
    patches = (patches[:, list(hilbert_order(*grid))] if walks else patches).flatten()
    whole = bool(keys.get("keep_first_frame"))
    listed = place[int(whole) :, special:]
    listed = listed[read[listed]].view(-1, windows[0] * windows[1])
    listed = listed[:, list(hilbert_order(*windows))] if walks else listed
    listed = listed[int(blocks.get("keep_first_frame", False) and not whole) :].flatten()
    chosen = {name: value for name, value in blocks.items() if name not in ("order", "keep_first_frame", "method")}
    choose: Choose = functools.partial(select_blocks, **{"keep": 0.25, **chosen}, **SIZES)
    if blocks.get("method") == "random":
        choose = functools.partial(random_blocks, keep=blocks["keep"], seed=blocks["seed"] * 1000, **SIZES)

    def core(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        index, count = choose(q[:, :, patches], k[:, :, listed])
        pairs = blocks_oracle.mask(index, count, -(-len(listed) // SIZES["k_block"]))
        pairs = pairs.repeat_interleave(SIZES["q_block"], 2).repeat_interleave(SIZES["k_block"], 3)
        allowed = read.expand(*q.shape[:2], len(read), -1).clone()
        allowed[:, :, patches[:, None], listed] = pairs[:, :, : len(patches), : len(listed)]
        return keys_oracle.attention(q, k, v, read, allowed, keys, scale)

    return core


KEYS: list[dict[str, Any]] = [
    {},
    {"stride": [1, 2], "own_key": True},
    {"own_key": True, "mean_key": "one", "keep_first_frame": True},
    {"stride": [2, 3], "phase": "shifted", "own_key": True, "mean_key": "count", "keep_first_frame": True},
    {"stride": [1, 1], "frames": 2, "mean_key": "count"},
    {"stride": [1, 2], "phase": "shifted", "frames": 3, "keep_first_frame": True, "own_key": True},
]
BLOCKS: list[dict[str, Any]] = [
    {"keep": 0.25},
    {"keep": 0.0, "cdf": 0.6, "coverage": "reach", "most": 1.0},
    {"keep": 0.4, "keep_first_frame": True},
    {"keep": 0.4, "order": "hilbert"},
]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("keys", KEYS)
def test_blocks_of_thinned_keys_are_a_mask(keys: dict, blocks: dict) -> None:
    model, x = build(ONE).double(), scene(2).double()
    out = run(model, x, capture=(capture := Capture(plan=plan(keys, blocks), strict=True)))
    assert [row.implementation for row in capture.report.rewritten] == ["block-sparse"]
    hand = joined(4, (5, 7), keys, blocks)
    torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-6, atol=1e-7)  # the log-weight is fp32


def test_random_blocks_of_thinned_keys_are_a_mask() -> None:
    keys, blocks = KEYS[2], {"method": "random", "keep": 0.4, "seed": 3}
    model, x = build(ONE).double(), scene(2).double()
    out = run(model, x, capture=Capture(plan=plan(keys, blocks), strict=True))
    torch.testing.assert_close(out, by_hand(model, x, joined(4, (5, 7), keys, blocks)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("keys", KEYS)
def test_all_blocks_are_the_thinned_keys_alone(keys: dict, order: str) -> None:
    model, x = build(ONE).double(), scene(2).double()
    alone = run(model, x, capture=(thin := Capture(plan=plan(keys, None), strict=True)))
    torch._dynamo.reset()
    both = run(model, x, capture=(capture := Capture(plan=plan(keys, {"keep": 1.0, "order": order}), strict=True)))
    torch.testing.assert_close(both, alone, rtol=1e-9, atol=1e-10)
    assert capture.report.attention_left() == thin.report.attention_left()


def test_windows_of_one_patch_leave_the_blocks_alone() -> None:
    model, x = build(ONE).double(), scene(2).double()
    blocks = {"keep": 0.25, "order": "hilbert", "keep_first_frame": True}
    alone = run(model, x, capture=Capture(plan=plan(None, blocks), strict=True))
    torch._dynamo.reset()
    keys = {"stride": [1, 1], "own_key": True, "mean_key": "count"}
    both = run(model, x, capture=Capture(plan=plan(keys, blocks), strict=True))
    torch.testing.assert_close(both, alone, rtol=1e-9, atol=1e-10)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, tuple[int, int], int, dict, dict]:
    """Frames, grid, special tokens, and parameters of both axes."""
    keys = {
        "stride": [draw(st.integers(1, 3)), draw(st.integers(1, 3))],
        "frames": draw(st.integers(1, 3)),
        "phase": draw(st.sampled_from(["fixed", "shifted"])),
        "keep_first_frame": draw(st.booleans()),
        "own_key": draw(st.booleans()),
        "mean_key": draw(st.sampled_from(["none", "one", "count"])),
    }
    blocks = {
        "keep": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        "order": draw(st.sampled_from(["raster", "hilbert"])),
        "keep_first_frame": draw(st.booleans()),
    }
    frames = draw(st.integers(keys["frames"] + 1, 7))  # so that two frames have keys
    return frames, (draw(st.integers(1, 6)), draw(st.integers(2, 6))), draw(st.integers(0, 3)), keys, blocks


@given(case=cases(), batch=st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_any_setting_is_a_mask(case: tuple, batch: int) -> None:
    frames, grid, special, keys, blocks = case
    model, x = build(Spec(pairs=1, special=special)).double(), scene(batch, frames, grid).double()
    torch._dynamo.reset()
    out = run(model, x, capture=Capture(plan=plan(keys, blocks), strict=True))
    hand = joined(frames, grid, keys, blocks, special)
    torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-6, atol=1e-7)


def test_a_kept_key_is_read_with_its_block_alone() -> None:
    """`own_key` gives back what thinning dropped, not what the choice of blocks leaves out."""
    keys, blocks = {"stride": [1, 2]}, {"keep": 0.0}
    model, x = build(ONE).double(), scene().double()
    plain = run(model, x, capture=Capture(plan=plan(keys, blocks)))
    torch._dynamo.reset()
    own = run(model, x, capture=Capture(plan=plan({**keys, "own_key": True}, blocks)))
    same = (plain - own).abs().amax(-1).flatten() < 1e-12
    assert torch.equal(same, keys_oracle.kept(4, (5, 7), 5, keys))


def test_scale_is_carried() -> None:
    model, x = build(Spec(head_dim=16, pairs=1, core=alternating.scaled)).double(), scene().double()
    keys = {"own_key": True, "mean_key": "count"}
    out = run(model, x, capture=Capture(plan=plan(keys, {"cdf": 0.5, "keep": 0.0, "most": 1.0}), strict=True))
    hand = joined(4, (5, 7), keys, {"cdf": 0.5, "keep": 0.0, "most": 1.0, "scale": 0.3})
    torch.testing.assert_close(out, by_hand(model, x, lambda q, k, v: hand(q, k, v, scale=0.3)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("core", [alternating.sdpa, wide_queries])
def test_autocast(core: Callable) -> None:
    keys = {"own_key": True, "mean_key": "count", "keep_first_frame": True}
    model, x = build(Spec(head_dim=16, core=core)), scene(2)
    hand = joined(4, (5, 7), keys, {"keep": 1.0})
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = run(model, x, capture=(capture := Capture(plan=plan(keys, {"keep": 1.0}), strict=True)))
        eager = by_hand(model, x, hand)
    want = by_hand(model.double(), x.double(), hand)
    # Sums in another order round elsewhere, so single numbers may be off by more; as a whole they are not.
    assert (out - want).norm() < 1.1 * (eager - want).norm()
    for node in capture.graphs[0].graph.nodes:
        check_node_safe(node)  # raises for what AOTAutograd would not cache


def test_batch_items_do_not_mix() -> None:
    setting = plan(KEYS[3], {"keep": 0.3})
    model, both = build(ONE), torch.cat((scene(), scene(seed=1)))
    together = run(model, both, capture=Capture(plan=setting))
    for index in range(2):
        torch._dynamo.reset()
        alone = run(model, both[index : index + 1], capture=Capture(plan=setting))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_order_of_frames_does_not_matter_where_all_is_kept() -> None:
    model, x, order = small("pi3", layers=1), pictures(1, 4, 3, 56, 70), [2, 0, 3, 1]
    setting = plan({"own_key": True, "mean_key": "one"}, {"keep": 1.0})
    out = run(model, x, capture=Capture(plan=setting, strict=True))
    torch._dynamo.reset()
    permuted = run(model, x[:, order], capture=Capture(plan=setting, strict=True))
    assert worst(permuted, {name: value[:, order] for name, value in out.items()}) < 1e-3


DYNAMIC: list[tuple[dict, dict]] = [
    ({"own_key": True, "mean_key": "one", "keep_first_frame": True}, {"keep": 0.3}),
    ({"frames": 4, "phase": "shifted", "mean_key": "count"}, {"keep": 0.1, "cdf": 0.7}),
    ({"stride": [2, 3], "phase": "shifted", "own_key": True}, {"keep": 0.4, "keep_first_frame": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "blocks"), DYNAMIC)
def test_one_graph_serves_all_frame_counts(keys: dict, blocks: dict) -> None:
    model, capture = build(SPEC).double(), Capture(plan=plan(keys, blocks), strict=True)
    for batch, frames, grid in ((2, 4, (5, 7)), (3, 9, (6, 5)), (2, 3, (8, 9)), (2, 5, (3, 4))):
        x = scene(batch, frames, grid).double()
        out = run(model, x, capture=capture, dynamic=True)
        hand = joined(frames, grid, keys, blocks)
        torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-6, atol=1e-7)
    assert len(capture.graphs) <= 2
    assert capture.reports[0].dynamic


def test_a_walk_keeps_frames_symbolic() -> None:
    keys, blocks = {"own_key": True, "mean_key": "one"}, {"keep": 0.3, "order": "hilbert"}
    model, capture = build(SPEC).double(), Capture(plan=plan(keys, blocks), strict=True)
    for frames in (3, 6):
        x = scene(frames=frames).double()
        torch._dynamo.mark_dynamic(x, 1)
        out = run(model, x, capture=capture, dynamic=None)
        hand = joined(frames, (5, 7), keys, blocks)
        torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-6, atol=1e-7)
    assert len(capture.reports) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_graphs_give_the_same_numbers(dynamic: bool) -> None:
    keys, blocks, auto = KEYS[2], {"keep": 0.3}, torch.export.Dim.AUTO
    model, x = build(SPEC), scene(2)
    gm, report = exported(model, x, plan(keys, blocks), {0: auto, 1: auto, 3: auto, 4: auto} if dynamic else None)
    assert len(report.rewritten) == 2
    torch.testing.assert_close(gm(x), by_hand(model, x, joined(4, (5, 7), keys, blocks)), rtol=1e-4, atol=1e-5)


EMPTY: list[tuple[dict, dict, int, bool]] = [
    ({"frames": 4, "keep_first_frame": True}, {}, 4, False),
    ({"frames": 4}, {"keep_first_frame": True, "cdf": 0.5}, 4, False),
    ({"frames": 4, "own_key": True}, {"keep_first_frame": True, "method": "random", "keep": 0.5, "seed": 1}, 3, False),
    ({"frames": 2, "keep_first_frame": True}, {}, 2, True),
]


@pytest.mark.parametrize(("keys", "blocks", "frames", "dynamic"), EMPTY)
def test_no_block_is_chosen_where_all_keys_are_always_read(
    keys: dict, blocks: dict, frames: int, dynamic: bool
) -> None:
    model, x = build(ONE).double(), scene(frames=frames).double()
    capture = Capture(plan=plan(keys, blocks), strict=True)
    out = run(model, x, capture=capture, dynamic=dynamic)
    torch._dynamo.reset()
    alone = run(model, x, capture=Capture(plan=plan(keys, None), strict=True))
    torch.testing.assert_close(out, alone, rtol=1e-9, atol=1e-10)


# What is refused


def test_all_three_axes_are_refused() -> None:
    setting = plan({}, {})
    setting["layers"]["*"]["scope"] = "frame"
    run(build(SPEC), scene(), capture=(capture := Capture(plan=setting)))
    reason = "keys are not thinned after another axis yet, and scope acted before"
    assert [row.reason for row in capture.report.global_rows] == [reason] * 2


# One choice for several layers


def test_a_choice_serves_layers_whose_keys_are_thinned_alike() -> None:
    thin, other = plan({}, {"refresh": 9}), plan({"own_key": True}, {"refresh": 9})
    policies = {"0-1": thin["layers"]["*"], "2-3": other["layers"]["*"], "4": plan(None, {"refresh": 9})["layers"]["*"]}
    capture = Capture(plan={"layers": policies}, strict=True)
    run(build(Spec(head_dim=16, pairs=5)), scene(), capture=capture)
    settings = [(row.layer, row.axes["blocks"]) for row in capture.report.global_rows]
    assert [setting.get("chosen_at", layer) for layer, setting in settings] == [0, 0, 2, 2, 4]


# What is counted

PAIRS = [
    ({}, {"keep": 0.4}, 4, 20, 0),  # ⌈5/2⌉·⌈7/2⌉ = 12 of 35 patches
    ({"mean_key": "one", "own_key": True}, {"keep": 0.4}, 4, 21, 4 * 23),
    ({"keep_first_frame": True, "own_key": True}, {"keep": 0.5}, 5, 25 + 35, 4 * 23),
    ({"keep_first_frame": True}, {"keep": 0.5, "keep_first_frame": True}, 5, 25 + 35, 0),
    ({}, {"keep": 0.5, "keep_first_frame": True}, 5, 25 + 12, 0),
]


@pytest.mark.parametrize(("keys", "blocks", "frames", "always", "own"), PAIRS)
def test_report_and_density_count_special_rows_kept_blocks_and_own_keys(
    keys: dict, blocks: dict, frames: int, always: int, own: int
) -> None:
    options = {"plan": plan(keys, blocks), "densities": True, "strict": True}
    with torch.no_grad(), collect_reports() as reports, collect_densities() as densities:
        torch.compile(build(SPEC), backend=vggt_sparse_eager, dynamic=False, options=options)(scene(2, frames))
    special, patches, tokens = frames * 5, frames * 35, frames * 40
    pairs = special * (always + 48) + patches * (always + 16) + own  # one of three blocks
    for row, found in zip(reports[0].rewritten, densities.rows, strict=True):
        assert row.flops_after == 2 * 4 * 2 * 16 * pairs
        assert row.flops_before == 2 * 4 * 2 * 16 * tokens**2
        assert found.density == pytest.approx(pairs / tokens**2)


def test_all_blocks_are_as_dense_as_the_thinned_keys() -> None:
    options = {"plan": plan(KEYS[2], {"keep": 1.0}), "densities": True}
    model = torch.compile(build(SPEC), backend=vggt_sparse_eager, dynamic=True, options=options)
    with torch.no_grad():
        for frames in (4, 7):
            with collect_reports() as reports, collect_densities() as densities:
                model(scene(frames=frames))
            keys = frames * 5 + 35 + 1 + (frames - 1) * 12
            pairs = frames * 40 * keys + (frames - 1) * 23
            assert densities.mean() == pytest.approx(pairs / (frames * 40) ** 2)
            assert len(reports) == (frames == 4)


@pytest.mark.slow
def test_compiled_is_what_the_rewritten_graph_computes() -> None:
    model, x, keys, blocks = build(ONE), scene(2), KEYS[3], {"cdf": 0.6, "order": "hilbert"}
    eager = run(model, x, capture=Capture(plan=plan(keys, blocks)))
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as reports:
        options = {"plan": plan(keys, blocks), "strict": True}
        compiled = torch.compile(model, backend=vggt_sparse, options=options)(x)
    assert len(reports[0].rewritten) == 1
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
