"""FastVGGT's own code beside `tokens: merge`, on its ground."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import alternating
import pytest
import torch
import upstream
from alternating import Spec, build, images
from axes import by_hand
from harness import Capture, run
from tokens_oracle import input_of, standing
from torch import Tensor

SPEC = Spec(head_dim=16)


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
    model, x = build(SPEC).double(), images(SPEC, 1, frames, grid).double()
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
    merging = {"layers": {"*": {"tokens": {"method": "merge", **setting}}}}
    out = run(model, x, capture=Capture(plan=merging, strict=True))
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
