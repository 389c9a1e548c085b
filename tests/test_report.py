"""The report: its numbers, its forms, and who receives it; and `explain`, which gets it without running the model."""

from __future__ import annotations

import json

import alternating
import pytest
import torch
from alternating import Spec, build
from framed import SPEC, scene
from harness import FRAME, Capture, run
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from vggt_compile import collect_reports, explain
from vggt_compile.errors import BadInput, NotRewritten
from vggt_compile.report import Report


def test_flops_are_those_of_the_products() -> None:
    capture = Capture()
    run(build(Spec(pairs=1)), scene(batch=2), capture=capture)
    inner, outer = capture.report.rows
    per_pair = 4 * 2 * 8  # two products of 2·D operations, two heads
    assert (inner.flops_before, inner.flops_after) == (per_pair * 6 * 11**2, per_pair * 6 * 11**2)
    assert inner.keys == 11
    assert (outer.flops_before, outer.flops_after) == (per_pair * 2 * 33**2, per_pair * 2 * 3 * 11**2)
    left = (6 * 11**2 + 2 * 3 * 11**2) / (6 * 11**2 + 2 * 33**2)
    assert capture.report.attention_left() == pytest.approx(left, rel=1e-12)


def test_a_report_reads_the_same_in_python_json_and_print() -> None:
    capture = Capture(plan={"layers": {"1,7": {"scope": "frame"}}})
    run(build(Spec(encoder=1)), scene(batch=2), capture=capture)
    report = capture.report
    left, done = report.global_rows
    assert (done.layer, done.batch, done.frames, done.per_frame, done.special) == (1, 2, 3, 11, 5)
    assert (done.heads, done.head_dim, done.dtype, done.reason) == (2, 8, "float32", None)
    assert done.axes == {"scope": "frame"}
    assert (left.axes, left.reason) == ({}, "the plan leaves this layer dense")
    read = json.loads(report.to_json())
    assert read["family"] == "vggt"
    assert [row["path"] for row in read["rows"]] == [row.path for row in report.rows]
    assert read["attention_left"] == report.attention_left() < 1
    text = str(report)
    assert "3 × 11 (5 special)" in text
    assert "global_blocks.1.attn" in text
    assert "frame_blocks" not in text
    assert "3 inside frames, 0 others" in text
    assert "1 of 5 attentions rewritten" in text
    assert "note: the plan names layer 7: no such layer" in text
    assert "frame_blocks.0.attn" in report.table(every=True)


def test_an_empty_report_prints() -> None:
    assert "0 of 0 attentions rewritten; 100.0%" in str(Report())
    assert json.loads(Report().to_json())["rows"] == []


def test_reports_reach_every_open_block() -> None:
    model = build(SPEC)
    with collect_reports() as outer:
        run(model, scene(), capture=Capture())
        with collect_reports() as inner:
            torch._dynamo.reset()
            run(model, scene(), capture=Capture())
        with pytest.raises(ZeroDivisionError), collect_reports() as broken:
            1 / 0  # noqa: B018
        torch._dynamo.reset()
        run(model, scene(), capture=Capture())
    torch._dynamo.reset()
    run(model, scene(), capture=Capture())
    assert (len(outer), len(inner), len(broken)) == (3, 1, 0)
    assert inner[0] is outer[1]


KERNELS: list[torch.Size] = []
"""Shapes that the operator below really ran on; dispatch modes cannot watch, Dynamo stands aside for them."""


@torch.library.custom_op("vggt_compile_tests::watched", mutates_args=())
def watched(x: Tensor) -> Tensor:
    KERNELS.append(x.shape)
    return x.clone()


@watched.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_explain_runs_no_kernel_of_the_model() -> None:
    model, x = build(Spec(core=lambda q, k, v: alternating.sdpa(watched(q), k, v))), scene(batch=2)
    KERNELS.clear()
    with torch.no_grad():
        report = explain(model, x, plan=FRAME)
        assert len(report.rewritten) == 2
        assert KERNELS == []
        model(x)
    assert len(KERNELS) == 2


def test_explain_is_what_compiling_does() -> None:
    model, x = build(SPEC), scene(batch=2)
    with torch.no_grad():
        told = explain(model, x, plan=FRAME, dynamic=False)
    run(model, x, capture=(capture := Capture()))
    assert told.rows == capture.report.rows
    assert told.family == "vggt"


@pytest.mark.parametrize(
    "plan",
    [
        FRAME,
        {"layers": {"*": {"keys": {"method": "grid", "stride": [2, 2], "most_frames": 4}}}},
        {"layers": {"*": {"tokens": {"method": "merge", "ratio": 0.5}}}},
        {"layers": {"1": {"blocks": {"method": "predict", "keep": 0.5, "q_block": 16, "k_block": 16}}}},
    ],
    ids=["scope", "keys", "tokens", "blocks"],
)
def test_flops_for_other_numbers_of_frames_are_those_of_a_trace_with_them(plan: object) -> None:
    model = build(SPEC)
    with torch.no_grad():
        report = explain(model, scene(frames=5, grid=(4, 6)), plan=plan, dynamic=True)
        assert report.rewritten
        assert report.attention_left(5) == report.attention_left() < 1
        for frames in (2, 3, 8, 40):
            alone = explain(model, scene(frames=frames, grid=(4, 6)), plan=plan, dynamic=False)
            assert report.attention_left(frames) == alone.attention_left() == alone.attention_left(frames)
            with pytest.raises(BadInput, match=f"does not serve 7 frames: their number is {frames} in it; trace with"):
                alone.attention_left(7)


def test_explain_leaves_nothing_behind() -> None:
    model, x = build(SPEC), scene()
    with torch.no_grad():
        want = model(x)
        for _ in range(2):
            explain(model, x, plan=FRAME)
        assert torch._dynamo.eval_frame._debug_get_cache_entry_list(type(model).forward.__code__) == []
        assert torch.equal(model(x), want)
        assert torch.equal(torch.compile(model, backend="eager", dynamic=False)(x), want)


def test_explain_is_strict_when_asked() -> None:
    model = build(SPEC)
    with torch.no_grad(), pytest.raises((NotRewritten, BackendCompilerFailed), match="layer 7: no such layer"):
        explain(model, scene(), plan={"layers": {"7": {"scope": "frame"}}}, strict=True)
