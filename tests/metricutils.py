"""Random cameras and worlds, and how alike numbers are, for tests of metrics."""

from __future__ import annotations

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from vggt_compile.metrics import (
    Similarity,
)

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
