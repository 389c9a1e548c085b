"""The published models, unmodified, as artifacts: a compile's numbers for every count, and a model left clean."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import upstream_models
from bare import bare
from harness import FRAME
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves
from upstream_models import same_bits, scene, tensors

import vggt_compile
from vggt_compile.artifact import program as programs
from vggt_compile.artifact import request
from vggt_compile.artifact.assumed import runs
from vggt_compile.artifact.check import BOUND, off
from vggt_compile.artifact.program import program
from vggt_compile.artifact.request import Span
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.families import trace
from vggt_compile.graph.enclosing import enclosure
from vggt_compile.plan import Plan

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CPU = torch.device("cpu")


def jit(net: nn.Module, x: torch.Tensor, plan: object) -> Any:
    torch._dynamo.reset()
    trace.arm()
    return torch.compile(net, backend=vggt_sparse_eager, options={"plan": plan}, dynamic=False)(x)


def close(got: Any, want: Any) -> None:
    for one, other in zip(tensors(got), tensors(want), strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())


def of_the_trace(net: nn.Module) -> list[Any]:
    """Fake tensors that a model holds anywhere, and forwards of single instances."""
    held = [leaf for module in net.modules() for value in vars(module).values() for leaf in tree_leaves(value)]
    fakes = [leaf for leaf in held if isinstance(leaf, FakeTensor)]
    return fakes + [module for module in net.modules() if "forward" in vars(module)]


def torchs(cls: type) -> bool:
    """Dynamo marks torch.nn.Module when it traces for the first time in a process."""
    return cls.__module__.startswith("torch.")


@pytest.mark.parametrize("name", ["vggt", "pi3", "omega"])
def test_one_program_serves_every_count_and_the_model_stays_clean(name: str) -> None:
    with upstream_models.model(name) as net, torch.no_grad():
        untouched = copy.deepcopy(net)
        classes = {cls: dict(vars(cls)) for module in net.modules() for cls in type(module).__mro__ if not torchs(cls)}
        size = tuple(scene(name).shape[-2:])
        made = program(net, Span((3, 64), (1, 2), size), Plan.read(FRAME), "fp32", CPU, strict=True)
        assert of_the_trace(net) == []
        assert {cls: dict(vars(cls)) for cls in classes} == classes
        assert made.report.family == name
        assert len(made.report.rewritten) == upstream_models.SITES[name]["global"]
        for batch, frames in ((1, 3), (2, 7)):
            x = scene(name, batch, frames)
            assert same_bits(net(x), untouched(x))
            close(made.graph(x), jit(net, x, FRAME))


def test_regions_of_autocast_hide_no_grid() -> None:
    """VGGT-Ω switches autocast on and off, which export turns into graphs of their own."""
    plan = {"layers": {"*": {"keys": {"method": "grid", "stride": [1, 2]}}}}
    with upstream_models.model("omega") as net, torch.no_grad():
        size = tuple(scene("omega").shape[-2:])
        made = program(net, Span((3, 64), (1, 1), size), Plan.read(plan), "fp32", CPU, strict=True)
        x = scene("omega", 1, 6)
        close(made.graph(x), jit(net, x, plan))


@pytest.mark.parametrize("name", ["vggt", "omega"])  # π³ takes a determinant in bf16 then, which no CPU can
def test_casts_of_autocast_stand_in_the_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What published models do under autocast can be said by casts, without another trace, to the bit."""

    def again(exported: Any) -> Any:
        raise AssertionError("the model was traced once more")

    monkeypatch.setattr(programs, "_decomposed", again)
    with upstream_models.model(name) as net, torch.no_grad():
        x = scene(name, 1, 5)
        made = program(net, Span((3, 64), (1, 1), tuple(x.shape[-2:])), Plan.read({}), "autocast", CPU, strict=False)
        assert not any(enclosure(node) for node in made.graph.graph.nodes)
        with torch.autocast("cpu", torch.bfloat16):
            want = jit(net, x, {})
        for one, other in zip(tensors(made.graph(x)), tensors(want), strict=True):
            assert torch.equal(one, other)


def test_dense_heads_are_one_loop_for_few_frames_and_many() -> None:
    """VGGT's own heads cut frames into chunks of eight; one graph has runs of equal length for all of its counts."""
    height, width = scene("vggt").shape[-2:]
    whole = Span((3, 40), (1, 1), (height, width))
    with upstream_models.model("vggt") as net, torch.no_grad():
        made = program(net, whole, Plan.read(FRAME), "fp32", CPU, strict=True)
        assert runs(made.graph, whole) == [(3, 40)]
        for frames in (3, 7, 8, 9, 25):
            x = scene("vggt", 1, frames)
            close(made.graph(x), jit(net, x, FRAME))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loop_of_dense_heads_as_a_file(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python and where this package is not; in bf16 up to what an export allows."""
    plan, path = {"layers": {"*": {"keys": {"method": "grid", "stride": [1, 2]}}}}, tmp_path / "model.pt2"
    wide = scene("vggt", 1, 7, grid=(2, 3))
    monkeypatch.setattr(request, "PIXELS_AT_ONCE", 6 * wide.shape[-1] * wide.shape[-2])
    with upstream_models.model("vggt") as net, torch.no_grad():
        made = vggt_compile.export(net, wide, plan=plan, frames=(3, 16), precision=precision, path=path, strict=True)
        assert [(entry.span.frames, entry.span.at_once) for entry in made.entries] == [((3, 16), 6)]
        run, scenes = vggt_compile.load(path), [scene("vggt", 1, frames, (2, 3)) for frames in (3, 7, 13, 16)]
        for x, alone in zip(scenes, bare(path, scenes, tmp_path), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
                want = jit(net, x, plan)
            for got in (run(x), alone):
                for one, other in zip(tensors(got), tensors(want), strict=True):
                    assert off(one, other) <= (1e-5 if precision == "fp32" else BOUND[precision])


def test_unmodified_omega_as_a_file(tmp_path: Path) -> None:
    with upstream_models.model("omega") as net, torch.no_grad():
        x = scene("omega", 1, 5)
        vggt_compile.export(net, x, plan=FRAME, frames=(3, 32), path=tmp_path / "omega.pt2")
        run = vggt_compile.load(tmp_path / "omega.pt2")
        for frames in (3, 8, 17):
            x = scene("omega", 1, frames)
            close(run(x), jit(net, x, FRAME))


@pytest.mark.parametrize("name", ["vggt", "pi3"])
def test_one_and_two_frames_of_either_aspect_ratio(name: str, tmp_path: Path) -> None:
    """The published models treat one and two frames apart; both sizes have as many tokens in other grids."""
    plan = {"layers": {"*": {"keys": {"method": "grid", "stride": [1, 2]}}}}
    wide, tall = scene(name, grid=(2, 3)), scene(name, grid=(3, 2))
    sizes = [tuple(x.shape[-2:]) for x in (wide, tall)]
    with upstream_models.model(name) as net, torch.no_grad():
        path = tmp_path / "model.pt2"
        made = vggt_compile.export(net, wide, plan=plan, frames=(1, 8), sizes=sizes, path=path, strict=True)
        assert sorted({(entry.span.frames, entry.span.size) for entry in made.entries}) == sorted(
            (frames, size) for frames in ((1, 1), (2, 2), (3, 8)) for size in sizes
        )
        run = vggt_compile.load(path)
        for grid, frames in itertools.product(((2, 3), (3, 2)), (1, 2, 5)):
            x = scene(name, 1, frames, grid)
            want = jit(net, x, plan)
            close(run(x), want)
            with pytest.raises(AssertionError):
                close(want, net(x))
