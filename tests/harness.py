"""Run a model through the rewrite without Inductor, and keep what was seen on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

from vggt_compile.backend import Options, reported_rewrite
from vggt_compile.plan import Plan
from vggt_compile.report import Report
from vggt_compile.rewrite import rewrite

FRAME = {"layers": {"*": {"scope": "frame"}}}


@dataclass
class Capture:
    """A backend that rewrites by a plan and runs the graph node by node, equal blocks as they are."""

    plan: object = field(default_factory=lambda: FRAME)
    strict: bool = False
    graphs: list[GraphModule] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    before: list[str] = field(default_factory=list)

    def __call__(self, gm: GraphModule, _: Any) -> Callable[..., Any]:
        self.before.append(nodes(gm))
        options = Options.read({"plan": self.plan, "strict": self.strict, "outline": False})
        self.reports.append(reported_rewrite(gm, options))
        self.graphs.append(gm)
        return gm.forward

    @property
    def report(self) -> Report:
        assert len(self.reports) == 1, f"{len(self.reports)} graphs"
        return self.reports[0]


def run(model: nn.Module | Callable, *inputs: Any, capture: Capture, dynamic: bool | None = False) -> Any:
    """With fixed sizes the cache of fake tensors spares more than its keys take, with symbolic ones it does not."""
    with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=dynamic is False):
        return torch.compile(model, backend=capture, dynamic=dynamic)(*inputs)


def raises_through_dynamo(error: type, match: str, model: nn.Module, x: Tensor, capture: Capture) -> None:
    """Running the model raises, from the backend, an error of this type."""
    with pytest.raises(BackendCompilerFailed, match=match) as caught:
        run(model, x, capture=capture)
    assert isinstance(caught.value.inner_exception, error)


def exported(model: nn.Module, images: Tensor, plan: object = None, dynamic: dict | None = None) -> tuple[Any, Report]:
    """The module of torch.export after a rewrite, and its report."""
    with torch.no_grad():
        gm = torch.export.export(model, (images,), dynamic_shapes=None if dynamic is None else (dynamic,)).module()
    return gm, rewrite(gm, Plan.read(FRAME if plan is None else plan), guard=False)


def nodes(gm: GraphModule) -> str:
    """Every node with its target and arguments, sub-graphs included."""
    lines = [f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}" for node in gm.graph.nodes]
    for name, inner in gm.named_children():
        if isinstance(inner, GraphModule):
            lines.append(f"{name}: {nodes(inner)}")
    return "\n".join(lines)


@contextlib.contextmanager
def swapped(model: Any, spec_core: Callable) -> Any:
    """The model with another core in every global attention that it has under known names."""
    attentions = [block.attn for block in model.global_blocks]
    cores = [attention.core for attention in attentions]
    for attention in attentions:
        attention.core = spec_core
    try:
        yield model
    finally:
        for attention, core in zip(attentions, cores, strict=True):
            attention.core = core


def in_frames(frames: int, core: Callable) -> Callable:
    """The hand-written form of scope:frame around an attention core."""

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, width = q.shape

        def split(x: Tensor) -> Tensor:
            return x.reshape(batch, heads, frames, tokens // frames, width).transpose(1, 2).flatten(0, 1)

        out = core(split(q), split(k), split(v))
        return out.unflatten(0, (batch, frames)).transpose(1, 2).reshape(batch, heads, tokens, width)

    return inside
