"""A product of fp32 matrices on the tensor cores of a GPU, to within 2⁻¹⁴ of the product of their magnitudes.

x = high + low + ε of two numbers in bf16, |low| ≤ 2⁻⁸ |x| and |ε| ≤ 2⁻¹⁶ |x|. So A B = A_high B_high + A_high B_low +
A_low B_high, but for three terms of 2⁻¹⁶, and each of the three runs many times faster than one in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_compile.ops.sizes import pieces

Split = tuple[Tensor, Tensor]
ALIGNED = 8
"""Tensor cores are fed well where rows are a multiple of so many numbers of bf16 long."""


def split(x: Tensor, offset: Tensor | float = 0.0) -> Split:
    """High and low part of x − offset in bf16, some rows at a time."""
    high, low = (torch.empty_like(x, dtype=torch.bfloat16) for _ in range(2))
    for rows in pieces(len(x), x[:1].numel() * 4):
        exact = x[rows] - offset
        high[rows] = exact
        low[rows] = exact - high[rows]
    return high, low


def product(a: Tensor, b: Split) -> Tensor:
    """A B in fp32 of A [M, K] and the parts of B [K, N], some of K at a time."""
    total = torch.zeros(len(a), b[0].shape[1], device=a.device)
    for some in pieces(a.shape[1], len(a) * 4):
        left, right = a[:, some], tuple(part[some] for part in b)
        if extra := -left.shape[1] % ALIGNED:
            left, right = F.pad(left, (0, extra)), tuple(F.pad(part, (0, 0, 0, extra)) for part in right)
        (high, low), (high_b, low_b) = split(left), right
        total += summed_in_fp32(high, high_b) + (summed_in_fp32(high, low_b) + summed_in_fp32(low, high_b))
    return total


def summed_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """A B of bf16 without rounding the result to bf16. Only CUDA has an operator for it."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
