"""What test_match_tokens.py runs in a process of its own: the kernel in Triton's interpreter, against the reference.

    TRITON_INTERPRET=1 python match_tokens_run.py

Tokens are vectors of a few ±½, whose products are exact in any order, so both find the same ones, ties included. The
interpreter multiplies bit patterns of bfloat16, so there is none. Prints how many cases agreed.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vggt_compile.ops.match_tokens import reference
from vggt_compile.ops.match_tokens_kernel import ROWS, TILE, launch

SHAPES = [
    # batch, sources, destinations, channels
    (1, 1, 1, 16),
    (2, 7, 5, 24),
    (2, ROWS + 2, TILE + 1, 16),
    (1, 5, 2 * TILE, 64),
    (1, 3, TILE + 3, 264),
]
RUNS = [(3, 2), (ROWS - 20, 40)]
"""Sources and destinations that are matched with each other only."""
DTYPES = [torch.float32, torch.float16]


def exact(batch: int, count: int, channels: int, seed: int) -> Tensor:
    """Tokens [batch, count, channels] of length one, each with four numbers of ±½."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(batch, count, channels, generator=generator).argsort(-1)[..., :4]
    sign = torch.randint(0, 2, place.shape, generator=generator) - 0.5
    return torch.zeros(batch, count, channels).scatter(-1, place, sign)


def runs(shape: tuple[int, int, int, int]) -> list[tuple[int | None, int | None]]:
    """None, and those of which every run of sources has a destination."""
    return [(None, None), *((s, d) for s, d in RUNS if (shape[1] - 1) // s * d < shape[2])]


def agrees(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    """Fails unless kernel and definition find the same destinations, on a CPU in the interpreter."""
    batch, sources, destinations, channels = shape
    source = exact(batch, sources, channels, seed=0).to(dtype)
    destination = exact(batch, destinations, channels, seed=1).to(dtype)
    for run in runs(shape):
        want = reference(source, destination, *run)
        if device == "cpu":
            got = launch(source, destination, *run, wrap=lambda kernel: kernel)
        else:
            got = launch(source.to(device), destination.to(device), *run)
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine.cpu(), theirs), (shape, dtype, run)


def main() -> None:
    torch.use_deterministic_algorithms(True)  # fills fresh memory, with NaN or the largest integer
    cases = list(itertools.product(SHAPES, DTYPES))
    for shape, dtype in cases:
        agrees(shape, dtype, "cpu")
    print(len(cases))


if __name__ == "__main__":
    main()
