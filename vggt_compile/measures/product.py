"""A product of fp32 matrices on the tensor cores of a GPU, to within 2⁻¹⁴ of the product of their magnitudes.

x = high + low + ε of two numbers in bf16, |low| ≤ 2⁻⁸ |x| and |ε| ≤ 2⁻¹⁶ |x|. So A B = A_high B_high + A_high B_low +
A_low B_high, but for three terms of 2⁻¹⁶, and each of the three runs many times faster than one in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

Split = tuple[Tensor, Tensor]


def split(x: Tensor) -> Split:
    """High and low part in bf16."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def product(a: Tensor, b: Split) -> Tensor:
    """A B in fp32 of A [M, K] and the parts of B [K, N], which may serve several products."""
    high, low = split(a)
    return summed_in_fp32(high, b[0]) + (summed_in_fp32(high, b[1]) + summed_in_fp32(low, b[0]))


def summed_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """A B of bf16 without rounding the result to bf16. Only CUDA has an operator for it."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
