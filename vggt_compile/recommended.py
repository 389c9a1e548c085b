"""Our own recipes: what the accuracy bench leaves standing and the GPU finds fast (docs/recipes.md).

Both thin keys and touch nothing else. Of all that was tried, queries that read fewer patches of every frame lose least
for what they save. The place of a window stays: where it moves from frame to frame, accuracy is the same or worse.
"""

from __future__ import annotations

from typing import Any

from vggt_compile.published import Entry

MOST_FRAMES = 100
"""Of longer sequences `turbo` reads patches of every second, third, … frame: time grows as their length, not faster."""


def _keys(stride: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {"keys": {"method": "grid", "stride": stride, **more}}


def _turbo(keep_first_frame: bool) -> dict[str, Any]:
    """VGGT's first frame, to which coordinates refer, keeps all its keys."""
    more = {"most_frames": MOST_FRAMES, "keep_first_frame": keep_first_frame}
    return {"0-75%": _keys((2, 3), **more), "75-100%": _keys((2, 2), **more)}


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "fast",
        "global layers read one patch of each 1×2 window: safe",
        "this project's benchmarks",
        {"layers": {"*": _keys((1, 2))}},
    ),
    Entry(
        "turbo",
        "global layers read one patch of each 2×3 window, in the last quarter of the depth 2×2, of "
        f"{MOST_FRAMES} frames at most",
        "this project's benchmarks",
        {"layers": _turbo(keep_first_frame=True), "families": {"pi3": _turbo(keep_first_frame=False)}},
    ),
)
