"""The time of a call is told apart by what launched its kernels, and every kernel is counted once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vggt_compile.bench import bars
from vggt_compile.bench.page import page
from vggt_compile.bench.parts import (
    CHOOSING,
    FRAME,
    GLOBAL,
    OURS,
    PARTS,
    PRODUCTS,
    REST,
    Kernel,
    kernels_of,
    milliseconds,
    part_of,
    profiled,
)

CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
KERNELS = Path(bars.__file__).parents[1] / "ops"


def operator(name: str, shapes: list[list[int]], *kernels: tuple[str, float]) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=CPU,
        input_shapes=shapes,
        kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels],
    )


def kernel(name: str, us: float) -> Any:
    return SimpleNamespace(name=name, device_type=CUDA, device_time_total=us, kernels=[], input_shapes=[])


def test_attention_over_frames_is_told_from_attention_inside_by_its_length() -> None:
    events = [
        operator(
            "aten::_scaled_dot_product_cudnn_attention", [[1, 16, 4000, 64]] * 3, ("fprop", 9000.0), ("copy", 40.0)
        ),
        operator("aten::_scaled_dot_product_cudnn_attention", [[4, 16, 1000, 64]] * 3, ("fprop", 2000.0)),
        operator("aten::mm", [[10, 10]] * 2, ("nvjet_tst", 700.0)),
        kernel("fprop", 9000.0),
        kernel("fprop", 2000.0),
        kernel("nvjet_tst", 700.0),
        kernel("copy", 40.0),  # of the attention over frames
        kernel("copy", 5.0),
        kernel("triton_poi_fused_add_3", 30.0),
        kernel("_select_0", 100.0),
        kernel("attention_hopper", 500.0),
    ]
    found = milliseconds(kernels_of(events), per_frame=1000)
    assert found == pytest.approx({GLOBAL: 9.54, FRAME: 2.0, CHOOSING: 0.1, PRODUCTS: 0.7, REST: 0.035})


@pytest.mark.parametrize("name", ["aten::_flash_attention_forward", "aten::_efficient_attention_forward"])
def test_operators_that_have_tokens_before_heads_are_known(name: str) -> None:
    events = [operator(name, [[1, 4000, 16, 64]] * 3, ("fprop", 9000.0)), kernel("fprop", 9000.0)]
    assert milliseconds(kernels_of(events), per_frame=1000)[GLOBAL] == pytest.approx(9.0)


def test_every_kernel_of_ours_that_is_launched_has_a_part() -> None:
    launched = {
        line.split("(")[0].removeprefix("def ")
        for file in KERNELS.glob("*_kernel.py")
        for text in [file.read_text()]
        for line in text.splitlines()
        if line.startswith("def ") and f"({line.split('(')[0].removeprefix('def ')})[" in text.replace("wrap(", "(")
    }
    assert launched
    assert launched <= OURS.keys()


def test_a_name_that_nobody_knows_is_the_rest() -> None:
    assert part_of(Kernel("memcpy", 1.0), 10) == REST
    assert part_of(Kernel("sm90_xmma_gemm_bf16", 1.0), 10) == PRODUCTS


def test_the_picture_shows_rows_with_parts_only(tmp_path: Path) -> None:
    rows = [{"variant": name, "frames": n, "parts": dict.fromkeys(PARTS, 0.1)} for n in (32, 100) for name in "ab"]
    bars.draw([{"variant": "c", "frames": 32}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    bars.draw(rows, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5_000


def test_the_page_of_a_benchmark_has_parts_where_they_were_measured() -> None:
    row = {"variant": "dense", "frames": 8, "warm_s": 1.0, "peak_gib": 1.5, "graphs": 1}
    record: dict[str, Any] = {
        "machine": {"gpu": "none"},
        "name": "trunk",
        "settings": {"upstream": "", "size": [28, 42]},
        "cold": [],
        "warm": [row],
    }
    assert "Where the time goes" not in page(record)
    record["warm"] = [row | {"parts": dict.fromkeys(PARTS, 0.25)}]
    text = page(record)
    assert "![Seconds by part](trunk-parts.png)" in text
    cells = [cell.strip() for cell in next(x for x in text.splitlines() if "0.250" in x).split("|")[1:-1]]
    assert cells == ["8", "dense", *["0.250"] * len(PARTS)]


@pytest.mark.gpu
def test_a_profile_on_a_gpu_finds_attention_and_products() -> None:
    x = torch.randn(4, 8, 512, 64, device="cuda", dtype=torch.bfloat16)
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        F.scaled_dot_product_attention(x, x, x)
        y = x.transpose(0, 1).reshape(1, 8, 2048, 64)
        F.scaled_dot_product_attention(y, y, y)
        a @ a

    call()
    found = milliseconds(profiled(call), per_frame=512)
    assert found[GLOBAL] > 0
    assert found[FRAME] > 0
    assert found[PRODUCTS] > 0
