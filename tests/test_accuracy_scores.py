"""The numbers of the accuracy bench: scores of a scene, means with intervals, differences, the front."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy_bench import video

from vggt_compile.bench.accuracy.cases import Geometry, rendered_case
from vggt_compile.bench.accuracy.picture import pareto
from vggt_compile.bench.accuracy.score import METRICS, in_world, scores
from vggt_compile.bench.accuracy.statistics import interval, summaries
from vggt_compile.metrics import Similarity
from vggt_compile.scenes import Views


@pytest.fixture(scope="module")
def views() -> Views:
    return video()


def truth(views: Views) -> Geometry:
    return rendered_case(views).truth


def test_the_truth_has_perfect_scores(views: Views) -> None:
    found = scores(truth(views), truth(views))
    assert tuple(found) == METRICS
    for name in METRICS:
        perfect = 0.0 if name in ("ATE", "AbsRel", "chamfer") else 100.0
        assert found[name] == pytest.approx(perfect, abs=1e-5), name


def test_a_similarity_of_the_found_world_changes_no_score_and_is_undone(views: Views) -> None:
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    turn = turn * torch.linalg.det(turn)
    moved = Similarity(turn, torch.tensor([1.0, -2.0, 3.0]).double(), torch.tensor(2.5).double())
    true = truth(views)
    points = moved.points(true.points.flatten(0, 2)).view(true.points.shape)
    found = Geometry(moved.cameras(true.extrinsics).float(), true.depth * 2.5, points.float())
    assert scores(found, true)["AUC@5"] == 100
    assert scores(found, true)["chamfer"] == pytest.approx(0, abs=1e-4)
    back = in_world(found, true)
    assert (back.extrinsics - true.extrinsics).abs().max() < 1e-4
    assert (back.points - true.points).abs().max() < 1e-4
    assert (back.depth - true.depth).abs().max() < 1e-4


def test_metrics_whose_truth_is_unknown_are_absent(views: Views) -> None:
    found = scores(truth(views), Geometry(views.extrinsics[0]))
    assert set(METRICS) - set(found) == {"AbsRel", "delta1.25", "chamfer"}


def test_pixels_of_unknown_depth_do_not_count(views: Views) -> None:
    true, holes = truth(views), views.depth[0].clone()
    holes[:, :20] = 0
    wrong = true.points.clone()
    wrong[:, :20] = 1e6
    assert scores(true._replace(points=wrong), true._replace(depth=holes))["chamfer"] == pytest.approx(0, abs=1e-6)


def test_an_interval_moves_and_scales_with_its_values() -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0]
    mean, low, high = interval(values)
    assert low < mean == 4.0 < high
    assert interval(values) == (mean, low, high)
    assert interval([10 - 2 * x for x in values]) == pytest.approx(
        (10 - 2 * mean, 10 - 2 * high, 10 - 2 * low), abs=0.5
    )
    assert interval([3.0] * 4) == (3.0, 3.0, 3.0)
    assert interval([3.0]) == (3.0, None, None)
    with pytest.raises(ValueError, match="no scene"):
        interval([])


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    drawn = torch.randn(300, 30, generator=torch.Generator().manual_seed(0))
    ends = [interval(sample, resamples=400) for sample in drawn.tolist()]
    share = sum(low <= 0 <= high for _, low, high in ends) / len(ends)
    assert 0.90 <= share <= 0.97  # of 0.95; percentile intervals of 30 values are a little short


def test_differences_are_taken_scene_by_scene() -> None:
    def row(plan: str, seed: int, auc: float, **more: Any) -> dict[str, Any]:
        numbers = {"truth": {"AUC@30": auc}, "baseline": {"AUC@30": 100.0}}
        place = {"plan": plan, "scene": "orbit/indoor", "seed": seed}
        return place | {"attention_left": 0.5, "rewritten": 1} | numbers | more

    rows = [row("dense", 0, 90.0), row("a", 0, 80.0), row("dense", 1, 50.0), row("a", 1, 40.0)]
    first, second = summaries(rows, "dense")
    assert first["difference"]["AUC@30"] == [0.0, 0.0, 0.0]
    assert second["difference"]["AUC@30"] == [-10.0, -10.0, -10.0]
    assert second["truth"]["AUC@30"][0] == 60.0
    broken = summaries([*rows[:3], {**row("a", 1, 0.0), "failed": "NaN"}], "dense")[1]
    assert (broken["count"], broken["failed"], broken["truth"]["AUC@30"]) == (1, 1, [80.0, None, None])


def test_the_front_holds_what_nothing_cheaper_reaches() -> None:
    points = [(100.0, 80.0), (50.0, 70.0), (60.0, 60.0), (50.0, 65.0), (20.0, 10.0)]
    assert pareto(points) == [(20.0, 10.0), (50.0, 70.0), (100.0, 80.0)]
