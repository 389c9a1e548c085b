"""What tracing sees instead: the same values from shapes and positions alone, without numbers read off tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vggt_compile.families.frame_loop import over_frames

FEW_FRAMES = 24
PIXELS_AT_ONCE = 61 * 392 * 518
"""Above this many pixels the published heads interpolate in parts, a graph of its own."""

_run_of_an_export: int | None = None


Run = Callable[[Callable[[Tensor], Tensor]], Any]
"""A head over some frames: of a function that takes them out of a tensor [B, F, …], gives tensors [B, frames, …]."""


class TooManyFrames(Exception):
    """A dense head was asked to see more frames at once than it may; who traces sets the length of its runs."""


@contextlib.contextmanager
def dense_heads_in_runs_of(frames: int | None) -> Iterator[None]:
    """Traces inside the block have dense heads see so many frames at once; all of them if 0, and none if None."""
    global _run_of_an_export
    before, _run_of_an_export = _run_of_an_export, -1 if frames is None else frames
    try:
        yield
    finally:
        _run_of_an_export = before


def rotate(tokens: Tensor, positions: Tensor, base: float) -> Tensor:
    """Two-dimensional rotary embedding (RoPE, arXiv 2104.09864; per axis as in arXiv 2403.13298).

    Args:
        tokens: [B, H, N, D], D divisible by 4; the first half of D turns with the row, the second with the column.
        positions: [B, N, 2], row and column in patches, integers.
        base: the longest wavelength is 2π·base patches.

    Returns:
        [B, H, N, D] in the dtype of `tokens`; angles are rounded to that dtype, as the published tables are.
    """
    half = tokens.shape[-1] // 2
    frequency = 1.0 / base ** (torch.arange(0, half, 2, device=tokens.device).float() / half)
    angle = (positions[..., None].to(frequency.dtype) * frequency).to(tokens.dtype)[:, None]  # [B, 1, N, 2, D/4]
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    axes = tokens.unflatten(-1, (2, half))
    first, second = axes.chunk(2, -1)
    return (axes * cos + torch.cat((-second, first), -1) * sin).flatten(-2)


def grid_positions(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """[batch, height·width, 2]: row and column of every patch, row by row."""
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device)[None].expand(height, width)
    return torch.stack((rows, columns), -1).reshape(1, height * width, 2).expand(batch, -1, -1).clone()


def in_few_passes(forward: Callable[..., Any], tokens: Any, images: Tensor, start: int, chunk: int | None) -> Any:
    """Run a dense head over runs of frames, as its own loop does, but in one graph for every count of frames.

    A trace unrolls the loop of the model, over chunks of 8 frames, so that every frame count is a graph of its own,
    with as many copies of the head. Here few frames are one run, and more are a loop that stays one in the graph.
    """

    def run(at: Callable[[Tensor], Tensor]) -> Any:
        return forward(_Chosen(tokens, at), at(images), start, None)

    return in_runs(run, images.shape[1], chunk, images.device)


class _Chosen:
    """Some frames of the tokens of each layer, taken when a head asks: what it leaves alone is no operand of a loop."""

    def __init__(self, layers: Any, at: Callable[[Tensor], Tensor]) -> None:
        self.layers, self.at = layers, at

    def __getitem__(self, layer: int) -> Tensor:
        return self.at(self.layers[layer])

    def __len__(self) -> int:
        return len(self.layers)


def flattened_in_few_passes(
    forward: Callable[..., Any], feats: Any, height: int, width: int, start: int, chunk: int | None
) -> Any:
    """The same for a head whose loop runs over batch times frames, and which returns a dictionary.

    Args:
        feats: a sequence for each level, of which the head reads the first: tokens [B, F, P, D].
    """
    tokens = feats[0][0]

    def head(at: Callable[[Tensor], Tensor]) -> Any:
        return forward([(at(feat[0]),) for feat in feats], height, width, start, None)

    made = in_runs(lambda at: dict(head(at)), tokens.shape[1], chunk, tokens.device)
    # Loops know plain dictionaries only. What one frame gives tells the class; nobody reads it, so nobody computes it.
    return type(head(lambda x: x[:, :1]))(made)


def in_set_passes(
    predict: Callable[..., Tensor], layers: Any, size: tuple[int, int], special: int, chunk: int | None
) -> Tensor:
    """The same for the dense head written here.

    Args:
        layers: tokens of some layers, each [B, F, P, C].
    """
    made: Tensor = in_runs(
        lambda at: predict([at(t) for t in layers], size, special), layers[0].shape[1], chunk, layers[0].device
    )
    return made


def in_runs(run: Run, frames: int, chunk: int | None, device: torch.device) -> Any:
    """A head over all frames at once where they are few, else in a loop over runs of `chunk` frames.

    Raises:
        TooManyFrames: the trace serves more of them than the head may see at once.
    """
    if chunk is None:
        return run(lambda x: x)
    if _run_of_an_export == -1:
        raise TooManyFrames
    if frames < FEW_FRAMES if _run_of_an_export is None else _run_of_an_export == 0:
        return run(lambda x: x)
    length = min(chunk, _run_of_an_export or chunk)
    return over_frames(lambda rows: run(lambda x: x.index_select(1, rows)), frames, length, device)
