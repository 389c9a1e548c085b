"""Modules that are alike are traced once, and the graph is the one of a trace that runs them all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from modelutils import tiny
from torch import Tensor, nn
from torch.fx import GraphModule
from written import written

from vggt_compile.artifact import alike
from vggt_compile.artifact.likeness import likeness
from vggt_compile.artifact.program import program
from vggt_compile.artifact.request import Span
from vggt_compile.models import vggt
from vggt_compile.models.camera import CameraConfig
from vggt_compile.plan import Plan

CPU = torch.device("cpu")
X = torch.zeros(2, 6, 8)


class Rotation(nn.Module):
    """Remembers a table, as upstream's rotary embedding does."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] not in self.tables:
            self.tables[x.shape[-1]] = torch.arange(x.shape[-1], dtype=x.dtype).cos()
        return x * self.tables[x.shape[-1]]


class Block(nn.Module):
    def __init__(self, width: int = 8, rotation: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.linear, self.scale = nn.LayerNorm(width), nn.Linear(width, width), 2.0
        self.rotation = nn.Identity() if rotation is None else rotation

    def forward(self, x: Tensor, mask: Tensor | None = None, *, times: float = 1.0) -> Tensor:
        made = self.rotation(self.linear(self.norm(x))) * self.scale * times
        return x + (made if mask is None else made * mask)


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module, rounds: int = 1) -> None:
        super().__init__()
        self.blocks, self.rounds = nn.ModuleList(blocks), rounds

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks] * self.rounds:
            x = block(x)
        return x


def exported(model: nn.Module, once: bool = True, x: Tensor = X, **asked: Any) -> tuple[GraphModule, list[str]]:
    """The graph of an export, and what was copied in it."""
    with torch.no_grad(), alike.traced_once(model) if once else nullcontext() as known:
        graph = torch.export.export(model, (x,), **asked).graph_module
    return graph, [path.removeprefix("_export_root.") for path in known.copied] if known else []


def check(model: nn.Module, copied: list[str], **asked: Any) -> None:
    model.eval()
    graph, seen = exported(model, **asked)
    plain, _ = exported(model, once=False, **asked)
    assert written(graph, modules=True) == written(plain, modules=True)
    assert seen == copied


def test_like_blocks_are_traced_once() -> None:
    check(Stack(Block(), Block(), Block()), ["blocks.1", "blocks.2"])


def test_counts_stay_symbols() -> None:
    model = Stack(Block(), Block(), Block())
    check(model, ["blocks.1", "blocks.2"], dynamic_shapes=({1: torch.export.Dim("tokens", min=3, max=100)},))


def test_blocks_are_called_twice() -> None:
    check(Stack(Block(), Block(), rounds=2), ["blocks.1", "blocks.0", "blocks.1"])


def test_a_block_stands_at_two_places() -> None:
    one = Block()
    check(Stack(one, Block(), one), ["blocks.1", "blocks.2"])


def _scaled() -> nn.Module:
    block = Block()
    block.scale = 3.0
    return block


def _hooked() -> nn.Module:
    block = Block()
    block.linear.register_forward_hook(lambda module, given, made: made + 1)
    return block


def _tied() -> nn.Module:
    block = Block()
    block.linear.bias = block.norm.bias
    return block


def _without_bias() -> nn.Module:
    block = Block()
    block.linear.bias = None
    return block


class Other(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, times: float = 1.0) -> Tensor:
        return super().forward(x, mask, times=times) + 1


@pytest.mark.parametrize("other", [_scaled, _hooked, _tied, _without_bias, lambda: Block(rotation=nn.Tanh())])
def test_a_block_that_differs_is_traced(other: Callable[[], nn.Module]) -> None:
    check(Stack(Block(), other(), Block()), ["blocks.2"])


def test_a_block_of_a_class_made_from_another_copies_only_what_it_inherits() -> None:
    check(Stack(Block(), Other(), Other()), ["blocks.2"])


class Calls(nn.Module):
    """Blocks are called in ways of their own."""

    def __init__(self, *ways: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.ways = nn.ModuleList(Block() for _ in ways), ways

    def forward(self, x: Tensor) -> Tensor:
        for way, block in zip(self.ways, self.blocks, strict=True):
            x = way(block, x)
        return x


def _plainly(block: nn.Module, x: Tensor) -> Tensor:
    made: Tensor = block(x)
    return made


def _under_autocast(block: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        made: Tensor = block(x)
    return made.float()


@pytest.mark.parametrize(
    "way",
    [
        lambda block, x: block(x, x),
        lambda block, x: block(x, x + 1),
        lambda block, x: block(x, torch.ones(8)),
        lambda block, x: block(x, times=2.0),
        lambda block, x: block(x[:, :3]).repeat(1, 2, 1),
        lambda block, x: block(x.transpose(0, 1)).transpose(0, 1).contiguous(),
        lambda block, x: block(x.double().float()).double().float(),
        _under_autocast,
    ],
    ids=["twice", "two", "constant", "keyword", "shape", "strides", "alike", "autocast"],
)
def test_a_block_that_is_called_otherwise_is_traced(way: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Calls(_plainly, way, _plainly, way).eval()
    graph, copied = exported(model)
    assert written(graph, modules=True) == written(exported(model, once=False)[0], modules=True)
    assert "blocks.2" in copied
    x = torch.randn(2, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_one_tensor_twice_is_not_two_tensors() -> None:
    model = Calls(lambda block, x: block(x, x), lambda block, x: block(x, x + 1), lambda block, x: block(x, x))
    check(model, ["blocks.2"])


class Remembers(Block):
    """What one call leaves behind changes the next."""

    count = 0.0

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        self.count += 1.0
        return super().forward(x, *rest, **named) + self.count


class Shares(Block):
    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return x.transpose(0, 1).transpose(0, 1)


class Asks(Block):
    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return x + (x > 0).nonzero().shape[0]


class Holds(Block):
    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return x + torch.tensor([1.0, 2.0]).sum()


def _with_one_rotation() -> nn.Module:
    rotation = Rotation()
    return Stack(*(Block(rotation=rotation) for _ in range(4)))


@pytest.mark.parametrize("kind", [Remembers, Shares, Asks, Holds])
def test_what_a_copy_would_get_wrong_is_traced(kind: type[Block]) -> None:
    once, copied = exported(Stack(*(kind() for _ in range(3))).eval())
    whole, _ = exported(Stack(*(kind() for _ in range(3))).eval(), once=False)
    assert not copied
    assert written(once) == written(whole)


def test_a_table_that_blocks_share_is_made_once() -> None:
    graph, _ = exported(_with_one_rotation())
    tables = [node for node in graph.graph.nodes if node.target is torch.ops.aten.arange.default]
    assert len(tables) <= 1


def test_classes_are_left_as_they_were() -> None:
    before = vars(Block)["forward"]
    exported(Stack(Block(), Block()))
    with pytest.raises(ValueError, match="inside"), alike.traced_once(Stack(Block(), Block())):
        raise ValueError("inside")
    assert vars(Block)["forward"] is before
    assert "forward" not in vars(type("Inherits", (Block,), {}))


def test_calls_outside_of_a_trace_and_in_dynamo_run_as_ever() -> None:
    model = Stack(Block(), Block()).eval()
    x = torch.randn(2, 6, 8)
    with torch.no_grad(), alike.traced_once(model) as known:
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    assert not known.copied


def test_likeness_is_of_all_but_values() -> None:
    one, other = Block(), Block()
    assert likeness(one) == likeness(other)
    assert hash(likeness(one)) == hash(likeness(other))
    for change in ("scale", "new"):
        setattr(other, change, 7.0)
        assert likeness(one) != likeness(other)
        setattr(one, change, 7.0)
        assert likeness(one) == likeness(other)
    tables = {"table": torch.zeros(2)}
    vars(one)["shared"], vars(other)["shared"] = tables, dict(tables)
    assert likeness(one) == likeness(other)
    vars(other)["shared"] = {"table": torch.zeros(2)}
    assert likeness(one) != likeness(other)


def test_a_model_has_the_graph_of_a_whole_trace() -> None:
    """Blocks of two kinds, in frames and across them, and a camera head that calls its own twice."""
    camera = {"outputs": ("camera",), "camera": CameraConfig(depth=2, heads=4, steps=2)}
    model, plan = tiny(vggt, depth=4, encoder="conv", **camera), Plan.read({"layers": {"0": {"scope": "frame"}}})
    span = Span((3, 40), (1, 2), (56, 70))
    with mock.patch.object(alike.Trace, "repeated", autospec=True, side_effect=alike.Trace.repeated) as copied:
        once = program(model, span, plan, "autocast", CPU, strict=True)
    with mock.patch.object(alike, "traced_once", return_value=nullcontext()):
        whole = program(model, span, plan, "autocast", CPU, strict=True)
    assert copied.call_count >= 4
    assert written(once.graph) == written(whole.graph)
