"""A loop over runs of frames in a library: one for every frame count, whichever torch writes it."""

from __future__ import annotations

from pathlib import Path

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
    """Two maps of each frame, made by runs of MOST frames or fewer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.second(self.first(images.flatten(0, 1)).relu()).unflatten(0, images.shape[:2])
        return seen.permute(0, 1, 3, 4, 2), images.mean((-1, -2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        frames, device = images.shape[1], images.device
        made = over_frames(lambda rows: self.maps(images.index_select(1, rows)), frames, MOST, device, equal=True)
        return made[0], made[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_graph_serves_less_than_a_run_and_many(device: str, tmp_path: Path) -> None:
    """While a kernel is tried out for a GPU, Inductor has it read frames of any number."""
    model, path = Maps().eval().to(device), tmp_path / "model.pt2"
    images = torch.rand(1, 41, 3, 8, 10, device=device)
    made = vggt_compile.export(model, images, plan={}, frames=(3, 41), path=path)
    assert [entry.span.frames for entry in made.entries] == [(3, 41)]
    run = vggt_compile.load(path)
    for frames in (3, MOST, MOST + 1, 25, 41):
        given = images[:, :frames]
        with torch.no_grad():
            want = model.maps(given)
        for one, other in zip(run(given), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_two_scenes_are_one_program_for_every_count() -> None:
    """Published heads give maps with channels last: runs of several scenes in a row are a copy of these."""
    model, images = Maps().eval(), torch.rand(2, 41, 3, 8, 10)
    traced = program(model, Span((3, 41), (2, 2), (8, 10)), Plan.read({}), "fp32", images.device, strict=False)
    run = traced.exported.module()
    with torch.no_grad():
        for frames in (3, MOST, 41):
            given = images[:, :frames]
            torch.testing.assert_close(tuple(run(given)), model.maps(given), rtol=1e-5, atol=1e-5)
