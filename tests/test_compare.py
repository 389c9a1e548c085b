"""Deviations of one output from another: exact numbers, and one set of names for both families."""

import math

import pytest
import torch

from vggt_compile.cli.compare import camera_centres, compare, deviation, quantities
from vggt_compile.errors import BadInput


def test_deviation_is_exact_on_numbers_made_by_hand():
    found = deviation(torch.tensor([3.0, 4.0, 1.0]), torch.tensor([3.0, 4.0, 0.0]))
    assert found.relative == 1 / 5
    assert found.largest == 1 / 4


def test_deviation_at_its_limits(monkeypatch):
    zero, one = torch.zeros(3), torch.ones(3)
    assert deviation(one, one).to_dict() == {"relative": 0.0, "largest": 0.0}
    assert deviation(zero, zero).relative == 0.0
    assert deviation(one, zero).relative == math.inf
    assert math.isnan(deviation(torch.full((3,), math.nan), one).largest)
    monkeypatch.setattr("vggt_compile.cli.compare.CHUNK", 2)
    assert deviation(torch.tensor([3.0, 4.0, 1.0]), torch.tensor([3.0, 4.0, 0.0])).relative == 1 / 5
    with pytest.raises(ValueError, match="shapes differ"):
        deviation(zero, zero[:2])


def test_both_families_are_compared_under_the_same_names():
    shape = (1, 2, 4, 4)
    poses = torch.eye(4).expand(1, 2, 4, 4)
    points = torch.rand(*shape, 3)
    pi3 = {"camera_poses": poses, "local_points": points, "points": points, "conf": torch.rand(*shape, 1)}
    vggt = {
        "pose_enc": torch.rand(1, 2, 9),
        "depth": torch.rand(*shape, 1),
        "depth_conf": torch.rand(shape),
        "world_points": points,
    }
    assert set(compare(pi3, pi3)) == set(compare(vggt, vggt)) == {"camera", "depth", "points", "confidence"}
    assert quantities(pi3)["depth"].equal(points[..., 2])
    assert compare({**vggt, "depth": vggt["depth"] * 1.5}, vggt)["depth"].relative == pytest.approx(0.5, rel=1e-6)
    with pytest.raises(BadInput, match="neither an output of VGGT nor"):
        quantities({"logits": points})


def test_camera_centres_of_both_families_agree():
    turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    centre = torch.tensor([1.0, 2.0, 3.0])
    pose = torch.eye(4)
    pose[:3, :3], pose[:3, 3] = turn.T, centre  # camera to world
    half = math.sqrt(0.5)
    encoding = torch.cat((-(turn @ centre), torch.tensor([0.0, 0.0, half, half, 1.0, 1.0])))
    assert camera_centres({"camera_poses": pose}, (28, 28)).tolist() == [1, 2, 3]
    torch.testing.assert_close(camera_centres({"pose_enc": encoding}, (28, 28)), centre)
    assert camera_centres({"depth": pose}, (28, 28)) is None
