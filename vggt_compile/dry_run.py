"""What a plan would do to a model, without running a kernel."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from vggt_compile.backend import Options, reported_rewrite
from vggt_compile.families import trace
from vggt_compile.graph.dialect import value
from vggt_compile.report import Report, collect_reports


def explain(
    model: nn.Module,
    *inputs: Any,
    plan: object = None,
    strict: bool = False,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Trace `model(*inputs, **kwargs)` and report what a plan does to each attention.

    The trace is the one that torch.compile makes, under the caller's autocast and grad mode. Graphs are rewritten but
    not compiled, and calling one gives zeros of the right shape, so none of the model's kernels runs.

    Args:
        model: on any device, in evaluation mode.
        inputs, kwargs: as for the model; only shapes, types and devices matter.
        plan: see `vggt_compile.recipes.resolve`.
        strict: raise NotRewritten where a layer that the plan names would not be rewritten.
        dynamic: as for torch.compile.

    Returns:
        One report; the graphs of a model that breaks are joined in it.
    """
    options = Options.read({"plan": plan, "strict": strict})

    def backend(gm: GraphModule, _: Any) -> Any:
        reported_rewrite(gm, options)
        return hollow(gm)

    trace.arm()
    with collect_reports() as reports:
        torch.compile(fresh_call(), backend=backend, dynamic=dynamic)(model, *inputs, **kwargs)
    return _join(reports, options)


def fresh_call() -> Any:
    """A function `(model, *inputs)` with code of its own: compiling it leaves the model's own caches alone."""

    def call(model: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
        return model(*inputs, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, call.__name__)


def hollow(gm: GraphModule) -> Any:
    """A function that takes the graph's inputs and returns zeros in the shape of its outputs."""
    output: Node = next(node for node in gm.graph.nodes if node.op == "output")
    outputs = tree_map(lambda x: _zeros(value(x)) if isinstance(x, Node) else x, output.args[0])
    return lambda *_: outputs


def _zeros(seen: Any) -> Any:
    def number(size: Any) -> Any:
        return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size

    if not isinstance(seen, torch.Tensor):
        return number(seen)
    return torch.zeros([number(s) for s in seen.shape], dtype=seen.dtype, device=seen.device)


def _join(reports: list[Report], options: Options) -> Report:
    joined = Report(plan=options.plan.name)
    for report in reports:
        joined.rows += report.rows
        joined.notes += report.notes
        joined.observed += report.observed
        joined.dynamic |= report.dynamic
        if report.family != "generic":
            joined.family = report.family
    return joined
