"""The Triton kernels that choose blocks, compiled for each target: they fit, and a row stays in one warp."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}  # bytes of shared memory of a multiprocessor


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: int, **options: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    placed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=placed, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def selecting(target: int, cover: bool, width: int = 64, floats: str = "fp32") -> Any:
    from vggt_compile.ops.select_blocks_kernel import CUT, LANES, _select

    types = dict.fromkeys(("q_ptr", "k_ptr"), "*fp32") | {"share": floats}
    types |= dict.fromkeys(("scratch_ptr", "index_ptr", "count_ptr"), "*i32")
    constants = {"D": width, "WIDTH": max(16, triton.next_power_of_2(width)), "COVER": cover, "REACH": 0}
    constants |= {"ROWS": CUT.rows, "TILE": CUT.tile, "ABREAST": CUT.abreast, "LANES": LANES, "UNROLL": CUT.unroll}
    constants |= {"CORES": CUT.precision == "tf32x3"}
    return compiled(_select, types, constants, target, num_warps=CUT.warps, num_stages=CUT.stages)


def inner_loops(kernel: Any, tmp_path: Path) -> list[list[str]]:
    """Machine code of the loops that hold no other loop."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump")
    text = subprocess.run([tool, "-sass", binary], check=True, capture_output=True, text=True).stdout
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", text)]
    jumps = [(int(to[1], 16), at) for at, line in code if (to := re.search(r"BRA\S* .*?0x([0-9a-f]+)", line))]
    loops = {(start, end) for start, end in jumps if start < end}
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [[line for at, line in code if start <= at <= end] for start, end in inner]


@pytest.mark.slow
@pytest.mark.parametrize("cover", [False, True])
@pytest.mark.parametrize("width", [24, 64, 128])
@pytest.mark.parametrize("target", LIMITS)
def test_compiled_as_many_programs_as_are_wanted_fit(target: int, width: int, cover: bool) -> None:
    from vggt_compile.ops.select_blocks_kernel import CUT

    kernel = selecting(target, cover, width)
    programs = CUT.programs if width <= 64 else 1
    assert programs * kernel.metadata.shared <= LIMITS[target]


@pytest.mark.slow
@pytest.mark.parametrize("cover", [False, True])
@pytest.mark.parametrize("target", [80, 90])
def test_sweeps_read_four_scores_at_a_time_and_wait_for_nobody(target: int, cover: bool, tmp_path: Path) -> None:
    loops = inner_loops(selecting(target, cover), tmp_path)
    sweeps = [loop for loop in loops if any("LDG.E.128" in line for line in loop)]
    assert sweeps
    assert not [line for loop in sweeps for line in loop if re.search(r"\b(BAR|STS|LDL|STL)\b", line)]


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_products_read_neighbouring_keys(target: int, tmp_path: Path) -> None:
    """Two keys a thread, side by side: keys one after the other would lie in one bank for all threads of a warp."""
    products = [loop for loop in inner_loops(selecting(target, False), tmp_path) if any("FFMA" in x for x in loop)]
    assert products
    for loop in products:
        assert sum("LDS.64" in line for line in loop) >= 64
        assert not [line for line in loop if "LDL" in line or "STL" in line]


@pytest.mark.slow
def test_it_computes_in_float32_where_a_compiler_hands_over_doubles() -> None:
    assert "xf64>" not in selecting(90, True, floats="fp64").asm["ttir"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("target", LIMITS)
def test_pooling_compiles_and_keeps_its_tile_in_registers(target: int, across: bool, dtype: str) -> None:
    from vggt_compile.ops.pool_blocks_kernel import TOKENS, _pool

    for block, width in ((128, 64), (64, 80), (256, 128)):
        constants = {"BLOCK": block, "D": width, "WIDTH": triton.next_power_of_2(width), "TOKENS": TOKENS}
        constants |= {"MEAN": True, "ACROSS": across, "x_lane": 1}
        types = {"x": f"*{dtype}", "means": "*fp32", "scale": "fp32", "x_batch": "i64"}
        kernel = compiled(_pool, types, constants, target, num_warps=4)
        assert kernel.metadata.shared <= 2**14
        assert "xf64>" not in kernel.asm["ttir"]
