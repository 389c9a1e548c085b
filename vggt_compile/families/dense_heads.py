"""Dense heads that loop over chunks of frames, as a loop of the graph, so that one graph serves every frame count.

A loop over chunks of fixed length is unrolled by a trace, so every count of frames would be a graph of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import Tensor

from vggt_compile.families.forms import flattened_head_in_runs, head_in_runs, own_head_in_runs
from vggt_compile.families.shim import Shim, by_name, names_in


def recognise(cls: type) -> Iterator[Shim]:
    """The shim of a dense head; none for any other class."""
    if _loops_over_flattened_frames(cls):
        yield _runs_of_flattened(cls)
    if _loops_over_frames(cls):
        yield _runs(cls)
    if _skips_its_loop(cls):
        yield _own_runs(cls)


def _loops_over_frames(cls: type) -> bool:
    """A dense head: forward(tokens, images, start, frames_chunk_size) with a Python loop over chunks of frames."""
    function = vars(cls).get("forward")
    return (
        {"range", "cat"} <= names_in(cls, "forward", 4)
        and isinstance(function, FunctionType)
        and (function.__code__.co_varnames[2:5:2] == ("images", "frames_chunk_size"))
    )


def _runs(cls: type) -> Shim:
    forward = vars(cls)["forward"]

    def form(self: Any, tokens: Any, images: Tensor, start: int, chunk: int | None = 8) -> Any:
        return head_in_runs(functools.partial(forward, self), tokens, images, start, chunk)

    what = "a loop in the graph, the same one for every frame count"
    return Shim(cls, "forward", forward, by_name(forward, form), what)


def _loops_over_flattened_frames(cls: type) -> bool:
    """A dense head: forward(feats, H, W, patch_start_idx, chunk_size) that makes batch and frames one axis."""
    function = vars(cls).get("forward")
    return (
        {"range", "reshape"} <= names_in(cls, "forward", 5)
        and isinstance(function, FunctionType)
        and function.__code__.co_varnames[1:6] == ("feats", "H", "W", "patch_start_idx", "chunk_size")
        and not function.__code__.co_flags & inspect.CO_VARKEYWORDS  # what it takes there would have to be cut as well
    )


def _runs_of_flattened(cls: type) -> Shim:
    forward = vars(cls)["forward"]

    def form(self: Any, feats: Any, height: int, width: int, start: int, chunk: int | None = 8) -> Any:
        return flattened_head_in_runs(functools.partial(forward, self), feats, height, width, start, chunk)

    what = "a loop in the graph, the same one for every frame count"
    return Shim(cls, "forward", forward, by_name(forward, form), what)


def _skips_its_loop(cls: type) -> bool:
    """The dense head written here: forward(layers, image_size, special) with a loop over frames for eager mode only."""
    return {"is_compiling", "chunk", "predict"} <= names_in(cls, "forward", 3)


def _own_runs(cls: type) -> Shim:
    forward = vars(cls)["forward"]

    def form(self: Any, layers: Any, size: tuple[int, int], special: int) -> Tensor:
        return own_head_in_runs(self.predict, layers, size, special, self.chunk)

    return Shim(
        cls, "forward", forward, by_name(forward, form), "a loop in the graph, the same one for every frame count"
    )
