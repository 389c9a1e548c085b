"""The plan `auto`: rules for whoever has measured nothing. What they rest on is in docs/auto.md.

A rule can only use what is known while a model is traced: the family, a layer's share of the depth, and whether there
are more tokens than a bound, because frame counts are symbols then. `find_plan` knows weights and images as well.
"""

from __future__ import annotations

from typing import Any

from vggt_compile.published import Entry

SENSITIVE = "0-25%,41.67-87.5%"
"""Layers that published methods spare in VGGT, 10-17 of 24, and where the small π³ loses most, 0, 1 and 6 of 8."""
OTHERS = "25-41.67%,87.5-100%"
WORTH = 6144
"""Tokens at which attention takes as many FLOPs as the rest of its block in models 1024 wide: 4·N²·C = 24·N·C²."""


def _layers(anchored: bool) -> dict[str, Any]:
    """VGGT's first frame, to which coordinates refer, stays whole."""
    merge = {"method": "merge", "ratio": 0.9, "cell": (2, 2), "cells": "seeded", "protect": 0.1, "metric": "input"}
    return {
        SENSITIVE: {"keys": {"method": "grid", "stride": (2, 2), "keep_first_frame": anchored}},
        OTHERS: {"tokens": {**merge, "reference": anchored}},
    }


AUTO = Entry(
    "auto",
    "rules without measuring: one of 2×2 keys in layers known to be sensitive, merged tokens in the others, and all "
    "dense below 6144 tokens",
    "no paper: docs/auto.md",
    {"layers": _layers(anchored=True), "families": {"pi3": _layers(anchored=False)}, "min_tokens": WORTH},
)
