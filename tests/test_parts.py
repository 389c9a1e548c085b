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


class Recorder:
    """Events as a profile has them: operators, calls of the runtime within their time, kernels that run later."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.now = 0.0

    def operator(self, name: str, shapes: list[list[int]], *kernels: tuple[str, float], inner: str = "") -> None:
        start = self.now
        for kernel, us in kernels:
            self.kernel(kernel, us)
        self.now += 1
        self._add(name, CPU, start, self.now, input_shapes=shapes)
        if inner:
            self._add(inner, CPU, start + 0.25, self.now - 0.25, input_shapes=shapes)
        self.now += 1

    def kernel(self, name: str, us: float) -> None:
        number = len(self.events) + 1
        self._add("cuLaunchKernelEx", CPU, self.now + 0.5, self.now + 0.75, id=number)
        self._add(name, CUDA, 1e6 + self.now, 1e6 + self.now + us, id=number)
        self.now += 1

    def _add(self, name: str, where: Any, start: float, end: float, **more: Any) -> None:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        given = {"id": -1, "input_shapes": [], "is_user_annotation": False} | more
        self.events.append(SimpleNamespace(name=name, device_type=where, time_range=span, **given))

    def annotation(self, name: str, us: float) -> None:
        self._add(name, CUDA, 1e6, 1e6 + us, is_user_annotation=True)


def test_attention_over_frames_is_told_from_attention_inside_by_its_length() -> None:
    seen = Recorder()
    cudnn = "aten::_scaled_dot_product_cudnn_attention"
    seen.annotation("## Call CompiledFxGraph ##", 12_000.0)
    seen.kernel("copy", 5.0)
    both = ("fprop", 9000.0), ("copy", 40.0)
    seen.operator(cudnn, [[1, 16, 4000, 64]] * 3, *both, inner="aten::_cudnn_attention_forward")
    seen.operator(cudnn, [[4, 16, 1000, 64]] * 3, ("fprop", 2000.0))
    seen.operator("aten::mm", [[10, 10]] * 2, ("nvjet_tst", 700.0))
    seen.kernel("triton_poi_fused_add_3", 30.0)
    seen.kernel("_select_0", 100.0)
    seen.kernel("attention_hopper", 500.0)
    found = milliseconds(kernels_of(seen.events), per_frame=1000)
    assert found == pytest.approx({GLOBAL: 9.54, FRAME: 2.0, CHOOSING: 0.1, PRODUCTS: 0.7, REST: 0.035})


@pytest.mark.parametrize("name", ["aten::_flash_attention_forward", "aten::_efficient_attention_forward"])
def test_operators_that_have_tokens_before_heads_are_known(name: str) -> None:
    seen = Recorder()
    seen.operator(name, [[1, 4000, 16, 64]] * 3, ("fprop", 9000.0))
    assert milliseconds(kernels_of(seen.events), per_frame=1000)[GLOBAL] == pytest.approx(9.0)


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
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    kernels = profiled(call)
    found = milliseconds(kernels, per_frame=512)
    assert min(found[GLOBAL], found[FRAME], found[PRODUCTS]) > 0, kernels
    assert sum(found.values()) <= start.elapsed_time(end), kernels
