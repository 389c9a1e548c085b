"""What tests of several axes share: the swapped core, odd models, and a look at what the driver lowers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import alternating
import torch
import torch.nn.functional as F
from alternating import Spec, build
from harness import exported, swapped
from torch import Tensor, nn

from vggt_compile.lower import Lowering
from vggt_compile.site import AttentionState, Site


def by_hand(model: nn.Module, x: Tensor, core: Callable) -> Tensor:
    """The model with another core in every global attention."""
    with torch.no_grad(), swapped(model, core):
        return model(x)


def wide_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q and k come out of a norm in float32, v stays in what autocast made of it."""
    return alternating.sdpa(q.float() * 1.0, k.float() * 1.0, v)


@contextlib.contextmanager
def attention_over_frames(tokens: int, core: Callable) -> Iterator[None]:
    """Within the block every attention over so many tokens is `core`."""

    class Swap(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention and args[0].shape[-2] == tokens and not (kwargs or {}):
                return core(*args)
            return func(*args, **(kwargs or {}))

    with Swap():
        yield


class BareTrunk(nn.Module):
    """The blocks of a model without its patch embedding, under names that a family knows, or under others."""

    def __init__(self, spec: Spec, names: str) -> None:
        super().__init__()
        source = build(spec)
        inner, outer = ("frame_blocks", "global_blocks") if names == "vggt" else ("a", "b")
        self.add_module(inner, source.frame_blocks)
        self.add_module(outer, source.global_blocks)
        self.inner, self.outer = inner, outer

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, tokens, width = x.shape
        for inner, outer in zip(getattr(self, self.inner), getattr(self, self.outer), strict=True):
            x = inner(x.reshape(batch * frames, tokens, width))
            x = outer(x.reshape(batch, frames * tokens, width)).reshape(batch, frames, tokens, width)
        return x


def lowered(model: nn.Module, x: Tensor, plan: object, monkeypatch: Any) -> tuple[Site, AttentionState, dict]:
    """The only site that is lowered, its state, and the values of all nodes by their name."""
    seen, values = [], {}
    lower = Lowering.lower

    def watch(self: Lowering, site: Site, state: AttentionState) -> None:
        seen.append((site, state))
        values[site.call.k.name] = None
        lower(self, site, state)

    class Watch(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            values[node.name] = super().run_node(node)
            return values[node.name]

    monkeypatch.setattr(Lowering, "lower", watch)
    gm, _ = exported(model, x, plan)
    Watch(gm).run(x)
    ((site, state),) = seen
    return site, state, values
