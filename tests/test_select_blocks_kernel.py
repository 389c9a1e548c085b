"""The Triton kernels that choose blocks, compiled for each target: they fit, and a row stays in one warp."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from machine_code import LIMITS, loops

triton = pytest.importorskip("triton")


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
    """Machine code of the loops that hold no other loop and more than one instruction."""
    found = {place: lines for place, lines in loops(kernel, tmp_path).items() if place[0] < place[1]}
    return [
        lines
        for place, lines in found.items()
        if not any(place != other and place[0] <= other[0] and other[1] <= place[1] for other in found)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("cover", [False, True])
@pytest.mark.parametrize(("target", "width"), [*((n, 64) for n in LIMITS), (80, 24), (80, 128), (120, 24), (120, 128)])
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
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("target", "dtype"), [*((n, "bf16") for n in LIMITS), (90, "fp16"), (90, "fp32")])
def test_pooling_compiles_and_keeps_its_tile_in_registers(target: int, across: bool, dtype: str) -> None:
    from vggt_compile.ops.pool_blocks_kernel import TOKENS, _pool

    for block, width in ((128, 64), (64, 80), (256, 128)):
        constants = {"BLOCK": block, "D": width, "WIDTH": triton.next_power_of_2(width), "TOKENS": TOKENS}
        constants |= {"MEAN": True, "ACROSS": across, "x_lane": 1}
        types = {"x": f"*{dtype}", "means": "*fp32", "scale": "fp32", "x_batch": "i64"}
        kernel = compiled(_pool, types, constants, target, num_warps=4)
        assert kernel.metadata.shared <= 2**14
        assert "xf64>" not in kernel.asm["ttir"]
