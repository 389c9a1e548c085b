"""Alignment and trajectory metrics agree with published libraries, and obey the laws of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metricutils import cameras, close, laws, noisy, randn, rotations, seeds, similarity
from torch import Tensor

from vggt_compile.metrics import (
    absolute_errors,
    align_cameras,
    pose_metrics,
    relative_errors,
    trajectory_metrics,
    umeyama,
)
from vggt_compile.metrics.cameras import centres


def test_umeyama_finds_the_similarity_and_agrees_with_evo() -> None:
    geometry = pytest.importorskip("evo.core.geometry", reason="evo is in an extra of its own, as it is heavy")
    source = randn(4, 20, 3, seed=9)
    target = source @ rotations(4, 1).mT * 2 + randn(4, 1, 3, seed=2) + 0.3 * randn(4, 20, 3, seed=3)
    for with_scale in (True, False):
        found = umeyama(source, target, with_scale)
        for row in range(4):
            r, t, c = geometry.umeyama_alignment(source[row].numpy().T, target[row].numpy().T, with_scale)
            assert np.allclose(found.rotation[row], r)
            assert np.allclose(found.translation[row], t)
            assert found.scale[row].item() == pytest.approx(c)


@laws
@given(seeds, st.integers(3, 10))
def test_umeyama_undoes_a_similarity(seed: int, count: int) -> None:
    source, moved = randn(count, 3, seed=seed), similarity(seed + 1)
    found = umeyama(source, moved.points(source))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, moved, strict=True))


@laws
@given(seeds, st.integers(1, 6))
def test_umeyama_is_a_rotation_even_for_mirrored_or_flat_or_few_points(seed: int, count: int) -> None:
    source = randn(count, 3, seed=seed)
    flat = source * torch.tensor([1.0, 1.0, 0.0])
    line = source * torch.tensor([1.0, 0.0, 0.0])
    for points in (source, flat, line):
        found = umeyama(points, -points @ rotations(1, seed)[0].mT)
        assert torch.linalg.det(found.rotation).item() == pytest.approx(1)
        assert torch.allclose(found.rotation @ found.rotation.mT, torch.eye(3, dtype=torch.float64))
        assert found.scale >= 0
    turned = umeyama(line, line @ rotations(1, seed)[0].mT * 3)
    assert torch.allclose(turned.points(line), line @ rotations(1, seed)[0].mT * 3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_at_one_place_tell_no_scale(dtype: torch.dtype) -> None:
    still, moving = randn(1, 3, seed=1).expand(5, 3).to(dtype) * 100, randn(5, 3, seed=2).to(dtype)
    assert umeyama(still, moving).scale == umeyama(moving, still).scale == 1
    assert umeyama(still, still).points(still).sub(still).abs().max() < 1e-9


def test_alignment_by_cameras_moves_the_cameras_onto_the_true_ones() -> None:
    true, moved = cameras(4, 1), similarity(2)
    predicted = moved.cameras(true)
    assert torch.allclose(align_cameras(predicted, true).cameras(predicted), true, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 5])
def test_cameras_on_a_line_align_no_world_but_have_a_trajectory(count: int, dtype: torch.dtype) -> None:
    rotation = rotations(count, 1)
    line = torch.arange(count)[:, None] * randn(3, seed=2) + randn(3, seed=3)
    true = torch.cat((rotation, -rotation @ line[..., None]), dim=-1).to(dtype)
    with pytest.raises(ValueError, match="on one line"):
        align_cameras(true, true)
    assert close(trajectory_metrics(similarity(4).cameras(true), true), {"ATE": 0, "RPE_trans": 0, "RPE_rot": 0}, 1e-4)


def test_cameras_at_one_place_keep_the_predicted_scale() -> None:
    rotation = rotations(5, 1)
    still = torch.cat((rotation, torch.zeros(5, 3, 1)), dim=-1)
    moving = torch.cat((rotation, -rotation @ randn(5, 3, 1, seed=2)), dim=-1)
    spread = centres(moving) - centres(moving).mean(0)
    assert trajectory_metrics(moving, still)["ATE"] == pytest.approx(spread.square().sum(-1).mean().sqrt().item())
    assert trajectory_metrics(still, still)["ATE"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_trajectory_metrics_are_evos(seed: int) -> None:
    trajectory = pytest.importorskip("evo.core.trajectory", reason="evo is in an extra of its own, as it is heavy")
    from evo.core import metrics

    true = cameras(12, seed)
    predicted = similarity(seed + 5).cameras(noisy(true, seed + 9))
    paths = []
    for extrinsics in (true, predicted):
        poses = torch.linalg.inv(torch.cat((extrinsics, torch.tensor([[[0.0, 0, 0, 1]]]).expand(12, 1, 4)), dim=-2))
        paths.append(trajectory.PosePath3D(poses_se3=list(poses.double().numpy())))
    paths[1].align(paths[0], correct_scale=True)
    part = metrics.PoseRelation
    expected = {}
    for name, metric in {
        "ATE": metrics.APE(part.translation_part),
        "RPE_trans": metrics.RPE(part.translation_part, 1, metrics.Unit.frames),
        "RPE_rot": metrics.RPE(part.rotation_angle_deg, 1, metrics.Unit.frames),
    }.items():
        metric.process_data(tuple(paths))
        expected[name] = float(metric.get_statistic(metrics.StatisticsType.rmse))
    assert close(trajectory_metrics(predicted, true), expected)


def test_trajectory_metrics_of_a_batch_are_the_mean_of_its_scenes() -> None:
    predicted, true = (torch.stack([cameras(5, seed + i) for i in range(3)]) for seed in (10, 20))
    alone = [trajectory_metrics(p, t) for p, t in zip(predicted, true, strict=True)]
    assert close(trajectory_metrics(predicted, true), {n: sum(each[n] for each in alone) / 3 for n in alone[0]})
    assert absolute_errors(predicted, true).shape == (3, 5)
    assert [error.shape for error in relative_errors(predicted, true)] == [(3, 4), (3, 4)]


@laws
@given(seeds, st.integers(2, 6))
def test_trajectory_metrics_of_equal_cameras_are_zero(seed: int, count: int) -> None:
    true = cameras(count, seed)
    assert max(trajectory_metrics(true, true).values()) < 1e-5


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        (torch.zeros(3, 3, 4), torch.zeros(4, 3, 4), "predicted extrinsics are"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), r"must be \[..., S, 3, 4\]"),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), "two or more"),
        (torch.zeros(0, 3, 3, 4), torch.zeros(0, 3, 3, 4), "no scene"),
        (torch.full((3, 3, 4), torch.nan), torch.zeros(3, 3, 4), "predicted extrinsics hold 36 values"),
        (torch.zeros(3, 3, 4), torch.full((3, 3, 4), torch.inf), "true extrinsics hold 36 values"),
        (torch.zeros(3, 3, 4, dtype=torch.int), torch.zeros(3, 3, 4), "floating point"),
    ],
)
@pytest.mark.parametrize("metric", [pose_metrics, trajectory_metrics, align_cameras])
def test_cameras_that_cannot_be_compared_are_an_error(metric, predicted: Tensor, true: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(predicted, true)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (torch.zeros(3, 3), torch.zeros(4, 3), "as many source as target"),
        (torch.zeros(3, 2), torch.zeros(3, 2), "as many source as target"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "as many source as target"),
        (torch.full((3, 3), torch.nan), torch.zeros(3, 3), "source points hold 9"),
    ],
)
def test_points_that_cannot_be_aligned_are_an_error(source: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        umeyama(source, target)
