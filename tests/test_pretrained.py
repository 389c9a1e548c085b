"""The models that come with the package find cameras and depth in scenes that they were not trained on."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch
from torch import Tensor

from vggt_compile.bench.accuracy.cases import rendered_case
from vggt_compile.cli.geometry import placed, scores
from vggt_compile.metrics import depth_metrics, pose_metrics
from vggt_compile.metrics.align import camera_points
from vggt_compile.models import available, prediction, pretrained
from vggt_compile.scenes import HELD_OUT_SEEDS, HELD_OUT_TEXTURES, Views, render

LARGEST = 16 * 2**20


@pytest.fixture(scope="module", params=available())
def seen(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], Views]:
    """Outputs of a shipped model on two held-out scenes in held-out textures, eight frames on an orbit."""
    views = render(HELD_OUT_SEEDS[7:9], 8, textures=list(HELD_OUT_TEXTURES))
    with torch.inference_mode():
        return pretrained(request.param)(views.images), views


def test_some_come_with_the_package_and_are_small() -> None:
    assert "pi3-small" in available()
    weights = files("vggt_compile.models") / "weights"
    for name in available():
        assert len((weights / f"{name}.safetensors").read_bytes()) <= LARGEST
        assert sum(p.numel() for p in pretrained(name).parameters()) <= 8e6


def test_others_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no trained 'vggt-1b' comes with the package, only 'pi3-small'"):
        pretrained("vggt-1b")


def test_it_finds_cameras_and_depth(seen: tuple[dict[str, Tensor], Views]) -> None:
    outputs, views = seen
    ours = prediction(outputs, (224, 224))
    assert pose_metrics(ours.extrinsics, views.extrinsics, (30,))["AUC@30"] > 60
    assert depth_metrics(ours.depth, views.depth)["AbsRel"] < 0.1


def test_a_prediction_is_one_world(seen: tuple[dict[str, Tensor], Views]) -> None:
    """A point of the map, seen by its own camera, lies at its own pixel and depth."""
    ours = prediction(seen[0], (224, 224))
    rotation, translation = ours.extrinsics[..., :3], ours.extrinsics[..., 3]
    seen_by_own = torch.einsum("bsij,bshwj->bshwi", rotation, ours.points) + translation[:, :, None, None]
    assert (seen_by_own[..., 2] - ours.depth).abs().max() < 1e-4 * ours.depth.max()
    assert rotation.det().sub(1).abs().max() < 1e-4


def test_it_is_placed_in_the_true_world(seen: tuple[dict[str, Tensor], Views]) -> None:
    outputs, views = seen
    images, truth = rendered_case(views)
    found = placed(outputs, images, truth)
    size = views.world_points[0].flatten(0, 2).std(0).norm()
    assert found.points is not None
    assert (found.points - views.world_points[0]).norm(dim=-1).median() < 0.3 * size
    between = camera_points(found.extrinsics) - camera_points(truth.extrinsics)
    assert between.norm(dim=-1).max() < 0.5 * size
    score = scores(outputs, images, truth)
    assert score is not None
    assert score["AUC@30"] > 50


def test_outputs_that_are_not_finite_have_no_score(seen: tuple[dict[str, Tensor], Views]) -> None:
    outputs, views = seen
    assert scores({**outputs, "points": outputs["points"] * torch.nan}, *rendered_case(views)) is None


def test_outputs_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="no depth, pose_enc, world_points"):
        prediction({}, (224, 224))
