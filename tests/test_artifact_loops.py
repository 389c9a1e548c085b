"""A loop over runs of frames in a library: one for every frame count, whichever torch writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vggt_compile
from vggt_compile.artifact.program import program
from vggt_compile.artifact.request import Span
from vggt_compile.families.frame_loop import over_frames
from vggt_compile.plan import Plan

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
MOST = 8


class Maps(nn.Module):
    """Two maps of each frame, made by runs of MOST frames or fewer, by two heads that are alike but for the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = ((3, 8), (8, 8)), ((3, 8), (8, 8), (8, 4))
        self.heads = nn.ModuleList(
            nn.Sequential(*(nn.Sequential(nn.Conv2d(*size, 3, padding=1), nn.ReLU(inplace=True)) for size in head))
            for head in sizes
        )

    def maps(self, images: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
        seen = head(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return seen.permute(0, 1, 3, 4, 2), images.mean((-1, -2))

    def all_maps(self, images: Tensor) -> list[Tensor]:
        """Without loops."""
        return [seen for head in self.heads for seen in self.maps(images, head)]

    def forward(self, images: Tensor) -> list[Tensor]:
        made: list[Tensor] = []
        frames, device = images.shape[1], images.device
        for head in self.heads:

            def run(rows: Tensor, head: nn.Module = head) -> Any:
                return self.maps(images.index_select(1, rows), head)

            made += over_frames(run, frames, MOST, device, equal=True)
        return made


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_graph_serves_less_than_a_run_and_many(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a kernel is tried out for a GPU, Inductor has it read frames of any number."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # some of a GPU's convolutions would round, not all
    model, path = Maps().eval().to(device), tmp_path / "model.pt2"
    images = torch.rand(1, 41, 3, 8, 10, device=device)
    made = vggt_compile.export(model, images, plan={}, frames=(3, 41), path=path, outline_heads=True)
    (entry,) = made.entries
    assert entry.span.frames == (3, 41)
    assert [one["count"] for one in entry.report["regions"] if one["name"] == "outline_blocks"] == [1]
    run = vggt_compile.load(path)
    for frames in (3, MOST, MOST + 1, 25, 41):
        given = images[:, :frames]
        with torch.no_grad():
            want = model.all_maps(given)
        for one, other in zip(run(given), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_two_scenes_are_one_program_for_every_count() -> None:
    """Published heads give maps with channels last: runs of several scenes in a row are a copy of these."""
    model, images = Maps().eval(), torch.rand(2, 41, 3, 8, 10)
    traced = program(model, Span((3, 41), (2, 2), (8, 10)), Plan.read({}), "fp32", images.device, strict=False)
    run = traced.graph
    with torch.no_grad():
        for frames in (3, MOST, 41):
            given = images[:, :frames]
            torch.testing.assert_close(list(run(given)), model.all_maps(given), rtol=1e-5, atol=1e-5)


def test_a_range_of_scenes_after_one_scene() -> None:
    """Dynamo would remember how many scenes a body had, and take them for a number."""
    model, images = Maps().eval(), torch.rand(2, 21, 3, 8, 10)
    for scenes in ((1, 1), (1, 2)):
        span = Span((3, 21), scenes, (8, 10))
        traced = program(model, span, Plan.read({}), "fp32", images.device, strict=False)
    with torch.no_grad():
        for frames in (3, MOST, 21):
            given = images[:, :frames]
            torch.testing.assert_close(list(traced.graph(given)), model.all_maps(given), rtol=1e-5, atol=1e-5)
