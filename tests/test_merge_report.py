"""Merged tokens: what is counted and shown, what is refused, and the recipe."""

from __future__ import annotations

from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from axes import BareTrunk, by_hand
from harness import Capture, run
from modelutils import images as pictures
from regions import small
from tokens_oracle import merging
from torch import Tensor

from vggt_compile import explain
from vggt_compile.errors import PlanError
from vggt_compile.plan import Plan
from vggt_compile.recipes import recipes

SPEC = Spec(head_dim=16)
GRID = (5, 7)


def plan(layers: str = "*", **parameters: Any) -> dict:
    return {"layers": {layers: {"tokens": {"method": "merge", **parameters}}}}


def scene(batch: int = 1, frames: int = 4, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    return alternating.images(SPEC, batch, frames, grid, seed)


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
    assert row.keys == tokens
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
    run(BareTrunk(SPEC, names), torch.randn(2, 3, 9, 32), capture=(capture := Capture(plan=plan())))
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


def test_the_recipe_merges_in_all_global_layers() -> None:
    placed = recipes()["fastvggt"].plan
    for family, depth in (("vggt", 24), ("pi3", 18), ("generic", 7)):
        for layer in range(depth):
            policy = placed.at(depth).policy(layer, family).to_json()
            assert set(policy) == {"tokens"}
            assert policy["tokens"]["reference"] == (family != "pi3")
            assert (policy["tokens"]["ratio"], policy["tokens"]["protect"]) == (0.9, 0.1)
    for model in map(small, ("vggt", "pi3")):
        torch._dynamo.reset()
        with torch.no_grad():
            report = explain(model, pictures(1, 2, 3, 56, 70), plan="fastvggt", strict=True)
        assert len(report.rewritten) == len(report.global_rows) > 0
