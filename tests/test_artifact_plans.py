"""What a compiler notes of sizes holds for every count that a library serves, whatever the plan puts into the graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alternating import build
from framed import SPEC, by_hand, scene
from harness import FRAME
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

import vggt_compile
from vggt_compile import recipes
from vggt_compile.artifact import assumed, request
from vggt_compile.artifact import build as building
from vggt_compile.artifact.library import Library
from vggt_compile.artifact.manifest import Entry
from vggt_compile.artifact.program import Program, program
from vggt_compile.artifact.request import Span
from vggt_compile.artifact.stages import Stages
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.errors import ExportFailed, WrongImages
from vggt_compile.plan import Plan
from vggt_compile.report import Report

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
MOST = 64
SPAN = Span((3, 40), (1, 2), (4, 6))


class Doubled(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images * 2


def exported(span: Span) -> tuple[GraphModule, Any]:
    """A program, and its symbol of frames: what is asked of that, its environment notes, as Inductor's lowerings do."""
    dims = {0: Dim("batch", min=1, max=4), 1: Dim("frames", min=span.frames[0], max=span.frames[1])}
    batch, frames = span.example()
    images = torch.zeros(batch, frames, 3, *span.size)
    made = torch.export.export(Doubled(), (images,), dynamic_shapes=(dims,)).module(check_guards=False)
    seen = next(node.meta["val"] for node in made.graph.nodes if node.op == "placeholder")
    return made, seen.shape[1]


def test_notes_that_are_true_of_all_counts_cut_nothing() -> None:
    made, frames = exported(SPAN)
    assert frames * 6 <= 64 * ((frames * 6 + 63) // 64)
    assert frames * 6 < 2**31 - 1
    assert assumed.runs(made, SPAN) == [(3, 40)]


def test_a_span_is_cut_where_a_note_is_true_no_more() -> None:
    made, frames = exported(SPAN)
    assert frames * 6 > 128  # as on the example
    assert assumed.runs(made, SPAN) == [(3, 21), (22, 40)]


def test_code_for_several_blocks_is_right_for_one() -> None:
    made, frames = exported(SPAN)
    blocks = (frames * 6 + 63) // 64
    assert blocks != 1
    assert blocks >= 2
    assert assumed.runs(made, SPAN) == [(3, 40)]


def test_rows_of_several_groups_are_more_than_those_of_one() -> None:
    made, frames = exported(SPAN)
    rows = 6 * ((frames + 7) // 8)
    assert rows > 6  # more than one group of frames, as Inductor asks where it views rows as one axis
    assert assumed.runs(made, SPAN) == [(3, 40)]
    assert rows > 18
    assert assumed.runs(made, SPAN) == [(3, 24), (25, 40)]


LONG = {"turbo": (1, 120), "spark3r-300": (2, 60)}
"""Recipes that choose frames by how many there are, and a scene longer than one step of the choice."""


@pytest.mark.parametrize("recipe", LONG)
def test_recipes_for_long_sequences_are_one_program_for_short_and_long(recipe: str) -> None:
    model, plan = build(replace(SPEC, pairs=2)), recipes.resolve(recipe)
    made = program(model, Span((3, 1024), (1, 2), (4, 6)), plan, "fp32", torch.device("cpu"), strict=True)
    assert not [node for node in made.graph.graph.nodes if "_assert_scalar" in str(node.target)]
    compiled = torch.compile(model, backend=vggt_sparse_eager, options={"plan": recipe}, dynamic=False)
    for batch, frames in ((1, 3), LONG[recipe]):
        x = scene(batch=batch, frames=frames)
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(made.graph(x), compiled(x), rtol=1e-4, atol=1e-5)


def test_what_is_true_of_single_counts_only_is_said() -> None:
    made, frames = exported(SPAN)
    assert frames % 4 == SPAN.example()[1] % 4
    with pytest.raises(ExportFailed, match="3-40 frames of 4×6: its code is right only where Eq"):
        assumed.runs(made, SPAN)


def test_what_is_true_of_the_example_alone_is_said() -> None:
    made, frames = exported(SPAN)
    assert frames == SPAN.example()[1]
    with pytest.raises(ExportFailed, match="3-40 frames of 4×6: its code is right only where frames is 37"):
        assumed.runs(made, SPAN)


def test_what_a_trace_has_noted_cuts_a_span_before_it_is_compiled() -> None:
    compiled: list[Any] = []

    def trace(span: Span) -> Program:
        graph, frames = exported(span)
        assert frames * 6 > 128 or span.frames[1] < 22  # asked, unless the range answers it
        return Program(span, graph, scene(), Report(plan="none"), Stages(span))

    def compile_one(made: Program, name: str, first: list[Library], meanwhile: object) -> Library:
        compiled.append(made.span.frames)
        return Library(Entry(name, made.span, (), {}), [], {}, not first)

    building._libraries([SPAN], trace, compile_one, None, lambda made, one, want: one, Plan())
    assert compiled == [(3, 21), (22, 40)]


def test_examples_are_large_and_no_other_size() -> None:
    assert Span((3, 500), (1, 1), (392, 518)).example() == (1, 61)
    assert Span((62, 500), (1, 2), (392, 518)).example() == (2, 62)
    assert Span((3, 40), (1, 1), (37, 31)).example() == (1, 29)
    assert all(all(n % d for d in range(2, n)) for n in request.GENERIC)


MERGED = {"tokens": recipes.resolve("fastvggt").to_json()["layers"]["0-"]["tokens"]}
BLOCKS = {"blocks": {"method": "predict", "keep": 0.2, "cdf": 0.4, "most": 1.0, "q_block": 16, "k_block": 16}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "few"),
    [
        ({"layers": {"0": MERGED, "1": BLOCKS}}, 0),
        ({"layers": {"*": BLOCKS}, "min_tokens": 110}, 10),  # 11 tokens a frame
    ],
    ids=["merged tokens and chosen blocks", "chosen blocks, few tokens dense"],
)
def test_one_file_is_right_at_more_frames_than_its_example_had_and_at_fewer(
    plan: dict[str, Any], few: int, tmp_path: Path
) -> None:
    """There are more groups or blocks then, or fewer; `min_tokens` costs a plan that chooses blocks no other graph."""
    model, path = build(replace(SPEC, pairs=len(plan["layers"]))), tmp_path / "model.pt2"
    made = vggt_compile.export(
        model, scene(), plan=plan, frames=(3, MOST), batch=(1, 2), path=path, strict=True, check=False
    )
    assert [entry.span.frames for entry in made.entries] == [(3, MOST)]
    run = vggt_compile.load(path)
    compiled = torch.compile(model, backend=vggt_sparse_eager, options={"plan": plan}, dynamic=False)
    for batch, frames in ((1, 3), (2, 8), (2, 9), (2, 10), (1, 17), (2, 40), (1, MOST)):
        x = scene(batch=batch, frames=frames)
        torch._dynamo.reset()
        with torch.no_grad():
            want, dense = compiled(x), model(x)
        torch.testing.assert_close(run(x), want, rtol=1e-4, atol=1e-5)
        assert torch.allclose(want, dense, rtol=1e-3, atol=1e-3) == (frames < few)


@pytest.mark.slow
def test_several_sizes_are_entries_of_one_file(tmp_path: Path) -> None:
    model, grids = build(replace(SPEC, pairs=1)), [(2, 3), (3, 2)]
    sizes = [(2 * rows, 2 * columns) for rows, columns in grids]
    path = tmp_path / "model.pt2"
    made = vggt_compile.export(model, scene(frames=4), plan=FRAME, frames=4, sizes=sizes, path=path, check=False)
    assert [entry.span.size for entry in made.entries] == sizes
    assert all(set(entry.own_constants).isdisjoint(model.state_dict()) for entry in made.entries[1:])
    run = vggt_compile.load(path)
    for grid in grids:
        x = scene(frames=4, grid=grid)
        torch.testing.assert_close(run(x), by_hand(model, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(WrongImages, match="for images of 4×6, 6×4, not 6×6"):
        run(scene(frames=4, grid=(3, 3)))
