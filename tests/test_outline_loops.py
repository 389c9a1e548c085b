"""Loops that are alike become one, which calls one sub-graph for what they share; others stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_outline_blocks import calls, outlined, same
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager_decomp_partition
from torch._higher_order_ops.scan import scan
from torch.fx import GraphModule

from vggt_compile.backend import vggt_sparse
from vggt_compile.families.frame_loop import over_frames
from vggt_compile.graph.loops import loops
from vggt_compile.graph.outline import outline_blocks
from vggt_compile.graph.schemas import asked_once


class Head(nn.Module):
    """Some convolutions of frames, a few at a time."""

    def __init__(self, *sizes: int, most: int = 4) -> None:
        super().__init__()
        pairs = zip((2, *sizes), sizes, strict=False)
        self.layers, self.most = nn.Sequential(*(self.layer(*pair) for pair in pairs)), most

    @staticmethod
    def layer(given: int, gives: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(given, gives, 3, padding=1), nn.GELU(), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Any:
        def run(rows: Tensor) -> Any:
            maps = self.layers(x.index_select(1, rows).flatten(0, 1)).unflatten(0, (1, self.most))
            return maps, maps.mean((-1, -2))

        return over_frames(run, x.shape[1], self.most, x.device)


class Heads(nn.Module):
    def __init__(self, *heads: nn.Module) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Any:
        return [made for head in self.heads for made in head(x)]


class Chain(Heads):
    """The second head reads what the first one gives."""

    def forward(self, x: Tensor) -> Any:
        for head in self.heads:
            x = head(x)[0]
        return x


class Sums(nn.Module):
    """A loop whose turns need each other."""

    def forward(self, x: Tensor) -> Any:
        frames = x.transpose(0, 1)
        return scan(lambda sums, frame: (sums + frame, sums * 2), torch.zeros(frames.shape[1:]), frames)


def frames(count: int) -> Tensor:
    x = torch.randn(1, count, 2, 5, 6, generator=torch.Generator().manual_seed(count))
    torch._dynamo.mark_dynamic(x, 1)
    return x


def bodies(gm: GraphModule) -> list[list[int]]:
    """Of each loop, how many calls each of its sub-graphs has."""
    return [calls(loop.body) for loop in loops(gm)]


HEADS: dict[str, tuple[Callable[[], nn.Module], list[list[int]]]] = {
    "other ends": (lambda: Heads(Head(3, 4, 5), Head(3, 4, 6)), [[2]]),
    "three": (lambda: Heads(*(Head(3, 4, 5 + end) for end in range(3))), [[3]]),
    "nothing alike": (lambda: Heads(Head(3, 4), Head(5, 6)), [[], []]),
    "other runs": (lambda: Heads(Head(3, 4, 5), Head(3, 4, 5, most=3)), [[], []]),
    "one reads the other": (lambda: Chain(Head(3, 4, 2), Head(3, 4, 2)), [[], []]),
    "turns need each other": (lambda: Heads(Sums(), Sums()), [[], []]),
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_what_heads_share_is_one_sub_graph_of_one_loop(name: str) -> None:
    model, want = HEADS[name]
    model_, x = model(), frames(9)
    got, gm, _ = outlined(model_, x, heads=True)
    assert bodies(gm) == want
    assert same(got, model_(x))


@torch.no_grad()
def test_a_loop_with_calls_is_compiled_for_every_number_of_frames() -> None:
    """AOTAutograd asks a loop what it changes; what it traces then has no decompositions."""
    model, found = Heads(Head(3, 4, 5), Head(3, 4, 6)), list[GraphModule]()

    def backend(gm: GraphModule, given: Any) -> Any:
        outline_blocks(gm, heads=True)
        found.append(gm)
        with asked_once():
            return aot_eager_decomp_partition(gm, given)

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, fullgraph=True)
    for count in (9, 6, 14):
        for one, other in zip(run(frames(count)), model(frames(count)), strict=True):
            torch.testing.assert_close(one, other)
    (gm,) = found
    assert bodies(gm) == [[2]]


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_it() -> None:
    model = Heads(Head(3, 4, 5), Head(3, 4, 6))
    torch._dynamo.reset()
    run = torch.compile(model, backend=vggt_sparse, options={"plan": "dense", "outline_heads": True}, fullgraph=True)
    for count in (9, 6, 14):
        for one, other in zip(run(frames(count)), model(frames(count)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
