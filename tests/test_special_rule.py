"""Special tokens read all keys and are read by all queries, unless an experiment puts them into blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alternating import Spec, build
from axes import by_hand
from blocks_model import BLOCKS, confined, plan, scene
from harness import Capture, run

from vggt_compile import explain
from vggt_compile.ops.select_blocks import select_blocks

SPEC = Spec(head_dim=16)


@pytest.mark.parametrize("keep", [0.1, 0.4])
def test_without_the_rule_special_tokens_are_in_blocks_like_patches(keep: float) -> None:
    model, x = build(SPEC), scene(2)
    out = run(model, x, capture=(capture := Capture(plan=plan(keep=keep, special_dense=False), strict=True)))
    assert [row.axes["blocks"]["special_dense"] for row in capture.report.rewritten] == [False, False]
    hand = confined(4, 0, lambda q, k: select_blocks(q, k, keep=keep, **BLOCKS))
    torch.testing.assert_close(out, by_hand(model, x, hand), rtol=1e-4, atol=1e-5)
    with_rule = run(model, x, capture=Capture(plan=plan(keep=keep), strict=True))
    assert (out - with_rule).abs().max() > 1e-3


def test_with_all_blocks_the_rule_changes_nothing() -> None:
    model, x = build(SPEC), scene()
    out = run(model, x, capture=Capture(plan=plan(keep=1.0, special_dense=False), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [{"order": "hilbert"}, {"keep_first_frame": True}])
def test_it_is_refused_beside_what_needs_to_know_special_tokens(other: dict[str, Any]) -> None:
    report = explain(build(SPEC), scene(), plan=plan(special_dense=False, **other))
    assert {row.reason for row in report.global_rows} == {
        "special_dense=False goes with no other axis, no order='hilbert' and no keep_first_frame"
    }
