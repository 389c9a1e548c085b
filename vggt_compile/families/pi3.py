"""π³ (arXiv 2507.13347): one list of 36 decoder blocks, even ones inside frames, odd ones global, 5 special tokens."""

from __future__ import annotations

import re

from vggt_compile.registry import Family, Place, family

_BLOCK = re.compile(r"(?:^|\.)decoder\.(\d+)\.attn$")


def place(match: re.Match[str]) -> Place | None:
    index = int(match[1])
    return ("global", index // 2) if index % 2 else ("frame", None)


family(Family("pi3", _BLOCK, place, special=5))
