"""What the driver leaves as it is, node by node, with the reason: no plan names it, or no method is for it.

With `strict` it raises instead.
"""

from __future__ import annotations

from collections.abc import Callable

import alternating
import pytest
import torch
from alternating import Spec, build
from framed import SPEC, by_hand, scene
from harness import FRAME, Capture, exported, nodes, raises_through_dynamo, run
from torch import Tensor, nn

from vggt_compile.errors import NotRewritten


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


def test_autograd_keeps_the_model_dense() -> None:
    model, x = build(SPEC).requires_grad_(True), scene()
    capture = Capture()
    torch.compile(model, backend=capture, dynamic=False)(x).sum().backward()
    assert nodes(capture.graphs[0]) == capture.before[0]
    assert all("torch.no_grad()" in (row.reason or "") for row in capture.report.global_rows)
    assert model.patch_embed.weight.grad is not None


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


def test_strict_raises_for_a_share_of_the_depth_where_there_is_none() -> None:
    plan = {"layers": {"75-100%": {"scope": "frame"}}}
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.ones(1, 16)
    raises_through_dynamo(NotRewritten, "no global layers were found", model, x, Capture(plan=plan, strict=True))
    dense = Capture(plan={"layers": {"75-100%": {}}}, strict=True)
    run(model, x, capture=dense)
    assert not dense.report.rewritten


def test_strict_names_layer_path_and_reason() -> None:
    out_of_range = Capture(plan={"layers": {"0-2": {"scope": "frame"}}}, strict=True)
    raises_through_dynamo(
        NotRewritten, r"layer 2: no such layer \(global layers found: 0-1\)", build(SPEC), scene(), out_of_range
    )
    model = build(Spec(cores={1: alternating.causal}))
    raises_through_dynamo(
        NotRewritten, r"layer 1 \(global_blocks.1.attn\): it is causal", model, scene(), Capture(strict=True)
    )


REGISTERS = Spec(pairs=3, registers_only=(1,))


def test_a_share_of_the_depth_passes_over_blocks_of_special_tokens() -> None:
    capture = Capture(plan={"layers": {"0-100%": {"scope": "frame"}}}, strict=True)
    run(build(REGISTERS), scene(REGISTERS), capture=capture)
    assert [row.layer for row in capture.report.rewritten] == [0, 2]
    assert capture.report.notes == []
    others = [row.reason for row in capture.report.rows if row.scope == "other"]
    assert others == ["it sees the special tokens of all frames only"]


def test_who_names_a_block_of_special_tokens_by_its_index_is_told() -> None:
    plan = {"layers": {"0-2": {"scope": "frame"}}}
    run(build(REGISTERS), scene(REGISTERS), capture=(capture := Capture(plan=plan)))
    assert capture.report.notes == ["the plan names layer 1: no such layer (global layers found: 0,2)"]
    raises_through_dynamo(
        NotRewritten, "layer 1: no such layer", build(REGISTERS), scene(REGISTERS), Capture(plan=plan, strict=True)
    )


def test_a_share_of_the_depth_asks_for_other_layers_that_are_not_found() -> None:
    model = build(Spec(pairs=3))
    model.global_blocks[1].attn = nn.Linear(16, 16)
    capture = Capture(plan={"layers": {"0-100%": {"scope": "frame"}}}, strict=True)
    raises_through_dynamo(NotRewritten, "layer 1: no such layer", model, scene(), capture)


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


def test_a_lost_module_path_is_said_aloud() -> None:
    model = build(SPEC)
    with pytest.warns(UserWarning, match="without a module path"):
        run(lambda q: alternating.sdpa(q, q, q), torch.randn(1, 2, 6, 8), capture=(capture := Capture()))
    assert len(capture.report.notes) == 1
    del model
