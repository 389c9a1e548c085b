"""Scenes: the geometry is exact, cameras move as their trajectory says, and a seed is a scene."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sceneutils import SMALL, laws, neighbours, same, seeds, sizes

from vggt_compile.scenes import (
    DIFFICULTIES,
    HELD_OUT_SEEDS,
    KINDS,
    RIG,
    TEXTURES,
    TRAINING_SEEDS,
    TRAJECTORIES,
    Difficulty,
    Scene,
    overlap,
    project,
    render,
    trace,
    unproject,
)
from vggt_compile.scenes.dice import Dice
from vggt_compile.scenes.layout import sample
from vggt_compile.scenes.trace import shadowed
from vggt_compile.scenes.views import compare


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("trajectory", sorted(TRAJECTORIES))
@laws
@given(seed=seeds, size=sizes, difficulty=st.sampled_from(sorted(DIFFICULTIES)))
def test_depth_cameras_and_world_points_agree_for_any_seed_and_size(trajectory, kind, seed, size, difficulty):
    views = render(seed, 2, size, trajectory, kind, difficulty=difficulty)
    assert views.images.shape == (1, 2, 3, *size)
    assert views.depth.isfinite().all()
    assert views.depth.min() > 0.05
    # The bound: float32 rounding of coordinates of a few metres, through one rotation and one inverse.
    assert (unproject(views.depth, views.intrinsics, views.extrinsics) - views.world_points).abs().max() < 2e-5
    pixels, depth = project(views.world_points.flatten(2, 3), views.intrinsics, views.extrinsics)
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    assert (pixels - torch.stack([x, y], -1).flatten(0, 1)).abs().max() < 1e-3
    assert (depth.view_as(views.depth) - views.depth).abs().max() < 2e-5


def test_double_precision_is_the_same_scene_and_tightens_the_agreement():
    single, double = render(3, 2, SMALL, "wide"), render(3, 2, SMALL, "wide", dtype=torch.float64)
    error = unproject(double.depth, double.intrinsics, double.extrinsics) - double.world_points
    assert error.abs().max() < 1e-12
    # A pixel on an object's edge may fall on either side of it; all others differ by rounding.
    assert ((single.depth.double() - double.depth).abs() < 1e-4).double().mean() > 0.999
    assert ((single.images.double() - double.images).abs() < 1e-2).double().mean() > 0.99


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("trajectory", sorted(TRAJECTORIES))
def test_frames_agree_on_what_is_visible(trajectory, kind):
    views = render(1, 2, (84, 112), trajectory, kind, dtype=torch.float64)
    scene, _ = sample([1], kind, Difficulty(), list(TEXTURES))
    rotation, translation = views.extrinsics[0, 1].split([3, 1], -1)
    eye = -(rotation.mT @ translation)[:, None]
    points = views.world_points[0, 0].flatten(0, 1).T[:, None]
    reached = trace(eye, points - eye, scene).depth[0]
    # A ray towards a point of a surface ends there or earlier, never behind it.
    assert reached.max() < 1 + 1e-9
    exact = (compare(views, 0)[0][0, 1] & (reached > 1 - 1e-6)).double().mean()
    # Depth interpolated between pixels fails only along silhouettes.
    assert overlap(views)[0, 0, 1] == pytest.approx(exact.item(), abs=0.06)
    assert overlap(views).diagonal(0, 1, 2).min() == 1


def hand_made(**changes):
    """A room of 4 × 6 × 8 m around the origin, a cube of side 2 turned by 45° at x = −1, a ball of radius 0.5."""
    row = lambda *values: torch.tensor([values], dtype=torch.float64)  # noqa: E731
    scene = {
        "boxes": 2,
        "centre": row([0, 0, 0], [-1, 0, 0], [1, 0, 3]),
        "half": row([2, 3, 4], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        "turn": row([1, 0], [0.5**0.5, 0.5**0.5], [1, 0]),
        "texture": torch.zeros(1, 8, dtype=torch.int64),
        "salt": torch.zeros(1, 8, dtype=torch.int32),
        "cell": torch.ones(1, 8, dtype=torch.float64),
        "colours": torch.ones(1, 8, 6, dtype=torch.float64),
        "lamp": row(0, 0, 3.5),
        "light": row(0.5, 0.5, 1, 1, 1),
        "gain": row(1, 1, 1),
    }
    return Scene(**(scene | changes))


@pytest.mark.parametrize(
    ("origin", "direction", "depth", "normal", "material"),
    [
        ((0, 0, 0), (0, 0, -1), 4, (0, 0, 1), 4),  # floor
        ((0, 0, 0), (0, 0, 2), 2, (0, 0, -1), 5),  # ceiling; depth counts directions, not metres
        ((0, 0, 0), (0, 1, 0), 3, (0, -1, 0), 3),  # +y wall
        ((0, 2, 0), (-1, 0, 0), 2, (1, 0, 0), 0),  # −x wall, past the cube
        ((1, 0, 0), (0, 0, 1), 2.5, (0, 0, -1), 7),  # the ball, from below
        ((1.3, 0, 0), (0, 0, 1), 2.6, (0.6, 0, -0.8), 7),  # the ball off its axis: 3 − √(0.25 − 0.09)
        ((1.5001, 0, 0), (0, 0, 1), 4, (0, 0, -1), 5),  # just past it
        ((1, 0.1, 0), (-1, 0, 0), 2 - 0.5**0.5 + 0.1, (0.5**0.5, 0.5**0.5, 0), 6),  # a vertical face of the turned cube
    ],
)
def test_single_rays_match_hand_computation(origin, direction, depth, normal, material):
    column = lambda v: torch.tensor(v, dtype=torch.float64).view(3, 1, 1)  # noqa: E731
    hit = trace(column(origin), column(direction), hand_made())
    torch.testing.assert_close(hit.depth.item(), float(depth), rtol=0, atol=1e-12)
    torch.testing.assert_close(hit.normal, column(normal).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(hit.point, column(origin) + depth * column(direction), rtol=0, atol=1e-12)
    assert hit.material.item() == material


def test_a_solid_between_point_and_lamp_casts_a_shadow():
    points = torch.tensor([[-1.2, 0, -4], [1.5, 0, -4], [-1, 0, 0.5]], dtype=torch.float64).T[:, None]
    lamp = torch.tensor([-1, 0, 3.5], dtype=torch.float64).view(3, 1, 1)
    assert shadowed(points + 1e-3, lamp, hand_made()).tolist() == [[True, False, False]]


@laws
@given(seeds, st.sampled_from(sorted(TRAJECTORIES)), st.sampled_from(sorted(KINDS)))
def test_cameras_are_level_rigid_and_in_free_space(seed, trajectory, kind):
    rotation = (views := render(seed, 12, (1, 1), trajectory, kind, dtype=torch.float64)).extrinsics[0, ..., :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).double().expand(12, 3, 3), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(12).double(), rtol=0, atol=1e-12)
    assert rotation[:, 0, 2].abs().max() < 1e-12  # x stays horizontal
    assert rotation[:, 1, 2].max() < -0.2  # y points down
    eye = -(rotation.mT @ views.extrinsics[0, ..., 3:])[..., 0]
    scene, _ = sample([seed], kind, Difficulty(), list(TEXTURES))
    reach = scene.half[0, 0] - (eye - scene.centre[0, 0]).abs()
    assert reach.min() > 0.1
    for k in range(1, scene.centre.shape[1]):
        x, y, z = (eye - scene.centre[0, k]).unbind(-1)
        cos, sin = scene.turn[0, k]
        local = torch.stack([cos * x + sin * y, cos * y - sin * x, z], -1)
        gap = local.norm(dim=-1) - scene.half[0, k, 0]
        if k < scene.boxes:
            gap = (local.abs() - scene.half[0, k]).amax(-1)
        assert gap.min() > 0.1


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("trajectory", "least"), [("video", 0.8), ("orbit", 0.5), ("wide", 0.15), ("rooms", 0.35)])
def test_views_overlap(trajectory, least, kind):
    assert neighbours(render(range(8), 5, SMALL, trajectory, kind)) > least


def test_a_longer_video_begins_with_the_shorter_one():
    short, long = (render(5, frames, (4, 4), "video") for frames in (3, 6))
    torch.testing.assert_close(long.extrinsics[:, :3], short.extrinsics, rtol=0, atol=1e-6)


def poses(views):
    """Camera-to-world [B, S, 4, 4]."""
    last = views.extrinsics.new_tensor([0, 0, 0, 1]).expand(*views.extrinsics.shape[:2], 1, 4)
    return torch.linalg.inv(torch.cat([views.extrinsics, last], -2))


@laws
@given(seeds, st.integers(1, 19), st.sampled_from(sorted(KINDS)))
def test_the_cameras_of_a_rig_keep_their_places_on_it(seed, frames, kind):
    world = poses(render(seed, frames, (1, 1), "rig", kind, dtype=torch.float64))[0]
    mounts = [torch.linalg.inv(time[:1]) @ time for time in world.split(RIG)]
    for mount in mounts:
        torch.testing.assert_close(mount, mounts[0][: len(mount)], rtol=0, atol=1e-12)


def test_a_rig_moves_and_its_cameras_look_different_ways():
    world = poses(render(range(4), 3 * RIG, (1, 1), "rig"))
    assert (world[:, RIG:, :3, 3] - world[:, :-RIG, :3, 3]).norm(dim=-1).min() > 0.01
    forward = world[:, :RIG, :3, 2]
    assert ((forward[:, 1:] * forward[:, :-1]).sum(-1)).max() < 0.95


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_far_frames_of_rooms_share_little_and_those_of_a_video_much(kind):
    far = lambda trajectory: overlap(render(range(6), 9, SMALL, trajectory, kind))[:, 0, 8].mean()  # noqa: E731
    assert far("rooms") < 0.02
    assert far("video") > 0.3


def angles(views):
    """Degrees between frames next to each other, seen from the room's axis [B, S − 1]."""
    eye = poses(views)[..., :2, 3]
    angle = torch.atan2(eye[..., 1], eye[..., 0])
    return torch.rad2deg(((angle.diff(dim=-1) + torch.pi) % (2 * torch.pi) - torch.pi).abs())


@pytest.mark.parametrize("trajectory", ["orbit", "video", "rooms"])
def test_pace_is_degrees_a_frame(trajectory):
    turned = angles(render(range(6), 5, (1, 1), trajectory, "objects", pace=(3, 4), dtype=torch.float64))
    torch.testing.assert_close(turned, turned[:, :1].expand_as(turned), rtol=0, atol=1e-9)
    assert turned.min() >= 3
    assert turned.max() < 4


def test_videos_differ_in_pace():
    turned = angles(render(range(20), 2, (1, 1), "video", "objects"))
    assert turned.min() < 2
    assert turned.max() > 5


def test_an_orbit_of_many_frames_closes():
    rotation = render(2, 20, (1, 1), "orbit", kind="objects").extrinsics[0, :, :, :3]
    steps = (rotation @ rotation.roll(-1, 0).mT).diagonal(0, 1, 2).sum(-1)  # 1 + 2 cos(angle to the next frame)
    assert steps[-1] == pytest.approx(steps[:-1].mean().item(), abs=0.1)


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_scene():
    first, again, other = (render(seed, 2, SMALL, "video") for seed in (11, 11, 12))
    assert same(first, again)
    assert (first.images - other.images).abs().mean() > 0.05


@laws
@given(st.lists(seeds, min_size=2, max_size=3), st.sampled_from(sorted(TRAJECTORIES)), st.sampled_from(sorted(KINDS)))
def test_a_scene_does_not_depend_on_the_batch_around_it(batch, trajectory, kind):
    together = render(batch, 2, (8, 10), trajectory, kind, difficulty="hard")
    for i, seed in enumerate(batch):
        alone = render(seed, 2, (8, 10), trajectory, kind, difficulty="hard")
        for name, tensor in vars(alone).items():
            # Rounding may differ with a tensor's length (vectorised loops have scalar ends), values may not.
            close = torch.isclose(getattr(together, name)[i], tensor[0], rtol=0, atol=1e-3)
            assert close.float().mean() > 0.98, name


def test_seeds_do_not_share_streams():
    draws = torch.cat([Dice([seed], purpose).uniform(0, 1, 4) for seed in range(20) for purpose in ("layout", "light")])
    assert len(draws.unique(dim=0)) == 40


def test_numbers_of_a_stream_are_even_and_streams_unrelated():
    draws = Dice(range(1000), "layout").uniform(0, 1, 200)
    deviation = 12**-0.5
    assert (draws.mean(0) - 0.5).abs().max() < 5 * deviation * 1000**-0.5
    assert draws.std() == pytest.approx(deviation, rel=0.01)
    for rows in (draws[:100], draws.T[:100]):
        assert (torch.corrcoef(rows) - torch.eye(100)).abs().max() < 6 * rows.shape[1] ** -0.5


def test_held_out_seeds_are_valid_and_apart_from_those_of_training():
    assert not set(HELD_OUT_SEEDS[:: 2**20]) & set(TRAINING_SEEDS[:: 2**20])
    assert TRAINING_SEEDS[-1] < HELD_OUT_SEEDS[0]
    assert len(TRAINING_SEEDS) + len(HELD_OUT_SEEDS) == 2**32
    render(HELD_OUT_SEEDS[-1], 1, (1, 1))


def test_chunks_do_not_show():
    whole = render([1, 2], 2, (20, 24))
    for chunk in (100, 480, 700):
        pieces = render([1, 2], 2, (20, 24), chunk=chunk)
        assert torch.isclose(pieces.images, whole.images, atol=1e-3).float().mean() > 0.99
        torch.testing.assert_close(pieces.extrinsics, whole.extrinsics, rtol=0, atol=0)
