"""A rewritten graph computes what the model does with the reshapes written by hand, in its dtypes and at all sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import alternating
import pytest
import torch
import torch.nn.functional as F
from alternating import Spec, build, images
from framed import SPEC, by_hand, scene
from harness import FRAME, Capture, exported, in_frames, run, swapped
from numerics import assert_as_accurate
from torch import Tensor, nn
from torch._functorch._aot_autograd.autograd_cache import check_node_safe

from vggt_compile import collect_reports, vggt_sparse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


@pytest.mark.slow
def test_jit_and_the_rewritten_graph_agree() -> None:
    model, x = build(Spec(pairs=1)), scene(batch=2)
    eager = run(model, x, capture=Capture())
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as reports:
        compiled = torch.compile(model, backend=vggt_sparse, options={"plan": FRAME, "strict": True})(x)
    assert len(reports[0].rewritten) == 1
    assert_as_accurate(compiled, eager, by_hand(model.double(), x.double()))


def test_heads_and_widths_of_any_size() -> None:
    for heads, head_dim in ((1, 4), (3, 12), (5, 16)):
        torch._dynamo.reset()
        spec = replace(SPEC, heads=heads, head_dim=head_dim)
        model, x = build(spec), scene(spec, batch=2)
        assert torch.equal(run(model, x, capture=Capture()), by_hand(model, x))
