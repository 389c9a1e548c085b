"""Functions rebuilt from their source answer as the originals do, and what cannot be rebuilt is refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from vggt_compile.families.rebuild import rebuilt, shares_out_a_batch


def bound_once(flag: bool) -> list:
    if flag:
        x = 1
    return ["x" in locals(), "x" not in locals()]


def bound_in_loop(flag: bool) -> list:
    seen = []
    for i in range(3):
        seen.append("y" in locals())
        if i == 1:
            y = i
    return seen


def unbound_again(flag: bool) -> list:
    a = b = 1
    if flag:
        del a, b
    return ["a" in locals(), "b" in locals()]


def unbound_of_many(flag: bool) -> list:
    a, table = 1, {"k": 1}
    if flag:
        del a, table["k"]
    return ["a" in locals(), table]


def parameter(flag: bool, other: int = 3) -> list:
    if flag:
        del other
    return ["other" in locals(), "flag" in locals(), "unheard" in locals()]


def bound_by_with_and_for(flag: bool) -> list:
    for item in range(2 if flag else 0):
        assert item >= 0
    with torch.no_grad() as context:
        pass
    return ["item" in locals(), "context" in locals()]


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(
    "function", [bound_once, bound_in_loop, unbound_again, unbound_of_many, parameter, bound_by_with_and_for]
)
def test_rebuilt_functions_answer_alike(function: types.FunctionType, flag: bool) -> None:
    form = rebuilt(function)
    assert form is not None
    assert "locals" not in form.__code__.co_names
    assert form(flag) == function(flag)


def returns_locals(flag: bool) -> dict:
    return locals()


def asks_a_variable(name: str) -> bool:
    return name in locals()


def keeps_them(flag: bool) -> bool:
    scope = locals()
    return "flag" in scope


async def asynchronous(flag: bool) -> bool:
    return "flag" in locals()


@pytest.mark.parametrize("function", [returns_locals, asks_a_variable, keeps_them, asynchronous])
def test_other_uses_of_locals_are_refused(function: types.FunctionType) -> None:
    assert rebuilt(function) is None


def test_closures_and_functions_without_source_are_refused() -> None:
    captured = 3

    def closure(flag: bool) -> bool:
        return "captured" in locals() and captured == 3

    assert rebuilt(closure) is None
    scope: dict = {}
    exec("def no_source(flag):\n    return 'flag' in locals()", scope)
    assert rebuilt(scope["no_source"]) is None


class Holder:
    LIMIT = 7
    shared: list = []  # noqa: RUF012

    def method(self, x: int, limit: int = LIMIT, *, into: list = shared, scale: int = LIMIT + 1) -> Any:
        if x > limit:
            high = True
        into.append("high" in locals())
        return into, limit, scale

    def private(self, flag: bool) -> bool:
        return "flag" in locals() and self.__flag

    def dunder(self, flag: bool) -> Any:
        return "flag" in locals() and self.__class__


def test_defaults_are_those_of_the_original() -> None:
    form = rebuilt(Holder.method)
    assert form is not None
    for x in (3, 9):
        Holder.shared.clear()
        assert form(Holder(), x) == (Holder.shared, 7, 8)
        assert form(Holder(), x)[0] is Holder.shared
        assert Holder.shared == [x > 7, x > 7]


def test_private_names_are_refused() -> None:
    assert rebuilt(Holder.private) is None
    form = rebuilt(Holder.dunder)
    assert form is not None
    assert form(Holder(), True) is Holder


def dropping(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Stochastic depth as DINO's blocks have it: outside training the count is unused."""
    sample_subset_size = max(int(x.shape[0] * (1 - self.sample_drop_ratio)), 1)
    if self.training and self.sample_drop_ratio > 0.0:
        return x[:sample_subset_size]
    return x * 2


def module(forward: Any, training: bool) -> torch.nn.Module:
    made = type("Dropping", (torch.nn.Module,), {"forward": forward, "sample_drop_ratio": 0.5})()
    return made.train(training)


def test_a_share_of_a_batch_may_stay_a_symbol() -> None:
    assert shares_out_a_batch(dropping)
    assert not shares_out_a_batch(bound_once)
    form, x, shapes = rebuilt(dropping), torch.ones(5, 2), ({0: torch.export.Dim("batch", min=3, max=9)},)
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        torch.export.export(module(dropping, False), (x,), dynamic_shapes=shapes)
    program = torch.export.export(module(form, False), (x,), dynamic_shapes=shapes)
    assert torch.equal(program.module()(torch.ones(8, 2)), torch.full((8, 2), 2.0))
    assert torch.equal(module(form, True)(x), module(dropping, True)(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compile_breaks_no_graph_at_a_share_of_a_batch(dynamic: bool) -> None:
    """In torch 2.11 a symbolic form of plain numbers does."""
    counts = CompileCounter()
    compiled = torch.compile(module(rebuilt(dropping), False), backend=counts, fullgraph=True, dynamic=dynamic)
    for batch in (5, 8):
        assert torch.equal(compiled(torch.ones(batch, 2)), torch.full((batch, 2), 2.0))
    assert counts.frame_count == (1 if dynamic else 2)
