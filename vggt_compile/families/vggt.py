"""VGGT (arXiv 2503.11651) and its forks: 24 frame blocks and 24 global blocks in turn, 5 special tokens a frame."""

from __future__ import annotations

import re

from vggt_compile.registry import Family, Place, family

_BLOCK = re.compile(r"(?:^|\.)(frame|global)_blocks\.(\d+)\.attn$")


def place(match: re.Match[str]) -> Place | None:
    return ("global", int(match[2])) if match[1] == "global" else ("frame", None)


family(Family("vggt", _BLOCK, place, special=5))
