"""The one rule for numbers: no further from float64 than the eager low-precision result, plus roundings."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(got: Tensor, eager: Tensor, want: Tensor, roundings: float = 4) -> None:
    """`got` may err by what `eager` errs against `want` (float64), plus roundings of the largest value."""
    assert got.shape == eager.shape == want.shape
    assert got.dtype == eager.dtype
    assert want.dtype == torch.float64
    assert got.isfinite().all()
    allowed = (eager.double() - want).abs().max() + roundings * torch.finfo(eager.dtype).eps * want.abs().max()
    error = (got.double() - want).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
