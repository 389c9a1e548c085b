"""An axis that is followed through an operation is one along which it treats each place alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from regions import DIALECTS, Program, graph_of, outputs
from torch import Tensor

from vggt_compile.graph import dialect
from vggt_compile.graph.axes import onward, origins, sizes

SHAPE = (2, 6, 10)
WEIGHT = torch.arange(40.0).reshape(4, 10).cos()
ALIKE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "operator": (lambda x: x * 2 + 1, 3),
    "method": (lambda x: x.sub(1).div(3), 3),
    "function": (lambda x: torch.cos(x), 3),
    "gelu": (lambda x: F.gelu(x), 3),
    "cast": (lambda x: x.to(torch.float64), 3),
    "float": (lambda x: x.double().float(), 3),
    "dropout": (lambda x: F.dropout(x, 0.5, False), 3),
    "broadcast": (lambda x: x * WEIGHT[0].sum() + WEIGHT[:1], 2),
    "mask": (lambda x: torch.where(x > 0, x, -x), 3),
    "linear": (lambda x: F.linear(x, WEIGHT), 2),
    "layer norm": (lambda x: F.layer_norm(x, (10,)), 2),
    "rms norm": (lambda x: F.rms_norm(x, (10,)), 2),
    "reshape": (lambda x: x.reshape(2, 6, 5, 2), 2),
    "view": (lambda x: x.view(2, 3, 2, 10), 2),
    "merge": (lambda x: x.reshape(12, 10), 1),
    "flatten": (lambda x: x.flatten(1), 1),
    "unflatten": (lambda x: x.unflatten(-1, (2, 5)), 2),
    "unsqueeze": (lambda x: x.unsqueeze(1), 3),
    "permute": (lambda x: x.permute(2, 0, 1), 3),
    "transpose": (lambda x: x.transpose(-1, 1), 3),
    "select": (lambda x: x.select(1, 2), 2),
    "unbind": (lambda x: x.unbind(1)[3], 2),
    "chunk": (lambda x: x.chunk(2, -1)[1], 2),
    "split": (lambda x: x.split(5, -1)[0], 2),
    "narrow": (lambda x: x.narrow(1, 2, 3), 2),
    "index": (lambda x: x[:, 1], 2),
    "slice": (lambda x: x[..., :4], 2),
    "new axis": (lambda x: x[:, None, :, 2:], 2),
    "stack": (lambda x: torch.stack((x, -x), 1), 3),
    "cat": (lambda x: torch.cat((x, -x), -1), 2),
}
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1),
    "sum": lambda x: x.sum(1, keepdim=True).expand(2, 6, 10),
    "running sum": lambda x: x.cumsum(1),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "maximum along": lambda x: x.cummax(1)[0],
    "norm over tokens": lambda x: F.layer_norm(x, (6, 10)),
    "strided": lambda x: x[:, ::2],
    "chance": lambda x: F.dropout(x, 0.5, True),
    "in place": lambda x: (x + 0).mul_(2),
    "cut through": lambda x: x.reshape(2, 3, 20),
    "sorted": lambda x: x.sort(1)[0],
}


def chain(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """From the input on; weights aside, each program has one value going through."""
    return [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]


def followed(node: torch.fx.Node, axis: int) -> int | None:
    """The axis of the program's input that this one is on all ways to it, None where it is lost."""
    if node.op == "placeholder":
        return axis if sizes(node) == SHAPE else None
    steps = [(x, at) for x, at in (origins(node, axis) or {}).items() if at is not None]
    found = {followed(x, at) for x, at in steps}
    return found.pop() if len(found) == 1 else None


@pytest.mark.parametrize("dialect_name", DIALECTS)
@pytest.mark.parametrize("name", ALIKE)
def test_a_followed_axis_may_be_reordered_before_or_after(name: str, dialect_name: str) -> None:
    function, count = ALIKE[name]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    gm = graph_of(Program(function), x, dialect_name=dialect_name)
    y, met = function(x), 0
    for axis in range(y.ndim):
        at = followed(outputs(gm)[0], axis)
        if at is not None:
            torch.testing.assert_close(function(x.flip(at)), y.flip(axis))
            met += 1
    assert met == count


@pytest.mark.parametrize("dialect_name", DIALECTS)
@pytest.mark.parametrize("name", MIXED)
def test_tokens_are_not_followed_through_what_mixes_them(name: str, dialect_name: str) -> None:
    gm = graph_of(Program(MIXED[name]), torch.randn(SHAPE), dialect_name=dialect_name)
    out = outputs(gm)[0]
    assert all(followed(out, axis) != 1 for axis in range(len(sizes(out))))


@pytest.mark.parametrize("dialect_name", DIALECTS)
def test_forward_is_the_other_way_round(dialect_name: str) -> None:
    program = Program(lambda x: x.reshape(2, 6, 5, 2).transpose(1, 2))
    gm = graph_of(program, torch.randn(SHAPE), dialect_name=dialect_name)
    (source,) = [node for node in gm.graph.nodes if node.op == "placeholder"]
    first, second = chain(gm)
    assert [onward(first, source, axis) for axis in range(3)] == [0, 1, None]
    assert [onward(second, first, axis) for axis in range(4)] == [0, 2, 1, 3]


def test_a_sum_of_two_carriers_is_not_gone_through_forward() -> None:
    gm = graph_of(Program(lambda x: x + x.cos()), torch.randn(SHAPE), dialect_name="dynamo")
    cosine, total = chain(gm)
    assert dialect.operation(total) == "add"
    assert origins(total, 1) is not None
    assert onward(total, cosine, 1) is None
