"""Depth Anything 3 (arXiv 2511.10647): the upper half of one ViT alternates between frames and all tokens.

Which blocks are global depends on the size of the model, so shapes tell. Layers count the global blocks from 0.
"""

from __future__ import annotations

import re

from vggt_compile.registry import Family, Place, family

_BLOCK = re.compile(r"(?:^|\.)pretrained\.blocks\.(\d+)\.attn$")


def place(match: re.Match[str]) -> Place | None:
    return None


family(Family("da3", _BLOCK, place, special=1))
