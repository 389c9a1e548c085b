"""What an artifact shall serve, cut into the graphs that serve it: ranges of frame counts, image sizes, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vggt_compile.errors import BadInput
from vggt_compile.families.forms import PIXELS_AT_ONCE

Size = tuple[int, int]
"""Height and width in pixels."""
Range = tuple[int, int]
"""From the first number to the second, both included."""
DYNAMIC_FROM = 3
"""The published models treat one and two frames apart, so these counts have graphs of their own."""
PRECISIONS = ("fp32", "autocast", "bf16")
CHUNK = 8
"""Frames that a dense head of a published model sees at once."""
GENERIC = (61, 59, 53, 47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7, 5)


@dataclass(frozen=True)
class Span:
    """One graph: the frame counts, batches and image size (height, width) that it serves."""

    frames: Range
    batch: Range
    size: tuple[int, int]

    def __str__(self) -> str:
        (low, high), (height, width) = self.frames, self.size
        return f"{low}-{high} frames of {height}×{width}" if low < high else f"{low} frames of {height}×{width}"

    def serves(self, batch: int, frames: int, size: tuple[int, int]) -> bool:
        return size == self.size and _within(frames, self.frames) and _within(batch, self.batch)

    @property
    def at_once(self) -> int:
        """Frames that a dense head sees at once where it cuts them into chunks."""
        height, width = self.size
        return max(1, min(CHUNK, PIXELS_AT_ONCE // (height * width * self.batch[1])))

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
