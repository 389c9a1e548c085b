"""Attention that leaves nothing out, by our kernel: what it computes, where PyTorch's stays, what the report says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from axes import by_hand, wide_queries
from harness import Capture, exported, nodes, raises_through_dynamo, run
from numerics import assert_as_accurate
from torch import Tensor
from torch._functorch._aot_autograd.autograd_cache import check_node_safe

from vggt_compile import collect_reports, explain, vggt_sparse
from vggt_compile.bench.variants import known_variant
from vggt_compile.cli.speed import read_variant
from vggt_compile.errors import NotRewritten, PlanError
from vggt_compile.ops import hopper
from vggt_compile.plan import Plan
from vggt_compile.recipes import resolve
from vggt_compile.recommended import SHORT
from vggt_compile.rewrite import rewrite

SPEC = Spec(head_dim=32)
ALL = {"layers": {"*": {"blocks": "all"}}}
STAYS = "PyTorch's attention stays: "
ELSEWHERE = STAYS + "the kernel that is faster is for Hopper GPUs"
OURS, PLAIN = torch.ops.vggt_compile.attention.default, torch.nn.functional.scaled_dot_product_attention
THIN = {"keys": {"method": "grid"}}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device counts as a Hopper GPU; on a CPU the operator's definition runs."""
    monkeypatch.setattr(hopper, "here", lambda device: True)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes everything, float64 too, in which the definition shows what is computed."""
    monkeypatch.setattr(hopper, "here", lambda device: True)
    monkeypatch.setattr(hopper, "suits", lambda x: True)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "here", lambda device: False)


def scene(batch: int = 2, frames: int = 4, grid: tuple[int, int] = (5, 7)) -> Tensor:
    return alternating.images(SPEC, batch, frames, grid).bfloat16()


def assert_no_worse(got: Tensor, eager: Tensor, want: Tensor) -> None:
    """Sums in float32 of what was rounded before have other largest errors; as a whole these are no larger."""
    assert got.dtype == eager.dtype == torch.float32
    assert (got - want).norm() < 1.1 * (eager - want).norm()


def calls(capture: Capture, function: object) -> int:
    return sum(node.target is function for node in capture.graphs[0].graph.nodes)


# Where the kernel is


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("core", [alternating.sdpa, alternating.scaled, alternating.spelled_out])
def test_it_is_the_attention_of_the_model(core: Callable) -> None:
    model, x = build(Spec(head_dim=32, core=core)).bfloat16(), scene()
    out = run(model, x, capture=(capture := Capture(plan=ALL, strict=True)))
    assert calls(capture, OURS) == len(capture.report.rewritten) == 2
    with torch.no_grad():
        assert_as_accurate(out, model(x), model.double()(x.double()))


@pytest.mark.usefixtures("here")
def test_the_report_says_whose_attention_it_is_and_that_nothing_was_saved() -> None:
    run(build(SPEC).bfloat16(), scene(), capture=(capture := Capture(plan=ALL)))
    assert [row.implementation for row in capture.report.global_rows] == ["hopper"] * 2
    assert [row.axes for row in capture.report.global_rows] == [{"blocks": "all"}] * 2
    assert [row.reason for row in capture.report.global_rows] == [None] * 2
    assert {row.implementation for row in capture.report.rows if row.scope == "frame"} == {"sdpa"}
    assert capture.report.attention_left() == 1.0
    assert "blocks: all" in str(capture.report)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("core", [alternating.sdpa, wide_queries])
def test_under_autocast_it_computes_in_the_dtype_of_the_output(core: Callable) -> None:
    model, x = build(Spec(head_dim=32, core=core)), scene().float()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = run(model, x, capture=(capture := Capture(plan=ALL, strict=True)))
        eager = model(x)
    assert [row.dtype for row in capture.report.rewritten] == ["bfloat16"] * 2
    with torch.no_grad():
        assert_no_worse(out, eager, by_hand(model.double(), x.double(), alternating.sdpa))
    for node in capture.graphs[0].graph.nodes:
        check_node_safe(node)  # raises for what AOTAutograd would not cache


@pytest.mark.usefixtures("everywhere")
def test_one_graph_serves_all_frame_counts() -> None:
    capture = Capture(plan={**ALL, "min_tokens": 160}, strict=False)
    model = build(SPEC).double()
    compiled = torch.compile(model, backend=capture, dynamic=True)
    with torch.no_grad():
        for frames, grid in ((4, (5, 7)), (6, (6, 5)), (5, (8, 9)), (2, (5, 7)), (3, (5, 6))):
            x = scene(2, frames, grid).double()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    few = "fewer tokens than min_tokens=160"
    assert [[row.reason for row in report.global_rows] for report in capture.reports] == [[None] * 2, [few] * 2]


# With other axes

MERGE: dict[str, Any] = {"tokens": "merge"}
OTHERS: dict[str, dict[str, Any]] = {
    "windows": THIN,
    "windows, one mean": {"keys": {"method": "grid", "mean_key": "one"}},
    "merge": MERGE,
    "merge, windows": {**MERGE, **THIN},
    "queries": {"tokens": {"method": "merge_queries", "frames": 2}},
}


@pytest.mark.parametrize("more", [{}, {"blocks": "all"}])
@pytest.mark.parametrize("name", OTHERS)
def test_what_other_axes_left_is_given_to_the_kernel(
    name: str, more: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build(SPEC).double(), scene().double()
    monkeypatch.setattr(hopper, "here", lambda device: False)
    alone = run(model, x, capture=(before := Capture(plan={"layers": {"*": OTHERS[name]}}, strict=True)))
    torch._dynamo.reset()
    monkeypatch.setattr(hopper, "here", lambda device: True)
    monkeypatch.setattr(hopper, "suits", lambda x: True)
    out = run(model, x, capture=(capture := Capture(plan={"layers": {"*": {**OTHERS[name], **more}}}, strict=True)))
    assert (calls(before, OURS), calls(capture, OURS)) == (0, 2)
    assert {row.implementation for row in before.report.rewritten} == {"sdpa"}
    assert {row.implementation for row in capture.report.rewritten} == {"hopper"}
    assert capture.report.attention_left() == before.report.attention_left() < 1
    torch.testing.assert_close(out, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", OTHERS)
def test_after_other_axes_it_changes_nothing(name: str) -> None:
    model, x = build(SPEC).bfloat16(), scene()
    run(model, x, capture=(before := Capture(plan={"layers": {"*": OTHERS[name]}})))
    torch._dynamo.reset()
    run(model, x, capture=(capture := Capture(plan={"layers": {"*": {**OTHERS[name], "blocks": "all"}}}, strict=True)))
    assert nodes(capture.graphs[0]) == nodes(before.graphs[0])
    assert {row.implementation for row in capture.report.rewritten} == {"sdpa"}
    assert [row.axes["blocks"] for row in capture.report.rewritten] == ["all"] * 2


@pytest.mark.usefixtures("here")
def test_attention_inside_frames_stays_pytorchs() -> None:
    run(build(SPEC).bfloat16(), scene(), capture=(capture := Capture(plan={"layers": {"*": {"scope": "frame"}}})))
    assert {row.implementation for row in capture.report.rewritten} == {"sdpa"}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    "policy", [{"keys": {"method": "grid", "own_key": True}}, {"tokens": {"method": "merge", "weight": "log_count"}}]
)
def test_what_our_operator_computes_anyway_is_left_to_it(
    policy: dict, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "here", lambda device: kernel)
    model, x = build(SPEC).bfloat16(), scene()
    run(model, x, capture=(before := Capture(plan={"layers": {"*": policy}})))
    torch._dynamo.reset()
    run(model, x, capture=(capture := Capture(plan={"layers": {"*": {**policy, "blocks": "all"}}})))
    assert nodes(capture.graphs[0]) == nodes(before.graphs[0])
    assert [row.implementation for row in capture.report.rewritten] == ["weighted"] * 2
    assert [row.reason for row in capture.report.rewritten] == [None] * 2


@pytest.mark.usefixtures("here")
def test_it_does_not_follow_scope() -> None:
    policy = {"scope": "frame", "blocks": "all"}
    run(build(SPEC).bfloat16(), scene(), capture=(capture := Capture(plan={"layers": {"*": policy}})))
    assert [row.reason for row in capture.report.global_rows] == ["blocks are not chosen after scope yet"] * 2
    assert capture.report.rewritten == []


# Where PyTorch's attention stays


@pytest.mark.usefixtures("elsewhere")
def test_without_a_hopper_gpu_the_graph_is_left_to_the_node() -> None:
    run(build(SPEC).bfloat16(), scene(), capture=(capture := Capture(plan=ALL)))
    assert nodes(capture.graphs[0]) == capture.before[0]
    assert [row.reason for row in capture.report.global_rows] == [ELSEWHERE] * 2


def test_a_cpu_is_no_hopper_gpu() -> None:
    run(build(SPEC).bfloat16(), scene(), capture=(capture := Capture(plan=ALL)))
    assert [row.reason for row in capture.report.global_rows] == [ELSEWHERE] * 2


@pytest.mark.usefixtures("elsewhere")
def test_strict_has_what_it_asks_for_where_nothing_is_left_out() -> None:
    run(build(SPEC).bfloat16(), scene(), capture=(capture := Capture(plan=ALL, strict=True)))
    assert [row.reason for row in capture.report.global_rows] == [ELSEWHERE] * 2
    missing = {"layers": {"7": {"blocks": "all"}}}
    raises_through_dynamo(
        NotRewritten, "no such layer", build(SPEC).bfloat16(), scene(), Capture(plan=missing, strict=True)
    )


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("head_dim", "dtype"), [(16, torch.bfloat16), (32, torch.float32), (64, torch.float64)])
def test_the_kernel_does_not_take_every_head(head_dim: int, dtype: torch.dtype) -> None:
    model = build(Spec(head_dim=head_dim)).to(dtype)
    run(model, scene().to(dtype), capture=(capture := Capture(plan=ALL)))
    assert nodes(capture.graphs[0]) == capture.before[0]
    why = STAYS + "the kernel for Hopper GPUs is for aligned 16-bit heads of 32, 64 or 128"
    assert [row.reason for row in capture.report.global_rows] == [why] * 2


@pytest.mark.usefixtures("here")
def test_other_attention_keeps_its_own_reason() -> None:
    spec = Spec(head_dim=32, pairs=3, cores={0: alternating.masked, 1: alternating.dropping})
    run(build(spec).bfloat16(), scene(), capture=(capture := Capture(plan=ALL)))
    reasons = ["it has an attention mask", "it drops out attention weights (p=0.5)", None]
    assert [row.reason for row in capture.report.global_rows] == reasons


@pytest.mark.usefixtures("here")
def test_artifacts_have_it_too() -> None:
    model, x = build(SPEC).bfloat16(), scene()
    gm, _ = exported(model, x, {})
    report = rewrite(gm, Plan.read(ALL), guard=False, strict=True)
    assert [row.implementation for row in report.global_rows] == ["hopper"] * 2
    assert sum(node.target is OURS for node in gm.graph.nodes) == 2
    with torch.no_grad():
        assert_as_accurate(gm(x), model(x), model.double()(x.double()))


# In plans


def test_wrong_words_get_the_nearest_one() -> None:
    with pytest.raises(PlanError, match="unknown method of axis 'blocks' 'al'; did you mean 'all'"):
        Plan.read({"layers": {"0": {"blocks": "al"}}})
    with pytest.raises(PlanError, match="unknown parameter of method 'all' of axis 'blocks' 'keep'"):
        Plan.read({"layers": {"0": {"blocks": {"method": "all", "keep": 0.5}}}})
    with pytest.raises(PlanError, match="did you mean 'exact'"):
        resolve("exakt")
    assert Plan.read(ALL).to_json()["layers"] == {"0-": {"blocks": "all"}}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("names", ["vggt", "pi3", "hidden"])
def test_exact_is_for_long_sequences_of_any_family(names: str) -> None:
    model, x = build(Spec(head_dim=32, names=names)).bfloat16(), scene(1, 8, (31, 33))
    assert 8 * (31 * 33 + 5) >= SHORT > 7 * (31 * 33 + 5)
    with torch.no_grad():
        long, short = explain(model, x, plan="exact", strict=True), explain(model, x[:, :7], plan="exact")
    assert [row.implementation for row in long.global_rows] == ["hopper"] * 2
    assert [row.reason for row in short.global_rows] == [f"fewer tokens than min_tokens={SHORT}"] * 2


@pytest.mark.usefixtures("here")
def test_fast_leaves_nothing_out_in_its_outer_layers() -> None:
    model, x = build(Spec(head_dim=32, pairs=4)).bfloat16(), scene(1)
    with torch.no_grad():
        rows = explain(model, x, plan="fast", strict=True).global_rows
    assert [sorted(row.axes) for row in rows] == [["blocks"], ["keys"], ["keys"], ["blocks"]]
    assert {row.implementation for row in rows} == {"hopper"}


@pytest.mark.usefixtures("elsewhere")
def test_without_the_kernel_fast_thins_keys_and_says_why_it_does_no_more() -> None:
    model, x = build(Spec(head_dim=32, pairs=4)).bfloat16(), scene(1)
    with torch.no_grad():
        rows = explain(model, x, plan="fast", strict=True).global_rows
    assert [sorted(row.axes) for row in rows] == [[], ["keys"], ["keys"], []]
    assert [row.reason for row in rows] == [ELSEWHERE, None, None, ELSEWHERE]


def test_benchmarks_know_it_by_its_name() -> None:
    assert known_variant("exact") == "exact"
    assert read_variant("exact") == ("exact", None)


# On a GPU: python -m pytest -m gpu tests/test_all_blocks.py


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_exact_loses_nothing_on_a_hopper_gpu(autocast: bool) -> None:
    if not (torch.cuda.is_available() and hopper.here(torch.device("cuda", 0))):
        pytest.skip("needs a Hopper GPU and Triton's Gluon")
    model = build(Spec(heads=4, head_dim=64)).cuda()
    x = alternating.images(SPEC, 1, 9, (28, 37)).cuda()
    with torch.no_grad():
        want = build(Spec(heads=4, head_dim=64)).cuda().double()(x.double())
    model, x = (model, x) if autocast else (model.bfloat16(), x.bfloat16())
    precision = torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.inference_mode(), precision, collect_reports() as reports:
        eager = model(x)
        got = torch.compile(model, backend=vggt_sparse, options={"plan": "exact", "strict": True})(x)
    assert [row.implementation for row in reports[0].global_rows] == ["hopper"] * 2
    assert [row.axes for row in reports[0].global_rows] == [{"blocks": "all"}] * 2
    (assert_no_worse if autocast else assert_as_accurate)(got, eager, want)
