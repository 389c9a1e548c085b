"""Keys of kept tokens only: the same values, from projections of fewer tokens, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import alternating
import pytest
import torch
import torch.nn.functional as F
from alternating import Spec, build
from harness import Capture, exported, run
from hypothesis import given, settings
from hypothesis import strategies as st
from modelutils import images as pictures
from modelutils import worst
from regions import DIALECTS, Program, editor, graph_of, outputs, run_again, small, told
from torch import Tensor, nn

from vggt_compile.graph import dialect
from vggt_compile.graph.axes import sizes
from vggt_compile.passes.hoist_keys import hoist_keys
from vggt_compile.site import Outcome, Taken

BATCH, TOKENS, HEADS, WIDTH = 2, 7, 3, 8
KEPT = torch.tensor([5, 0, 2])


# The law: whatever lies between tokens and their keys, taking tokens out before it or after it is the same.


def fused(x: Tensor, qkv: nn.Linear) -> tuple[Tensor, ...]:
    return qkv(x).reshape(BATCH, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)


def indexed(x: Tensor, qkv: nn.Linear) -> tuple[Tensor, ...]:
    out = qkv(x).reshape(BATCH, TOKENS, 3, HEADS, WIDTH).transpose(1, 3)
    return out[:, :, 0], out[:, :, 1], out[:, :, 2]


def chunked(x: Tensor, qkv: nn.Linear) -> tuple[Tensor, ...]:
    return tuple(part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in qkv(x).chunk(3, -1))


def by_heads(x: Tensor, qkv: nn.Linear) -> tuple[Tensor, ...]:
    """Rows of queries, keys and values of one head after the other."""
    return tuple(part.transpose(1, 2) for part in qkv(x).view(BATCH, TOKENS, HEADS, 3, WIDTH).unbind(3))


LAYOUTS: dict[str, Callable] = {f.__name__: f for f in (fused, indexed, chunked, by_heads)}


def rotate(x: Tensor, table: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * table.cos() + torch.cat((-second, first), -1) * table.sin()


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": lambda x, table: F.layer_norm(x, (WIDTH,)),
    "rotate": rotate,
    "rotate by heads": lambda x, table: rotate(x, table.expand(BATCH, HEADS, TOKENS, WIDTH)),
    "halves": lambda x, table: rotate(x.unflatten(-1, (2, 4)), table.unflatten(-1, (2, 4))).flatten(-2),
    "scale": lambda x, table: x * 0.5,
    "there and back": lambda x, table: x.double().to(torch.float32),
    "dropout": lambda x, table: F.dropout(x, 0.3, False),
    "contiguous": lambda x, table: x.contiguous(),
    "token first": lambda x, table: F.gelu(x.permute(2, 0, 1, 3)).permute(1, 2, 0, 3),
}


def keys_of(layout: Callable, steps: tuple[str, ...], x: Tensor, table: Tensor, qkv: nn.Linear) -> tuple[Tensor, ...]:
    q, k, v = layout(x, qkv)
    for step in steps:
        q, k = STEPS[step](q, table), STEPS[step](k, table)
    return q, k, v, k.index_select(2, KEPT), v.index_select(2, KEPT)


def program(layout: str, steps: tuple[str, ...], *, bias: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)

    def attend(x: Tensor, table: Tensor, qkv: nn.Linear) -> tuple[Tensor, ...]:
        q, _, _, k, v = keys_of(LAYOUTS[layout], steps, x, table, qkv)
        return q, k, v

    width = HEADS * WIDTH
    made = Program(attend, nn.Linear(width, 3 * width, bias=bias))
    return made, torch.randn(BATCH, TOKENS, width), torch.randn(1, 1, TOKENS, WIDTH)


def hoisted(gm: torch.fx.GraphModule, whole: int = 0) -> Outcome:
    """The pass on a graph whose last two outputs are keys and values of kept tokens."""
    edit, parts = editor(gm), outputs(gm)[-2:]

    def take(edit: Any, x: torch.fx.Node) -> torch.fx.Node:
        return edit.call(torch.index_select, x, 2, edit.constant("kept", lambda: KEPT))

    taken = Taken({part.args[0]: part for part in parts}, take)
    one = SimpleNamespace(site=SimpleNamespace(path="here"), state=SimpleNamespace(taken=taken))
    return hoist_keys(gm.graph, [one], edit)


@pytest.mark.parametrize("dialect_name", DIALECTS)
@settings(max_examples=12)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=4).map(tuple),
    bias=st.booleans(),
)
def test_a_region_of_kept_tokens_is_the_region_and_then_kept_tokens(
    dialect_name: str, layout: str, steps: tuple[str, ...], bias: bool
) -> None:
    torch._dynamo.reset()
    made, x, table = program(layout, steps, bias=bias)
    expected = made(x, table)
    gm = graph_of(made, x, table, dialect_name=dialect_name)
    assert hoisted(gm) == Outcome(1, "attentions with keys and values of kept tokens only")
    for out, want in zip(run_again(gm, x, table), expected, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    linear = [sizes(n) for n in gm.graph.nodes if dialect.operation(n) == "linear"]
    width = HEADS * WIDTH
    assert sorted(linear) == [(BATCH, len(KEPT), 2 * width), (BATCH, TOKENS, width)]


def test_keys_projected_by_a_map_of_their_own() -> None:
    def attend(x: Tensor, one: nn.Linear, two: nn.Linear) -> tuple[Tensor, ...]:
        k, v = (linear(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for linear in (one, two))
        return x + 1, k.index_select(2, KEPT), v.index_select(2, KEPT)

    width = HEADS * WIDTH
    made, x = Program(attend, nn.Linear(width, width), nn.Linear(width, width)), torch.randn(BATCH, TOKENS, width)
    gm = graph_of(made, x, dialect_name="dynamo")
    assert hoisted(gm).count == 1
    torch.testing.assert_close(run_again(gm, x), made(x))
    assert [sizes(n)[1] for n in gm.graph.nodes if dialect.operation(n) == "linear"] == [3, 3]


def whole_keys_read(x: Tensor, table: Tensor, qkv: nn.Linear) -> tuple[Tensor, ...]:
    _, k, _, few_k, few_v = keys_of(fused, (), x, table, qkv)
    return k.sum(), few_k, few_v


def whole_projection_read(x: Tensor, table: Tensor, qkv: nn.Linear) -> tuple[Tensor, ...]:
    out = qkv(x)
    _, k, v = out.reshape(BATCH, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
    return out.sum(), k.index_select(2, KEPT), v.index_select(2, KEPT)


def mixed_over_tokens(x: Tensor, table: Tensor, qkv: nn.Linear) -> tuple[Tensor, ...]:
    q, k, v = fused(x, qkv)
    return q, k.cumsum(2).index_select(2, KEPT), v.index_select(2, KEPT)


@pytest.mark.parametrize("dialect_name", DIALECTS)
@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (whole_keys_read, "the keys of all tokens are read elsewhere"),
        (whole_projection_read, "what its keys are projected with is read as a whole elsewhere"),
        (mixed_over_tokens, "its keys and values do not come from a linear map of its tokens"),
    ],
)
def test_what_needs_all_tokens_is_left_with_a_reason(attend: Callable, reason: str, dialect_name: str) -> None:
    torch.manual_seed(0)
    width = HEADS * WIDTH
    made, x = Program(attend, nn.Linear(width, 3 * width)), torch.randn(BATCH, TOKENS, width)
    table = torch.randn(1, 1, TOKENS, WIDTH)
    gm = graph_of(made, x, table, dialect_name=dialect_name)
    before = [str(node) for node in gm.graph.nodes]
    assert hoisted(gm).left == {"here": reason}
    assert [str(node) for node in gm.graph.nodes] == before


# In models.

BEFORE = """
linear [1, 33, 48]
reshape [1, 33, 3, 2, 8]
permute [3, 1, 2, 33, 8]
unbind [1, 2, 33, 8]
getitem [1, 2, 33, 8]
getitem [1, 2, 33, 8]
getitem [1, 2, 33, 8]
reshape [1, 2, 3, 11, 8]
narrow [1, 2, 3, 6, 8]
reshape [1, 2, 3, 2, 3, 8]
getitem [1, 2, 3, 1, 2, 8]
reshape [1, 2, 6, 8]
reshape [1, 2, 3, 11, 8]
narrow [1, 2, 3, 5, 8]
reshape [1, 2, 15, 8]
cat [1, 2, 21, 8]
reshape [1, 2, 3, 11, 8]
narrow [1, 2, 3, 6, 8]
reshape [1, 2, 3, 2, 3, 8]
getitem [1, 2, 3, 1, 2, 8]
reshape [1, 2, 6, 8]
reshape [1, 2, 3, 11, 8]
narrow [1, 2, 3, 5, 8]
reshape [1, 2, 15, 8]
cat [1, 2, 21, 8]
scaled_dot_product_attention [1, 2, 33, 8]
transpose [1, 33, 2, 8]
reshape [1, 33, 16]
linear [1, 33, 16]
"""

EXPECTED = """
reshape [1, 1, 33, 16]
reshape [1, 1, 3, 11, 16]
narrow [1, 1, 3, 6, 16]
reshape [1, 1, 3, 2, 3, 16]
getitem [1, 1, 3, 1, 2, 16]
reshape [1, 1, 6, 16]
reshape [1, 1, 3, 11, 16]
narrow [1, 1, 3, 5, 16]
reshape [1, 1, 15, 16]
cat [1, 1, 21, 16]
reshape [1, 21, 16]
linear [1, 33, 16]
reshape [33, 1, 2, 8]
permute [1, 2, 33, 8]
linear [1, 21, 32]
narrow [1, 21, 16]
reshape [21, 1, 2, 8]
permute [1, 2, 21, 8]
narrow [1, 21, 16]
reshape [21, 1, 2, 8]
permute [1, 2, 21, 8]
scaled_dot_product_attention [1, 2, 33, 8]
transpose [1, 33, 2, 8]
reshape [1, 33, 16]
linear [1, 33, 16]
"""


def plan(**parameters: Any) -> dict:
    return {"layers": {"*": {"keys": {"method": "grid", **parameters}}}}


def captured(model: nn.Module, x: Tensor, plan: dict, off: str = "", dynamic: bool = False) -> tuple[Any, Capture]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(disabled_passes=off):
        out = run(model, x, capture=(capture := Capture(plan=plan, strict=True)), dynamic=dynamic)
    return out, capture


def test_before_and_expected() -> None:
    spec = Spec(pairs=1)
    model, x = build(spec), alternating.images(spec, 1, 3, (2, 3))
    for off, expected in (("hoist_keys,share_tables", BEFORE), ("share_tables", EXPECTED)):
        _, capture = captured(model, x, plan(), off)
        assert told(capture.graphs[0], "global_blocks.0.attn") == expected.strip()


FIRST_FRAME = {"keep_first_frame": True, "frames": 2}
SHIFTED = {"stride": [3, 2], "phase": "shifted"}


@pytest.mark.parametrize(
    ("name", "dynamic", "parameters"),
    [("vggt", False, {}), ("vggt", True, SHIFTED), ("pi3", False, SHIFTED), ("pi3", True, FIRST_FRAME)],
)
def test_models_compute_the_same(name: str, dynamic: bool, parameters: dict) -> None:
    model = small(name, layers=1 if name == "pi3" else 2)  # cameras of VGGT see what patches became a layer later
    x = pictures(2, 4, 3, 56, 70)
    plain, _ = captured(model, x, plan(**parameters), "regions", dynamic)
    out, capture = captured(model, x, plan(**parameters), "", dynamic)
    report = capture.report
    regions = {region.name: region for region in report.regions}
    assert regions["hoist_keys"].count == len(report.rewritten) > 0
    assert not regions["hoist_keys"].left
    assert worst(out, plain) < 1e-5


def test_blocks_among_kept_keys() -> None:
    model, x = small("vggt"), pictures(1, 4, 3, 84, 84)
    policy = plan()
    policy["layers"]["*"]["blocks"] = {"method": "predict", "keep": 0.5, "q_block": 16, "k_block": 16}
    for order in ("raster", "hilbert"):
        policy["layers"]["*"]["blocks"]["order"] = order
        plain, _ = captured(model, x, policy, "regions")
        out, capture = captured(model, x, policy)
        assert capture.report.regions[0].count == len(capture.report.rewritten)
        assert worst(out, plain) < 1e-5


@pytest.mark.parametrize(("name", "setting"), [("own_key", {"own_key": True}), ("mean_key", {"mean_key": "count"})])
def test_keys_of_all_tokens_are_needed(name: str, setting: dict) -> None:
    spec = Spec()
    model, x = build(spec), alternating.images(spec, 1, 3, (4, 6))
    _, capture = captured(model, x, plan(**setting))
    reason = f"{name} reads the keys of all tokens"
    paths = [row.path for row in capture.report.rewritten]
    assert capture.report.regions[0].left == dict.fromkeys(paths, reason)
    assert f"hoist_keys: not at {len(paths)}: {reason}" in str(capture.report)


def test_one_graph_serves_all_frame_counts() -> None:
    spec = Spec()
    model, graphs = build(spec), {}
    for off in ("regions", ""):
        torch._dynamo.reset()
        capture = Capture(plan=plan(), strict=True)
        compiled = torch.compile(model, backend=capture)
        with torch._inductor.config.patch(disabled_passes=off), torch.no_grad():
            for frames in (3, 4, 6, 9):
                x = alternating.images(spec, 1, frames, (4, 6))
                torch._dynamo.mark_dynamic(x, 1)
                graphs.setdefault(frames, []).append(compiled(x))
        assert len(capture.graphs) == 1
    for plain, out in graphs.values():
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


def test_exported_graphs() -> None:
    spec = Spec()
    model, x = build(spec), alternating.images(spec, 1, 4, (4, 6))
    outs = []
    for off in ("regions", ""):
        with torch._inductor.config.patch(disabled_passes=off):
            gm, report = exported(model, x, plan(), {1: torch.export.Dim("frames", min=3, max=64)})
        outs.append([gm(x), gm(alternating.images(spec, 1, 7, (4, 6)))])
    assert report.regions[0].count == 2
    for plain, out in zip(*outs, strict=True):
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


def test_under_autocast() -> None:
    model, x = small("vggt"), pictures(1, 4, 3, 56, 70)
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = captured(model, x, plan(), "regions")
        out, capture = captured(model, x, plan())
    assert capture.report.regions[0].count == len(capture.report.rewritten)
    assert {k: v.dtype for k, v in out.items() if isinstance(v, Tensor)} == {
        k: v.dtype for k, v in plain.items() if isinstance(v, Tensor)
    }
    exact = captured(model, x, plan(), "regions")[0]
    assert worst(out, exact) <= 1.5 * worst(plain, exact) + 2**-8
