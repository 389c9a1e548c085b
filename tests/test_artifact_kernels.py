"""What a compiler cannot take into its own code travels as C++: which programs have it, and that it is called right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from alternating import Spec, build
from torch import Tensor, nn
from torch.export import Dim

from vggt_compile.artifact import kernels
from vggt_compile.artifact import library as libraries
from vggt_compile.artifact.program import Program, program
from vggt_compile.artifact.request import Span
from vggt_compile.artifact.stages import Stages
from vggt_compile.ops import attention as attention_module
from vggt_compile.ops import hopper, hopper_launch
from vggt_compile.ops.hopper_variant import Variant
from vggt_compile.ops.operands import Operands
from vggt_compile.ops.tiles import longest_first
from vggt_compile.plan import Plan
from vggt_compile.report import Report

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
ALL = {"layers": {"*": {"blocks": "all"}}}
OURS = torch.ops.vggt_compile.attention_hopper.default


# Which programs have it


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = build(Spec(head_dim=32)).bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.bfloat16())


def traced(model: nn.Module, plan: dict[str, Any]) -> Program:
    span = Span((3, 40), (1, 1), (4, 6))
    return program(model.eval(), span, Plan.read(plan), "fp32", torch.device("cpu"), strict=False)


def planned(plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch, model: nn.Module | None = None) -> Any:
    """The variants of which a program takes code along; every device is a Hopper GPU."""
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from vggt_compile.ops import hopper_code_kernel

    monkeypatch.setattr(hopper, "here", lambda device: True)
    monkeypatch.setattr(hopper_code_kernel, "code", lambda variant: variant)
    monkeypatch.setattr(hopper_launch, "c_function", lambda codes: list(codes))
    monkeypatch.setattr(kernels, "in_a_worker", lambda work, made_for: work(made_for))
    functions = kernels.c_functions(kernels.variants(traced(Half() if model is None else model, plan).graph))
    return functions[OURS][0] if functions else None


def test_programs_have_the_variants_that_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(ALL, monkeypatch)
    assert found == [Variant(torch.bfloat16, 32, 128, 64, lists=False, own=False)]


def test_blocks_and_own_keys_are_variants_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"method": "grid", "own_key": True}
    plan = {
        "layers": {"0": {"blocks": "predict"}, "1": {"keys": keys, "blocks": {"method": "predict", "q_block": 256}}}
    }
    found = planned(plan, monkeypatch)
    assert Variant(torch.bfloat16, 32, 128, 64, lists=True, own=False) in found
    assert Variant(torch.bfloat16, 32, 256, 64, lists=True, own=True) in found


def test_programs_that_run_it_nowhere_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned({}, monkeypatch) is None
    assert planned({"layers": {"*": {"blocks": "predict"}}}, monkeypatch, build(Spec(head_dim=32))) is None
    small = {"layers": {"*": {"blocks": {"method": "predict", "q_block": 64}}}}
    assert planned(small, monkeypatch) is None


def test_workers_make_the_same_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    made_for = [Variant(torch.bfloat16, 64, 128, 64, lists=False, own=False)]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "get_compile_threads", lambda: 1)
        here = kernels.in_a_worker(kernels.machine_code, made_for)
    monkeypatch.setattr(kernels, "get_compile_threads", lambda: 2)
    with torch._inductor.config.patch(compile_threads=2):
        there = kernels.in_a_worker(_code_and_process, made_for)
    code, process = there.rsplit("\n", 1)
    assert code == here
    assert int(process) != os.getpid()


def _code_and_process(made_for: list[Variant]) -> str:
    return f"{kernels.machine_code(made_for)}\n{os.getpid()}"


def test_a_worker_that_fails_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def process_pool(self) -> None:
            raise OSError("no more processes")

    monkeypatch.setattr(kernels, "AsyncCompile", Broken())
    monkeypatch.setattr(kernels, "get_compile_threads", lambda: 2)
    assert kernels.in_a_worker(lambda made_for: f"{len(made_for)} made", []) == "0 made"


def test_other_devices_have_none() -> None:
    made = traced(Half(), {"layers": {"*": {"blocks": "predict"}}})
    assert kernels.c_functions(kernels.variants(made.graph)) == {}


@pytest.mark.parametrize("here", [True, False])
def test_every_graph_runs_it_where_it_suits(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("vggt_compile.ops.attention_kernel", reason="needs Triton")
    used: list[str] = []
    monkeypatch.setattr(hopper, "here", lambda device: here)
    monkeypatch.setattr(triton, "launch", lambda x: used.append("triton") or x.q.clone())
    monkeypatch.setattr(attention_module, "attend", lambda x: used.append("hopper") or x.q.clone())
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 2, 300, 64, dtype=torch.bfloat16, device="cuda")
        attention_module.attention._init_fn(q, q, q)
    assert used == ["hopper" if here else "triton"]


# How it is called: with a function for a CPU, told to Inductor in the same way


class Attends(nn.Module):
    """The operator on views of a fused projection: over all keys, and over lists, with keys of queries' own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(3, 3 * 2 * 8)

    def operands(self, images: Tensor) -> tuple[Operands, Operands]:
        batch, frames, _, height, width = images.shape
        tokens = frames * height * width
        x = images.permute(0, 1, 3, 4, 2).reshape(batch, tokens, 3)
        q, k, v = self.project(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        blocks = (tokens + 127) // 128
        count = 1 + torch.arange(blocks, dtype=torch.int32) % 2
        index = torch.arange(blocks, dtype=torch.int32)[:, None] // 2 + torch.arange(3, dtype=torch.int32)
        count, index = (y.expand(batch, 2, *y.shape).contiguous() for y in (count, index))
        own = torch.arange(tokens) % 3 == 0
        everything = Operands(q, k, v, None, None, 0, 128, 64, None, None, None, None, 0.3)
        return everything, Operands(q, k, v, index, count, frames, 128, 64, None, q, k, own, 0.5)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.attention(x) for x in self.operands(images))

    def attention(self, x: Operands) -> Tensor:
        order = None if x.block_count is None else longest_first(x.block_count)
        longest = x.k.square().sum(-1).amax(-1)
        lists, sizes = (x.block_index, x.block_count, order), (x.always, x.q_block, x.k_block)
        return OURS(x.q, x.k, x.v, *lists, longest, *sizes, x.own_k, x.own_v, x.own, x.scale)


RUN = """
    import sys, torch
    run = torch._C._aoti.AOTIModelContainerRunnerCpu({library!r}, 1)
    torch.save([run.run([x]) for x in torch.load({images!r})], {out!r})
    assert not any(name.startswith("vggt_compile") for name in sys.modules)
"""


@pytest.mark.slow
def test_libraries_call_it_with_the_operands_of_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that knows torch alone; views, sizes that are symbols, and operands that are not there."""
    text = Path(__file__).with_name("attention_hopper_cpu.cpp").read_text()
    monkeypatch.setattr(kernels, "c_functions", lambda variants: {OURS: [text]})
    model, span = Attends(), Span((6, 40), (1, 1), (4, 6))
    example = torch.rand(1, 13, 3, 4, 6)
    dims = ({1: Dim("frames", min=6, max=40)},)
    graph = torch.export.export(model, (example,), dynamic_shapes=dims).module(check_guards=False)
    made = Program(span, graph, example, Report(plan="none"), Stages(span))
    path = libraries.library(made, "model", tmp_path, [], {}).path
    scenes = [torch.rand(1, frames, 3, 4, 6) for frames in (6, 13, 40)]
    torch.save(scenes, tmp_path / "images.pt")
    code = RUN.format(library=str(path), images=str(tmp_path / "images.pt"), out=str(tmp_path / "out.pt"))
    lines = "\n".join(line.strip() for line in code.splitlines())
    environment = {"PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", lines], check=True, cwd=tmp_path, env=environment, timeout=120)
    for images, got in zip(scenes, torch.load(tmp_path / "out.pt"), strict=True):
        for x, one in zip(model.operands(images), got, strict=True):
            torch.testing.assert_close(one, attention_module.reference(x))
            assert one.transpose(1, 2).is_contiguous()
