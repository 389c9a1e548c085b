"""Equal values are computed once, tables of angles are kept in memory, and nothing that changes is taken for equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import Capture, nodes, run
from modelutils import images as pictures
from modelutils import worst
from regions import DIALECTS, Program, editor, graph_of, run_again, small
from torch import Tensor
from torch._inductor.utils import get_code

from vggt_compile import vggt_sparse
from vggt_compile.graph import dialect
from vggt_compile.models import vggt
from vggt_compile.passes.share_tables import _once_each, share_tables

FRAME = {"layers": {"0": {"scope": "frame"}}}


def rotated(x: Tensor) -> Tensor:
    """Computes its angles anew, as models do in every attention."""
    angle = torch.arange(x.shape[1], device=x.device)[:, None].float() / 10 ** (torch.arange(0, 4, 2).float() / 4)
    angle = torch.cat((angle, angle), -1)
    return x * angle.cos() + x.flip(-1) * angle.sin()


def layers(x: Tensor) -> Tensor:
    for _ in range(3):
        x = rotated(x).tanh()
    return x


def counts(gm: torch.fx.GraphModule) -> dict[str, int]:
    found = [dialect.operation(node) for node in gm.graph.nodes]
    return {name: found.count(name) for name in ("arange", "cos", "sin", "as_strided", "tanh", "mul")}


@pytest.mark.parametrize("dialect_name", DIALECTS)
def test_one_table_of_each_kind_for_all_layers(dialect_name: str) -> None:
    made, x = Program(layers), torch.randn(2, 5, 4)
    gm = graph_of(made, x, dialect_name=dialect_name)
    assert counts(gm)["cos"] == 3
    assert share_tables(gm.graph, [], editor(gm)).count == 2
    found = counts(gm)
    assert (found["cos"], found["sin"], found["as_strided"]) == (1, 1, 2)
    assert (found["arange"], found["tanh"]) == (2, 3)
    got = run_again(gm, x)
    assert torch.equal(got[0] if isinstance(got, tuple) else got, layers(x))


def test_sizes_of_tables_are_computed_once() -> None:
    """Each table in memory is told its shape and its strides, here multiples of one number that is not known."""

    def turned(x: Tensor) -> Tensor:
        angle = torch.arange(3 * x.shape[1], dtype=torch.float32)[:, None] * torch.ones(1, 4)
        for _ in range(3):
            x = (x.repeat(1, 3, 1) * angle.cos() + angle.sin())[:, : x.shape[1]].tanh()
        return x

    found: list[int] = []
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(share_tables(gm.graph, [], editor(gm)).count)
        gm.recompile()
        graphs.append(gm)
        return gm.forward

    x = torch.randn(2, 5, 4)
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(turned, backend=backend, fullgraph=True)(x), turned(x))
    (gm,) = graphs
    assert found == [2]
    expressions = [
        seen.node.expr
        for node in gm.graph.nodes
        if node.op.startswith("call_") and isinstance(seen := dialect.value(node), torch.SymInt)
    ]
    assert len(expressions) == len(set(expressions))


def places(images: Tensor, *convolutions: torch.nn.Module) -> tuple[Tensor, ...]:
    """Adds one table, repeated for all frames, to several maps, as a dense head does with its positions."""
    outs = []
    for before, after in zip(convolutions[::2], convolutions[1::2], strict=True):
        table = torch.arange(48, dtype=torch.float64).reshape(2, 3, 8).cos().float() * 0.1
        outs.append(after(before(images) + table.permute(2, 0, 1)[None].expand(images.shape[0], -1, -1, -1)))
    return tuple(outs)


def dense_head() -> Program:
    sizes = ((16, 8, 1), (8, 4, 3)) * 2
    return Program(places, *(torch.nn.Conv2d(into, out, size, padding=size // 2) for into, out, size in sizes))


@pytest.mark.parametrize("dialect_name", DIALECTS)
def test_a_table_repeated_for_all_frames_is_kept_once(dialect_name: str) -> None:
    """Strides of 0 are read wrongly from memory that has every frame."""
    made, x = dense_head(), torch.randn(2, 16, 2, 3)
    gm = graph_of(made, x, dialect_name=dialect_name)
    assert share_tables(gm.graph, [], editor(gm)).count == 1
    (kept,) = (node for node in gm.graph.nodes if dialect.operation(node) == "as_strided")
    assert dialect.value(kept).shape == (2, 3, 8)
    for out, want in zip(run_again(gm, x), made(x), strict=True):
        torch.testing.assert_close(out, want)


@pytest.mark.slow
def test_compiled_maps_have_their_table_in_place() -> None:
    made, x = dense_head(), torch.randn(2, 6, 16).permute(0, 2, 1).reshape(2, 16, 2, 3)  # channels last
    gm = graph_of(made, x, dialect_name="export")
    share_tables(gm.graph, [], editor(gm))
    gm.recompile()
    with torch.no_grad():
        for out, want in zip(torch.compile(gm, dynamic=False)(x), made(x), strict=True):
            torch.testing.assert_close(out, want)


@pytest.mark.xfail(raises=AssertionError, reason="Inductor reads strides of 0 from memory without repeats", strict=True)
def test_inductor_reads_a_repeated_value_by_its_strides() -> None:
    """Once it does, `_once_each` may go."""

    def add(x: Tensor, table: Tensor) -> Tensor:
        frames = (table.cos() * 0.1).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
        return x + frames.as_strided(frames.shape, frames.stride())

    x, table = torch.randn(2, 8, 2, 3).to(memory_format=torch.channels_last), torch.randn(2, 3, 8)
    torch.testing.assert_close(torch.compile(add)(x, table), add(x, table))


@pytest.mark.parametrize("view", [lambda x: x.expand(4, 5), lambda x: x.expand(4, 5).t(), lambda x: x[:, ::2]])
def test_strides_with_repeats_or_gaps_are_told(view: Callable[[Tensor], Tensor]) -> None:
    assert _once_each(torch.ones(1, 5).t())
    assert not _once_each(view(torch.ones(1, 5)))


def changed_between(x: Tensor) -> tuple[Tensor, ...]:
    x = x + 0
    first = x.view(-1).cos()
    x.mul_(2)
    return first, x.view(-1).cos()


def changed_through_a_view(x: Tensor) -> tuple[Tensor, ...]:
    x = x + 0
    row = x[0]
    first = x.sin()
    row += 1
    return first, x.sin()


def drawn(x: Tensor) -> tuple[Tensor, ...]:
    return x + torch.rand_like(x), x + torch.rand_like(x)


def allocated(x: Tensor) -> tuple[Tensor, ...]:
    one, two = torch.empty_like(x), torch.empty_like(x)
    one.fill_(1)
    two.fill_(2)
    return one, two


def kinds_of_one(x: Tensor) -> tuple[Tensor, ...]:
    return torch.full((2,), 1) + x, torch.full((2,), 1.0) + x, torch.full((2,), True) + x


@pytest.mark.parametrize("dialect_name", DIALECTS)
@pytest.mark.parametrize("function", [changed_between, changed_through_a_view, drawn, allocated, kinds_of_one])
def test_what_is_not_equal_is_not_shared(function: Callable, dialect_name: str) -> None:
    made, x = Program(function), torch.randint(3, (2, 2))
    x = x if function is kinds_of_one else x.float()
    gm = graph_of(made, x, dialect_name=dialect_name)
    share_tables(gm.graph, [], editor(gm))
    torch.manual_seed(0)
    got = run_again(gm, x)
    torch.manual_seed(0)
    for out, want in zip(got, function(x), strict=True):
        assert out.dtype == want.dtype
        assert torch.equal(out, want)


def test_equal_operations_under_another_autocast_are_not_equal() -> None:
    def twice(x: Tensor) -> tuple[Tensor, ...]:
        first = torch.linalg.norm(x @ x)
        with torch.autocast("cpu", torch.bfloat16):
            return first, torch.linalg.norm(x @ x)

    gm = graph_of(Program(twice), x := torch.randn(4, 4), dialect_name="dynamo")
    share_tables(gm.graph, [], editor(gm))
    got = run_again(gm, x)
    assert [out.dtype for out in got] == [out.dtype for out in twice(x)]
    assert counts(gm)["cos"] == 0
    assert sum(dialect.operation(node) == "matmul" for node in gm.graph.nodes) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_models_compute_the_same_to_the_bit(dynamic: bool) -> None:
    model, x = small("vggt", layers=1), pictures(2, 4, 3, 56, 70)
    outs, graphs = [], []
    for off in ("share_tables", ""):
        torch._dynamo.reset()
        with torch._inductor.config.patch(disabled_passes=off):
            outs.append(run(model, x, capture=(capture := Capture(plan=FRAME)), dynamic=dynamic))
        graphs.append(capture.graphs[0])
    assert worst(*outs) == 0
    tables = [counts(gm)["as_strided"] for gm in graphs]
    assert tables[0] == 0
    assert tables[1] == capture.report.regions[0].count > 0


def test_a_dense_plan_leaves_the_graph_as_it_is() -> None:
    model, x = small("vggt"), pictures(1, 4, 3, 56, 70)
    run(model, x, capture=(capture := Capture(plan="dense")))
    assert nodes(capture.graphs[0]) == capture.before[0]


@pytest.mark.slow
def test_compiled_code_computes_a_cosine_in_one_kernel() -> None:
    """Without the pass every kernel that rotates computes its own."""

    class Trunk(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = vggt("tiny", depth=1, encoder="conv", outputs=("camera",), layer_scale=0.5).eval().aggregator

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images)

    x, found = torch.rand(1, 4, 3, 28, 42), {}
    for off in ("share_tables", ""):
        torch._dynamo.reset()
        switches = {"disabled_passes": off, "fx_graph_cache": False}
        options = {"plan": FRAME, "outline": False, "inductor": switches}  # a shared block has one kernel anyway
        with torch.no_grad():
            code = "".join(get_code(torch.compile(Trunk(), backend=vggt_sparse, options=options), x))
        found[off] = code.count("cos(")
    assert found[""] < found["share_tables"]
