"""Which keys are kept and what attention over them is, in the words of the documentation and token by token."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


def every(frames: int, setting: dict) -> int:
    """The least distance of frames that is allowed and leaves no more than `most_frames` of them."""
    distance, most = setting.get("frames", 1), setting.get("most_frames", 0)
    while most and len(range(0, frames, distance)) > most:
        distance += 1
    return distance


def keeps(frame: int, row: int, column: int, grid: tuple[int, int], setting: dict, distance: int) -> bool:
    """Whether a patch keeps its key where every so many frames keep some, in the words of the documentation."""
    if setting.get("keep_first_frame") and frame == 0:
        return True
    if frame % distance:
        return False
    down, right = setting.get("stride", (2, 2))
    turn = frame // distance if setting.get("phase") == "shifted" else 0
    starts, (tall, wide) = (turn // right % down, turn % right), setting.get("kept", (1, 1))
    return row in stands(row, grid[0], down, starts[0], tall) and column in stands(
        column, grid[1], right, starts[1], wide
    )


def stands(line: int, count: int, stride: int, start: int, number: int) -> list[int]:
    """The rows (or columns) that the window of one keeps, from `start` on and again from its begin."""
    window = list(range(line - line % stride, min(count, line - line % stride + stride)))
    first = min(start, len(window) - 1)
    return [*window[first:], *window[:first]][:number]


def kept(frames: int, grid: tuple[int, int], special: int, setting: dict) -> Tensor:
    """[F·P] bool, token by token."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    distance = every(frames, setting)
    return torch.tensor(
        [
            token
            for frame in range(frames)
            for token in ([True] * special + [keeps(frame, *place, grid, setting, distance) for place in places])
        ]
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: Tensor,
    allowed: Tensor,
    setting: dict[str, Any],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention under a mask `allowed` [queries, keys], with own keys and the mean key of a setting.

    `read` [keys] are those that are kept; `bias` [keys] is added to their logits.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    allowed = allowed | torch.diag(~read) if setting.get("own_key") else allowed
    logits = (q @ k.mT * scale + (0 if bias is None else bias)).masked_fill(~allowed, -math.inf)
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
        "kept": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "frames": draw(st.integers(1, 4)),
        "most_frames": draw(st.integers(0, 4)),
        "phase": draw(st.sampled_from(["fixed", "shifted"])),
        "keep_first_frame": draw(st.booleans()),
    }
    return draw(size), (draw(size), draw(size)), draw(st.integers(0, 3)), setting
