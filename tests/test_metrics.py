"""Metrics agree with published libraries on random input, and obey the laws that their definitions promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from vggt_compile.metrics import (
    PoseErrors,
    Similarity,
    absolute_errors,
    accuracy,
    align_cameras,
    auc,
    cloud,
    cloud_metrics,
    depth_metrics,
    nearest_distances,
    pose_metrics,
    relative_errors,
    relative_pose_errors,
    trajectory_metrics,
    umeyama,
)
from vggt_compile.metrics.cameras import centres, rotation_angle

laws = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**31)
frames = st.integers(3, 7)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotations(count: int, seed: int) -> Tensor:
    return torch.from_numpy(Rotation.random(count, random_state=seed).as_matrix())


def cameras(count: int, seed: int) -> Tensor:
    """Random extrinsics `[S, 3, 4]`."""
    return torch.cat((rotations(count, seed), 3 * randn(count, 3, 1, seed=seed)), dim=-1)


def noisy(extrinsics: Tensor, seed: int, size: float = 0.2) -> Tensor:
    """The same cameras, turned and shifted a little; `size` in radians and units."""
    turn = torch.from_numpy(Rotation.from_rotvec((size * randn(len(extrinsics), 3, seed=seed)).numpy()).as_matrix())
    moved = turn @ extrinsics
    moved[..., 3] += size * randn(len(extrinsics), 3, seed=seed + 1)
    return moved


def similarity(seed: int) -> Similarity:
    return Similarity(rotations(1, seed)[0], 5 * randn(3, seed=seed), randn(1, seed=seed).exp()[0])


def close(a: dict[str, float], b: dict[str, float], tolerance: float = 1e-6) -> bool:
    assert a.keys() == b.keys()
    return all(math.isclose(a[name], b[name], rel_tol=tolerance, abs_tol=tolerance) for name in a)


# Relative poses


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


# Alignment and trajectories


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


# Depth


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


# Clouds


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
