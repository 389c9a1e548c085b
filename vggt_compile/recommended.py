"""Our own recipes: one that loses nothing, and what the accuracy bench leaves standing and the GPU finds fast.

`exact` leaves nothing out (docs/passes.md), nor does `fast` in its outer layers. In others `fast` and `turbo` thin keys
(docs/recipes.md): of all that was tried, reading fewer patches loses least for the time it saves, and the middle half
of the depth can spare most. The place of a window stays: where it moves from frame to frame, accuracy is no better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vggt_compile.published import Entry

MOST_FRAMES = 100
"""Of longer sequences `turbo` reads patches of fewer of the frames: time grows as their number, not faster."""

SHORT = 8192
"""Tokens below which `exact` keeps PyTorch's attention: our kernel was timed beside it with 16,656 tokens and more."""


def _keys(stride: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {"keys": {"method": "grid", "stride": stride, **more}}


def _fast(keep_first_frame: bool) -> dict[str, Any]:
    return {"0-25%,75-100%": {"blocks": "all"}, "25-75%": _keys((2, 2), keep_first_frame=keep_first_frame)}


def _turbo(keep_first_frame: bool) -> dict[str, Any]:
    """As many keys in the outer layers as one of 2×2 windows, but of half of the frames: of videos that loses less."""
    outer = _keys((1, 2), frames=2, most_frames=MOST_FRAMES // 2, keep_first_frame=keep_first_frame)
    middle = _keys((2, 3), most_frames=MOST_FRAMES, keep_first_frame=keep_first_frame)
    return {"0-25%": outer, "25-75%": middle, "75-100%": outer}


def _entry(name: str, summary: str, layers: Callable[[bool], dict[str, Any]]) -> Entry:
    """VGGT's first frame, to which coordinates refer, keeps all its keys."""
    written = {"layers": layers(True), "families": {"pi3": layers(False)}}
    return Entry(name, summary, "this project's benchmarks", written)


EXACT = Entry(
    "exact",
    f"nothing is left out: on Hopper GPUs this package's kernel computes global attention over {SHORT} tokens or more",
    "this project's kernel",
    {"layers": {"*": {"blocks": "all"}}, "min_tokens": SHORT},
)

ENTRIES: tuple[Entry, ...] = (
    EXACT,
    _entry(
        "fast",
        "in the middle half of the depth global layers read one patch of each 2×2 window, in the others all: safe",
        _fast,
    ),
    _entry(
        "turbo",
        "global layers read one patch of each 1×2 window of every second frame, in the middle half of the depth of "
        f"each 2×3 window of every frame, of {MOST_FRAMES // 2} and {MOST_FRAMES} frames at most",
        _turbo,
    ),
)
