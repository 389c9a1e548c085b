"""Positions, rotations and cameras inside the reference models keep the laws of their geometry."""

from __future__ import annotations

import pytest
import torch
from modelutils import randomized

from vggt_compile.models import ViTConfig
from vggt_compile.models.camera import nearest_rotation
from vggt_compile.models.encoder import ViT
from vggt_compile.models.pose import Cameras, decode_pose, encode_pose, matrix_to_quaternion, quaternion_to_matrix
from vggt_compile.models.rope import grid_positions, rotate, rotation


@torch.no_grad()
def test_the_stored_position_grid_is_resampled_to_itself() -> None:
    vit = randomized(ViT(ViTConfig(depth=0, grid=5), patch_size=14, dim=8))
    assert torch.equal(vit.positions(5, 5)[1], vit.pos_embed[:, 1:])
    assert vit.positions(3, 7)[1].shape == (1, 21, 8)


def test_rotated_products_depend_on_the_offset_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 32)
    positions = grid_positions(4, 6, special=2, device=torch.device("cpu"))
    by = rotation(positions, 32, base=100.0)
    q, k = (rotate(x.expand(1, 1, 26, 32), by)[0, 0] for x in (query, key))
    assert torch.equal(q[:2], query.expand(2, 32))
    scores = (q @ k.T)[2:, 2:]
    same = positions[2:, None] - positions[None, 2:]
    for offset in (torch.tensor([0, 0]), torch.tensor([1, -2]), torch.tensor([-3, 5])):
        equal = scores[(same == offset).all(-1)]
        torch.testing.assert_close(equal, equal[:1].expand_as(equal))
    assert scores.std() > 0.1


def test_nearest_rotation() -> None:
    torch.manual_seed(0)
    rotations = quaternion_to_matrix(torch.randn(50, 4))
    torch.testing.assert_close(nearest_rotation(3 * rotations), rotations)
    mirrored = rotations @ torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    for matrices in (mirrored, torch.randn(50, 3, 3)):
        nearest = nearest_rotation(matrices)
        torch.testing.assert_close(nearest @ nearest.mT, torch.eye(3).expand(50, 3, 3))
        torch.testing.assert_close(torch.linalg.det(nearest), torch.ones(50))


def test_pose_round_trip() -> None:
    torch.manual_seed(0)
    encoding = torch.randn(4, 100, 9, dtype=torch.float64)
    encoding[..., 7:] = 0.2 + 2.5 * torch.rand(4, 100, 2)
    cameras = decode_pose(encoding, (392, 518))
    again = encode_pose(cameras, (392, 518))
    quaternion = encoding[..., 3:7] / encoding[..., 3:7].norm(dim=-1, keepdim=True) * encoding[..., 6:7].sign()
    torch.testing.assert_close(again, torch.cat((encoding[..., :3], quaternion, encoding[..., 7:]), dim=-1))
    torch.testing.assert_close(decode_pose(again, (392, 518)), cameras)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_turns_keep_their_axis(axis: int) -> None:
    turn = -torch.eye(3)
    turn[axis, axis] = 1
    quaternion = torch.eye(4)[axis]
    torch.testing.assert_close(matrix_to_quaternion(turn).abs(), quaternion)
    torch.testing.assert_close(quaternion_to_matrix(quaternion), turn)


def test_a_decoded_camera_sees_the_image_border_at_half_its_field_of_view() -> None:
    encoding = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.4])
    cameras = decode_pose(encoding, (200, 300))
    assert isinstance(cameras, Cameras)
    ray = torch.stack([torch.tan(torch.tensor(0.7)), torch.tan(torch.tensor(0.5)), torch.tensor(1.0)])
    torch.testing.assert_close(cameras.intrinsics @ ray, torch.tensor([300.0, 200.0, 1.0]))
    torch.testing.assert_close(cameras.extrinsics, torch.eye(3, 4))
