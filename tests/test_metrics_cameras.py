"""Metrics of cameras agree with published libraries on random input, and obey the laws of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metricutils import cameras, close, frames, laws, noisy, randn, rotations, seeds, similarity
from scipy.spatial.transform import Rotation

from vggt_compile.metrics import (
    PoseErrors,
    accuracy,
    auc,
    pose_metrics,
    relative_pose_errors,
    trajectory_metrics,
)
from vggt_compile.metrics.cameras import rotation_angle


def test_rotation_angle_is_scipys() -> None:
    a, b = rotations(500, 1), rotations(500, 2)
    expected = (Rotation.from_matrix(a.numpy()).inv() * Rotation.from_matrix(b.numpy())).magnitude()
    assert np.allclose(rotation_angle(a, b).numpy(), np.degrees(expected), atol=1e-9)


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 1e-3, 90.0, 179.999999, 180.0])
def test_rotation_angle_keeps_its_digits_at_both_ends(degrees: float) -> None:
    axis = np.array([2.0, -1.0, 2.0]) / 3
    turn = torch.from_numpy(Rotation.from_rotvec(axis * degrees, degrees=True).as_matrix())
    assert abs(rotation_angle(torch.eye(3, dtype=torch.float64), turn).item() - degrees) < 1e-9


def test_pose_errors_are_those_of_a_loop_over_pairs() -> None:
    predicted, true = cameras(6, 3), cameras(6, 4)
    errors = relative_pose_errors(predicted, true)
    bottom = np.array([[0.0, 0.0, 0.0, 1.0]])
    ours, theirs = ([np.concatenate((e, bottom)) for e in each.numpy()] for each in (predicted, true))
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    for (i, j), rotation, translation in zip(pairs, *errors, strict=True):
        a, b = (each[i] @ np.linalg.inv(each[j]) for each in (ours, theirs))
        turn = np.degrees(Rotation.from_matrix(a[:3, :3].T @ b[:3, :3]).magnitude())
        cosine = a[:3, 3] @ b[:3, 3] / np.linalg.norm(a[:3, 3]) / np.linalg.norm(b[:3, 3])
        angle = np.degrees(np.arccos(cosine))
        assert rotation.item() == pytest.approx(turn, abs=1e-9)
        assert translation.item() == pytest.approx(min(angle, 180 - angle), abs=1e-6)


@pytest.mark.parametrize("threshold", [1, 3, 30, 180])
def test_auc_is_that_of_a_histogram(threshold: int) -> None:
    """The evaluation of VGGT, as a loop: np.histogram with bins of one degree, mean of the cumulative shares."""
    errors = PoseErrors(40 * randn(200, seed=5).abs(), 20 * randn(200, seed=6).abs())
    worst = np.maximum(*(error.numpy() for error in errors))
    histogram, _ = np.histogram(worst, bins=np.arange(threshold + 1))
    assert auc(errors, threshold).item() == pytest.approx(100 * np.mean(np.cumsum(histogram / len(worst))), abs=1e-9)


def test_accuracy_is_the_percentage_below_the_threshold() -> None:
    assert accuracy(torch.tensor([0.0, 4.9, 5.0, 90.0]), 5).item() == 50


def test_pose_metrics_of_a_batch_are_the_mean_of_its_scenes() -> None:
    predicted, true = (torch.stack([cameras(5, seed + i) for i in range(3)]) for seed in (10, 20))
    alone = [pose_metrics(p, t) for p, t in zip(predicted, true, strict=True)]
    mean = {name: sum(each[name] for each in alone) / 3 for name in alone[0]}
    assert close(pose_metrics(predicted, true), mean)
    assert set(mean) == {f"{name}@{k}" for name in ("RRA", "RTA", "AUC") for k in (30, 15, 5, 3)}


def test_direction_of_a_pair_without_a_baseline() -> None:
    moving = cameras(3, 7)
    still = torch.cat((moving[:, :, :3], -moving[:, :, :3] @ randn(3, 1, seed=8)), dim=-1)
    assert relative_pose_errors(still.float(), still.float()).translation.max() == 0
    assert (relative_pose_errors(still.float(), moving.float()).translation == 90).all()
    assert (relative_pose_errors(moving, still).translation == 90).all()
    assert (relative_pose_errors(moving, still).rotation < 1e-9).all()


@laws
@given(seeds, frames)
def test_pose_errors_of_equal_cameras_are_zero(seed: int, count: int) -> None:
    true = cameras(count, seed)
    for errors in (relative_pose_errors(true, true), relative_pose_errors(true.float(), true.float())):
        assert errors.translation.max() < 1e-12
        assert errors.rotation.max() < 1e-5
    assert set(pose_metrics(true, true).values()) == {100.0}


@laws
@given(seeds, frames)
def test_pose_errors_are_symmetric_and_bounded(seed: int, count: int) -> None:
    predicted, true = cameras(count, seed), cameras(count, seed + 1)
    there, back = relative_pose_errors(predicted, true), relative_pose_errors(true, predicted)
    assert all(torch.allclose(a, b) for a, b in zip(there, back, strict=True))
    assert 0 <= there.rotation.min() <= there.rotation.max() <= 180
    assert 0 <= there.translation.min() <= there.translation.max() <= 90


@laws
@given(seeds, frames)
def test_camera_metrics_do_not_see_a_similarity_of_the_prediction(seed: int, count: int) -> None:
    true = cameras(count, seed)
    predicted = noisy(true, seed + 1)
    moved = similarity(seed + 2).cameras(predicted)
    errors, again = relative_pose_errors(predicted, true), relative_pose_errors(moved, true)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(errors, again, strict=True))
    assert close(trajectory_metrics(predicted, true), trajectory_metrics(moved, true))


@laws
@given(st.lists(st.floats(0, 180), min_size=1, max_size=30), st.integers(1, 100), st.integers(0, 80))
def test_auc_is_a_percentage_that_grows_with_the_threshold(errors: list[float], threshold: int, more: int) -> None:
    worst = torch.tensor(errors)
    pair = PoseErrors(worst, torch.zeros_like(worst))
    assert 0 <= auc(pair, threshold) <= auc(pair, threshold + more) + 1e-9 <= 100 + 1e-8
    assert torch.allclose(auc(pair, threshold), auc(PoseErrors(*reversed(pair)), threshold))
    assert auc(pair, threshold) <= accuracy(worst, threshold) + 1e-9


@pytest.mark.parametrize("threshold", [0, -3, 2.5])
def test_auc_takes_whole_degrees(threshold: float) -> None:
    with pytest.raises(ValueError, match="whole number"):
        auc(PoseErrors(torch.zeros(3), torch.zeros(3)), threshold)  # type: ignore[arg-type]
