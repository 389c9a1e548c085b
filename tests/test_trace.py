"""Shims: traced forms give the same bits, eager calls and caches stay as they are, look-alikes are left alone."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import lookalikes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lookalikes import (
    AsksForLocals,
    Attributes,
    ColumnsFirst,
    FlatHead,
    Head,
    Positions,
    ScaledRotary,
    SwappedRotary,
    TableRotary,
    Talks,
    TalksToCuda,
    Trunk,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from vggt_compile import prepare, unprepare
from vggt_compile.families import forms, rotary, shims, trace
from vggt_compile.families.rebuild import rebuilt

CPU = torch.device("cpu")
CLASSES = {
    TableRotary: "forward",
    Positions: "__call__",
    Head: "forward",
    FlatHead: "forward",
    Attributes: "__setitem__",
    AsksForLocals: "forward",
    TalksToCuda: "forward",
}


@pytest.fixture(autouse=True)
def disarmed_afterwards() -> Iterator[None]:
    trace.arm()
    yield
    trace._prepared.clear()


def graphs(model: Callable, *inputs: Any, dynamic: bool = False) -> tuple[Any, int]:
    """The output of a trace that ran node by node, and the number of graphs."""
    seen = []

    def backend(gm: Any, _: Any) -> Any:
        seen.append(gm)
        return gm.forward

    with torch.no_grad():
        return torch.compile(model, backend=backend, dynamic=dynamic)(*inputs), len(seen)


def original(cls: type, method: str) -> Any:
    return vars(cls)[method].__wrapped__


@pytest.mark.parametrize(("cls", "method"), CLASSES.items())
def test_classes_are_recognised_by_structure(cls: type, method: str) -> None:
    assert (cls, method) in trace._armed
    assert vars(cls)[method] is not original(cls, method)
    assert vars(cls)[method].__doc__ == original(cls, method).__doc__


@settings(max_examples=40)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    base=st.sampled_from([10.0, 100.0, 1000.0]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.sampled_from([4, 8, 16, 64])),
    largest=st.integers(0, 80),
)
def test_rotary_form_gives_the_bits_of_the_table(
    dtype: torch.dtype, base: float, shape: tuple[int, ...], largest: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(shape, generator=generator).to(dtype)
    positions = torch.randint(0, largest + 1, (shape[0], shape[2], 2), generator=generator)
    assert torch.equal(forms.rotate(tokens, positions, base), TableRotary(base)(tokens, positions))


@given(batch=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 9))
def test_positions_form_gives_the_grid(batch: int, height: int, width: int) -> None:
    grid = forms.grid_positions(batch, height, width, CPU)
    want = Positions()(batch, height, width, CPU)
    assert torch.equal(grid, want)
    assert (grid.dtype, grid.stride()) == (want.dtype, want.stride())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trunk_is_one_graph_with_the_same_bits(dtype: torch.dtype, dynamic: bool) -> None:
    model, x = Trunk(TableRotary(50.0)).to(dtype), torch.randn(2, 15, 16).to(dtype)
    out, count = graphs(model, x, 3, 5, dynamic=dynamic)
    assert count == 1
    with torch.no_grad():
        assert torch.equal(out, model(x, 3, 5))


def test_without_the_shim_the_trunk_breaks() -> None:
    """What the shims are for, so that the other tests here cannot pass by accident."""
    model, x = Trunk(SwappedRotary()), torch.randn(2, 15, 16)
    out, count = graphs(model, x, 3, 5)
    assert count > 1
    with torch.no_grad():
        assert torch.equal(out, model(x, 3, 5))


def test_tracing_leaves_caches_alone() -> None:
    model, x = Trunk(), torch.randn(2, 15, 16)
    with torch.no_grad():
        want = model(x, 3, 5)
    tables, kept = dict(model.rotary.tables), dict(model.positions.kept)
    graphs(model, torch.randn(2, 28, 16), 4, 7)
    with torch.no_grad():
        torch.export.export(model, (torch.randn(2, 12, 16), 3, 4))
    assert model.rotary.tables == tables
    assert model.positions.kept.keys() == kept.keys()
    assert not any(isinstance(t, FakeTensor) for t in model.positions.kept.values())
    with torch.no_grad():
        assert torch.equal(model(x, 3, 5), want)
        assert model(torch.randn(2, 12, 16), 3, 4).isfinite().all()


def test_an_exported_trunk_gives_the_same_bits() -> None:
    model, x = Trunk(), torch.randn(2, 15, 16)
    with torch.no_grad():
        gm = torch.export.export(model, (x, 3, 5)).module()
        assert torch.equal(gm(x, 3, 5), model(x, 3, 5))


def test_keyword_calls_reach_the_traceable_form() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary, self.positions = TableRotary(), Positions()

        def forward(self, x: Tensor) -> Tensor:
            return self.rotary(positions=self.positions(2, width=5, height=3, device=x.device), tokens=x)

    model, x = Calls(), torch.randn(2, 2, 15, 8)
    out, count = graphs(model, x)
    assert count == 1
    assert torch.equal(out, model(x))


@pytest.mark.parametrize(
    ("cls", "says"), [(ScaledRotary, "computes something else"), (SwappedRotary, "something else")]
)
def test_a_look_alike_is_left_alone_with_a_warning(cls: type, says: str, caplog: pytest.LogCaptureFixture) -> None:
    before = vars(cls)["forward"]
    with caplog.at_level(logging.WARNING):
        assert list(shims.recognise(cls)) == [] or all(shim.owner is not cls for shim in shims.recognise(cls))
    assert says in caplog.text
    assert cls.__name__ in caplog.text
    assert vars(cls)["forward"] is before
    assert (cls, "forward") not in trace._armed


def test_positions_in_another_order_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert list(rotary.positions_shim(ColumnsFirst)) == []
    assert "keep its cache" in caplog.text
    assert (ColumnsFirst, "__call__") not in trace._armed


def test_arming_is_done_once() -> None:
    before = {key: vars(key[0])[key[1]] for key in trace._armed}
    assert trace.arm() == []
    assert {key: vars(key[0])[key[1]] for key in trace._armed} == before


def test_classes_of_torch_are_never_wrapped() -> None:
    assert not [owner for owner, _ in trace._armed if owner.__module__.startswith("torch.")]


def test_prepare_names_the_classes_and_unprepare_restores_them() -> None:
    model = Trunk()
    used = prepare(model)
    assert {shim.owner for shim in used} == {TableRotary, Positions}
    assert all(shim.what for shim in used)
    unprepare(model)
    assert "__wrapped__" not in vars(vars(TableRotary)["forward"])
    assert "__wrapped__" not in vars(vars(Positions)["__call__"])
    unprepare(model)
    assert {shim.owner for shim in prepare(model)} == {TableRotary, Positions}
    assert hasattr(vars(TableRotary)["forward"], "__wrapped__")


def test_two_prepared_models_share_their_classes() -> None:
    one, two = Trunk(), Trunk()
    prepare(one)
    prepare(two)
    unprepare(one)
    assert hasattr(vars(TableRotary)["forward"], "__wrapped__")
    unprepare(two)
    assert not hasattr(vars(TableRotary)["forward"], "__wrapped__")
    trace.arm()


def test_prepared_inside_a_block_all_is_as_before_behind_it() -> None:
    model = Trunk()
    unprepare(model)
    prepare(model)
    unprepare(model)
    for known in (False, True):
        if known:
            prepare(model)
        before = vars(TableRotary)["forward"]
        with trace.prepared(model) as used:
            assert {shim.owner for shim in used} == {TableRotary, Positions}
            assert hasattr(vars(TableRotary)["forward"], "__wrapped__")
        assert vars(TableRotary)["forward"] is before
        assert hasattr(before, "__wrapped__") == known == (model in trace._prepared)


def test_prepare_twice_and_forgotten_models() -> None:
    model = Trunk()
    assert prepare(model) == prepare(model)
    del model
    other = Trunk()
    prepare(other)
    unprepare(other)
    assert not hasattr(vars(TableRotary)["forward"], "__wrapped__")
    trace.arm()


def test_a_model_without_obstacles_needs_nothing() -> None:
    assert prepare(nn.Linear(2, 2)) == []


def test_subclasses_inherit_the_traceable_form() -> None:
    class Renamed(TableRotary):
        pass

    model, x = Trunk(Renamed()), torch.randn(2, 15, 16)
    out, count = graphs(model, x, 3, 5)
    assert count == 1
    with torch.no_grad():
        assert torch.equal(out, model(x, 3, 5))
    assert TableRotary in {shim.owner for shim in prepare(model)}


def test_armed_models_can_be_copied_and_pickled() -> None:
    model, x = Trunk(), torch.randn(2, 15, 16)
    prepare(model)
    with torch.no_grad():
        want = model(x, 3, 5)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(again) is Trunk
            assert torch.equal(again(x, 3, 5), want)


@pytest.mark.parametrize("frames", [1, 7, 8, 9, 23, 24, 25, 50])
def test_a_head_in_runs_gives_the_same_bits(frames: int) -> None:
    torch.manual_seed(0)
    head = Head()
    tokens, images = [torch.randn(1, frames, 6, 4)], torch.randn(1, frames, 3, 8, 8)
    out, count = graphs(head, tokens, images, 2)
    assert count == 1
    with torch.no_grad():
        eager = head(tokens, images, 2)
        exact = head.double()([t.double() for t in tokens], images.double(), 2)
    from numerics import assert_as_accurate

    assert_as_accurate(out, eager, exact)


def test_a_loop_is_given_the_layers_that_its_head_reads() -> None:
    """What it is given, a model has to keep for all of its frames; heads are handed every layer and read four."""
    seen = []

    def backend(gm: Any, _: Any) -> Any:
        seen.append(gm.graph)
        return gm.forward

    layers = [torch.randn(1, 30, 6, width) for width in (4, 5, 7)]
    with torch.no_grad():
        torch.compile(Head(), backend=backend)(layers, torch.randn(1, 30, 3, 8, 8), 2)
    (loop,) = [node for node in seen[0].nodes if node.op == "call_function" and str(node.target) == "scan"]
    given = [node.meta.get("example_value") for node in tree_leaves((loop.args, loop.kwargs)) if isinstance(node, Node)]
    widths = [x.shape[-1] for x in given if isinstance(x, Tensor) and x.ndim == 4]
    assert widths == [4]


def test_frame_counts_of_a_head_compile_at_most_twice() -> None:
    head, seen = Head(), []

    def backend(gm: Any, _: Any) -> Any:
        seen.append(gm)
        return gm.forward

    call = torch.compile(head, backend=backend, dynamic=True)
    with torch.no_grad():
        for frames in range(5, 40, 2):  # a first number that is also a width would be taken for it, and be static
            out = call([torch.randn(1, frames, 6, 4)], torch.randn(1, frames, 3, 8, 8), 2, frames_chunk_size=8)
            assert out.shape == (1, frames, 2, 8, 8)
    assert len(seen) <= 2


@pytest.mark.parametrize("frames", [1, 8, 9, 23, 24, 50])
def test_a_head_that_returns_a_dictionary_class_is_one_graph(frames: int) -> None:
    head, tokens = FlatHead(), torch.randn(2, frames, 8, 4, generator=torch.Generator().manual_seed(0))
    out, count = graphs(head, [(tokens,)], 2, 3, 2)
    assert count == 1
    with torch.no_grad():
        eager, exact = head([(tokens,)], 2, 3, 2), copy.deepcopy(head).double()([(tokens.double(),)], 2, 3, 2)
    assert type(out) is type(eager) is Attributes
    assert list(out) == list(eager) == ["depth", "confidence"]
    from numerics import assert_as_accurate

    for name in out:
        assert_as_accurate(out[name], eager[name], exact[name])


def test_frame_counts_of_a_flattened_head_compile_at_most_twice() -> None:
    head, seen = FlatHead(), []

    def backend(gm: Any, _: Any) -> Any:
        seen.append(gm)
        return gm.forward

    call = torch.compile(head, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for frames in range(9, 40, 2):
            assert call([(torch.randn(1, frames, 8, 4),)], 2, 3, 2).depth.shape == (1, frames, 2, 3)
    assert len(seen) <= 2


def test_a_dictionary_class_stays_as_strict_as_it_was() -> None:
    given = Attributes({"a": 1})
    object.__setattr__(given, "closed", True)
    with pytest.raises(KeyError):
        given.b = 2
    form = rebuilt(original(Attributes, "__setitem__"))
    assert form is not None
    with pytest.raises(KeyError):
        form(given, "b", 2)
    bare = Attributes.__new__(Attributes)
    with pytest.raises(AttributeError):
        form(bare, "b", 2)


def test_a_logger_that_prints_is_silent_while_tracing_only(capsys: pytest.CaptureFixture) -> None:
    model, x = Talks(), torch.ones(2)
    out, count = graphs(model, x)
    assert count == 1
    assert capsys.readouterr().out == ""
    lookalikes.LOG.said.clear()
    assert torch.equal(model(x), out)
    assert capsys.readouterr().out == "forward\n"
    assert lookalikes.LOG.said == ["forward"]


@pytest.mark.parametrize("double", [False, True])
def test_a_question_to_locals_is_answered_in_one_graph(double: bool) -> None:
    model, x = AsksForLocals(), torch.ones(2)
    out, count = graphs(model, x, double)
    assert count == 1
    assert torch.equal(out, original(AsksForLocals, "forward")(model, x, double))


@pytest.mark.parametrize("supported", [False, True])
def test_cuda_hints_and_capability_queries_are_not_in_the_traceable_form(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    form = rebuilt(original(TalksToCuda, "forward"))
    assert form is not None
    assert {"synchronize", "empty_cache", "is_bf16_supported"}.isdisjoint(form.__code__.co_names)
    out = form(TalksToCuda(), torch.ones(2))
    assert torch.equal(out, original(TalksToCuda, "forward")(TalksToCuda(), torch.ones(2)))
    assert out.dtype == (torch.bfloat16 if supported else torch.float16)


def test_a_model_that_talks_to_cuda_is_one_graph() -> None:
    out, count = graphs(TalksToCuda(), torch.ones(2))
    assert count == 1
    assert torch.equal(out, TalksToCuda()(torch.ones(2)))
