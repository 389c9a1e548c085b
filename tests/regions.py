"""Small programs as graphs of either dialect, for tests of what lies around an attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from modelutils import randomized
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from vggt_compile.graph import dialect
from vggt_compile.graph.axes import sizes
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.enclosing import parts
from vggt_compile.graph.symbols import Symbols
from vggt_compile.models import pi3, vggt
from vggt_compile.models.presets import VGGT_PRESETS

DIALECTS = ("dynamo", "export")


def small(name: str, layers: int = 2) -> nn.Module:
    """A model of so many global layers, with one head where it may have one."""
    if name == "pi3":
        return randomized(pi3("tiny", depth=2 * layers, layer_scale=0.5))
    camera = replace(VGGT_PRESETS["tiny"].camera, steps=1)
    given = {"encoder": "conv", "outputs": ("camera",), "camera": camera, "layer_scale": 0.5}
    return randomized(vggt("tiny", depth=layers, **given))


class Program(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.parts)


def graph_of(program: nn.Module, *inputs: Tensor, dialect_name: str, dynamic: Any = None) -> GraphModule:
    """The graph of a program; with Dynamo its weights are inputs, so `run_again` runs it."""
    with torch.no_grad():
        if dialect_name == "export":
            return torch.export.export(program, inputs, dynamic_shapes=dynamic).module()
        graphs = []

        def keep(gm: GraphModule, given: Any) -> Callable[..., Any]:
            graphs.append(gm)
            gm.given = given
            return gm.forward

        torch.compile(program, backend=keep, fullgraph=True, dynamic=False)(*inputs)
    return graphs[0]


def run_again(gm: GraphModule, *inputs: Tensor) -> Any:
    gm.graph.lint()
    gm.recompile()
    with torch.no_grad():
        return gm(*gm.given) if hasattr(gm, "given") else gm(*inputs)


def editor(gm: GraphModule) -> Editor:
    return Editor(next(parts(gm)), Symbols(gm.graph))


def outputs(gm: GraphModule) -> tuple[Node, ...]:
    (given,) = gm.graph.output_node().args
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def told(gm: GraphModule, path: str) -> str:
    """What the module of a path does: one operation a line, with the shape of its value, views of weights left out."""
    lines = []
    for node in gm.graph.nodes:
        weights = all(x.op in ("placeholder", "get_attr") for x in node.all_input_nodes)
        inside = (dialect.module_path(node) or "").startswith(path)
        if node.op.startswith("call") and inside and not weights:
            lines.append(f"{dialect.operation(node).rpartition('.')[2]} {list(sizes(node))}")
    return "\n".join(lines)
