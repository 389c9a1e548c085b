"""One model traced once, and its graphs run under any number of plans.

Dynamo's own trace would take seconds for each plan, and hundreds are tried; a rewrite of its graphs takes a moment.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from vggt_compile import probes
from vggt_compile.dry_run import fresh_call, hollow
from vggt_compile.errors import BadInput
from vggt_compile.families import trace
from vggt_compile.handouts import handing_out
from vggt_compile.plan import Plan
from vggt_compile.report import Report
from vggt_compile.rewrite import rewrite

Graph = Callable[..., Any]


class Traced:
    """The graphs of a model on images of one shape; nothing is run."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.graphs = model, list[GraphModule]()
        trace.arm()
        self._call = torch.compile(fresh_call(), backend=self._keep, dynamic=False)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="vggt_compile:")
            self.first = self._call(model, images)
        if not self.graphs:
            raise BadInput(
                "no graph of this model was traced: Dynamo ran it without compiling; its warnings say why, and "
                "TORCH_LOGS=graph_breaks,recompiles says more"
            )

    def report(self, plan: Plan) -> Report:
        """What a plan does; the graphs of a model that breaks are joined in it."""
        joined = Report(plan=plan.name)
        for index in range(len(self.graphs)):
            found = self._rewritten(index, plan)[1]
            joined.rows += found.rows
            joined.notes += found.notes
            if found.family != "generic":
                joined.family = found.family
        return joined

    def _keep(self, gm: GraphModule, _: Any) -> Graph:
        self.graphs.append(gm)
        return hollow(gm)

    def _rewritten(self, index: int, plan: Plan) -> tuple[Graph, Report]:
        graph = duplicate(self.graphs[index])
        report = rewrite(graph, plan, probes=True)
        return handing_out(graph.forward, probes.receivers(report.observed)), report


class Runner(Traced):
    """The same, and the graphs run node by node. `first` are the dense outputs of the images that it was made with."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self._plan, self._made = Plan(), dict[int, tuple[Graph, Report]]()
        super().__init__(model, images)

    def __call__(self, plan: Plan, images: Tensor) -> Any:
        """The model's outputs under a plan."""
        self._choose(plan)
        with torch.no_grad():
            return self._call(self.model, images)

    def report(self, plan: Plan) -> Report:
        self._choose(plan)
        return super().report(plan)

    def _choose(self, plan: Plan) -> None:
        if plan != self._plan:
            self._plan, self._made = plan, {}

    def _keep(self, gm: GraphModule, _: Any) -> Graph:
        index = len(self.graphs)
        self.graphs.append(gm)
        return lambda *inputs: self._rewritten(index, self._plan)[0](*inputs)

    def _rewritten(self, index: int, plan: Plan) -> tuple[Graph, Report]:
        if index not in self._made:
            self._made[index] = super()._rewritten(index, plan)
        return self._made[index]


def duplicate(gm: GraphModule) -> GraphModule:
    """A graph module with nodes of its own, and those of sub-graphs too; parameters and buffers are shared."""
    made = GraphModule(gm, copy.deepcopy(gm.graph))
    for name, child in gm.named_children():
        if isinstance(child, GraphModule) and hasattr(made, name):
            setattr(made, name, duplicate(child))
    return made
