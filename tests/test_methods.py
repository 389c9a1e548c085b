"""A registered method takes part in a plan, and one that is wrong, refuses or fails leaves no trace in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import alternating
import pytest
import torch
from alternating import build
from framed import SPEC, by_hand, scene
from harness import Capture, nodes, raises_through_dynamo, run

from vggt_compile import registry
from vggt_compile.errors import RewriteBug
from vggt_compile.graph import dialect
from vggt_compile.site import Skip


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Register methods for one test."""
    registry.methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    return registry.method


def test_a_method_from_elsewhere_takes_part(register: Callable) -> None:
    calls = []

    @register("keys", "own_scale")
    def own_scale(site: Any, state: Any, edit: Any, *, factor: float = 1.0) -> Any:
        """Multiply the keys."""
        calls.append((site.path, list(state.axes)))
        k = edit.call(torch.mul, state.k, factor)
        return state.then("keys", {"method": "own_scale", "factor": factor}, lambda edit, out: out, k=k)

    policy = {"keys": {"method": "own_scale", "factor": 0.5}, "scope": "frame"}
    model, x = build(SPEC), scene()
    out = run(model, x, capture=(capture := Capture(plan={"layers": {"*": policy}})))
    assert calls == [(f"global_blocks.{i}.attn", ["scope"]) for i in range(2)]
    assert capture.report.global_rows[0].axes == {"scope": "frame", "keys": {"method": "own_scale", "factor": 0.5}}
    assert "own_scale(factor=0.5)" in str(capture.report)
    hand = by_hand(model, x, lambda q, k, v: alternating.sdpa(q, k * 0.5, v))
    assert torch.equal(out, hand)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda edit, out: edit.call(torch.Tensor.to, out, torch.float64), "float32 .* into torch.float64"),
        (lambda edit, out: edit.call(torch.narrow, out, 2, 0, 5), "shape"),
        (lambda edit, out: edit.call(torch.flatten, out, 0, 1), "shape"),
    ],
)
def test_a_wrong_pass_is_caught(register: Callable, change: Callable, what: str) -> None:
    @register("keys", "wrong")
    def wrong(site: Any, state: Any, edit: Any) -> Any:
        return state.then("keys", "wrong", change)

    capture = Capture(plan={"layers": {"*": {"keys": "wrong"}}})
    raises_through_dynamo(RewriteBug, f"global_blocks.0.attn changed .*{what}", build(SPEC), scene(), capture)


def test_what_a_refusing_pass_added_is_taken_back(register: Callable) -> None:
    @register("keys", "hesitant")
    def hesitant(site: Any, state: Any, edit: Any) -> Any:
        k = edit.call(torch.mul, state.k, 2.0)
        edit.call(torch.add, k, edit.reshape(k, *dialect.value(k).shape))
        return Skip("second thoughts")

    policy = {"scope": "frame", "keys": "hesitant"}
    capture = Capture(plan={"layers": {"*": policy}})
    run(build(SPEC), scene(), capture=capture)
    assert nodes(capture.graphs[0]) == capture.before[0]
    assert [row.reason for row in capture.report.global_rows] == ["second thoughts"] * 2
    assert [row.axes for row in capture.report.global_rows] == [{}, {}]


def test_what_a_failing_pass_added_is_taken_back(register: Callable) -> None:
    @register("keys", "failing")
    def failing(site: Any, state: Any, edit: Any) -> Any:
        edit.call(torch.mul, state.k, 2.0)
        raise LookupError("lost")

    seen: list[tuple[str, str]] = []

    def backend(gm: Any, _: Any) -> Any:
        capture, before = Capture(plan={"layers": {"*": {"scope": "frame", "keys": "failing"}}}), nodes(gm)
        with pytest.raises(LookupError):
            capture(gm, None)
        seen.append((before, nodes(gm)))
        return gm.forward

    with torch.no_grad():
        torch.compile(build(SPEC), backend=backend, dynamic=False)(scene())
    assert seen[0][0] == seen[0][1]


def test_a_failing_fake_leaves_no_node(register: Callable) -> None:
    @register("keys", "misfit")
    def misfit(site: Any, state: Any, edit: Any) -> Any:
        edit.call(torch.reshape, state.k, (1, 2, 3))
        return state

    seen = []

    def backend(gm: Any, _: Any) -> Any:
        before = nodes(gm)
        with pytest.raises(RuntimeError):
            Capture(plan={"layers": {"*": {"keys": "misfit"}}})(gm, None)
        seen.append(before == nodes(gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(build(SPEC), backend=backend, dynamic=False)(scene())
    assert seen == [True]
