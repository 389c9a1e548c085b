"""An export compares compiled code with its program: wrong code is found, rounding is not, also where it grows."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from alternating import build
from framed import SPEC, scene
from harness import FRAME
from torch import Tensor, nn
from torch.fx import GraphModule, traceback

import vggt_compile
from vggt_compile.artifact import check, library
from vggt_compile.artifact.check import Expected, checked, off
from vggt_compile.artifact.library import Library
from vggt_compile.artifact.manifest import Entry
from vggt_compile.artifact.program import Program, program
from vggt_compile.artifact.request import Span
from vggt_compile.errors import ExportFailed, WrongCode
from vggt_compile.plan import Plan

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
CPU = torch.device("cpu")
SPAN = Span((4, 9), (1, 2), (4, 6))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"maps": [x.mean(2), x.amax(2)], "images": x}


class Chaos(nn.Module):
    """Doubles a difference at each step."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(30):
            x = 3.99 * x * (1 - x)
        return x


def judged(monkeypatch: pytest.MonkeyPatch, model: nn.Module, code: Callable[[Any], Any], precision: str) -> Any:
    """What is said of a library that gives `code` of its program's answer."""
    made = program(model.eval(), SPAN, Plan.read({}), precision, CPU, strict=False)
    monkeypatch.setattr(check, "opened", lambda library, device: made.graph)
    monkeypatch.setattr(check, "answer", lambda runner, images: code(runner)(images))
    stub = Library(Entry("model", SPAN, (), {}), ["model.so"], {}, holds_weights=True)
    with torch.no_grad():
        return checked(made, stub, Expected(made, precision, CPU), CPU)


def scaled(factor: float) -> Callable[[Any], Any]:
    """Code that is off by a factor in one of its outputs."""

    def code(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def answer(images: Tensor) -> Any:
            out = run(images)
            return out | {"maps": [out["maps"][0], out["maps"][1] * factor]}

        return answer

    return code


@pytest.mark.parametrize(("precision", "passes", "fails"), [("fp32", 1 + 1e-4, 1 + 1e-2), ("autocast", 1.02, 1.1)])
def test_an_output_may_be_off_by_rounding(
    monkeypatch: pytest.MonkeyPatch, precision: str, passes: float, fails: float
) -> None:
    seen = judged(monkeypatch, Mean(), scaled(passes), precision)
    assert (seen["batch"], seen["frames"]) == (1, 4)
    assert list(seen["outputs"]) == ["maps.0", "maps.1", "images"]
    deviations = [one["deviation"] for one in seen["outputs"].values()]
    assert deviations == [0.0, pytest.approx(passes - 1, rel=0.01), 0.0]
    with pytest.raises(WrongCode) as caught:
        judged(monkeypatch, Mean(), scaled(fails), precision)
    said = str(caught.value)
    assert "4-9 frames of 4×6" in said
    assert f"maps.1 {fails - 1:.2g} (at most" in said
    assert "maps.0" not in said
    assert "--no-check" in said


def test_what_is_expected_is_found_out_once_and_beside_other_work() -> None:
    made = program(Mean().eval(), SPAN, Plan.read({}), "fp32", CPU, strict=False)
    threads: list[int] = []
    made.graph.register_forward_pre_hook(lambda *_: threads.append(threading.get_ident()))
    want = Expected(made, "fp32", CPU)
    assert not threads
    want.begin()
    want.begin()
    outputs = want.result()
    assert outputs is want.result()
    assert torch.equal(outputs["maps.0"][0], want.images.mean(2))
    assert len(threads) == 1 + check.DRAWS
    assert {*threads}.isdisjoint({threading.get_ident()})


def test_what_fails_in_its_thread_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def code(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return run

    monkeypatch.setattr(check, "_rounded", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judged(monkeypatch, Mean(), code, "fp32")


BEGUN, OVER = threading.Event(), threading.Event()


@torch.library.custom_op("vggt_compile_tests::waits", mutates_args=())
def waits(x: Tensor) -> Tensor:
    """Runs until a compile is over."""
    BEGUN.set()
    assert OVER.wait(60)
    return x.clone()


@pytest.mark.slow
def test_an_operator_that_runs_when_a_compile_ends_does_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's export notes which operators ran in what Dynamo leaves alone, in one dictionary for all threads."""
    begin, outputs, compiled = Expected.begin, check._outputs, library._compiled
    for event in (BEGUN, OVER):
        event.clear()

    def begin_and_wait(want: Expected) -> None:
        begin(want)
        assert BEGUN.wait(60)

    def outputs_later(*given: Any) -> Any:
        waits(torch.zeros(1))
        return outputs(*given)

    def compiled_first(*given: Any) -> Any:
        try:
            return compiled(*given)
        finally:
            OVER.set()

    monkeypatch.setattr(Expected, "begin", begin_and_wait)
    monkeypatch.setattr(check, "_outputs", outputs_later)
    monkeypatch.setattr(library, "_compiled", compiled_first)
    made = vggt_compile.export(Mean().eval(), scene(frames=4), plan={}, frames=4, path=tmp_path / "model.pt2")
    assert made.entries[0].check["outputs"].keys() == {"maps.0", "maps.1", "images"}
    assert not traceback.current_meta


def test_where_rounding_grows_more_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_order(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda images: run(images * (1 + 2.0**-22))

    seen = judged(monkeypatch, Chaos(), other_order, "fp32")["outputs"]["output"]
    assert check.BOUND["fp32"] < seen["deviation"] <= seen["bound"]
    assert judged(monkeypatch, Mean(), other_order, "fp32")["outputs"]["maps.0"]["bound"] == check.BOUND["fp32"]


@pytest.mark.parametrize(
    ("got", "want", "far"),
    [
        (torch.ones(3), torch.ones(3), 0.0),
        (torch.full((4,), 1.5), torch.ones(4), 0.5),
        (torch.zeros(3), torch.zeros(3), 0.0),
        (torch.ones(3), torch.zeros(3), math.inf),
        (torch.ones(3), torch.ones(1, 3), math.inf),
        (torch.ones(3), torch.ones(3).bfloat16(), math.inf),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), 0.0),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0]), math.inf),
        (torch.tensor([1, 3]), torch.tensor([1, 0]), 3.0),
        (torch.tensor([True, False]), torch.tensor([True, True]), 0.5**0.5),
    ],
)
def test_how_far_an_output_is_off(got: Tensor, want: Tensor, far: float) -> None:
    assert off(got, want) == pytest.approx(far)


def wrong_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's code gives 101 % of what a graph means."""
    compile_right = torch._inductor.aot_compile

    def compile_wrong(gm: GraphModule, *rest: Any, **settings: Any) -> Any:
        output = gm.graph.output_node()
        (last,) = output.all_input_nodes
        with gm.graph.inserting_before(output):
            wrong = gm.graph.call_function(torch.ops.aten.mul.Tensor, (last, 1.01))
        output.replace_input_with(last, wrong)
        gm.recompile()
        return compile_right(gm, *rest, **settings)

    monkeypatch.setattr(torch._inductor, "aot_compile", compile_wrong)


@pytest.mark.slow
def test_a_wrong_compile_is_found_and_writes_nothing_unless_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_compiler(monkeypatch)
    path, x = tmp_path / "model.pt2", scene(frames=4)
    with pytest.raises(ExportFailed, match=r"code of 4 frames of 4×6 gives other numbers .* output 0\.01 \(at most"):
        vggt_compile.export(build(SPEC), x, plan=FRAME, frames=4, path=path)
    assert not path.exists()
    made = vggt_compile.export(build(SPEC), x, plan=FRAME, frames=4, path=path, check=False)
    assert [entry.check for entry in made.entries] == [{}]
    assert off(vggt_compile.load(path)(x), _right(x)) == pytest.approx(0.01, rel=0.01)


def _right(x: Tensor) -> Tensor:
    made: Program = program(build(SPEC), Span((4, 4), (1, 1), (4, 6)), Plan.read(FRAME), "fp32", CPU, strict=False)
    with torch.no_grad():
        return made.graph(x)
