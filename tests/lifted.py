"""A function under a plan that lifts spelled-out attention: what it gives, its graph after and before, the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Capture, nodes
from torch import Tensor, nn
from torch.fx import GraphModule

from vggt_compile.graph import dialect
from vggt_compile.plan import Plan
from vggt_compile.rewrite import rewrite

PLAN = {"layers": {"0": {"scope": "frame"}}}
"""Anything that is not dense: the models here have no layers."""


def assert_same(out: Any, want: Any) -> None:
    """Bit for bit, for one tensor or several."""
    out, want = (x if isinstance(x, tuple) else (x,) for x in (out, want))
    for got, expected in zip(out, want, strict=True):
        assert torch.equal(got, expected)


def dynamo(function: Callable, *inputs: Tensor, plan: object = None, dynamic: bool = False) -> Any:
    capture = Capture(plan=PLAN if plan is None else plan)
    with torch.no_grad():
        out = torch.compile(function, backend=capture, dynamic=dynamic)(*inputs)
    return out, capture.graphs[0], capture.report, capture.before[0]


def export(function: Callable, *inputs: Tensor, plan: object = None) -> Any:
    class Module(nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return function(*given)

    with torch.no_grad():
        gm = torch.export.export(Module(), inputs).module()
        before = nodes(gm)
        report = rewrite(gm, Plan.read(PLAN if plan is None else plan))
        return gm(*inputs), gm, report, before


TRACES = [dynamo, export]


def attentions(gm: GraphModule) -> int:
    return sum(dialect.attention_call(node) is not None for node in gm.graph.nodes)
