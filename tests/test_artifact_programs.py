"""What goes into an artifact: the plan's numbers for every count that was asked for, in the dtypes of eager."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from alternating import build
from framed import SPEC, by_hand, scene
from harness import FRAME
from hypothesis import given
from hypothesis import strategies as st
from modelutils import images, randomized, tensors, worst
from torch import Tensor, nn
from torch.fx import GraphModule

from vggt_compile.artifact import build as building
from vggt_compile.artifact import request
from vggt_compile.artifact.library import Library, plain_calls
from vggt_compile.artifact.manifest import Entry
from vggt_compile.artifact.program import Program, program
from vggt_compile.artifact.request import PIXELS_AT_ONCE, Span, spans
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.errors import ExportFailed
from vggt_compile.graph.enclosing import enclosure, switches_autocast
from vggt_compile.models import pi3, vggt
from vggt_compile.models.camera import CameraConfig
from vggt_compile.models.presets import VGGT_PRESETS
from vggt_compile.plan import Plan

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
CPU = torch.device("cpu")
PLANS: dict[str, Any] = {
    "dense": {},
    "keys": {
        "layers": {
            "0": {"scope": "frame"},
            "1": {"keys": {"method": "grid", "stride": [2, 2], "own_key": True, "mean_key": "one"}},
        }
    },
    "blocks": {"layers": {"*": {"blocks": {"method": "predict", "keep": 0.5, "cdf": 0.4, "most": 1.0}}}},
}
SMALL_BLOCKS = {"method": "predict", "q_block": 16, "k_block": 16}


def shallow_vggt(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    camera = CameraConfig(depth=1, heads=4, mlp_ratio=2.0, steps=1)
    return randomized(vggt("tiny", outputs=("camera",), depth=layers, encoder="conv", camera=camera))


def shallow_pi3(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return randomized(pi3("tiny", depth=2 * layers))


MODELS = {"vggt": shallow_vggt, "pi3": shallow_pi3}


def traced(model: nn.Module, span: Span, plan: object, precision: str = "fp32") -> Program:
    return program(model, span, Plan.read(plan), precision, CPU, strict=True)


def jit(model: nn.Module, plan: object, x: Tensor) -> Any:
    """What a compile gives, without Inductor."""
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=vggt_sparse_eager, options={"plan": plan}, dynamic=False)(x)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plan"), [("vggt", "keys"), ("vggt", "blocks"), ("pi3", "keys"), ("pi3", "dense")])
def test_one_program_gives_what_a_compile_gives_for_every_count(name: str, plan: str) -> None:
    model = MODELS[name](layers=1 if plan == "dense" else 2)
    made = traced(model, Span((3, 64), (1, 2), (28, 42)), PLANS[plan])
    assert bool(made.report.rewritten) == (plan != "dense")
    program_of_all = made.graph
    for batch, frames in ((1, 3), (2, 8), (1, 17)):
        x = images(batch, frames, 3, 28, 42)
        want, got = jit(model, PLANS[plan], x), program_of_all(x)
        assert worst(got, want) < 1e-4, (batch, frames)
    if plan != "dense":
        with torch.no_grad():
            assert worst(got, model(x)) > 1e-3


@pytest.mark.parametrize("count", [1, 2])
def test_few_frames_have_programs_of_their_own(count: int) -> None:
    model, x = build(SPEC), scene(frames=count)
    (span,) = spans((count, count), (1, 1), (4, 6))
    made = program(model, span, Plan.read(FRAME), "fp32", CPU, strict=False)  # one frame is inside itself already
    torch.testing.assert_close(made.graph(x), by_hand(model, x))


def test_a_single_batch_of_several_is_a_program_for_all_of_them() -> None:
    model, made = build(SPEC), traced(build(SPEC), Span((3, 9), (1, 3), (4, 6)), FRAME)
    for batch in (1, 2, 3):
        x = scene(batch=batch, frames=4)
        torch.testing.assert_close(made.graph(x), by_hand(model, x))


# Precision


def dtypes_of_eager(model: nn.Module, x: Tensor) -> list[torch.dtype]:
    """Of what attentions give, in the order in which they run."""
    seen = []

    class Note(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if function is torch.nn.functional.scaled_dot_product_attention:
                seen.append(out.dtype)
            return out

    with Note(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
    return seen


def test_autocast_is_part_of_the_program_and_rounded_weights_change_no_bit() -> None:
    model, x, span = shallow_vggt(layers=1), images(1, 5, 3, 28, 42), Span((3, 64), (1, 1), (28, 42))
    plan = {"layers": {"0": PLANS["keys"]["layers"]["1"]}}
    cast, rounded = (traced(model, span, plan, precision) for precision in ("autocast", "bf16"))
    with torch.autocast("cpu", torch.bfloat16):
        want = jit(model, plan, x)
    assert [getattr(torch, row.dtype) for row in cast.report.rows] == dtypes_of_eager(model, x)
    assert {row.dtype for row in cast.report.rewritten} == {"bfloat16"}
    assert [row.path for row in cast.report.rewritten] == ["aggregator.global_blocks.0.attn"]
    assert cast.report.family == "vggt"
    with torch.no_grad():
        same, half = (made.graph(x) for made in (cast, rounded))
    for name, tensor in tensors(want).items():
        assert torch.equal(tensors(same)[name], tensor), name
        assert torch.equal(tensors(half)[name], tensor), name
    stored = rounded.graph.state_dict()
    heads = [name for name in stored if name.startswith("camera_head") and stored[name].is_floating_point()]
    assert heads
    assert {stored[name].dtype for name in heads} == {torch.float32}
    assert stored["aggregator.global_blocks.0.attn.qkv.weight"].dtype == torch.bfloat16


def test_under_autocast_attention_may_lie_otherwise_than_the_model_has_it() -> None:
    """Casts take the place of regions, and views that of reshapes, which chosen blocks could not be read through."""
    model, plan = build(replace(SPEC, head_dim=32)), {"layers": {"*": {"blocks": SMALL_BLOCKS}}}
    made, x = traced(model, Span((3, 40), (1, 1), (4, 6)), plan, "autocast"), scene(frames=9)
    with torch.autocast("cpu", torch.bfloat16):
        want = jit(model, plan, x)
    with torch.no_grad():
        assert torch.equal(made.graph(x), want)


# Ranges


@given(pixels=st.integers(14, 1400), batch=st.integers(1, 40))
def test_a_dense_head_sees_as_many_frames_as_it_may(pixels: int, batch: int) -> None:
    span = Span((3, 500), (1, batch), (pixels, pixels))
    may = PIXELS_AT_ONCE // (pixels * pixels * batch)
    assert span.at_once == (8 if may >= 8 else max(1, may))


def test_dense_heads_written_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the maps of a few frames are in memory at once, not those of all, and a loop has one head, not many."""
    monkeypatch.setattr(request, "PIXELS_AT_ONCE", 6 * 28 * 42)
    dpt = replace(VGGT_PRESETS["tiny"].dpt, chunk=8, layers=(0, 0, 0, 0))
    model = randomized(vggt("tiny", depth=1, encoder="conv", outputs=("depth",), dpt=dpt))
    made = traced(model, Span((3, 16), (1, 1), (28, 42)), PLANS["dense"])
    graphs = [part.graph for part in made.graph.modules() if isinstance(part, GraphModule)]
    called = [str(node.target) for graph in graphs for node in graph.nodes]
    assert sum("conv_transpose2d" in target for target in called) == 2
    program_of_all = made.graph
    with torch.no_grad():
        for frames in (3, 6, 7, 8, 16):
            x = images(1, frames, 3, 28, 42)
            assert worst(program_of_all(x), model(x)) < 1e-5


def test_weights_of_a_graph_with_a_loop_are_rounded_too() -> None:
    """Around a loop torch.export leaves nodes that open and close autocast; elsewhere it makes graphs of regions."""
    dpt = replace(VGGT_PRESETS["tiny"].dpt, chunk=8, layers=(0, 0, 0, 0))
    model = randomized(vggt("tiny", depth=1, encoder="conv", outputs=("depth",), dpt=dpt))
    made = traced(model, Span((3, 16), (1, 1), (28, 42)), PLANS["dense"], "bf16")
    nodes = made.graph.graph.nodes
    assert [node for node in nodes if "scan" in str(node.target) and node.op == "call_function"]
    assert not [node for node in nodes if switches_autocast(node) or enclosure(node)]
    assert made.graph.state_dict()["aggregator.global_blocks.0.attn.qkv.weight"].dtype == torch.bfloat16


def test_few_frames_and_single_scenes_of_them_are_graphs_of_their_own() -> None:
    assert [span.frames for span in spans((1, 500), (1, 1), (392, 518))] == [(3, 500), (1, 1), (2, 2)]
    assert [span.batch for span in spans((2, 2), (1, 4), (392, 518))] == [(1, 1), (2, 4)]


def test_every_count_is_served_once() -> None:
    for high in (1, 2, 3, 9, 100, 1024):
        served = [n for span in spans((1, high), (1, 1), (140, 140)) for n in range(span.frames[0], span.frames[1] + 1)]
        assert sorted(served) == list(range(1, high + 1))


def test_min_tokens_divides_the_counts_as_a_compile_would_unless_operators_do() -> None:
    plan = Plan.read(FRAME | {"min_tokens": 80})  # 11 tokens a frame: from 8 frames on
    (span,) = spans((3, 20), (1, 1), (4, 6))
    parts = building._cut(span, program(build(SPEC), span, plan, "fp32", CPU, strict=False), plan)
    assert [part.frames for part in parts] == [(8, 20), (3, 7)]
    made = [program(build(SPEC), part, plan, "fp32", CPU, strict=False) for part in parts]
    assert [bool(one.report.rewritten) for one in made] == [True, False]
    assert all(building._cut(part, one, plan) == [part] for part, one in zip(parts, made, strict=True))
    chosen = Plan.read({"layers": {"*": {"blocks": SMALL_BLOCKS}}, "min_tokens": 80})
    assert building._cut(span, program(build(SPEC), span, chosen, "fp32", CPU, strict=True), chosen) == [span]
    mixed = Plan.read({"layers": {"0": {"blocks": SMALL_BLOCKS}, "1": {"scope": "frame"}}, "min_tokens": 80})
    assert len(building._cut(span, program(build(SPEC), span, mixed, "fp32", CPU, strict=True), mixed)) == 2


@pytest.mark.parametrize(("high", "traced_for"), [(20, [(3, 20), (3, 7)]), (8, [(3, 8), (8, 8), (3, 7)])])
def test_what_a_plan_is_applied_to_is_traced_once(high: int, traced_for: list[tuple[int, int]]) -> None:
    """A program for all counts serves those that have enough tokens; a single count has a program of its own."""
    plan, seen, made = Plan.read(FRAME | {"min_tokens": 80}), list[tuple[int, int]](), list[Program]()
    model = build(SPEC)

    def trace(span: Span) -> Program:
        seen.append(span.frames)
        return program(model, span, plan, "fp32", CPU, strict=False)

    def compiled(one: Program, name: str, first: list[Library], meanwhile: object) -> Library:
        made.append(one)
        return Library(Entry(name, one.span, (), {}), [], {}, not first)

    building._libraries(spans((3, high), (1, 1), (4, 6)), trace, compiled, None, lambda made, one, want: one, plan)
    assert seen == traced_for
    assert [one.span.frames for one in made] == [(8, high), (3, 7)]
    assert [one.stages.span for one in made] == [one.span for one in made]
    for one, frames in ((made[0], 8), (made[0], high), (made[1], 3), (made[1], 7)):
        x = scene(frames=frames)
        with torch.no_grad():
            want = by_hand(model, x) if frames >= 8 else model(x)
            torch.testing.assert_close(one.graph(x), want, rtol=1e-4, atol=1e-5)


def test_the_code_that_calls_kernels_is_not_optimised_unless_somebody_asks() -> None:
    setting = "aot_inductor.compile_wrapper_opt_level"
    assert plain_calls()[setting].split()[0] == "O0"
    with torch._inductor.config.patch({setting: "O2"}):
        assert setting not in plain_calls()


def test_what_no_graph_can_serve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[1] == 5 else x

    with pytest.raises(ExportFailed, match="no single graph serves 3-9 frames of 4×6"):
        traced(Fixed().eval(), Span((3, 9), (1, 1), (4, 6)), {})
