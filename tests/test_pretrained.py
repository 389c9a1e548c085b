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
DEPTH_ERROR = {"pi3-small": 0.1, "vggt-small": 0.12}
"""AbsRel that a model stays below, in textures that it has never seen."""


@pytest.fixture(scope="module", params=available())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def seen(name: str) -> tuple[dict[str, Tensor], Views]:
    """Outputs of a shipped model on two held-out scenes in held-out textures, eight frames on an orbit."""
    views = render(HELD_OUT_SEEDS[7:9], 8, textures=list(HELD_OUT_TEXTURES))
    with torch.inference_mode():
        return pretrained(name)(views.images), views


def test_some_come_with_the_package_and_are_small() -> None:
    assert "pi3-small" in available()
    weights = files("vggt_compile.models") / "weights"
    for name in available():
        assert len((weights / f"{name}.safetensors").read_bytes()) <= LARGEST
        assert sum(p.numel() for p in pretrained(name).parameters()) <= 8e6


def test_others_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no trained .vggt-1b. comes with the package, only .*'pi3-small'"):
        pretrained("vggt-1b")


def test_it_finds_cameras_and_depth(name: str, seen: tuple[dict[str, Tensor], Views]) -> None:
    outputs, views = seen
    ours = prediction(outputs, (224, 224))
    assert pose_metrics(ours.extrinsics, views.extrinsics, (30,))["AUC@30"] > 60
    assert depth_metrics(ours.depth, views.depth)["AbsRel"] < DEPTH_ERROR[name]


def test_a_prediction_is_one_world(name: str, seen: tuple[dict[str, Tensor], Views]) -> None:
    """A point of the map, seen by its own camera, lies at its own depth; VGGT's heads each say so for themselves."""
    ours = prediction(seen[0], (224, 224))
    rotation, translation = ours.extrinsics[..., :3], ours.extrinsics[..., 3]
    seen_by_own = torch.einsum("bsij,bshwj->bshwi", rotation, ours.points) + translation[:, :, None, None]
    error = ((seen_by_own[..., 2] - ours.depth) / ours.depth).abs()
    assert error.max() < 1e-3 if name == "pi3-small" else error.median() < 0.1
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
    for key in ("points", "world_points"):
        if key in outputs:
            assert scores({**outputs, key: outputs[key] * torch.nan}, *rendered_case(views)) is None


def test_outputs_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="no depth, pose_enc, world_points"):
        prediction({}, (224, 224))
