"""The training script learns, goes on where it stopped, and its parts are what they say."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vggt_compile.metrics import relative_pose_errors
from vggt_compile.models import pi3, vggt
from vggt_compile.models.dpt import DPTConfig
from vggt_compile.models.pose import Cameras, encode_pose
from vggt_compile.scenes import TRAINING_SEEDS, Views, render

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "training"
ALL = [0, 1, 2]


@pytest.fixture(autouse=True, scope="module")
def importable():
    """The script's own modules lie beside it."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def views() -> Views:
    return render([1, 2], 3, (56, 56), "wide")


def true_outputs(views: Views) -> dict:
    """What a VGGT that is never wrong gives."""
    from losses import from_first_camera

    truth = from_first_camera(views)
    pose = encode_pose(Cameras(truth.extrinsics, truth.intrinsics), (56, 56))
    sure = torch.ones_like(truth.depth)
    return {
        "pose_enc_list": [pose, pose],
        "pose_enc": pose,
        "depth": truth.depth[..., None],
        "depth_conf": sure,
        "world_points": truth.points,
        "world_points_conf": sure,
    }


def test_truth_costs_vggt_nothing_and_a_step_away_something(views: Views) -> None:
    from losses import vggt_loss

    outputs = true_outputs(views)
    assert all(loss.abs() < 1e-3 for loss in vggt_loss(outputs, views, ALL).values())
    assert vggt_loss({**outputs, "depth": 1.1 * outputs["depth"]}, views, ALL)["depth"] > 0.01
    moved = outputs["pose_enc"] + torch.tensor([0.1, *[0.0] * 8])
    worse = vggt_loss({**outputs, "pose_enc": moved, "pose_enc_list": [moved]}, views, ALL)
    assert worse["camera"] > 0.01


def test_truth_costs_pi3_nothing_whatever_its_world_and_scale(views: Views) -> None:
    from losses import from_first_camera, local_points, pi3_loss

    truth = from_first_camera(views)
    poses = torch.eye(4).repeat(2, 3, 1, 1)
    poses[..., :3, :3] = truth.extrinsics[..., :3].mT
    poses[..., :3, 3:] = -poses[..., :3, :3] @ truth.extrinsics[..., 3:]
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    elsewhere = torch.eye(4)
    elsewhere[:3, :3], elsewhere[:3, 3] = turn * turn.det(), torch.tensor([1.0, -2.0, 0.5])
    scale = 3.0
    poses[..., :3, 3] *= scale
    outputs = {
        "camera_poses": elsewhere @ poses,
        "local_points": local_points(truth) * scale,
        "conf": torch.full((2, 3, 56, 56, 1), 20.0),
    }
    assert all(loss < 2e-3 for loss in pi3_loss(outputs, views, ALL).values())
    assert pi3_loss({**outputs, "camera_poses": poses.flip(1)}, views, ALL)["rotation"] > 0.1


def test_relative_poses_agree_with_the_metrics(views: Views) -> None:
    from losses import relative_pose_loss

    other = render([3, 4], 3, (14, 14), "wide").extrinsics
    angle, _ = relative_pose_loss(other, views.extrinsics)
    pairs = relative_pose_errors(other, views.extrinsics).rotation  # each pair once, and no frame with itself
    assert torch.rad2deg(angle).item() == pytest.approx(2 * pairs.sum().item() / (2 * 9), rel=1e-3)


@given(st.floats(0.1, 10), st.integers(0, 100))
def test_the_best_scale_undoes_a_scale_among_outliers(scale: float, seed: int) -> None:
    from losses import best_scale

    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(1, 2, 8, 8, 3, generator=generator) + 0.5
    points = target / scale
    points[0, 0, :1] *= 7  # a sixteenth of all
    assert best_scale(points, target, torch.ones(1, 2, 8, 8, 1)).item() == pytest.approx(scale, rel=1e-4)


def test_a_pi3_whose_translations_are_in_another_unit_gets_them_back(views: Views) -> None:
    from gauge import length_factor
    from losses import from_first_camera, local_points, scale_of_points

    truth = from_first_camera(views)
    poses = torch.eye(4).repeat(2, 3, 1, 1)
    poses[..., :3, :3] = truth.extrinsics[..., :3].mT
    poses[..., :3, 3:] = -poses[..., :3, :3] @ truth.extrinsics[..., 3:]
    points = local_points(truth) / torch.tensor([2.0, 5.0])[:, None, None, None, None]  # a unit for each scene
    torch.testing.assert_close(scale_of_points(points, truth), torch.tensor([2.0, 5.0]))
    poses[..., :3, 3] *= 1.25 / torch.tensor([2.0, 5.0])[:, None, None]
    model = lambda images: {"camera_poses": poses, "local_points": points}  # noqa: E731
    assert length_factor(model, [views, views]) == pytest.approx(0.8, rel=1e-4)


def test_the_shipped_pi3_has_its_cameras_in_the_unit_of_its_points(views: Views) -> None:
    from gauge import length_factor

    from vggt_compile.models import pretrained

    batches = [render([seed], 6, (224, 224), "orbit") for seed in TRAINING_SEEDS[:3]]
    assert 0.85 < length_factor(pretrained("pi3-small"), batches) < 1.18


def test_partners_are_patches_that_see_one_point(views: Views) -> None:
    from matching import partners

    target, visible = partners(views, 14, 1)
    assert target.shape == visible.shape == (2, 3, 16)
    assert 0.1 < visible.float().mean() < 1
    # A frame's partner in itself is the patch itself: take the same frames twice.
    twice = Views(**{name: tensor[:, :1].expand(-1, 2, *tensor.shape[2:]) for name, tensor in vars(views).items()})
    target, visible = partners(twice, 14, 1)
    assert visible.all()
    assert torch.equal(target, torch.arange(16).expand(2, 2, 16))


def test_vggt_maps_some_frames_as_if_it_mapped_all(views: Views) -> None:
    from forward import forward
    from losses import vggt_loss

    torch.manual_seed(0)
    model = vggt("tiny").train()
    some, mapped = forward(model, views, random.Random(0))
    whole = model(views.images)
    assert len(mapped) == 1
    assert torch.equal(some["pose_enc"], whole["pose_enc"])
    torch.testing.assert_close(some["depth"], whole["depth"][:, mapped])
    torch.testing.assert_close(some["world_points_conf"], whole["world_points_conf"][:, mapped])
    assert vggt_loss(some, views, mapped)["camera"] == vggt_loss(whole, views, ALL)["camera"]
    assert forward(pi3("tiny"), views, random.Random(0))[1] == ALL


def test_a_trunk_taken_from_pi3_sees_what_pi3_sees(views: Views) -> None:
    from transfer import take_trunk

    torch.manual_seed(0)
    model, source = (
        vggt("tiny", dpt=DPTConfig(layers=(0, 0, 1, 1), channels=(8, 8, 16, 16), features=16), depth=2),
        pi3("tiny"),
    )
    for token in (model.aggregator.camera_token, model.aggregator.register_token):
        token.data.zero_()
    take_trunk(model, source.state_dict())
    seen: list[torch.Tensor] = []
    source.decoder[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    source(views.images)
    features = model.aggregator(views.images)[1][..., 64:]
    torch.testing.assert_close(features, seen[0].view_as(features), rtol=1e-3, atol=1e-4)  # the norms differ in epsilon


@pytest.mark.parametrize("model", [vggt("tiny"), pi3("tiny")], ids=["vggt", "pi3"])
def test_matching_listens_to_the_model(views: Views, model: torch.nn.Module) -> None:
    from matching import Matching

    torch.manual_seed(0)
    matching = Matching(model)
    model(views.images)
    loss = matching(views, random.Random(0))
    loss.backward()
    assert loss.isfinite()
    assert matching.head.weight.grad.abs().sum() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_step_sees_the_same_whenever_it_is_drawn() -> None:
    from curriculum import Curriculum

    curriculum = Curriculum(seed=0, images=6, size=(28, 28), warm=10, compile=False)
    cpu = torch.device("cpu")
    first, again, other = (curriculum.views(step, worker, cpu) for step, worker in ((5, 0), (5, 0), (5, 1)))
    assert torch.equal(first.images, again.images)
    assert first.images.shape != other.images.shape or not torch.equal(first.images, other.images)
    assert TRAINING_SEEDS.stop == 2**31


def test_the_rate_rises_stays_and_falls() -> None:
    from optimizer import schedule

    shares = [schedule(step, 100, 10, fall=0.25) for step in range(100)]
    assert shares[0] == 0.1
    assert shares[9:75] == [1.0] * 66
    assert sorted(shares[75:], reverse=True) == shares[75:]
    assert shares[-1] < 0.03


def run(folder: Path, steps: int) -> list[dict]:
    command = [sys.executable, str(FOLDER / "train.py"), "--model", "pi3-tiny", "--out", str(folder)]
    options = f"--images 6 --size 28 28 --steps {steps} --log-every 2 --judge-every 100 --warmup 1 --no-compile"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options.split(), "--device", "cpu"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    assert [row["step"] for row in run(tmp_path, 2)] == [2]
    rows = run(tmp_path, 4)
    assert [row["step"] for row in rows] == [2, 4]
    assert set(rows[-1]["held_out"]) >= {"video", "orbit", "wide"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pt",
        "curves.png",
        "log.jsonl",
        "weights.safetensors",
    }
    pi3("tiny").load_state_dict(load_file(tmp_path / "weights.safetensors"))
