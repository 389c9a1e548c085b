"""What test_token_groups.py runs in a process of its own: the kernel in Triton's interpreter, against the reference.

    TRITON_INTERPRET=1 python token_groups_run.py

Tokens are multiples of ⅛ whose sums are exact in any order, so both give the same bits. The interpreter adds bit
patterns of bfloat16, so there is none. Prints how many cases agreed.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vggt_compile.ops.token_groups import group_members, group_sizes, reference
from vggt_compile.ops.token_groups_kernel import LANES, ROWS, launch

SHAPES = [
    # batch, heads, tokens, width, groups
    (1, 1, 1, 16, 1),
    (2, 3, 40, 8, 25),
    (1, 2, 3 * ROWS + 1, 16, 2),
    (2, 3, 50, LANES // 2, 40),
]
DTYPES = [torch.float32, torch.float16]


def case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x as a view of a fused projection, members and sizes of groups that are as different in size as can be."""
    batch, heads, tokens, width, groups = shape
    generator = torch.Generator().manual_seed(0)
    fused = torch.randint(-16, 17, (batch, tokens, 3, heads, width), generator=generator) / 8
    x = fused.to(dtype).to(device)[:, :, 1].transpose(1, 2)
    spread = torch.rand(batch, tokens, generator=generator) ** 4 * groups
    spread[:, :groups] = torch.arange(groups)  # none is empty
    group = spread.long().to(device)
    return x, group_members(group), group_sizes(group, groups)


def main() -> None:
    torch.use_deterministic_algorithms(True)  # fills fresh memory, with NaN or the largest integer
    cases = list(itertools.product(SHAPES, DTYPES))
    for shape, dtype in cases:
        given = case(shape, dtype)
        got, want = launch(*given, wrap=lambda kernel: kernel), reference(*given)
        assert got.dtype == want.dtype == dtype
        assert got.stride() == want.stride()
        assert torch.equal(got, want), (shape, dtype)
    print(len(cases))


if __name__ == "__main__":
    main()
