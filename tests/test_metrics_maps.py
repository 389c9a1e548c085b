"""Metrics of depth and of point clouds agree with published libraries, and obey the laws of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metricutils import cameras, close, laws, noisy, randn, seeds, similarity
from scipy.spatial import cKDTree
from torch import Tensor

from vggt_compile.metrics import (
    align_cameras,
    cloud,
    cloud_metrics,
    depth_metrics,
    nearest_distances,
    pose_metrics,
    trajectory_metrics,
    umeyama,
)


def depths(seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, truth, and a mask with a few pixels out; the truth has holes of 0 and NaN there."""
    true = 1 + randn(*shape, seed=seed).abs()
    predicted = true * (0.15 * randn(*shape, seed=seed + 1)).exp() * 0.3
    valid = randn(*shape, seed=seed + 2) > -1
    return predicted, torch.where(valid, true, torch.nan), valid


@pytest.mark.parametrize("align", ["median", "least_squares", "none"])
def test_depth_metrics_are_those_of_numpy(align) -> None:
    predicted, true, valid = depths(1, 3, 8, 9)
    p, t = predicted[valid].numpy(), true[valid].numpy()
    lower = (len(p) - 1) // 2
    p = p * {"median": np.sort(t)[lower] / np.sort(p)[lower], "least_squares": (p @ t) / (p @ p), "none": 1}[align]
    found = depth_metrics(predicted, true, valid, align)
    assert found["AbsRel"] == pytest.approx(np.mean(np.abs(p - t) / t))
    assert found["delta1.25"] == pytest.approx(100 * np.mean(np.maximum(p / t, t / p) < 1.25))
    assert depth_metrics(predicted, true, align=align) == found  # holes are found without a mask


def test_least_squares_scale_is_numpys() -> None:
    predicted, true, _ = depths(2, 2, 5, 5)
    true = true.nan_to_num(1.0)
    (scale,), *_ = np.linalg.lstsq(predicted.numpy().reshape(-1, 1), true.numpy().ravel(), rcond=None)
    aligned = depth_metrics(predicted * scale, true, align="none")
    assert close(depth_metrics(predicted, true, align="least_squares"), aligned)


def test_one_scale_for_all_frames_of_a_scene() -> None:
    true = torch.ones(2, 4, 4)
    flicker = true * torch.tensor([1.0, 2.0])[:, None, None]
    assert depth_metrics(flicker, true)["AbsRel"] == pytest.approx(0.5)
    scenes = torch.stack((flicker[:1], flicker[1:]))
    assert depth_metrics(scenes, torch.ones_like(scenes)) == {"AbsRel": 0.0, "delta1.25": 100.0}


def test_negative_depth_is_not_near_anything() -> None:
    predicted, true = torch.tensor([1.0, 1, 1, -1, 0]).view(1, 1, 5), torch.ones(1, 1, 5)
    assert depth_metrics(predicted, true)["delta1.25"] == pytest.approx(60)


@laws
@given(seeds, st.floats(0.01, 100), st.sampled_from(["median", "least_squares"]))
def test_depth_metrics_do_not_see_the_scale_of_the_prediction(seed: int, scale: float, align) -> None:
    predicted, true, valid = depths(seed, 2, 2, 4, 4)
    found = depth_metrics(predicted, true, valid, align)
    assert close(depth_metrics(predicted * scale, true, valid, align), found)
    assert 0 <= found["delta1.25"] <= 100
    truth = true.nan_to_num(1.0)
    assert close(depth_metrics(truth * scale, true, valid, align), {"AbsRel": 0.0, "delta1.25": 100.0})


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 4, 3), "of one shape"),
        (torch.ones(3, 4), torch.ones(3, 4), "of one shape"),
        (torch.ones(2, 3, 4), torch.zeros(2, 3, 4), "no pixel with a valid true depth"),
        (torch.full((2, 3, 4), torch.nan), torch.ones(2, 3, 4), "predicted depth maps hold 24"),
        (-torch.ones(2, 3, 4), torch.ones(2, 3, 4), "no positive scale"),
    ],
)
def test_depth_that_cannot_be_compared_is_an_error(predicted: Tensor, true: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depth_metrics(predicted, true)
    with pytest.raises(ValueError, match="least_squares or none"):
        depth_metrics(torch.ones(2, 3, 4), torch.ones(2, 3, 4), align="mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [2**10, 2**14, 2**22])
def test_cloud_metrics_are_those_of_a_tree(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cloud.TILE, "cpu", tile)
    predicted, true = randn(1500, 3, seed=1) + 100, randn(70, 3, seed=2) + 100
    there = cKDTree(true.numpy()).query(predicted.numpy())[0]
    back = cKDTree(predicted.numpy()).query(true.numpy())[0]
    assert np.allclose(nearest_distances(predicted, true), there, atol=1e-12)
    for clip in (None, 0.4):
        first, second = (np.minimum(d, clip or np.inf).mean() for d in (there, back))
        expected = {"accuracy": first, "completeness": second, "chamfer": first + second}
        assert close(cloud_metrics(predicted, true, clip=clip), expected)


def test_large_clouds_are_thinned_the_same_way_for_the_same_seed() -> None:
    predicted, true = randn(300, 3, seed=1), randn(200, 3, seed=2)
    found = cloud_metrics(predicted, true, limit=50)
    assert found == cloud_metrics(predicted, true, limit=50)
    assert found != cloud_metrics(predicted, true, limit=50, seed=1)
    assert found["chamfer"] > cloud_metrics(predicted, true)["chamfer"]
    assert cloud_metrics(predicted, true, limit=300) == cloud_metrics(predicted, true, limit=None)


@laws
@given(seeds)
def test_cloud_metrics_are_zero_for_equal_clouds_and_symmetric(seed: int) -> None:
    predicted, true = randn(40, 3, seed=seed), randn(30, 3, seed=seed + 1)
    assert set(cloud_metrics(true, true).values()) == {0.0}
    there, back = cloud_metrics(predicted, true), cloud_metrics(true, predicted)
    swapped = {"accuracy": back["completeness"], "completeness": back["accuracy"], "chamfer": back["chamfer"]}
    assert close(there, swapped)


@laws
@given(seeds)
def test_cloud_metrics_after_alignment_do_not_see_a_similarity(seed: int) -> None:
    true, moved = randn(30, 3, seed=seed), similarity(seed + 1)
    predicted = true + 0.1 * randn(30, 3, seed=seed + 2)
    found = cloud_metrics(predicted, true, umeyama(predicted, true))
    points = moved.points(predicted)
    assert close(cloud_metrics(points, true, umeyama(points, true)), found)
    poses = cameras(4, seed)
    aligned = cloud_metrics(points, true, align_cameras(moved.cameras(poses), poses))
    assert close(aligned, cloud_metrics(predicted, true), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predicted": torch.zeros(0, 3)}, r"predicted points must be \[N, 3\]"),
        ({"true": torch.zeros(4, 2)}, r"true points must be \[N, 3\]"),
        ({"true": torch.full((4, 3), torch.nan)}, "true points hold 12"),
        ({"clip": 0.0}, "must be positive"),
        ({"limit": 0}, "must be positive"),
        ({"alignment": umeyama(torch.eye(3).expand(2, 3, 3), torch.eye(3).expand(2, 3, 3))}, "one alignment"),
    ],
)
def test_clouds_that_cannot_be_compared_are_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cloud_metrics(**({"predicted": torch.zeros(4, 3), "true": torch.zeros(4, 3)} | options))


@pytest.mark.gpu
def test_the_device_does_not_matter() -> None:
    true = torch.stack([cameras(6, seed) for seed in range(3)]).float()
    predicted = torch.stack([noisy(each, 5).float() for each in true.double()])
    for metric in (pose_metrics, trajectory_metrics):
        assert close(metric(predicted.cuda(), true.cuda()), metric(predicted, true), 1e-4)
    ours, theirs, valid = depths(1, 2, 3, 8, 9)
    assert close(depth_metrics(ours.cuda(), theirs.cuda(), valid.cuda()), depth_metrics(ours, theirs, valid))
    a, b = randn(3000, 3, seed=1), randn(3000, 3, seed=2)
    moved = cloud_metrics(a.cuda(), b.cuda(), umeyama(a.cuda(), b.cuda()), limit=1000)
    assert close(moved, cloud_metrics(a, b, umeyama(a, b), limit=1000))
