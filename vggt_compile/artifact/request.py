"""What an artifact shall serve, cut into the graphs that serve it: ranges of frame counts, image sizes, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vggt_compile.errors import BadInput
from vggt_compile.families.forms import PIXELS_AT_ONCE

Size = tuple[int, int]
"""Height and width in pixels."""
Range = tuple[int, int]
"""From the first number to the second, both included."""
DYNAMIC_FROM = 3
"""The published models treat one and two frames apart, so these counts have graphs of their own."""
PRECISIONS = ("fp32", "autocast", "bf16")
CAN_LOOP = not torch.__version__.startswith("2.11.")
"""AOTInductor of torch 2.11 gives the graph of a loop fewer inputs than it has."""
CHUNK = 8
"""Frames that a dense head sees at once where it loops over runs of them, as in the published models."""
GENERIC = (61, 59, 53, 47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7, 5)


@dataclass(frozen=True)
class Span:
    """One graph: the frame counts, batches and image size (height, width) that it serves.

    `run` is how many of its frames a dense head that cuts frames into chunks sees at once; 0 means all of them, in so
    many `passes` of equal length.
    """

    frames: Range
    batch: Range
    size: tuple[int, int]
    run: int = 0
    passes: int = 1

    def __str__(self) -> str:
        (low, high), (height, width) = self.frames, self.size
        return f"{low}-{high} frames of {height}×{width}" if low < high else f"{low} frames of {height}×{width}"

    def serves(self, batch: int, frames: int, size: tuple[int, int]) -> bool:
        return size == self.size and _within(frames, self.frames) and _within(batch, self.batch)

    def fits(self) -> bool:
        """Whether a dense head may see as many frames at once as a trace for this span has it see."""
        height, width = self.size
        at_once = self.run or -(-self.frames[1] // self.passes)
        return at_once * self.batch[1] * height * width <= PIXELS_AT_ONCE

    @property
    def name(self) -> str:
        """Of its entry in the package."""
        return "frames_{}_{}_batch_{}_{}_size_{}x{}".format(*self.frames, *self.batch, *self.size)

    def example(self) -> tuple[int, int]:
        """(batch, frames) to trace and compile with: what is seen of it is taken for granted, see `assumed`.

        Many frames, so that nothing that grows with them is one, and a number that other sizes hardly have.
        """
        low, high = self.frames
        frames = next((n for n in GENERIC if low <= n <= high and n not in self.size), None)
        if frames is None:
            frames = next((n for n in range(low, high + 1) if n not in self.size), high)
        return (self.batch[0] if self.batch[0] == self.batch[1] else max(2, self.batch[0])), frames


def spans(frames: Range, batch: Range, size: tuple[int, int]) -> list[Span]:
    """The graphs for one image size, the one with the most frame counts first."""
    low, high = frames
    few = range(low, min(high + 1, DYNAMIC_FROM))
    static = [Span((n, n), items, size) for n in few for items in _one_and_more(batch)]
    low = max(low, DYNAMIC_FROM)
    return sorted(
        (*([Span((low, high), batch, size)] if low <= high else []), *static),
        key=lambda span: span.frames[0] - span.frames[1],
    )


def in_runs(span: Span) -> list[Span]:
    """A graph for as many frames as a dense head may see at once, and one that loops over runs of them."""
    low, high = span.frames
    cut = _at_once(span)
    if not CAN_LOOP:
        return _in_passes(span)
    few = [] if low > cut else [replace(span, frames=(low, min(cut, high)))]
    many = [] if high <= cut else [replace(span, frames=(max(low, cut + 1), high), run=min(CHUNK, cut))]
    return [*many, *few]


def _in_passes(span: Span) -> list[Span]:
    """Without loops: more frames are more passes, each of which is a part of the graph."""
    low, high = span.frames
    cut = max(2, _at_once(span))
    cuts = []
    while low <= high:
        passes = 1 if high <= cut else -(-high // cut)
        first = low if passes == 1 else max(low, min(cut + 1, high), 2 * passes)
        cuts.append(replace(span, frames=(first, high), passes=passes))
        high = first - 1
    return cuts


def _at_once(span: Span) -> int:
    height, width = span.size
    return max(1, PIXELS_AT_ONCE // (height * width * span.batch[1]))


def _one_and_more(batch: Range) -> list[Range]:
    """Of few frames, one scene and several are different graphs as well."""
    low, high = batch
    return [batch] if low > 1 or high == 1 else [(1, 1), (2, high)]


def read_range(what: str, given: int | Sequence[int]) -> Range:
    """A number, or the least and the greatest."""
    numbers = (given, given) if isinstance(given, int) else tuple(given)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if len(numbers) != 2 or not whole or not 1 <= numbers[0] <= numbers[1]:
        raise BadInput(f"{what} is a number from 1 on or (least, greatest), not {given!r}")
    return numbers[0], numbers[1]


def read_precision(given: str) -> str:
    if given not in PRECISIONS:
        from vggt_compile.errors import UnknownName

        raise UnknownName("precision", given, PRECISIONS)
    return given


def _within(number: int, among: Range) -> bool:
    return among[0] <= number <= among[1]
