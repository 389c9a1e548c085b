"""What test_select_blocks.py runs in a process of its own: the kernel in Triton's interpreter, against the reference.

    TRITON_INTERPRET=1 python select_blocks_run.py

Scores are products of small integers, so both have the same ones, ties included. Prints how many cases agreed.
"""

from __future__ import annotations

import itertools

import torch

from vggt_compile.ops.select_blocks import SLACK, best_blocks, budget
from vggt_compile.ops.select_blocks_kernel import ROWS, TILE, launch

SHAPES = [(1, 1, 1, 1, 16), (1, 2, 3, 7, 8), (2, 1, ROWS + 2, TILE + 1, 16), (1, 1, 5, 2 * TILE, 64)]
CHOICES = [
    # keep, cdf, most, reach
    (0.25, 0.0, 0.5, False),
    (0.0, 0.0, 0.5, False),
    (1.0, 0.3, 0.5, False),
    (0.25, 0.9, 0.5, False),
    (0.0, 0.5, 1.0, False),
    (0.0, 0.5, 1.0, True),
    (0.1, 1.0, 1.0, True),
    (0.2, 0.97, 0.3, True),
]


def main() -> None:
    torch.manual_seed(0)
    agreed = 0
    for (batch, heads, queries, blocks, width), (keep, cdf, most, reach) in itertools.product(SHAPES, CHOICES):
        q = torch.randint(-3, 4, (batch, heads, queries, width)) / 8
        k = torch.randint(-2, 3, (batch, heads, blocks, width)) / 2
        floor, cap = budget(blocks, keep, cdf, most)
        want = best_blocks(q @ k.mT, floor, cap, cdf, reach)
        got = launch(q, k, floor, cap, cdf + SLACK if cdf else 0.0, reach, programs=2, wrap=lambda kernel: kernel)
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs), (batch, heads, queries, blocks, width, keep, cdf, most, reach)
        agreed += 1
    print(agreed)


if __name__ == "__main__":
    main()
