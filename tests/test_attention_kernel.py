"""The Triton kernel of `attention` without a GPU: interpreted it is right, compiled for each target it fits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import attention_interpreted
import pytest
import sympy
import torch
from attention_cases import Case, eager, operands, wanted
from machine_code import LIMITS, loops
from numerics import assert_as_accurate
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from vggt_compile.ops import tiles
from vggt_compile.ops.attention import attention
from vggt_compile.ops.operands import Operands
from vggt_compile.ops.tiles import SINGLE, TILES, Tile, fitted, needed

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
BF16 = Case(dtype=torch.bfloat16, q_block=128, k_block=64, head_dim=64)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, "-W", "ignore", HERE / "attention_interpreted.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("name", attention_interpreted.CASES)
def test_interpreted_it_is_the_operator(name: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[name], interpreted[name]


@pytest.mark.parametrize("name", attention_interpreted.LONGEST)
def test_interpreted_the_longest_key_of_each_head_is_found(name: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[name], interpreted[name]


def compiled(x: Operands, tile: Tile, target: int, floats: str = "fp32") -> Any:
    """The kernel for a compute capability, from the very arguments with which it would be launched."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vggt_compile.ops.attention_kernel import _arguments, _flags, attention_kernel

    constants = _flags(x, tile)
    given = _arguments(x, tile) | {"out": x.q} | constants
    signature = {
        name: "constexpr" if name in constants else _type(given[name], floats) for name in attention_kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(attention_kernel.arg_names)
        if signature[name].startswith("*") or re.search("_[bht]$", name)
    }
    placed = {(attention_kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(attention_kernel, signature, constexprs=placed, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _type(value: Any, floats: str) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.bool: "i1"}
    if isinstance(value, torch.Tensor):
        return f"*{names[value.dtype]}"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{names[value.base.dtype]}{value.block_shape}>"
    return floats if isinstance(value, float) else "i32"


def inner_loops(kernel: Any, tmp_path: Path) -> list[list[str]]:
    """Machine code of the innermost loops that hold matrix products."""
    found = [loop for loop in loops(kernel, tmp_path).values() if any("MMA" in line for line in loop)]
    products = min(sum("MMA" in line for line in loop) for loop in found)
    return [loop for loop in found if sum("MMA" in line for line in loop) == products]


COMPILED = [(target, head_dim) for target in (80, 90) for head_dim in (32, 64, 80, 128)]
COMPILED += [(86, 64), (86, 128), (89, 64), (120, 64), (120, 128)]
"""Every target with the width of published heads, and most of those that have the least memory with the widest."""


@pytest.mark.slow
@pytest.mark.parametrize(("target", "head_dim"), COMPILED)
def test_compiled_it_fits_and_spills_nothing_in_its_loops(target: int, head_dim: int, tmp_path: Path) -> None:
    plain, full = BF16, replace(BF16, weighted=True, own=True)
    for case in (plain, full) if target in (80, 90) else (full,):
        x = operands(replace(case, head_dim=head_dim))
        tile = fitted(tiles.tabled(x, target // 10), x, LIMITS[target])
        kernel = compiled(x, tile, target)
        assert kernel.metadata.shared <= LIMITS[target]
        loops = inner_loops(kernel, tmp_path)
        assert len(loops) >= 2
        spills = [line for loop in loops for line in loop if "LDL" in line or "STL" in line]
        assert not spills


@pytest.mark.slow
def test_compiled_with_descriptors_it_loads_by_tma(tmp_path: Path) -> None:
    x = operands(BF16)
    kernel = compiled(x, Tile(128, 64, warps=8, stages=3, descriptors=True), 90)
    assert any("UTMALDG" in line for loop in inner_loops(kernel, tmp_path) for line in loop)
    assert any("GMMA" in line for loop in inner_loops(kernel, tmp_path) for line in loop)


@pytest.mark.slow
def test_compiled_for_float32_it_fits() -> None:
    x = operands(replace(BF16, dtype=torch.float32, head_dim=128))
    kernel = compiled(x, fitted(SINGLE, x, LIMITS[86]), 86)
    assert kernel.metadata.shared <= LIMITS[86]


@pytest.mark.slow
def test_it_computes_in_float32_where_a_compiler_hands_over_doubles() -> None:
    for case in (BF16, replace(BF16, weighted=True, own=True)):
        x = operands(case)
        kernel = compiled(x, fitted(tiles.tabled(x, 9), x, LIMITS[90]), 90, floats="fp64")
        assert "xf64>" not in kernel.asm["ttir"]  # no tensor of doubles


def test_nothing_that_it_is_compiled_for_knows_the_number_of_tokens() -> None:
    from vggt_compile.ops.attention_kernel import _flags

    short, long = (operands(replace(BF16, queries=n, always=n, patches=n)) for n in (1, 500))
    assert _flags(short, TILES[9, 64]) == _flags(long, TILES[9, 64])


@pytest.mark.parametrize("limit", LIMITS.values())
@pytest.mark.parametrize("tile", TILES.values())
def test_tiles_are_fitted(limit: int, tile: Tile) -> None:
    x = operands(replace(BF16, head_dim=128, k_block=32, q_block=64))
    small = fitted(tile, x, limit)
    assert needed(small, x) <= limit
    assert small.rows <= 64
    assert small.keys in (16, 32, 64)


def test_blocks_that_are_not_multiples_of_16_are_refused() -> None:
    x = operands(replace(BF16, q_block=24))
    with pytest.raises(ValueError, match="multiples of 16, not 24"):
        fitted(SINGLE, x, 2**20)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing asks for a GPU, its memory and its driver, none of which it uses."""
    from triton.backends.compiler import GPUTarget

    from vggt_compile.ops import attention_kernel

    monkeypatch.setattr(attention_kernel, "chosen", lambda x: Tile())
    driver = type("Driver", (), {"get_current_target": lambda self: GPUTarget("cuda", 90, 32)})()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


def launches(mode: Any, args: Sequence[Any]) -> list[Any]:
    """Launches of kernels in the graph of the operator on a GPU."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from vggt_compile.ops import attention_kernel

    def run(*args: Any) -> torch.Tensor:
        x = Operands(*args)
        x.check()
        return attention_kernel.launch(x)

    with mode:
        graph = make_fx(torch.func.functionalize(run))(*args).graph
    return [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("density", [None, 0.5])
def test_traced_on_a_gpu_it_is_the_kernel(density: float | None) -> None:
    mode = FakeTensorMode()
    x = operands(replace(BF16, density=density, weighted=True, own=True))
    given = [getattr(x, name) for name in x.__dataclass_fields__]
    fake = [_on_cuda(mode, y) if isinstance(y, torch.Tensor) else y for y in given]
    (launch,) = launches(mode, fake)
    assert launch.kwargs["tensors_to_clone"] == ["out"]  # no operand is copied out of fear that it is written


@pytest.mark.usefixtures("hopper")
def test_traced_on_a_gpu_its_lengths_stay_symbols() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    tokens, cap = (_symbol(mode, n) for n in (200, 9))
    with mode:
        blocks = (tokens + 127) // 128
        new = _on_cuda(mode, torch.empty(1, dtype=torch.bfloat16)).new_empty
        q, k, v = new(1, tokens, 3, 2, 64).permute(2, 0, 3, 1, 4)
        index, count = new(1, 2, blocks, cap, dtype=torch.int32), new(1, 2, blocks, dtype=torch.int32)
    (launch,) = launches(mode, (q, k, v, index, count, 5, 128, 64, None, None, None, None, 0.125))
    assert not isinstance(launch.kwargs["grid"][0][0], int)
    assert not [guard for guard in mode.shape_env.guards if isinstance(guard.expr, sympy.Eq)]


def _symbol(mode: Any, hint: int) -> Any:
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    return mode.from_tensor(torch.empty(hint), symbolic_context=context).shape[0]


def _on_cuda(mode: Any, x: torch.Tensor) -> torch.Tensor:
    return FakeTensor(mode, x.to("meta"), torch.device("cuda:0"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("density", [None, 0, 0.3, 1])
def test_on_a_gpu_it_is_the_operator(dtype: torch.dtype, head_dim: int, density: float | None) -> None:
    case = Case(2, 2, 300, 7, 500, head_dim, 128, 64, density, weighted=True, own=True, fused=True, dtype=dtype)
    x = operands(case)
    args = [y.cuda() if isinstance(y, torch.Tensor) else y for y in (getattr(x, n) for n in x.__dataclass_fields__)]
    assert_as_accurate(attention(*args).cpu(), eager(x), wanted(x))
