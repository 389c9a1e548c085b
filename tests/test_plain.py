"""An operation in place becomes the plain one where nobody can see a difference, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from vggt_compile.graph.dialect import in_place
from vggt_compile.graph.plain import plain


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, wide: Tensor) -> Any:
        return self.function(x, wide)


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Any], int]] = {
    "own memory": (lambda x, wide: (x + 1).mul_(x).relu_(), 0),
    "a number": (lambda x, wide: torch.arange(4.0).div_(3.0) ** 2, 0),
    "an input": (lambda x, wide: x.relu_() + 1, 1),
    "a view": (lambda x, wide: (x + 1)[:, 1:].relu_(), 1),
    "read before": (lambda x, wide: (y := x + 1, z := y * 2, y.relu_() + z)[2], 0),
    "read later": (lambda x, wide: (y := x + 1, z := y.relu_(), y.mul_(2) + z * y)[2], 0),
    "a view of it read later": (lambda x, wide: (y := x + 1, z := y[0], y.mul_(2), z)[3], 1),
    "a wider operand": (lambda x, wide: (x + 1).add_(wide), 1),
    "other strides": (lambda x, wide: (x + 1).mul_((x.mT * 2).contiguous().mT), 0),
}


def exported(function: Callable[[Tensor, Tensor], Any], *given: Tensor) -> GraphModule:
    gm = torch.export.export(Function(function), given).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


def traced(function: Callable[[Tensor, Tensor], Any], *given: Tensor) -> GraphModule:
    found: list[GraphModule] = []
    torch._dynamo.reset()
    torch.compile(function, backend=lambda gm, _: found.append(gm) or gm.forward, fullgraph=True)(*given)
    return found[0]


@pytest.mark.parametrize("trace", [exported, traced])
@pytest.mark.parametrize("name", CASES)
def test_only_what_nobody_sees_is_written_plainly(name: str, trace: Callable[..., GraphModule]) -> None:
    function, left = CASES[name]
    x, wide = torch.randn(3, 4, 4), torch.randn(3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        gm = trace(function, x.clone(), wide)
        plain(gm)
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        given = (x.clone(), wide)[: len(names)]
        got, want = gm(*given), function(x.clone(), wide)
    assert sum(in_place(node) for node in gm.graph.nodes if node.op.startswith("call")) == left
    for one, other in zip(*([out] if isinstance(out, Tensor) else list(out) for out in (got, want)), strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())


def test_what_autocast_casts_in_one_form_only_stays() -> None:
    gm = traced(lambda x, y: (x * 2).addmm_(x, y), torch.randn(4, 4), torch.randn(4, 4))
    plain(gm)
    assert sum(in_place(node) for node in gm.graph.nodes) == 1
