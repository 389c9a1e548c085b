"""One compile or two serve all frame counts and image sizes: no pass asks for a size that it does not need."""

from __future__ import annotations

from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from harness import Capture, run

SPEC = Spec(head_dim=16, pairs=1)
MERGE: dict[str, Any] = {"tokens": "merge"}
QUERIES: dict[str, Any] = {"tokens": {"method": "merge_queries", "frames": 4}}
HEADS: dict[str, Any] = {"tokens": {"method": "merge_heads", "patches": 6, "frames": 3}}
BLOCKS: dict[str, Any] = {"blocks": {"method": "predict", "q_block": 32, "k_block": 16}}


def grid(**parameters: Any) -> dict[str, Any]:
    return {"keys": {"method": "grid", **parameters}}


POLICIES: dict[str, dict[str, Any]] = {
    "windows": grid(),
    "windows, own keys, mean": grid(stride=[2, 3], own_key=True, mean_key="count", keep_first_frame=True),
    "frames": grid(stride=[1, 1], frames=4),
    "several of a window": grid(stride=[3, 3], kept=[2, 2], phase="shifted"),
    "merge": MERGE,
    "merge, windows": {**MERGE, **grid(stride=[3, 3], kept=[2, 2], phase="shifted")},
    "merge, blocks": {**MERGE, **BLOCKS},
    "queries, frames": {**QUERIES, **grid(stride=[1, 1], frames=3)},
    "heads": HEADS,
    "windows, blocks": {**grid(), **BLOCKS},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_twenty_frame_counts_take_two_compiles_at_most(name: str) -> None:
    capture = Capture(plan={"layers": {"*": POLICIES[name]}}, strict=True)
    compiled = torch.compile(build(SPEC), backend=capture)
    with torch.no_grad():
        for frames in (4, 9, 2, 3, *range(5, 9), *range(10, 22)):
            x = alternating.images(SPEC, 1, frames, (5, 7))
            torch._dynamo.maybe_mark_dynamic(x, 1)
            compiled(x)
    assert len(capture.graphs) <= 2


SIZES = [(4, (5, 7)), (9, (6, 5)), (5, (8, 9)), (6, (11, 5)), (3, (13, 13)), (7, (6, 6)), (3, (12, 6)), (10, (9, 9))]


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_frame_counts_and_image_sizes_take_two_compiles_at_most(name: str) -> None:
    """Of grids with more than one window each way: a single one is a size of its own for the compiler."""
    model, capture = build(SPEC), Capture(plan={"layers": {"*": POLICIES[name]}}, strict=True)
    for frames, size in SIZES:
        run(model, alternating.images(SPEC, 2, frames, size), capture=capture, dynamic=True)
    assert len(capture.graphs) <= 2
