"""A model as a rewritten program: traced by torch.export, then rewritten by a plan, with fake values all the way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental import _config as symbolic

from vggt_compile.artifact import alike, bodies
from vggt_compile.artifact.request import Span
from vggt_compile.artifact.stages import Stages
from vggt_compile.artifact.stored import store_channels_last, store_rounded
from vggt_compile.errors import ExportFailed
from vggt_compile.families import trace
from vggt_compile.families.forms import dense_heads_see_at_most
from vggt_compile.graph import code
from vggt_compile.graph.casts import Unclear
from vggt_compile.graph.dialect import is_attention_like
from vggt_compile.graph.flatten import flatten
from vggt_compile.graph.plain import plain
from vggt_compile.graph.views import copy_what_cannot_be_viewed
from vggt_compile.plan import Plan
from vggt_compile.report import Report, publish
from vggt_compile.rewrite import rewrite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """A graph for all that one span asks for, and the images that it was traced with."""

    span: Span
    graph: GraphModule
    images: Tensor
    report: Report
    stages: Stages

    def for_some(self, span: Span) -> Program:
        """The same program, to serve some of its counts only."""
        return replace(self, span=span, stages=self.stages.continued(span))


def program(model: nn.Module, span: Span, plan: Plan, precision: str, device: torch.device, strict: bool) -> Program:
    """Trace and rewrite what serves one span. The model is as it was before."""
    batch, frames = span.example()
    images, at = torch.zeros(batch, frames, 3, *span.size, device=device), Stages(span)
    with ExitStack() as stack:
        stack.enter_context(trace.prepared(model))
        stack.enter_context(dense_heads_see_at_most(span.at_once))
        stack.enter_context(torch.no_grad())
        stack.enter_context(code.written_when_run())
        with at.stage("trace"), nullcontext() if precision == "fp32" else _under_autocast(model, device):
            stack.enter_context(alike.traced_once(model))
            stack.enter_context(bodies.traced_directly())
            traced = _export(model, images, span)
        with at.stage("take autocast apart"):
            gm = _in_one_graph(traced)
            plain(gm)
        with at.stage("rewrite"), _two_for_one():
            report = rewrite(gm, plan, strict=strict, guard=False)
        if precision == "bf16":
            store_rounded(gm)
        store_channels_last(gm)
    gm.recompile()
    publish(report)
    return Program(span, gm, images, report, at)


@contextmanager
def _under_autocast(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block calls of the model are under autocast: around the trace, tracing would not see it."""
    forward = model.forward

    def cast(images: Tensor) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(images)

    model.forward = cast
    try:
        yield
    finally:
        del model.forward


def _in_one_graph(exported: ExportedProgram) -> GraphModule:
    """The graph of a trace, with casts in the place of regions of autocast, which are graphs of their own."""
    gm = exported.module(check_guards=False)
    try:
        flatten(gm)
    except Unclear as error:
        log.info("the model is traced twice to write casts of autocast out: %s", error)
        return _decomposed(exported)
    return gm


def _decomposed(exported: ExportedProgram) -> GraphModule:
    """Casts in the place of regions as AOTAutograd traces them, which takes as long as an export.

    Attentions keep their module paths.
    """
    stacks = [node.meta.get("nn_module_stack") for node in _attentions(exported.graph_module)]
    flat = exported.run_decompositions({}).module(check_guards=False)
    for node, path in zip(_attentions(flat), stacks, strict=True):
        node.meta["nn_module_stack"] = path
    copy_what_cannot_be_viewed(flat)
    return flat


def _attentions(gm: GraphModule) -> list[Node]:
    """Nodes that a rewrite may anchor on, sub-graphs included, in the order in which they run."""
    found: list[Node] = []
    for node in gm.graph.nodes:
        inner = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(inner, GraphModule):
            found += _attentions(inner)
        elif is_attention_like(node):
            found.append(node)
    return found


def _export(model: nn.Module, images: Tensor, span: Span) -> ExportedProgram:
    """Counts of frames and batches are symbols.

    The tracer may have more of a batch than was asked for: with a range of one and two it would settle for two.
    """
    (fewest, most), (low, high) = span.batch, span.frames
    dims: dict[int, Any] = {0: Dim("batch", min=fewest, max=most + 2)} if fewest < most else {}
    dims |= {1: Dim("frames", min=low, max=high)} if low < high else {}
    try:
        with _two_for_one():
            return torch.export.export(model, (images,), dynamic_shapes=(dims,))
    except torch._dynamo.exc.UserError as error:
        raise ExportFailed(str(span), str(error)) from error


def _two_for_one() -> AbstractContextManager[Any]:
    """Within the block what holds for two of something is taken to hold for one."""
    patched: AbstractContextManager[Any] = symbolic.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched
