"""A product of split matrices is nearly that of fp32, on any device, and so is what is measured with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vggt_compile.measures.contraction import contraction
from vggt_compile.measures.product import product, split


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near_the_product(device: str) -> None:
    a, b = noise(20, 3000).softmax(-1), noise(3000, 7, seed=1)
    found = product(a.float().to(device), split(b.float().to(device))).double().cpu()
    fp32 = 3000**0.5 * 2**-24  # sums of as many terms, and their rounding to begin with
    assert ((found - a @ b).abs() <= (3 * 2**-16 + fp32) * (a @ b.abs())).all()
    assert (found - a @ b).norm() < 2**-14 * (a @ b).norm()


def test_a_product_of_split_matrices_is_nearly_that_of_fp32() -> None:
    assert_near_the_product("cpu")


def test_both_parts_of_a_number_hold_it_to_sixteen_bits() -> None:
    x = noise(10_000).float()
    high, low = split(x)
    assert (low.abs() <= 2**-8 * x.abs()).all()
    assert ((high.double() + low.double() - x.double()).abs() <= 2**-16 * x.abs()).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_product_and_the_contraction_of_the_cpu() -> None:
    assert_near_the_product("cuda")
    given = (*(noise(2, 3, 500, 16, seed=i).float() for i in range(2)), 100 + noise(2, 500, 24, seed=2).float())
    want = contraction(*given, None, rows=64)
    found = contraction(*(x.cuda() for x in given), None, rows=64).cpu()
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
