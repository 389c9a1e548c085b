"""Scopes and token layouts as found in graphs, against what is true of the models that were traced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alternating import Spec, Truth, build, images, truth
from harness import Capture, exported, run
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vggt_compile import registry
from vggt_compile.graph import dialect
from vggt_compile.graph.layout import find_sites
from vggt_compile.graph.symbols import Symbols
from vggt_compile.report import Report

NO_SHRINKING = (Phase.explicit, Phase.generate)
"""A trace takes most of a second, and the sizes are small as they are."""

GRIDS = st.one_of(
    st.sampled_from([(2, 2), (4, 4), (3, 5), (5, 3), (7, 2), (1, 6), (6, 1)]),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
)


def found(report: Report) -> list[Truth]:
    return [Truth(row.scope, row.layer, row.frames, row.per_frame, row.special) for row in report.rows]


def traced(spec: Spec, x: Tensor, dynamic: bool = False) -> Report:
    torch._dynamo.reset()
    capture = Capture()
    run(build(spec), x, capture=capture, dynamic=dynamic)
    return capture.report


@settings(max_examples=16, phases=NO_SHRINKING)
@given(
    names=st.sampled_from(["vggt", "pi3", "hidden"]),
    batch=st.integers(1, 3),
    frames=st.integers(2, 12),
    grid=GRIDS,
    special=st.integers(0, 17),
    encoder=st.one_of(st.none(), st.integers(0, 5)),
)
def test_layouts_of_static_traces(
    names: str, batch: int, frames: int, grid: tuple[int, int], special: int, encoder: int | None
) -> None:
    if special + grid[0] * grid[1] == 1:
        return  # one token a frame: no attention inside frames
    spec = Spec(names=names, pairs=1, special=special, encoder=encoder, head_dim=4)
    assert found(traced(spec, images(spec, batch, frames, grid))) == truth(spec, frames, grid)


@settings(max_examples=6, phases=NO_SHRINKING)
@given(
    names=st.sampled_from(["vggt", "pi3", "hidden"]),
    batch=st.integers(1, 3),
    frames=st.integers(2, 12),
    grid=st.sampled_from([(2, 2), (3, 5), (7, 2), (2, 9)]),
    special=st.integers(0, 17),
)
def test_layouts_of_dynamic_traces(names: str, batch: int, frames: int, grid: tuple[int, int], special: int) -> None:
    spec = Spec(names=names, pairs=1, special=special, head_dim=4)
    report = traced(spec, images(spec, batch, frames, grid), dynamic=True)
    assert report.dynamic
    assert found(report) == truth(spec, frames, grid)


@settings(max_examples=6, phases=NO_SHRINKING)
@given(
    names=st.sampled_from(["vggt", "pi3", "hidden"]),
    batch=st.integers(1, 3),
    frames=st.integers(2, 12),
    grid=GRIDS,
    special=st.integers(1, 17),
)
def test_layouts_of_exported_graphs(names: str, batch: int, frames: int, grid: tuple[int, int], special: int) -> None:
    spec = Spec(names=names, pairs=1, special=special, head_dim=4)
    _, report = exported(build(spec), images(spec, batch, frames, grid))
    assert found(report) == truth(spec, frames, grid)


@pytest.mark.parametrize("names", ["vggt", "hidden"])
def test_layouts_of_exported_graphs_with_symbolic_sizes(names: str) -> None:
    spec, auto = Spec(names=names, encoder=1), torch.export.Dim.AUTO
    x = images(spec, 2, 4, (3, 5))
    _, report = exported(build(spec), x, dynamic={0: auto, 1: auto, 3: auto, 4: auto})
    assert report.dynamic
    assert found(report) == truth(spec, 4, (3, 5))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("names", ["vggt", "pi3"])
def test_shapes_alone_tell_what_names_tell(names: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(names=names, pairs=3, encoder=5)
    x = images(spec, 2, 3, (2, 3))
    named = traced(spec, x, dynamic)
    monkeypatch.setattr(registry, "families", list)
    generic = traced(spec, x, dynamic)
    assert (named.family, generic.family) == (names, "generic")
    assert found(generic) == found(named)
    assert [row.flops_after for row in generic.rows] == [row.flops_after for row in named.rows]
    assert len(named.rewritten) == 3


def test_the_grid_is_found_by_both_dialects() -> None:
    spec = Spec(names="hidden", special=3)
    model, x = build(spec), images(spec, 2, 4, (3, 5))
    capture = Capture(plan="dense")
    run(model, x, capture=capture, dynamic=True)
    for gm in (capture.graphs[0], exported(model, x, {})[0]):
        calls = [call for node in gm.graph.nodes if (call := dialect.attention_call(node))]
        symbols = Symbols(gm.graph)
        sites = find_sites(gm, calls, registry.families(), symbols)
        layouts = [site.layout for site in sites if site.scope == "global"]
        assert len(layouts) == 2
        for layout in layouts:
            assert layout.special == 3
            assert [
                int(str(size)) if isinstance(size, int) else symbols.symint(size).node.hint for size in layout.grid
            ] == [3, 5]


@pytest.mark.parametrize("names", ["vggt", "pi3", "hidden"])
def test_one_frame_is_not_rewritten(names: str) -> None:
    spec = Spec(names=names)
    report = traced(spec, images(spec, 2, 1, (2, 3)))
    assert report.rewritten == []
    if names == "hidden":
        assert {row.scope for row in report.rows} == {"other"}
        return
    assert [row.layer for row in report.global_rows] == [0, 1]
    assert all("one frame only" in (row.reason or "") for row in report.global_rows)


@pytest.mark.parametrize("names", ["vggt", "hidden"])
@pytest.mark.parametrize("encoder", [1, 3, 17])
@pytest.mark.parametrize("dynamic", [False, True])
def test_blocks_of_registers_are_not_attention_over_frames(names: str, encoder: int, dynamic: bool) -> None:
    spec = Spec(names=names, pairs=3, special=17, encoder=encoder, registers_only=(0, 2))
    report = traced(spec, images(spec, 1, 3, (4, 4)), dynamic)
    assert found(report) == truth(spec, 3, (4, 4))
    assert [row.layer for row in report.rewritten] == ([0] if names == "hidden" else [1])


@pytest.mark.parametrize("frames", [2, 3, 6])
def test_registers_as_many_as_the_tokens_of_an_encoder(frames: int) -> None:
    """17 registers and an encoder of 1 + 16 tokens: [B, 17·F] looks like attention over the encoder's frames."""
    spec = Spec(names="hidden", pairs=4, special=17, encoder=1, registers_only=(1,))
    assert found(traced(spec, images(spec, 2, frames, (4, 4)))) == truth(spec, frames, (4, 4))


@settings(max_examples=6, phases=NO_SHRINKING)
@given(
    batch=st.integers(1, 2),
    frames=st.integers(2, 6),
    grid=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    special=st.integers(1, 17),
    encoder=st.integers(0, 5),
)
@example(batch=1, frames=4, grid=(2, 2), special=4, encoder=0)
def test_coincidences_of_sizes_do_not_mislead(
    batch: int, frames: int, grid: tuple[int, int], special: int, encoder: int
) -> None:
    spec = Spec(names="hidden", pairs=3, special=special, encoder=encoder, registers_only=(1,), head_dim=4)
    assert found(traced(spec, images(spec, batch, frames, grid))) == truth(spec, frames, grid)


def test_reused_weights_are_sites_of_their_own() -> None:
    for names in ("vggt", "hidden"):
        spec = Spec(names=names, pairs=3, reuse=True)
        report = traced(spec, images(spec, 1, 3, (2, 2)))
        assert found(report) == truth(spec, 3, (2, 2))
        assert len(report.rewritten) == 3


def test_a_name_is_a_claim_that_shapes_must_support() -> None:
    """global_blocks that see one frame each have nothing to lose, whatever they are called."""

    class Misnamed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.frame_blocks, self.global_blocks = model.frame_blocks, model.global_blocks

        def forward(self, x: Tensor) -> Tensor:
            for inner, outer in zip(self.frame_blocks, self.global_blocks, strict=True):
                x = outer(inner(x))
            return x

    capture = Capture()
    run(Misnamed(build(Spec())), torch.randn(6, 7, 16), capture=capture)
    assert capture.report.family == "vggt"
    assert capture.report.rewritten == []
    assert all("one frame only" in (row.reason or "") for row in capture.report.global_rows)


def test_a_trunk_without_attention_inside_frames_says_so() -> None:
    class Outer(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.global_blocks = model.global_blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.global_blocks:
                x = block(x)
            return x

    capture = Capture()
    run(Outer(build(Spec())), torch.randn(1, 42, 16), capture=capture)
    assert all("tokens of one frame are unknown" in (row.reason or "") for row in capture.report.rows)
    assert capture.report.rewritten == []


def test_a_family_gives_the_special_tokens_where_the_graph_has_no_images() -> None:
    class Trunk(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.aggregator = model

        def forward(self, x: Tensor) -> Tensor:
            batch, frames, tokens, width = x.shape
            for inner, outer in zip(self.aggregator.frame_blocks, self.aggregator.global_blocks, strict=True):
                x = inner(x.reshape(batch * frames, tokens, width))
                x = outer(x.reshape(batch, frames * tokens, width))
            return x

    capture = Capture()
    run(Trunk(build(Spec())), torch.randn(2, 3, 9, 16), capture=capture)
    assert [(r.frames, r.per_frame, r.special) for r in capture.report.global_rows] == [(3, 9, 5)] * 2


def test_heads_of_any_number_and_width_are_told() -> None:
    for heads, head_dim in ((1, 8), (3, 4), (5, 16)):
        spec = replace(Spec(), heads=heads, head_dim=head_dim)
        report = traced(spec, images(spec, 1, 2, (2, 2)))
        assert {(row.heads, row.head_dim, row.batch) for row in report.global_rows} == {(heads, head_dim, 1)}
