"""Equal blocks call one sub-graph, give the same values, and what differs in anything stays apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modelutils import images, randomized
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._higher_order_ops.invoke_subgraph import InvokeSubgraphHOP
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from vggt_compile import collect_reports, vggt_sparse
from vggt_compile.backend import Options, vggt_sparse_eager
from vggt_compile.graph import dialect
from vggt_compile.graph.outline import outline_blocks
from vggt_compile.graph.repeats import operations, repeats, sink_results
from vggt_compile.graph.schemas import asked_once
from vggt_compile.models import vggt
from vggt_compile.models.vggt import Aggregator
from vggt_compile.site import Outcome


class Block(nn.Module):
    def __init__(self, slope: float = 0.1, width: int = 8) -> None:
        super().__init__()
        self.slope = slope
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.leaky_relu(self.up(self.norm(x)), self.slope))


class Method(Block):
    """Calls a method of a tensor, of which a graph does not show what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


class Keeping(Stack):
    """Hands out what its second block and its last one leave, and a view of what its first one does."""

    def forward(self, x: Tensor) -> Any:
        kept = []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return kept[0].transpose(0, 1), kept[1] * 2, x


class Checking(Stack):
    """Before each block it compares sizes, which a trace decides and yet writes down, and keeps what nobody reads."""

    def forward(self, x: Tensor) -> Any:
        shape, kept = (x.shape[0], *x.shape[1:]), []
        for block in self.blocks:
            if x.shape != shape:
                x = x.view(shape)
            x = block(x)
            kept.append(x * 2)
        return x, kept[0]


class Scaled(Stack):
    """Its second half runs under another autocast."""

    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Choosing(nn.Module):
    """Says which attention kernels it allows, as π³ does, or leaves that to who calls it."""

    def __init__(self, *kernels: SDPBackend) -> None:
        super().__init__()
        self.kernels, self.qkv, self.out = list(kernels), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        with sdpa_kernel(self.kernels) if self.kernels else contextlib.nullcontext():
            return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])


def outlined(
    model: nn.Module | Callable[..., Any], x: Tensor, *, heads: bool = False, **given: Any
) -> tuple[Any, GraphModule, Outcome]:
    """What a model gives with its equal blocks outlined, without Inductor; the graph, and what was done."""
    seen: list[tuple[GraphModule, Outcome]] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        seen.append((gm, outline_blocks(gm, heads=heads)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend=backend, fullgraph=True, **given)(x)
    ((gm, done),) = seen
    return got, gm, done


def calls(gm: GraphModule) -> list[int]:
    """How many calls each sub-graph has."""
    names = [node.args[1] for node in operations(gm.graph) if "invoke_subgraph" in str(node.target)]
    return sorted(names.count(name) for name in set(names))


def same(got: Any, want: Any) -> bool:
    got, want = ([x] if isinstance(x, Tensor) else list(x) for x in (got, want))
    return all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def noise() -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_equal_blocks_call_one_sub_graph_and_give_the_same_bits() -> None:
    model = Stack(*(Block() for _ in range(6)))
    got, gm, done = outlined(model, noise())
    assert same(got, model(noise()))
    assert len([node for node in operations(gm.graph) if node.name.startswith("linear")]) == 2
    assert (calls(gm), done.count, done.left) == ([5], 4, {})  # from just after a linear map to just after one


@pytest.mark.parametrize("other", [Block(slope=0.2), Block(width=16)])
@torch.no_grad()
def test_blocks_that_differ_in_a_constant_or_a_shape_stay_apart(other: Block) -> None:
    model = Stack(Block(), Block(), Block(), other, Block(), Block(), Block())
    got, gm, _ = outlined(model, noise())
    assert same(got, model(noise()))
    assert sum(calls(gm)) >= 4
    for sub in gm.children():
        maps = {dialect.value(node).shape[-1] for node in operations(sub.graph) if node.name.startswith("linear")}
        slopes = {node.args[1] for node in operations(sub.graph) if node.name.startswith("leaky_relu")}
        assert (maps, slopes) == ({8}, {0.1})


@torch.no_grad()
def test_what_several_blocks_give_to_others_is_an_output_of_all() -> None:
    model = Keeping(*(Block() for _ in range(5)))
    got, gm, _ = outlined(model, noise())
    assert same(got, model(noise()))
    assert max(calls(gm)) >= 3


@torch.no_grad()
def test_what_nobody_reads_does_not_tell_blocks_apart() -> None:
    model, x = Checking(*(Block() for _ in range(6))), noise()
    torch._dynamo.mark_dynamic(x, 0)
    got, gm, done = outlined(model, x)
    assert same(got, model(x))
    assert (calls(gm), done.count) == ([5], 4)
    assert not [node for node in operations(gm.graph) if not node.users]


@pytest.mark.parametrize(("shows", "times"), [(True, 0), (False, 1)])
def test_a_shared_sub_graph_is_asked_once_what_it_changes(
    shows: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not at all where it shows that it changes nothing."""
    asked: list[str] = []
    ask = InvokeSubgraphHOP.gen_schema

    def counted(hop: Any, subgraph: Any, identifier: str, *operands: Any) -> Any:
        asked.append(identifier)
        return ask(hop, subgraph, identifier, *operands)

    def backend(gm: GraphModule, inputs: Any) -> Any:
        outline_blocks(gm)
        with asked_once():
            return aot_eager(gm, inputs)

    monkeypatch.setattr(InvokeSubgraphHOP, "gen_schema", counted)
    model = Stack(*(Block() if shows else Method() for _ in range(6)))
    torch._dynamo.reset()
    with torch.no_grad():
        assert same(torch.compile(model, backend=backend, fullgraph=True)(noise()), model(noise()))
    assert asked == ["block_0"] * times
    assert InvokeSubgraphHOP.gen_schema is counted


@torch.no_grad()
def test_blocks_under_another_autocast_stay_apart() -> None:
    model = Scaled(*(Block() for _ in range(3)))
    got, gm, _ = outlined(model, noise())
    assert same(got, model(noise()))
    assert max(calls(gm)) <= 3


@pytest.mark.parametrize("backend", [lambda gm, _: gm.forward, aot_eager])
@torch.no_grad()
def test_blocks_that_choose_their_attention_kernel_call_one_sub_graph(backend: Callable[..., Any]) -> None:
    model, found = Stack(*(Choosing(SDPBackend.MATH) for _ in range(6))), []

    def compiled(gm: GraphModule, given: Any) -> Any:
        outline_blocks(gm)
        found.append(gm)
        return backend(gm, given)

    torch._dynamo.reset()
    got, flags = torch.compile(model, backend=compiled, fullgraph=True)(noise()), kernels_allowed()
    assert same(got, model(noise()))
    assert calls(found[0]) == [5]  # from just after a linear map to just after one
    assert flags == kernels_allowed()
    assert all(sum(map(dialect.chooses_attention, operations(sub.graph))) == 2 for sub in found[0].children())


def kernels_allowed() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()


@torch.no_grad()
def test_blocks_under_another_choice_of_attention_kernels_stay_apart() -> None:
    def model(x: Tensor) -> Tensor:
        x = first(x)
        with sdpa_kernel([SDPBackend.MATH]):
            x = inner(x)
        return inner(x)

    first, inner = Stack(Choosing(SDPBackend.MATH)), Stack(*(Choosing() for _ in range(3)))
    got, gm, _ = outlined(model, noise())
    assert same(got, model(noise()))
    assert max(calls(gm)) <= 3
    assert not [node for sub in gm.children() for node in operations(sub.graph) if dialect.chooses_attention(node)]


def dropping(x: Tensor) -> Tensor:
    weight = torch.eye(8)
    for _ in range(4):
        x = F.dropout(F.linear(x, weight), 0.5)
    return x


def written(x: Tensor) -> Tensor:
    weight = torch.eye(8)
    for _ in range(4):
        x = F.linear(x, weight)
        first = x[0]
        x += 1
        x = x + first
    return x


@pytest.mark.parametrize("function", [dropping, written])
def test_what_draws_at_random_or_writes_is_left_alone(function: Callable[[Tensor], Tensor]) -> None:
    _, gm, done = outlined(function, noise())
    assert (calls(gm), done.count) == ([], 0)


def test_switched_off_it_leaves_the_graph_as_it_is() -> None:
    for setting in ({"disabled_passes": "outline_blocks"}, {"disabled_passes": "regions"}, {"cpp_wrapper": True}):
        with torch._inductor.config.patch(setting):
            _, gm, done = outlined(Stack(Block(), Block(), Block()), noise())
        assert calls(gm) == []
        assert list(done.left) == [""]


def test_more_symbols_than_the_number_of_frames_are_refused() -> None:
    done: list[Outcome] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        done.append(outline_blocks(gm))
        return gm.forward

    torch._dynamo.reset()
    x = torch.randn(3, 5, 8)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        torch.compile(Stack(*(Block() for _ in range(4))), backend=backend)(x)
    assert (done[0].count, done[0].left) == (0, {"": "more than the number of frames is symbolic"})


def test_where_gradients_are_asked_for_it_leaves_the_graph_as_it_is() -> None:
    done: list[Outcome] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        done.append(outline_blocks(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Stack(Block(), Block()), backend=backend)(noise())
    assert done[0].left == {"": "gradients are asked for"}


def framed(frames: int) -> Tensor:
    """Images of which only the number is dynamic."""
    x = images(1, frames, 3, 56, 56)
    torch._dynamo.mark_dynamic(x, 1)
    return x


def trunk(depth: int = 4) -> Aggregator:
    return randomized(vggt("tiny", depth=depth, encoder="conv", outputs=("camera",))).aggregator


def test_a_result_that_only_heads_read_does_not_tell_blocks_apart() -> None:
    model = vggt("tiny", depth=6, encoder="conv", outputs=("depth",)).eval()

    def backend(gm: GraphModule, _: Any) -> Any:
        for step in (lambda graph: None, sink_results):
            step(gm.graph)
            found.append(sum((len(spans) - 1) * (spans[0][1] - spans[0][0]) for spans in repeats(gm.graph)))
        return gm.forward

    found: list[int] = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(images(1, 3, 3, 56, 56))
    assert found[1] > found[0]  # operations spared


@pytest.mark.parametrize("plan", ["dense", "g2f", "fastvggt", "faster_vggt-50"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_plan_gives_the_same_bits_for_every_number_of_frames(plan: str, autocast: bool) -> None:
    model, results = trunk(2), []
    for outline in (False, True):
        torch._dynamo.reset()
        run = torch.compile(model, backend=vggt_sparse_eager, options={"plan": plan, "outline": outline})
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), collect_reports() as reports:
            results.append([run(framed(frames))[1] for frames in (5, 7, 3)])
        assert len(reports) == 1
    assert same(*results)
    (region,) = (one for one in reports[0].regions if one.name == "outline_blocks")
    assert region.count >= 1


@pytest.mark.slow
def test_inductor_compiles_it_for_every_number_of_frames_and_caches_it(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, seen = trunk(2), []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        run = torch.compile(model, backend=vggt_sparse, options={"plan": "dense", "outline": True})
        with torch.no_grad(), collect_reports() as reports:
            for frames in (5, 7):
                x = framed(frames)
                torch.testing.assert_close(run(x)[1], model(x)[1], rtol=1e-4, atol=1e-4)
        seen.append((counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]))
        assert len(reports) == 1
        assert any(one.name == "outline_blocks" and one.count for one in reports[0].regions)
    assert seen == [(0, 1), (1, 0)]


def test_it_is_on_unless_asked_not_to() -> None:
    assert Options.read({}).outline
    assert not Options.read({"outline": False}).outline
