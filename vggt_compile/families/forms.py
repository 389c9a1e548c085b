"""What tracing sees instead: the same values from shapes and positions alone, without numbers read off tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vggt_compile.families.frame_loop import Run, over_frames
from vggt_compile.ops.rotate import rotate

ALWAYS_EXPORTED = torch.__version__.startswith("2.11.")
FEW_FRAMES = 24
PIXELS_AT_ONCE = 61 * 392 * 518
"""Above this many pixels the published heads interpolate in parts, a graph of its own."""

_most: int | None = None
"""Frames that a dense head sees at once, as an export sets it; None in a compile, which decides by their number."""


@contextlib.contextmanager
def dense_heads_see_at_most(frames: int) -> Iterator[None]:
    """Traces inside the block have dense heads see no more frames at once, whatever the number of all is."""
    global _most
    before, _most = _most, frames
    try:
        yield
    finally:
        _most = before


def rotary(tokens: Tensor, positions: Tensor, base: float) -> Tensor:
    """`rotate`, for Dynamo as one operation where no gradients are asked for; an export holds PyTorch's only."""
    if torch.is_grad_enabled() or not torch.compiler.is_dynamo_compiling():
        return rotate(tokens, positions, base)
    turned: Tensor = torch.ops.vggt_compile.rotate.default(tokens, positions, float(base))
    return turned


def grid_positions(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """[batch, height·width, 2]: row and column of every patch, row by row."""
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device)[None].expand(height, width)
    return torch.stack((rows, columns), -1).reshape(1, height * width, 2).expand(batch, -1, -1).clone()


def head_in_runs(forward: Callable[..., Any], tokens: Any, images: Tensor, start: int, chunk: int | None) -> Any:
    """Run a dense head over runs of frames, as its own loop does, but in one graph for every count of frames.

    A trace unrolls the loop of the model, over chunks of 8 frames, so that every frame count is a graph of its own,
    with as many copies of the head. Here few frames are one run, and more are a loop that stays one in the graph.
    """

    def run(at: Callable[[Tensor], Tensor]) -> Any:
        return forward(_Chosen(tokens, at), at(images), start, None)

    return _in_runs(run, images.shape[1], chunk, images.device)


class _Chosen:
    """Some frames of the tokens of each layer, taken when a head asks: what it leaves alone is no operand of a loop."""

    def __init__(self, layers: Any, at: Callable[[Tensor], Tensor]) -> None:
        self.layers, self.at = layers, at

    def __getitem__(self, layer: int) -> Tensor:
        return self.at(self.layers[layer])

    def __len__(self) -> int:
        return len(self.layers)


def flattened_head_in_runs(
    forward: Callable[..., Any], feats: Any, height: int, width: int, start: int, chunk: int | None
) -> Any:
    """The same for a head whose loop runs over batch times frames, and which returns a dictionary.

    Args:
        feats: a sequence for each level, of which the head reads the first: tokens [B, F, P, D].
    """
    tokens = feats[0][0]
    frames = tokens.shape[1]

    def run(at: Callable[[Tensor], Tensor]) -> Any:
        return forward([(at(feat[0]),) for feat in feats], height, width, start, None)

    if chunk is None or _at_once(frames):
        return run(lambda x: x)
    made = _looped(lambda at: dict(run(at)), frames, chunk, tokens.device)
    # Loops know plain dictionaries only. What one frame gives tells the class; nobody reads it, so nobody computes it.
    return type(run(lambda x: x[:, :1]))(made)


def own_head_in_runs(
    predict: Callable[..., Tensor], layers: Any, size: tuple[int, int], special: int, chunk: int | None
) -> Tensor:
    """The same for the dense head written here; all frames at once where somebody else than `export` exports it.

    Args:
        layers: tokens of some layers, each [B, F, P, C].
    """
    if _most is None and _exported():
        return predict(layers, size, special)  # to compare the number of frames would cut the range that is asked for

    def run(at: Callable[[Tensor], Tensor]) -> Tensor:
        return predict([at(tokens) for tokens in layers], size, special)

    made: Tensor = _in_runs(run, layers[0].shape[1], chunk, layers[0].device)
    return made


def _exported() -> bool:
    """Whether torch.export traces; Dynamo of torch 2.11 takes each of its traces for that."""
    return torch.compiler.is_exporting() and not (ALWAYS_EXPORTED and torch.compiler.is_dynamo_compiling())


def _in_runs(run: Run, frames: int, chunk: int | None, device: torch.device) -> Any:
    if chunk is None or _at_once(frames):
        return run(lambda x: x)
    return _looped(run, frames, chunk, device)


def _at_once(frames: int) -> bool:
    """Whether a head sees all frames in one go, without a loop. An export may not ask a symbolic number."""
    if _most is None:
        return frames < FEW_FRAMES
    return isinstance(frames, int) and frames <= _most


def _looped(run: Run, frames: int, chunk: int, device: torch.device) -> Any:
    """Runs of a length that the code knows, or in an export, where one graph serves few frames too, of equal length."""
    most, exported = min(chunk, _most or chunk), _most is not None
    return over_frames(lambda rows: run(lambda x: x.index_select(1, rows)), frames, most, device, equal=exported)
