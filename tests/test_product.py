"""A product of split matrices is nearly that of fp32, on any device, and so is what is measured with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vggt_compile.measures.contraction import contraction
from vggt_compile.measures.product import product, split
from vggt_compile.ops import sizes


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near_the_product(device: str, terms: int) -> None:
    a, b = noise(20, terms).softmax(-1), noise(terms, 7, seed=1)
    found = product(a.float().to(device), split(b.float().to(device))).double().cpu()
    fp32 = terms**0.5 * 2**-24  # sums of as many terms, and their rounding to begin with
    assert ((found - a @ b).abs() <= (3 * 2**-16 + fp32) * (a @ b.abs())).all()
    assert (found - a @ b).norm() < 2**-14 * (a @ b).norm()


@pytest.mark.parametrize("terms", [3000, 3001, 7])
def test_a_product_of_split_matrices_is_nearly_that_of_fp32(terms: int) -> None:
    assert_near_the_product("cpu", terms)


def test_it_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "PIECE_BYTES", 4 * 20 * 13)  # 13 of K at a time
    assert_near_the_product("cpu", 100)


def test_both_parts_of_a_number_hold_it_to_sixteen_bits() -> None:
    x, offset = noise(1000, 10).float(), noise(10, seed=1).float()
    high, low = split(x, offset)
    centred = x - offset
    assert (low.abs() <= 2**-8 * centred.abs()).all()
    assert ((high.double() + low.double() - centred.double()).abs() <= 2**-16 * centred.abs()).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_product_and_the_contraction_of_the_cpu() -> None:
    for terms in (3000, 3001):
        assert_near_the_product("cuda", terms)
    given = (*(noise(2, 3, 500, 16, seed=i).float() for i in range(2)), 100 + noise(2, 500, 24, seed=2).float())
    want = contraction(*given, None, rows=64)
    found = contraction(*(x.cuda() for x in given), None, rows=64).cpu()
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
