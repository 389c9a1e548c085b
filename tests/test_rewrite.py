"""The driver and scope_to_frame: exact numbers, dtypes, refusals with reasons, thresholds, reports."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import alternating
import pytest
import torch
import torch.nn.functional as F
from alternating import Spec, build, images
from harness import FRAME, Capture, exported, in_frames, nodes, run, swapped
from numerics import assert_as_accurate
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch._aot_autograd.autograd_cache import check_node_safe

from vggt_compile import collect_reports, explain, registry, vggt_sparse
from vggt_compile.errors import NotRewritten, RewriteBug
from vggt_compile.graph import dialect
from vggt_compile.report import Report
from vggt_compile.site import Skip

SPEC = Spec()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scene(spec: Spec = SPEC, batch: int = 1, frames: int = 3, grid: tuple[int, int] = (2, 3)) -> Tensor:
    return images(spec, batch, frames, grid)


def by_hand(model: nn.Module, x: Tensor, core: Callable = alternating.sdpa) -> Tensor:
    """The model with an explicit reshape around every global attention."""
    with torch.no_grad(), swapped(model, in_frames(x.shape[1], core)):
        return model(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "dynamic"), [(1, False), (2, False), (3, False), (2, True)])
def test_scope_frame_is_a_reshape_around_the_same_attention(batch: int, dynamic: bool, dtype: torch.dtype) -> None:
    model, x = build(SPEC).to(dtype), scene(batch=batch).to(dtype)
    capture = Capture()
    out = run(model, x, capture=capture, dynamic=dynamic)
    assert len(capture.report.rewritten) == 2
    assert torch.equal(out, by_hand(model, x))
    with torch.no_grad():
        assert not torch.equal(out, model(x))


def test_one_graph_serves_all_sizes() -> None:
    model, capture = build(SPEC), Capture()
    for batch, frames, grid in ((2, 3, (2, 3)), (3, 5, (4, 2)), (2, 7, (3, 5)), (4, 2, (2, 7))):
        x = scene(batch=batch, frames=frames, grid=grid)
        assert torch.equal(run(model, x, capture=capture, dynamic=True), by_hand(model, x))
    assert len(capture.graphs) <= 2


def test_square_images_under_dynamic_shapes() -> None:
    model, capture = build(SPEC), Capture()
    for side in (3, 5):
        x = scene(frames=4, grid=(side, side))
        assert torch.equal(run(model, x, capture=capture, dynamic=True), by_hand(model, x))
    assert capture.reports[0].dynamic


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_graphs_give_the_same_numbers(dynamic: bool) -> None:
    model, x, auto = build(SPEC), scene(batch=2, frames=4), torch.export.Dim.AUTO
    gm, report = exported(model, x, dynamic={0: auto, 1: auto, 3: auto, 4: auto} if dynamic else None)
    assert len(report.rewritten) == 2
    assert torch.equal(gm(x), by_hand(model, x))
    if dynamic:
        longer = scene(batch=3, frames=6, grid=(3, 4))
        assert torch.equal(gm(longer), by_hand(model, longer))


def test_one_layer_of_several() -> None:
    model, x = build(Spec(pairs=3)), scene(batch=2)
    out = run(model, x, capture=(capture := Capture(plan={"layers": {"1": {"scope": "frame"}}})))
    assert [row.layer for row in capture.report.rewritten] == [1]
    model.global_blocks[1].attn.core = in_frames(3, alternating.sdpa)
    with torch.no_grad():
        assert torch.equal(out, model(x))


def test_scale_is_carried() -> None:
    model, x = build(Spec(core=alternating.scaled)), scene()
    assert torch.equal(run(model, x, capture=Capture()), by_hand(model, x, alternating.scaled))


def test_batch_items_do_not_mix() -> None:
    model = build(SPEC)
    both = torch.cat((scene(), images(SPEC, 1, 3, (2, 3), seed=1)))
    out = run(model, both, capture=Capture())
    for index in range(2):
        assert_as_accurate(
            out[index], by_hand(model, both[index : index + 1])[0], by_hand(model.double(), both.double())[index]
        )
        model.float()


def outer_bf16() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def outer_fp16() -> Any:
    return torch.autocast("cpu", dtype=torch.float16)


class Nested(nn.Module):
    """The trunk in full precision inside a caller's autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.model(x.float())


def wide_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q and k come out of a norm in float32, v stays in what autocast made of it."""
    return F.scaled_dot_product_attention(q.float() * 1.0, k.float() * 1.0, v)


@contextlib.contextmanager
def dtypes_of_attention(seen: list[torch.dtype]) -> Iterator[None]:
    """Record what every attention that really runs puts out."""

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention):
                seen.append(out.dtype)
            return out

    with Recorder():
        yield


@pytest.mark.parametrize("dialect_name", ["dynamo", "export"])
@pytest.mark.parametrize("core", [alternating.sdpa, wide_queries])
@pytest.mark.parametrize(
    ("context", "nested", "weights"),
    [
        (contextlib.nullcontext, False, torch.float32),
        (outer_bf16, False, torch.float32),
        (outer_fp16, False, torch.float32),
        (outer_bf16, True, torch.float32),
        (contextlib.nullcontext, False, torch.bfloat16),
    ],
    ids=["fp32", "bf16 autocast", "fp16 autocast", "nested full precision", "bf16 weights"],
)
def test_every_site_keeps_its_dtype(
    context: Callable, nested: bool, weights: torch.dtype, core: Callable, dialect_name: str
) -> None:
    if core is wide_queries and weights is torch.bfloat16:
        pytest.skip("PyTorch's attention wants one dtype outside autocast")
    trunk, x = build(Spec(core=core)).to(weights), scene(batch=2).to(weights)
    model = Nested(trunk) if nested else trunk
    seen: list[torch.dtype] = []
    with context(), torch.no_grad():
        with dtypes_of_attention(seen):
            eager = model(x)
        if dialect_name == "dynamo":
            out, report = run(model, x, capture=(capture := Capture())), capture.report
        else:
            gm, report = exported(model, x)
            out = gm(x)
    assert [row.dtype for row in report.rows] == [str(dtype).removeprefix("torch.") for dtype in seen]
    assert len(report.rewritten) == 2
    assert out.dtype == eager.dtype
    with context(), torch.no_grad(), swapped(trunk, in_frames(3, core)):
        hand = model(x)
    trunk.double()
    assert_as_accurate(out, hand, by_hand(trunk, x.double(), alternating.sdpa))


@pytest.mark.parametrize("dynamic", [False, True])
def test_new_nodes_do_not_keep_a_graph_out_of_the_cache(dynamic: bool) -> None:
    capture = Capture()
    with outer_bf16():
        run(build(Spec(core=wide_queries)), scene(), capture=capture, dynamic=dynamic)
    assert len(capture.report.rewritten) == 2
    for node in capture.graphs[0].graph.nodes:
        check_node_safe(node)  # raises for what AOTAutograd would not cache


@pytest.mark.parametrize("plan", ["dense", {}, {"layers": {"*": {"scope": "global"}}}])
@pytest.mark.parametrize("core", [alternating.sdpa, alternating.spelled_out])
def test_the_identity_leaves_the_graph_to_the_node(plan: object, core: Callable) -> None:
    model, x = build(Spec(core=core)), scene()
    capture = Capture(plan=plan)
    out = run(model, x, capture=capture)
    assert nodes(capture.graphs[0]) == capture.before[0]
    with torch.no_grad():
        assert torch.equal(out, model(x))
    assert capture.report.attention_left() == 1.0


def test_a_plan_for_no_layer_of_the_model_changes_nothing() -> None:
    capture = Capture(plan={"layers": {"40-": {"scope": "frame"}}})
    run(build(SPEC), scene(), capture=capture)
    assert nodes(capture.graphs[0]) == capture.before[0]
    assert "no such layer (global layers found: 0-1)" in capture.report.notes[0]


REFUSED = [
    (alternating.causal, "it is causal"),
    (alternating.masked, "it has an attention mask"),
    (alternating.dropping, "it drops out attention weights (p=0.5)"),
    (alternating.grouped, "grouped-query attention"),
    (alternating.crossing, "cross-attention"),
    (alternating.narrow, "values are of another width"),
    (alternating.spelled_out_with_mask, "a mask or bias is added to its logits"),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("core", "reason"), REFUSED)
def test_an_unusual_attention_is_left_with_its_reason(core: Callable, reason: str, dynamic: bool) -> None:
    model, x = build(Spec(core=core)), scene(batch=2)
    capture = Capture()
    torch.manual_seed(0)
    out = run(model, x, capture=capture, dynamic=dynamic)
    assert nodes(capture.graphs[0]) == capture.before[0]
    assert capture.report.rewritten == []
    assert [row.path for row in capture.report.rows if reason in (row.reason or "")] == [
        "global_blocks.0.attn", "global_blocks.1.attn"
    ]  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(out, model(x))


@pytest.mark.parametrize(("core", "reason"), REFUSED)
def test_one_unusual_layer_does_not_stop_the_others(core: Callable, reason: str) -> None:
    capture = Capture(strict=False)
    run(build(Spec(pairs=3, cores={1: core})), scene(), capture=capture)
    assert {"global_blocks.0.attn", "global_blocks.2.attn"} == {row.path for row in capture.report.rewritten}


@pytest.mark.parametrize("core", [alternating.sdpa, alternating.scaled, alternating.spelled_out])
def test_a_plain_attention_is_rewritten(core: Callable) -> None:
    model, x = build(Spec(core=core)), scene(batch=2)
    out = run(model, x, capture=(capture := Capture()))
    assert [row.reason for row in capture.report.global_rows] == [None, None]
    assert [row.implementation for row in capture.report.global_rows] == ["sdpa", "sdpa"]
    hand = by_hand(model, x, core)
    assert_as_accurate(out, hand, by_hand(model.double(), x.double(), core))


def test_functional_attention_is_rewritten() -> None:
    spec = Spec(functional=True)
    model, x = build(spec), scene(batch=2)
    out = run(model, x, capture=(capture := Capture()))
    assert len(capture.report.rewritten) == 2
    block = model.global_blocks
    for i in range(2):
        mha = block[i].attn.mha
        inner = mha.forward
        mha.forward = lambda q, k, v, need_weights, inner=inner: (
            inner(*(x.unflatten(1, (3, -1)).flatten(0, 1) for x in (q, k, v)), need_weights=need_weights)[0]
            .unflatten(0, (-1, 3)).flatten(1, 2), None,
        )  # fmt: skip
    with torch.no_grad():
        hand = model(x)
        assert_as_accurate(out, hand, model.double()(x.double()))


def test_autograd_keeps_the_model_dense() -> None:
    model, x = build(SPEC).requires_grad_(True), scene()
    capture = Capture()
    torch.compile(model, backend=capture, dynamic=False)(x).sum().backward()
    assert nodes(capture.graphs[0]) == capture.before[0]
    assert all("torch.no_grad()" in (row.reason or "") for row in capture.report.global_rows)
    assert model.patch_embed.weight.grad is not None


def raises_through_dynamo(error: type, match: str, model: nn.Module, x: Tensor, capture: Capture) -> None:
    with pytest.raises(BackendCompilerFailed, match=match) as caught:
        run(model, x, capture=capture)
    assert isinstance(caught.value.inner_exception, error)


def test_strict_passes_where_every_layer_is_rewritten() -> None:
    for layers in ("*", "0-1", "1", "0-"):
        torch._dynamo.reset()
        capture = Capture(plan={"layers": {layers: {"scope": "frame"}}}, strict=True)
        run(build(SPEC), scene(), capture=capture)
        assert capture.report.rewritten


def test_strict_raises_where_nothing_matches() -> None:
    model = build(SPEC)
    for block in model.global_blocks:
        block.attn = nn.Linear(16, 16)
    plan = {"layers": {"0-1": {"scope": "frame"}}}
    raises_through_dynamo(NotRewritten, "layers 0-1: no such layer", model, scene(), Capture(plan=plan, strict=True))
    model = nn.Sequential(nn.Linear(16, 16))
    raises_through_dynamo(
        NotRewritten, "layers 0-1: no such", model, torch.ones(1, 16), Capture(plan=plan, strict=True)
    )


def test_strict_raises_for_every_layer_when_none_is_found() -> None:
    model = build(SPEC)
    for block in model.global_blocks:
        block.attn = nn.Linear(16, 16)
    raises_through_dynamo(NotRewritten, "no such layer", model, scene(), Capture(strict=True))


def test_strict_names_layer_path_and_reason() -> None:
    out_of_range = Capture(plan={"layers": {"0-2": {"scope": "frame"}}}, strict=True)
    raises_through_dynamo(
        NotRewritten, r"layer 2: no such layer \(global layers found: 0-1\)", build(SPEC), scene(), out_of_range
    )
    model = build(Spec(cores={1: alternating.causal}))
    raises_through_dynamo(
        NotRewritten, r"layer 1 \(global_blocks.1.attn\): it is causal", model, scene(), Capture(strict=True)
    )


def test_strict_is_about_the_family_at_hand() -> None:
    plan = {"layers": {"9": {"scope": "frame"}}, "families": {"vggt": {"0": {"scope": "frame"}}}}
    capture = Capture(plan=plan, strict=True)
    run(build(SPEC), scene(), capture=capture)
    assert [row.layer for row in capture.report.rewritten] == [0]


@pytest.mark.parametrize(("tokens", "rewritten"), [(33, 2), (34, 0)])
def test_min_tokens_is_a_threshold(tokens: int, rewritten: int) -> None:
    capture = Capture(plan={**FRAME, "min_tokens": tokens})
    run(build(SPEC), scene(), capture=capture)  # 3 frames of 11 tokens
    assert len(capture.report.rewritten) == rewritten
    if not rewritten:
        assert all(f"fewer tokens than min_tokens={tokens}" in (row.reason or "") for row in capture.report.global_rows)


def test_min_tokens_under_dynamic_shapes_compiles_twice() -> None:
    model, capture = build(SPEC), Capture(plan={**FRAME, "min_tokens": 8 * 11})
    for frames in range(2, 22):
        x = scene(frames=frames)
        out = run(model, x, capture=capture, dynamic=True)
        with torch.no_grad():
            assert torch.equal(out, by_hand(model, x) if frames >= 8 else model(x)), frames
    assert [len(report.rewritten) for report in capture.reports] == [0, 2]


def test_min_tokens_of_an_export_decides_for_all_sizes() -> None:
    auto = {1: torch.export.Dim("frames", min=3, max=100)}
    _, report = exported(build(SPEC), scene(frames=4), {**FRAME, "min_tokens": 33}, auto)
    assert len(report.rewritten) == 2


def test_a_graph_shared_by_several_calls_is_left_with_a_reason() -> None:
    class Pair(nn.Module):
        def __init__(self, model: nn.Module, index: int) -> None:
            super().__init__()
            self.inner, self.outer = model.frame_blocks[index], model.global_blocks[index]

        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            batch, frames, tokens, width = x.shape
            x = self.inner(x.reshape(batch * frames, tokens, width))
            return self.outer(x.reshape(batch, frames * tokens, width)).reshape(batch, frames, tokens, width)

    source = build(SPEC)
    model = nn.Sequential(Pair(source, 0), Pair(source, 1))
    x = torch.randn(2, 3, 7, 16)
    capture = Capture()
    out = run(model, x, capture=capture)
    assert [row.reason for row in capture.report.global_rows] == [
        "its graph is shared by 2 calls, so layers cannot be told apart"
    ]
    with torch.no_grad():
        assert torch.equal(out, model(x))


def test_an_unknown_number_of_tokens_is_left_with_a_reason() -> None:
    """Tokens chosen by their values have a length that no input gives."""

    class Chosen(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.frame_blocks, self.global_blocks = model.frame_blocks, model.global_blocks

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            batch, frames, _, width = x.shape
            x = x[:, :, keep.nonzero()[:, 0]]
            x = self.frame_blocks[0](x.reshape(batch * frames, -1, width))
            return self.global_blocks[0](x.reshape(batch, -1, width))

    model, x = Chosen(build(SPEC)), torch.randn(2, 3, 9, 16)
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    capture = Capture()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out = run(model, x, keep, capture=capture, dynamic=False)
    assert capture.report.rewritten == []
    assert any("no input of its graph gives the size" in (row.reason or "") for row in capture.report.rows)
    with torch.no_grad():
        assert torch.equal(out, model(x, keep))


@pytest.mark.slow
def test_jit_and_the_rewritten_graph_agree() -> None:
    model, x = build(Spec(pairs=1)), scene(batch=2)
    eager = run(model, x, capture=Capture())
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as reports:
        compiled = torch.compile(model, backend=vggt_sparse, options={"plan": FRAME, "strict": True})(x)
    assert len(reports[0].rewritten) == 1
    assert_as_accurate(compiled, eager, by_hand(model.double(), x.double()))


def test_flops_are_those_of_the_products() -> None:
    capture = Capture()
    run(build(Spec(pairs=1)), scene(batch=2), capture=capture)
    inner, outer = capture.report.rows
    per_pair = 4 * 2 * 8  # two products of 2·D operations, two heads
    assert (inner.flops_before, inner.flops_after) == (per_pair * 6 * 11**2, per_pair * 6 * 11**2)
    assert (outer.flops_before, outer.flops_after) == (per_pair * 2 * 33**2, per_pair * 2 * 3 * 11**2)
    left = (6 * 11**2 + 2 * 3 * 11**2) / (6 * 11**2 + 2 * 33**2)
    assert capture.report.attention_left() == pytest.approx(left, rel=1e-12)


def test_a_report_reads_the_same_in_python_json_and_print() -> None:
    capture = Capture(plan={"layers": {"1,7": {"scope": "frame"}}})
    run(build(Spec(encoder=1)), scene(batch=2), capture=capture)
    report = capture.report
    left, done = report.global_rows
    assert (done.layer, done.batch, done.frames, done.per_frame, done.special) == (1, 2, 3, 11, 5)
    assert (done.heads, done.head_dim, done.dtype, done.reason) == (2, 8, "float32", None)
    assert done.axes == {"scope": "frame"}
    assert (left.axes, left.reason) == ({}, "the plan leaves this layer dense")
    read = json.loads(report.to_json())
    assert read["family"] == "vggt"
    assert [row["path"] for row in read["rows"]] == [row.path for row in report.rows]
    assert read["attention_left"] == report.attention_left() < 1
    text = str(report)
    assert "3 × 11 (5 special)" in text
    assert "global_blocks.1.attn" in text
    assert "frame_blocks" not in text
    assert "3 inside frames, 0 others" in text
    assert "1 of 5 attentions rewritten" in text
    assert "note: the plan names layer 7: no such layer" in text
    assert "frame_blocks.0.attn" in report.table(every=True)


def test_an_empty_report_prints() -> None:
    assert "0 of 0 attentions rewritten; 100.0%" in str(Report())
    assert json.loads(Report().to_json())["rows"] == []


def test_reports_reach_every_open_block() -> None:
    model = build(SPEC)
    with collect_reports() as outer:
        run(model, scene(), capture=Capture())
        with collect_reports() as inner:
            torch._dynamo.reset()
            run(model, scene(), capture=Capture())
        with pytest.raises(ZeroDivisionError), collect_reports() as broken:
            1 / 0  # noqa: B018
        torch._dynamo.reset()
        run(model, scene(), capture=Capture())
    torch._dynamo.reset()
    run(model, scene(), capture=Capture())
    assert (len(outer), len(inner), len(broken)) == (3, 1, 0)
    assert inner[0] is outer[1]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Register methods for one test."""
    registry.methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    return registry.method


def test_a_method_from_elsewhere_takes_part(register: Callable) -> None:
    calls = []

    @register("keys", "own_scale")
    def own_scale(site: Any, state: Any, edit: Any, *, factor: float = 1.0) -> Any:
        """Multiply the keys."""
        calls.append((site.path, list(state.axes)))
        k = edit.call(torch.mul, state.k, factor)
        return state.then("keys", {"method": "own_scale", "factor": factor}, lambda edit, out: out, k=k)

    policy = {"keys": {"method": "own_scale", "factor": 0.5}, "scope": "frame"}
    model, x = build(SPEC), scene()
    out = run(model, x, capture=(capture := Capture(plan={"layers": {"*": policy}})))
    assert calls == [(f"global_blocks.{i}.attn", ["scope"]) for i in range(2)]
    assert capture.report.global_rows[0].axes == {"scope": "frame", "keys": {"method": "own_scale", "factor": 0.5}}
    assert "own_scale(factor=0.5)" in str(capture.report)
    hand = by_hand(model, x, lambda q, k, v: alternating.sdpa(q, k * 0.5, v))
    assert torch.equal(out, hand)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda edit, out: edit.call(torch.Tensor.to, out, torch.float64), "float32 .* into torch.float64"),
        (lambda edit, out: edit.call(torch.narrow, out, 2, 0, 5), "shape"),
        (lambda edit, out: edit.call(torch.flatten, out, 0, 1), "shape"),
    ],
)
def test_a_wrong_pass_is_caught(register: Callable, change: Callable, what: str) -> None:
    @register("keys", "wrong")
    def wrong(site: Any, state: Any, edit: Any) -> Any:
        return state.then("keys", "wrong", change)

    capture = Capture(plan={"layers": {"*": {"keys": "wrong"}}})
    raises_through_dynamo(RewriteBug, f"global_blocks.0.attn changed .*{what}", build(SPEC), scene(), capture)


def test_what_a_refusing_pass_added_is_taken_back(register: Callable) -> None:
    @register("keys", "hesitant")
    def hesitant(site: Any, state: Any, edit: Any) -> Any:
        k = edit.call(torch.mul, state.k, 2.0)
        edit.call(torch.add, k, edit.reshape(k, *dialect.value(k).shape))
        return Skip("second thoughts")

    policy = {"scope": "frame", "keys": "hesitant"}
    capture = Capture(plan={"layers": {"*": policy}})
    run(build(SPEC), scene(), capture=capture)
    assert nodes(capture.graphs[0]) == capture.before[0]
    assert [row.reason for row in capture.report.global_rows] == ["second thoughts"] * 2
    assert [row.axes for row in capture.report.global_rows] == [{}, {}]


def test_what_a_failing_pass_added_is_taken_back(register: Callable) -> None:
    @register("keys", "failing")
    def failing(site: Any, state: Any, edit: Any) -> Any:
        edit.call(torch.mul, state.k, 2.0)
        raise LookupError("lost")

    seen: list[tuple[str, str]] = []

    def backend(gm: Any, _: Any) -> Any:
        capture, before = Capture(plan={"layers": {"*": {"scope": "frame", "keys": "failing"}}}), nodes(gm)
        with pytest.raises(LookupError):
            capture(gm, None)
        seen.append((before, nodes(gm)))
        return gm.forward

    with torch.no_grad():
        torch.compile(build(SPEC), backend=backend, dynamic=False)(scene())
    assert seen[0][0] == seen[0][1]


def test_a_failing_fake_leaves_no_node(register: Callable) -> None:
    @register("keys", "misfit")
    def misfit(site: Any, state: Any, edit: Any) -> Any:
        edit.call(torch.reshape, state.k, (1, 2, 3))
        return state

    seen = []

    def backend(gm: Any, _: Any) -> Any:
        before = nodes(gm)
        with pytest.raises(RuntimeError):
            Capture(plan={"layers": {"*": {"keys": "misfit"}}})(gm, None)
        seen.append(before == nodes(gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(build(SPEC), backend=backend, dynamic=False)(scene())
    assert seen == [True]


KERNELS: list[torch.Size] = []
"""Shapes that the operator below really ran on; dispatch modes cannot watch, Dynamo stands aside for them."""


@torch.library.custom_op("vggt_compile_tests::watched", mutates_args=())
def watched(x: Tensor) -> Tensor:
    KERNELS.append(x.shape)
    return x.clone()


@watched.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_explain_runs_no_kernel_of_the_model() -> None:
    model, x = build(Spec(core=lambda q, k, v: alternating.sdpa(watched(q), k, v))), scene(batch=2)
    KERNELS.clear()
    with torch.no_grad():
        report = explain(model, x, plan=FRAME)
        assert len(report.rewritten) == 2
        assert KERNELS == []
        model(x)
    assert len(KERNELS) == 2


def test_explain_is_what_compiling_does() -> None:
    model, x = build(SPEC), scene(batch=2)
    with torch.no_grad():
        told = explain(model, x, plan=FRAME, dynamic=False)
    run(model, x, capture=(capture := Capture()))
    assert told.rows == capture.report.rows
    assert told.family == "vggt"


def test_explain_leaves_nothing_behind() -> None:
    model, x = build(SPEC), scene()
    with torch.no_grad():
        want = model(x)
        for _ in range(2):
            explain(model, x, plan=FRAME)
        assert torch._dynamo.eval_frame._debug_get_cache_entry_list(type(model).forward.__code__) == []
        assert torch.equal(model(x), want)
        assert torch.equal(torch.compile(model, backend="eager", dynamic=False)(x), want)


def test_explain_is_strict_when_asked() -> None:
    model = build(SPEC)
    with torch.no_grad(), pytest.raises((NotRewritten, BackendCompilerFailed), match="layer 7: no such layer"):
        explain(model, scene(), plan={"layers": {"7": {"scope": "frame"}}}, strict=True)


def test_a_lost_module_path_is_said_aloud() -> None:
    model = build(SPEC)
    with pytest.warns(UserWarning, match="without a module path"):
        run(lambda q: alternating.sdpa(q, q, q), torch.randn(1, 2, 6, 8), capture=(capture := Capture()))
    assert len(capture.report.notes) == 1
    del model


def test_heads_and_widths_of_any_size() -> None:
    for heads, head_dim in ((1, 4), (3, 12), (5, 16)):
        torch._dynamo.reset()
        spec = replace(SPEC, heads=heads, head_dim=head_dim)
        model, x = build(spec), scene(spec, batch=2)
        assert torch.equal(run(model, x, capture=Capture()), by_hand(model, x))
