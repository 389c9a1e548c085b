"""Camera heads: VGGT refines a pose encoding step by step, π³ regresses a rigid transform at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_compile.models.layers import MLP, Block, at_least_fp32

POSE_DIM = 9  # translation 3, quaternion 4, field of view 2: see pose.py


@dataclass(frozen=True)
class CameraConfig:
    """Sizes of the refining head; its width is twice the trunk's. The defaults are those of VGGT-1B."""

    depth: int = 4
    """Blocks of a refinement step."""
    heads: int = 16
    """Attention heads of a block."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over the head's width."""
    steps: int = 4
    """Refinement steps."""
    layer_scale: float = 0.01
    """Initial gain of the blocks' residual branches."""


class CameraHead(nn.Module):
    """Refines all frames' poses together; a step sees the estimate so far through adaptive norms (arXiv:2212.09748)."""

    def __init__(self, config: CameraConfig, dim: int) -> None:
        super().__init__()
        self.steps = config.steps
        self.trunk = nn.Sequential(
            *(Block(dim, config.heads, config.mlp_ratio, config.layer_scale) for _ in range(config.depth))
        )
        self.token_norm = nn.LayerNorm(dim)
        self.trunk_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_DIM))
        self.embed_pose = nn.Linear(POSE_DIM, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.pose_branch = MLP(dim, dim // 2, POSE_DIM)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Camera tokens `[B, S, dim]` → the pose encoding after each step, `[B, S, 9]`, fields of view in radians."""
        tokens = self.token_norm(tokens.to(self.token_norm.weight.dtype))
        pose = torch.zeros_like(tokens[..., :POSE_DIM])
        seen = self.empty_pose_tokens.expand_as(pose)
        poses = []
        for _ in range(self.steps):
            pose = pose + self.refinement(tokens, seen)
            seen = pose.detach()  # each step learns its own correction, not through the ones before
            poses.append(activate_pose(pose))
        return poses

    def refinement(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """What to add to the pose, from normalised tokens `[B, S, dim]` and the estimate so far `[B, S, 9]`."""
        shift, scale, gate = self.poseLN_modulation(self.embed_pose(seen)).chunk(3, dim=-1)
        x = tokens + gate * (self.adaln_norm(tokens) * (1 + scale) + shift)
        return self.pose_branch(self.trunk_norm(self.trunk(x)))


def activate_pose(pose: Tensor) -> Tensor:
    """Keeps translation and quaternion and cuts fields of view below zero: `[..., 9]` → `[..., 9]`."""
    pose = at_least_fp32(pose)
    return torch.cat((pose[..., :7], pose[..., 7:].relu()), dim=-1)


class RigidHead(nn.Module):
    """One camera-to-world transform from a frame's patch tokens: residual MLPs, mean over patches, two regressions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv = nn.ModuleList((ResidualMLP(dim), ResidualMLP(dim)))
        self.more_mlps = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t = nn.Linear(dim, 3)
        self.fc_rot = nn.Linear(dim, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        """Patch tokens `[N, P, dim]` → transforms `[N, 4, 4]`."""
        x = tokens.to(self.fc_t.weight.dtype)
        for layer in self.res_conv:
            x = layer(x)
        x = self.more_mlps(x.mean(dim=1))
        rotation = nearest_rotation(at_least_fp32(self.fc_rot(x)).unflatten(-1, (3, 3)))
        upper = torch.cat((rotation, at_least_fp32(self.fc_t(x))[..., None]), dim=-1)
        lower = F.pad(torch.ones_like(upper[:, :1, :1]), (3, 0))
        return torch.cat((upper, lower), dim=1)


class ResidualMLP(nn.Module):
    """Three rectified linear maps, added to the input, `[..., dim]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv1 = nn.Linear(dim, dim)
        self.res_conv2 = nn.Linear(dim, dim)
        self.res_conv3 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res_conv3(self.res_conv2(self.res_conv1(x).relu()).relu()).relu()


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotation nearest to `matrix` `[N, 3, 3]` with its rows normalised (arXiv:2006.14616).

    Both singular bases are made right-handed by replacing their last vector, which flips that singular direction
    exactly where the product would be a reflection.
    """
    u, _, vh = torch.linalg.svd(F.normalize(matrix, dim=-1))
    columns = torch.stack((u[..., 0], u[..., 1], torch.linalg.cross(u[..., 0], u[..., 1])), dim=-1)
    rows = torch.stack((vh[..., 0, :], vh[..., 1, :], torch.linalg.cross(vh[..., 0, :], vh[..., 1, :])), dim=-2)
    return columns @ rows
