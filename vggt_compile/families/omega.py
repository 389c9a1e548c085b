"""VGGT-Ω (arXiv 2605.15195): 24 frame and 24 inter-frame blocks in turn, 17 special tokens a frame.

Some inter-frame blocks see special tokens only. Their path claims to be global, their shape does not agree, and shapes
decide: they are not attention over frames. Layers keep the index of their block, so those blocks leave gaps.
"""

from __future__ import annotations

import re

from vggt_compile.registry import Family, Place, family

_BLOCK = re.compile(r"(?:^|\.)aggregator\.(frame|inter_frame)_blocks\.(\d+)\.attn$")


def place(match: re.Match[str]) -> Place | None:
    return ("global", int(match[2])) if match[1] == "inter_frame" else ("frame", None)


family(Family("omega", _BLOCK, place, special=17))
