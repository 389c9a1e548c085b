"""What tracing sees instead: the same values from shapes and positions alone, without numbers read off tensors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

FEW_FRAMES = 24
PASSES = 6
PIXELS_PER_PASS = 61 * 392 * 518
"""Above this many pixels the published heads interpolate in parts, a graph of its own."""

_fixed_passes: int | None = None
_enough = True


class TooManyFrames(Exception):
    """A dense head was asked to run in passes that are too few; who set their number tries again with more."""


@contextlib.contextmanager
def dense_heads_in(passes: int, enough: bool = True) -> Iterator[None]:
    """Traces inside the block run dense heads in so many passes, whatever the frame count; if enough, else they end."""
    global _fixed_passes, _enough
    before, (_fixed_passes, _enough) = (_fixed_passes, _enough), (passes, enough)
    try:
        yield
    finally:
        _fixed_passes, _enough = before


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
    """Run a dense head over runs of frames, as its own loop does, but in one pass or in `PASSES`.

    A loop over chunks of 8 frames makes every frame count a graph of its own, with as many copies of the head. Here
    one graph serves all counts below `FEW_FRAMES` and one all others. More passes cost compile time, fewer cost memory:
    of 300 frames a pass holds 50, which also stays below the size (61 frames of 392×518) above which the published
    heads interpolate in parts, a graph of its own.
    """
    frames = images.shape[1]
    if chunk is None or (passes := _passes(frames)) == 1:
        return forward(tokens, images, start, None)
    runs = _runs(frames, passes)
    levels = [[None] * passes if t is None else t.split(runs, 1) for t in tokens]
    parts = [
        forward(list(run), of_run, start, None) for *run, of_run in zip(*levels, images.split(runs, 1), strict=True)
    ]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, 1)
    return tuple(torch.cat(outputs, 1) for outputs in zip(*parts, strict=True))


def flattened_in_few_passes(
    forward: Callable[..., Any], feats: Any, height: int, width: int, start: int, chunk: int | None
) -> Any:
    """The same for a head whose loop runs over batch times frames, and which returns a dictionary.

    Args:
        feats: a sequence for each level, of which the head reads the first: tokens [B, F, P, D].
    """
    frames = feats[0][0].shape[1]
    if chunk is None or (passes := _passes(frames)) == 1:
        return forward(feats, height, width, start, None)
    levels = [feat[0].split(_runs(frames, passes), 1) for feat in feats]
    parts = [forward([(of_run,) for of_run in run], height, width, start, None) for run in zip(*levels, strict=True)]
    return type(parts[0])({name: torch.cat([part[name] for part in parts], 1) for name in parts[0]})


def in_set_passes(
    predict: Callable[..., Tensor], layers: Any, size: tuple[int, int], special: int, chunk: int | None
) -> Tensor:
    """Run a dense head in the passes that an export sets; in a compile in one, as it does by itself.

    Args:
        layers: tokens of some layers, each [B, F, P, C].
    """
    frames = layers[0].shape[1]
    passes = 1 if chunk is None or _fixed_passes is None else _passes(frames)
    if passes == 1:
        return predict(layers, size, special)
    levels = [t.split(_runs(frames, passes), 1) for t in layers]
    return torch.cat([predict(list(run), size, special) for run in zip(*levels, strict=True)], 1)


def _passes(frames: int) -> int:
    if not _enough:
        raise TooManyFrames
    if _fixed_passes is not None:
        return _fixed_passes
    return 1 if frames < FEW_FRAMES else PASSES


def _runs(frames: int, passes: int) -> list[int]:
    """Frames of each pass, alike up to one; numbers to split by, as torch 2.11 cannot tell how long a slice is."""
    cuts = [index * frames // passes for index in range(passes + 1)]
    return [after - before for before, after in itertools.pairwise(cuts)]
