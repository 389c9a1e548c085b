"""What test_select_blocks.py runs in a process of its own: the kernel in Triton's interpreter, against the reference.

    TRITON_INTERPRET=1 python select_blocks_run.py

Scores are products of small integers, so both have the same ones, ties included. Prints how many cases agreed.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from vggt_compile.ops import pool_blocks_kernel
from vggt_compile.ops.select_blocks import SLACK, best_blocks, budget, pooled
from vggt_compile.ops.select_blocks_kernel import CUT, LANES, launch

SHAPES = [
    (1, 1, 1, 1, 16),
    (1, 2, 3, 7, 8),
    (3, 1, 1, LANES + 1, 16),
    (1, 1, 2, 2 * LANES, 64),
    (1, 2, 5, 0, 16),
]
"""Of the third, one of two programs has two groups of rows: scores of the second go where those of the first lay."""
GROUPS = (1, 1, CUT.rows + 2, LANES + 1, 16)
"""A head with two groups of rows, the second one not full."""
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
EVERY = ((1, 2, 3, 7, 8), (1, 1, 2, 2 * LANES, 64))
CASES = [(shape, choice) for shape in (*SHAPES, GROUPS) for choice in (CHOICES if shape in EVERY else CHOICES[::3])]
"""A row is chosen by itself, so that other shapes and many rows need no more than a choice of each kind."""


def agrees(shape: tuple[int, ...], choice: tuple[float, float, float, bool], device: str) -> None:
    """Fails unless kernel and definition give the same lists, on a CPU in the interpreter.

    Sums of mass differ by rounding on a GPU, so that a row which asks for mass may keep one block more or less there.
    """
    (batch, heads, queries, blocks, width), (keep, cdf, most, reach) = shape, choice
    torch.manual_seed(0)
    q = torch.randint(-3, 4, (batch, heads, queries, width)) / 8
    k = torch.randint(-2, 3, (batch, heads, blocks, width)) / 2
    floor, cap = budget(blocks, keep, cdf, most)
    want = best_blocks(q @ k.mT, floor, cap, cdf, reach)
    share = cdf + SLACK if cdf else 0.0
    across = F.pad(k.mT, (0, -blocks % LANES), value=torch.nan)
    if device == "cpu":
        got = launch(q, across, blocks, floor, cap, share, reach, programs=2, wrap=lambda kernel: kernel)
    else:
        got = launch(q.to(device), across.to(device), blocks, floor, cap, share, reach)
    (index, count), (wanted, number) = (got[0].cpu(), got[1].cpu()), want
    assert index.dtype == wanted.dtype == count.dtype == number.dtype
    same = count == number
    assert torch.equal(index[same], wanted[same]), (shape, choice)
    assert same.all() or (device != "cpu" and cdf and (count - number).abs().max() <= 1), (shape, choice)
    assert same.float().mean() > 0.99, (shape, choice)


POOLED = [
    (1, 1, 1, 16, 4),
    (2, 3, 37, 24, 4),
    (1, 2, 300, 64, 128),
    (1, 2, 130, 80, 48),
    (1, 1, 9, 8, 1),
    (1, 2, 0, 16, 64),
]


def pools(shape: tuple[int, ...], pool: str, device: str) -> None:
    """Fails unless kernel and definition pool alike: whole numbers, so that sums are exact in any order."""
    batch, heads, tokens, width, block = shape
    torch.manual_seed(0)
    fused = torch.randint(-8, 9, (batch, tokens, 3, heads, width)).to(torch.bfloat16).to(device)
    x = fused.permute(2, 0, 3, 1, 4)[1]
    wrap = {"wrap": lambda kernel: kernel} if device == "cpu" else {}
    want = pooled(x, block, pool) * 0.25
    assert torch.equal(pool_blocks_kernel.launch(x, block, pool, 0.25, **wrap), want), shape
    across = pool_blocks_kernel.launch(x, block, pool, 0.25, across=LANES, **wrap)
    assert across.shape[-1] % LANES == 0
    assert torch.equal(across[..., : want.shape[2]].mT, want), shape


def main() -> None:
    for shape, pool in itertools.product(POOLED, ("mean", "max")):
        pools(shape, pool, "cpu")
    for shape, choice in CASES:
        agrees(shape, choice, "cpu")
    print(len(CASES))


if __name__ == "__main__":
    main()
