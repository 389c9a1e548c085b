"""What of the benchmark of `attention` runs without a GPU: its lists, its page, its rows of failures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vggt_compile.bench import attention as bench
from vggt_compile.bench.attention import Setting
from vggt_compile.ops.attention import reference


@pytest.mark.parametrize("density", [0.05, 0.5, 1])
def test_lists_ascend_and_are_as_dense_as_they_say(density: float) -> None:
    index, count = bench.lists(Setting(20_000, density), 2, torch.Generator().manual_seed(0))
    columns = -(-20_000 // 64)
    assert float(count.float().mean()) / columns == pytest.approx(density, rel=0.1)
    for listed, n in zip(index.flatten(0, 2), count.flatten(), strict=True):
        assert (listed[:n].diff() > 0).all()
        assert ((listed >= 0) & (listed < columns)).all()


def test_a_mask_says_what_the_lists_say_in_blocks_of_any_shape() -> None:
    x = bench.operands(Setting(1000, 0.4).of("SpargeAttn (int8)"), heads=2, device="cpu")
    assert (x.q_block, x.k_block) == (64, 128)
    x.check()
    assert x.block_index is not None
    assert x.block_count is not None
    mask = bench.block_mask(x)
    assert mask.shape == (1, 2, 16, 8)
    for row, listed, n in zip(mask.flatten(0, 2), x.block_index.flatten(0, 2), x.block_count.flatten(), strict=True):
        assert row.nonzero().flatten().tolist() == listed[:n].tolist()


def test_operands_are_views_of_one_projection_and_fit() -> None:
    x = bench.operands(Setting(300, 0.5), heads=2, device="cpu")
    assert x.q.untyped_storage().data_ptr() == x.v.untyped_storage().data_ptr()
    x.check()


def test_the_reference_deviates_from_itself_by_a_rounding() -> None:
    x = bench.operands(Setting(300, 0.5), heads=2, device="cpu")
    assert 0.5 < bench.error(lambda x: lambda: reference(x), x)["error"] < 3


def test_what_fails_is_a_row() -> None:
    x = bench.operands(Setting(300, 0.5), heads=2, device="cpu")
    row = bench._caught(bench.times, lambda x: lambda: x.q / (1 // 0), x)
    assert row == {"failed": "ZeroDivisionError: integer division or modulo by zero"}


def test_the_page_has_a_table_for_each_length() -> None:
    rows = [
        {"way": "a", "tokens": 100, "density": 0.5, "ms": 2.0, "tflops": 400.4},
        {"way": "a", "tokens": 100, "density": 1.0, "ms": 4.0, "tflops": 410.0},
        {"way": "b", "tokens": 100, "density": 1.0, "failed": "E: no\nmore"},
        {"way": "a", "tokens": 200, "density": 1.0, "ms": 8.0, "tflops": 1.0},
    ]
    record = {"machine": {"gpu": "none"}, "checks": [{"way": "a", "error": 1.25}], "rows": rows}
    lines = bench.page(record).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert ["way", "0.5", "1.0"] in cells
    assert ["a", "2.00 (400)", "4.00 (410)"] in cells
    assert ["b", "", "failed"] in cells
    assert ["a", "8.00 (1)"] in cells
    assert "- b: E: no" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "vggt_compile.bench.attention", "--out", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode
    assert "needs a CUDA device" in done.stderr
