"""A rotary embedding is one operation of Dynamo's trace, is written out for the passes, and keeps its bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from regions import editor
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

from vggt_compile.families.forms import rotary
from vggt_compile.graph import dialect
from vggt_compile.graph.rotary import expand_rotations
from vggt_compile.graph.symbols import form
from vggt_compile.ops.rotate import rotate

OURS = torch.ops.vggt_compile.rotate.default


def operands(dtype: torch.dtype = torch.float32, frames: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(frames, 3, 7, 16, generator=generator).to(dtype)
    return tokens, torch.randint(0, 40, (frames, 7, 2), generator=generator)


def attend(tokens: Tensor, positions: Tensor) -> Tensor:
    return rotary(tokens, positions, 100.0) + rotary(tokens * 2, positions, 100.0)


def traced(
    function: Callable, *inputs: Tensor, then: Callable[[GraphModule, Any], Any]
) -> tuple[Any, list[GraphModule]]:
    """What a function gives when compiled by `then`, and the graphs that it was handed."""
    seen: list[GraphModule] = []

    def backend(gm: GraphModule, given: Any) -> Any:
        seen.append(gm)
        return then(gm, given)

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)(*inputs), seen


def names(gm: GraphModule) -> list[str]:
    return [dialect.operation(node) for node in gm.graph.nodes if node.op.startswith("call_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [lambda gm, _: gm.forward, aot_eager])
@torch.no_grad()
def test_dynamo_sees_one_operation_for_each_call_of_the_same_bits(dtype: torch.dtype, backend: Callable) -> None:
    tokens, positions = operands(dtype)
    got, (gm,) = traced(attend, tokens, positions, then=backend)
    assert names(gm) == ["vggt_compile.rotate", "mul", "vggt_compile.rotate", "add"]
    assert torch.equal(got, rotate(tokens, positions, 100.0) + rotate(tokens * 2, positions, 100.0))


def before_and_written_out(function: Callable, *inputs: Tensor) -> tuple[GraphModule, Any]:
    def written_out(gm: GraphModule, _: Any) -> Any:
        expand_rotations(gm.graph, editor(gm))
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    got, (gm,) = traced(function, *inputs, then=written_out)
    return gm, got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_written_out_it_is_what_its_definition_traces_to(dtype: torch.dtype) -> None:
    tokens, positions = operands(dtype)
    gm, got = before_and_written_out(attend, tokens, positions)
    _, (plain,) = traced(lambda t, p: rotate(t, p, 100.0), tokens, positions, then=lambda gm, _: gm.forward)
    expected = [{"float": "to"}.get(name, name) for name in names(plain)]
    expected.remove("cat")  # the definition doubles its angles twice
    if dtype is torch.float32:  # a cast that changes nothing is not written
        expected.remove("to")
    found = names(gm)
    assert "vggt_compile.rotate" not in found
    assert sorted(found) == sorted([*expected * 2, "mul", "add"])
    assert torch.equal(got, attend(tokens, positions))


@torch.no_grad()
def test_it_is_written_out_for_any_number_of_frames() -> None:
    tokens, positions = operands(torch.bfloat16, frames=5)
    torch._dynamo.mark_dynamic(tokens, 0)
    torch._dynamo.mark_dynamic(positions, 0)
    gm, got = before_and_written_out(attend, tokens, positions)
    assert torch.equal(got, attend(tokens, positions))
    again = operands(torch.bfloat16, frames=3)
    assert torch.equal(gm(*_arguments(gm, *again))[0], attend(*again))


def _arguments(gm: GraphModule, tokens: Tensor, positions: Tensor) -> list[Any]:
    """In the order of the graph's inputs, the number of frames among them."""
    seen = (dialect.value(node) for node in gm.graph.nodes if node.op == "placeholder")
    return [len(tokens) if not isinstance(x, Tensor) else tokens if x.is_floating_point() else positions for x in seen]


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x.mT])
@torch.no_grad()
def test_its_fake_value_is_that_of_its_definition(view: Callable[[Tensor], Tensor]) -> None:
    tokens = view(torch.randn(4, 4, 16, 16))
    positions = torch.zeros(tokens.shape[0], tokens.shape[2], 2, dtype=torch.int64)
    _, (gm,) = traced(lambda t, p: rotary(t, p, 100.0), tokens, positions, then=lambda gm, _: gm.forward)
    (node,) = (node for node in gm.graph.nodes if node.target is OURS)
    want = rotate(tokens, positions, 100.0)
    assert form(dialect.value(node)) == form(want)
    torch.library.opcheck(OURS, (tokens, positions, 100.0), test_utils=("test_schema", "test_faketensor"))


def test_where_gradients_are_asked_for_it_stays_what_has_one() -> None:
    tokens, positions = operands()
    tokens.requires_grad_()
    got, (gm,) = traced(attend, tokens, positions, then=aot_eager)
    assert "vggt_compile.rotate" not in names(gm)
    (grad,) = torch.autograd.grad(got.square().sum(), tokens)
    (want,) = torch.autograd.grad(attend(tokens, positions).square().sum(), tokens)
    torch.testing.assert_close(grad, want)


@torch.no_grad()
def test_an_export_holds_operations_of_pytorch_only() -> None:
    class Model(torch.nn.Module):
        def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
            return attend(tokens, positions)

    program = torch.export.export(Model(), operands())
    assert not [node for node in program.graph.nodes if "vggt_compile" in str(node.target)]
    assert torch.equal(program.module()(*operands()), attend(*operands()))
