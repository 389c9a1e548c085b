"""Which tokens keep their key: laws of the operators by themselves, token by token."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from keys_oracle import every, grids, kept

from vggt_compile.ops.key_grid import dropped_tokens, window_patches


def places(frames: int, grid: tuple[int, int], special: int, setting: dict) -> tuple:
    """Arguments of the operators."""
    x = torch.empty(1, 1, frames * (special + grid[0] * grid[1]), 1)
    kept = tuple(map(min, setting.get("kept", (1, 1)), setting["stride"]))
    phase = (setting["keep_first_frame"], setting["phase"] == "shifted")
    return x, special, *grid, setting["stride"], kept, every(frames, setting), *phase


@given(grids())
@settings(max_examples=200, deadline=None)
def test_each_token_is_kept_or_dropped(case: tuple[int, tuple[int, int], int, dict]) -> None:
    frames, grid, special, setting = case
    dropped = dropped_tokens(*places(*case))
    assert torch.equal(~dropped, kept(*case))
    found = window_patches(*places(*case)).tolist()
    assert len(set(found)) == len(found)
    per_frame = special + grid[0] * grid[1]
    first = per_frame if setting["keep_first_frame"] else 0
    patches = [i for i in range(first, frames * per_frame) if i % per_frame >= special]
    assert sorted(found) == [i for i in patches if not dropped[i]]


def lines(count: int, stride: int, kept: int) -> int:
    return sum(min(stride, count - start, kept) for start in range(0, count, stride))


@given(grids())
@settings(max_examples=50, deadline=None)
def test_every_special_token_and_as_many_patches_of_each_window_are_kept(case: tuple) -> None:
    frames, grid, special, setting = case
    read = kept(*case).view(frames, -1)
    assert torch.equal(read, ~dropped_tokens(*places(*case)).view(frames, -1))
    assert read[:, :special].all()
    down, right = setting["stride"]
    tall, wide = setting["kept"]
    windows = lines(grid[0], down, tall) * lines(grid[1], right, wide)
    for frame in range(bool(setting["keep_first_frame"]), frames):
        patches = read[frame, special:].sum()
        assert patches == (0 if frame % every(frames, setting) else windows)


def test_shifted_places_visit_a_whole_window() -> None:
    setting = {"stride": (2, 3), "frames": 2, "phase": "shifted", "keep_first_frame": False}
    read = kept(12, (4, 6), 1, setting).view(12, -1)[::2, 1:]
    assert torch.equal(read.sum(0), torch.ones(24, dtype=torch.int64))
