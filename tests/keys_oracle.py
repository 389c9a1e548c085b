"""Which keys are kept and what attention over them is, in the words of the documentation and token by token."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


def keeps(frame: int, row: int, column: int, grid: tuple[int, int], setting: dict) -> bool:
    """Whether a patch keeps its key, in the words of the documentation."""
    if setting.get("keep_first_frame") and frame == 0:
        return True
    if frame % setting.get("frames", 1):
        return False
    down, right = setting.get("stride", (2, 2))
    turn = frame // setting.get("frames", 1) if setting.get("phase") == "shifted" else 0
    window_row, window_column = row - row % down, column - column % right
    place_row = min(window_row + turn // right % down, grid[0] - 1)
    place_column = min(window_column + turn % right, grid[1] - 1)
    return (row, column) == (place_row, place_column)


def kept(frames: int, grid: tuple[int, int], special: int, setting: dict) -> Tensor:
    """[F·P] bool, token by token."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    return torch.tensor(
        [
            token
            for frame in range(frames)
            for token in ([True] * special + [keeps(frame, *place, grid, setting) for place in places])
        ]
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, read: Tensor, allowed: Tensor, setting: dict[str, Any], scale: float | None = None
) -> Tensor:
    """Attention in the model's order of tokens under a mask `allowed`, with own keys and the mean key of a setting.

    `read` [N] are the tokens that kept their key.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    own = torch.diag(~read) if setting.get("own_key") else torch.zeros(len(read), len(read), dtype=torch.bool)
    logits = (q @ k.mT * scale).masked_fill(~(allowed | own), -math.inf)
    dropped = int((~read).sum())
    if setting.get("mean_key", "none") != "none" and dropped:
        weight = dropped if setting["mean_key"] == "count" else 1
        mean_k, mean_v = (x[:, :, ~read].mean(2, keepdim=True) for x in (k, v))
        logits = torch.cat((logits, q @ mean_k.mT * scale + math.log(weight)), -1)
        v = torch.cat((v, mean_v), 2)
    return logits.softmax(-1) @ v


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, tuple[int, int], int, dict]:
    """Frames, grid, special tokens, and where on them the keys are."""
    size = st.integers(1, 6)
    setting = {
        "stride": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "frames": draw(st.integers(1, 4)),
        "phase": draw(st.sampled_from(["fixed", "shifted"])),
        "keep_first_frame": draw(st.booleans()),
    }
    return draw(size), (draw(size), draw(size)), draw(st.integers(0, 3)), setting
