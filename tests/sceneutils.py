"""Sizes, seeds and comparisons for tests of scenes."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from vggt_compile.scenes import (
    overlap,
)

SMALL = (42, 56)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))
laws = settings(deadline=None, max_examples=10, derandomize=True)


def neighbours(views):
    """Mean overlap of each frame with the next."""
    return overlap(views).diagonal(1, 1, 2).mean().item()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
