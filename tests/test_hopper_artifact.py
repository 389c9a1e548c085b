"""On a Hopper GPU: artifacts run the kernel for it where this package is not, and give what a compile here gives.

`python -m pytest -m gpu tests/test_hopper_artifact.py` on a machine with such a GPU; a run takes some minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from numerics import assert_as_accurate
from torch import Tensor, nn
from torch.export import Dim

import vggt_compile
from vggt_compile.artifact.library import library
from vggt_compile.artifact.program import Program
from vggt_compile.artifact.request import Span
from vggt_compile.artifact.stages import Stages
from vggt_compile.ops import hopper
from vggt_compile.ops.attention import reference
from vggt_compile.ops.operands import Operands
from vggt_compile.report import Report

ON_HOPPER = torch.cuda.is_available() and hopper.here(torch.device("cuda", 0))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU and Triton's Gluon"),
]
HEADS, ALWAYS = 4, 70
KINDS = ("no lists", "lists", "own keys", "own keys, no lists", "of two blocks", "unaligned")
FOR_HOPPER = len(KINDS) - 1


class Attends(nn.Module):
    """Our attention, in every kind, on views of a fused projection [B, N, 3, H, D]."""

    def operands(self, fused: Tensor, kind: str) -> Operands:
        batch, tokens = fused.shape[:2]
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        q_block, k_block = (256, 128) if kind == "of two blocks" else (128, 64)
        lists: tuple[Any, ...] = (None, None, 0)
        if kind in ("lists", "own keys", "of two blocks"):
            listed = (tokens - ALWAYS + k_block - 1) // k_block
            rows = torch.arange((tokens + q_block - 1) // q_block, dtype=torch.int32, device=fused.device)
            first = rows % 3  # every third block, so lists are of different lengths
            index = first[:, None] + 3 * torch.arange((listed + 2) // 3, dtype=torch.int32, device=fused.device)
            count = (listed + 2 - first) // 3
            lists = (*(x.expand(batch, HEADS, *x.shape).contiguous() for x in (index, count)), ALWAYS)
        own: tuple[Any, ...] = (None, None, None)
        if kind.startswith("own keys"):
            own = (v * 0.5, k, torch.arange(tokens, device=fused.device) % 5 == 0)
        if kind == "unaligned":
            k = torch.nn.functional.pad(k, (0, 1))[..., :-1]
        return Operands(q, k, v, *lists, q_block, k_block, None, *own, q.shape[-1] ** -0.5)

    def forward(self, fused: Tensor) -> tuple[Tensor, ...]:
        given = (self.operands(fused, kind) for kind in KINDS)
        return tuple(torch.ops.vggt_compile.attention(*vars(x).values()) for x in given)


RUN = """
    import json, sys, torch
    from torch.profiler import ProfilerActivity, profile
    {load}
    inputs = [x.cuda() for x in torch.load({inputs!r})]
    first = [run(x) for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again = run(inputs[-1])
    side.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run(inputs[-1])
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    torch.save((first, again, names), {out!r})
    assert not any(name.startswith("vggt_compile") for name in sys.modules)
"""
KEPT = (
    "runner = torch._C._aoti.AOTIModelContainerRunnerCuda({0!r}, 1, 'cuda:0', {1!r}); run = lambda x: runner.run([x])"
)
PACKAGE = "from torch._inductor import aoti_load_package; run = aoti_load_package({0!r})"


def bare(load: str, inputs: list[Tensor], folder: Path) -> tuple[list[Any], Any, list[str]]:
    """Results, the last one on another stream too, and names of kernels, from a process that knows torch alone."""
    torch.save([x.cpu() for x in inputs], folder / "inputs.pt")
    code = RUN.format(load=load, inputs=str(folder / "inputs.pt"), out=str(folder / "out.pt"))
    lines = "\n".join(line[4:] for line in code.splitlines())
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    subprocess.run([sys.executable, "-c", lines], check=True, cwd=folder, env=environment, timeout=600)
    return torch.load(folder / "out.pt")


def double(x: Operands) -> Operands:
    return Operands(
        **{n: y.double() if isinstance(y, Tensor) and y.is_floating_point() else y for n, y in vars(x).items()}
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_library_gives_what_a_compile_gives(dtype: torch.dtype, tmp_path: Path) -> None:
    """For every kind, for several numbers of tokens, and on another stream."""
    torch.manual_seed(0)
    model = Attends()
    inputs = [torch.randn(1, tokens, 3, HEADS, 64, device="cuda", dtype=dtype) for tokens in (1500, 20011, 9369)]
    dims = ({1: Dim("tokens", min=1000, max=100_000)},)
    with torch.no_grad():
        traced = torch.export.export(model, (inputs[-1],), dynamic_shapes=dims)
        span = Span((1, 1), (1, 1), (1, 1))
        made = Program(span, traced.module(check_guards=False), inputs[-1], Report(plan="none"), Stages(span))
        path = library(made, "model", tmp_path, [], {}).path
        results, again, names = bare(KEPT.format(str(path), str(path.parent)), inputs, tmp_path)
        compiled = torch.compile(model, dynamic=True)
        for fused, got in zip(inputs, results, strict=True):
            here = compiled(fused)
            for kind, mine, jit in zip(KINDS, got, here, strict=True):
                want = reference(double(model.operands(fused, kind)))
                assert_as_accurate(mine, jit, want)
                assert_as_accurate(jit, mine, want)
                assert mine.stride() == jit.stride(), kind
    assert all(torch.equal(one, other) for one, other in zip(again, results[-1], strict=True))
    assert names.count("attention_hopper") == FOR_HOPPER, names
    assert sum(name.startswith("attention_kernel") for name in names) == 1, names


class Half(nn.Module):
    """A model in bfloat16 that takes images in float32, as exports have them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.bfloat16())


PLANS: dict[str, Any] = {
    "all": {"layers": {"*": {"blocks": "all"}}},
    "predict": {"layers": {"*": {"blocks": {"method": "predict", "keep": 0.3}}}},
    "own keys": {"layers": {"*": {"keys": {"method": "grid", "own_key": True}, "blocks": {"method": "predict"}}}},
}


@pytest.mark.parametrize("plan", PLANS)
def test_an_artifact_gives_what_a_compile_gives(plan: str, tmp_path: Path) -> None:
    spec = Spec(heads=4, head_dim=64)
    model, path = Half(build(spec)).cuda().eval(), tmp_path / "model.pt2"
    example = alternating.images(spec, 1, 12, (28, 37)).cuda()
    with torch.no_grad():
        manifest = vggt_compile.export(
            model, example, plan=PLANS[plan], frames=(9, 16), path=path, strict=True, check=False
        )
        fewest, most = manifest.entries[0].span.frames  # the entry that torch finds by itself
        scenes = [alternating.images(spec, 1, frames, (28, 37)).cuda() for frames in (most, fewest)]
        results, again, names = bare(PACKAGE.format(str(path)), scenes, tmp_path)
        compiled = torch.compile(model, backend=vggt_compile.vggt_sparse, options={"plan": PLANS[plan], "strict": True})
        for images, got in zip(scenes, results, strict=True):
            here = compiled(images)
            assert (got.float() - here.float()).norm() < 0.05 * here.float().norm()
    assert torch.equal(again, results[-1])
    assert manifest.architecture == "sm_90"
    assert path.stat().st_size < 20 * 2**20
    assert names.count("attention_hopper") == 2, names


def test_what_is_written_has_been_compared_with_its_program(tmp_path: Path) -> None:
    """Under autocast, with weights in bf16; here the library runs beside this package."""
    spec = Spec(heads=4, head_dim=64)
    model, path = build(spec).cuda(), tmp_path / "model.pt2"
    images = alternating.images(spec, 1, 9, (28, 37)).cuda()
    manifest = vggt_compile.export(
        model, images, plan=PLANS["all"], frames=(9, 16), precision="bf16", path=path, strict=True
    )
    ((_, seen),) = manifest.entries[0].check["outputs"].items()
    assert seen["deviation"] <= seen["bound"]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        want = model(images)
    assert (vggt_compile.load(path)(images) - want).norm() < 0.05 * want.norm()


def test_errors_are_raised_with_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A library whose machine code cannot be loaded; the process goes on."""
    from vggt_compile.artifact import kernels
    from vggt_compile.ops.hopper_code_kernel import code
    from vggt_compile.ops.hopper_launch import c_function
    from vggt_compile.ops.hopper_variant import Variant

    class Alone(nn.Module):
        def forward(self, fused: Tensor) -> Tensor:
            q, k, v = fused.permute(2, 0, 3, 1, 4)
            return torch.ops.vggt_compile.attention(q, k, v)

    fused = torch.randn(1, 2000, 3, HEADS, 64, device="cuda", dtype=torch.bfloat16)
    other = code(Variant(torch.float16, 64, 128, 64, lists=False, own=False))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        operator = torch.ops.vggt_compile.attention_hopper.default
        patch.setattr(kernels, "c_functions", lambda variants: {operator: [c_function([other])]})
        span, traced = Span((1, 1), (1, 1), (1, 1)), torch.export.export(Alone(), (fused,))
        made = Program(span, traced.module(check_guards=False), fused, Report(plan="none"), Stages(span))
        path = library(made, "model", tmp_path, [], {}).path
        runner = torch._C._aoti.AOTIModelContainerRunnerCuda(str(path), 1, "cuda:0", str(path.parent))
        with pytest.raises(RuntimeError):
            runner.run([fused])
    assert "this artifact has no machine code for attention of this kind" in capfd.readouterr().err
    assert torch.ones(2, device="cuda").sum() == 2
