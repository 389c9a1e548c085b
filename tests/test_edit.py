"""An editor evaluates equal calls once: same operation, arguments and forms of operands, whatever layer it is for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from vggt_compile.graph.dialect import value
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.enclosing import parts
from vggt_compile.graph.symbols import Symbols


def test_equal_calls_share_what_they_give_and_others_do_not() -> None:
    found: list[Any] = []

    def model(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (x + 1) * (y + 1) * z.sum()

    def backend(gm: GraphModule, _: Any) -> Any:
        edit = Editor(next(parts(gm)), Symbols(gm.graph))
        x, y, z = (node for node in gm.graph.nodes if isinstance(value(node), Tensor) and node.op == "placeholder")
        with edit.before(gm.graph.output_node()):
            calls = [(torch.narrow, given, 1, 0, end) for given, end in ((x, 2), (y, 2), (z, 2), (x, 1))]
            found.extend(value(edit.call(*call)) for call in calls)
            edit.undo()
        return gm.forward

    torch._dynamo.reset()
    x, y, z = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4, dtype=torch.float64)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(y, 0)
    torch.compile(model, backend=backend, fullgraph=True)(x, y, z)
    of_x, of_y, of_z, shorter = found
    assert of_x is of_y
    assert [tuple(seen.shape)[1:] for seen in found] == [(2,), (2,), (2,), (1,)]
    assert (of_z.dtype, shorter.dtype) == (torch.float64, torch.float32)
