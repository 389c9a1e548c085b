"""Published methods as plans: a few lines each, with their source and their figures as these are quoted.

Layers are shares of the depth, so that a plan names layers 0-8 of VGGT's 24 and as many in proportion of other models.
Where a paper gives layers of VGGT only, those of π³ are in proportion too. VGGT keeps the frame whole that its
coordinates refer to, π³ has no such frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One plan in the plan language.

    Attributes:
        summary: one line for people.
        source: the paper or page that it follows.
        figures: what the source reports, with model, data and machine; empty where nothing is quoted.
    """

    name: str
    summary: str
    source: str
    plan: dict[str, Any]
    figures: str = ""


_G2F = {"scope": "frame"}
_WORTH_CHOOSING = 8192
"""Tokens from which leaving out blocks is faster than dense, choosing them included (docs/benchmarks/short.md)."""


def _faster_vggt(percent: int, keep: float, cdf: float, measured: str) -> Entry:
    """One of the published settings, where 1 − keep is the paper's ρ and cdf its τ; it sets no upper bound."""
    return Entry(
        f"faster_vggt-{percent}",
        "every global layer reads blocks of keys chosen by their means",
        f"Faster VGGT, arXiv 2509.07120, supplement: ρ = {1 - keep:.0%}, τ = {cdf:g}",
        {
            "layers": {"*": {"blocks": {"method": "predict", "keep": keep, "cdf": cdf, "most": 1.0}}},
            "min_tokens": _WORTH_CHOOSING,
        },
        f"{measured} of VGGT's pairs are skipped",
    )


def _avggt(name: str, stride: tuple[int, int], figures: str) -> Entry:
    """AVGGT(σ) with σ = rows · columns of a window."""

    def thinned(keep_first_frame: bool) -> dict:
        keys = {"method": "grid", "stride": stride, "own_key": True, "mean_key": "one"}
        return {"keys": {**keys, "keep_first_frame": keep_first_frame}}

    rows, columns = stride
    return Entry(
        name,
        f"`g2f`, and later global layers read one patch of each {rows}×{columns} window, a query's own, and the mean "
        "of the others",
        f"AVGGT, arXiv 2512.02541, σ = {rows * columns}",
        {
            "layers": {"0-37.5%": _G2F, "37.5-100%": thinned(keep_first_frame=True)},
            "families": {"pi3": {"0-55%": _G2F, "55-100%": thinned(keep_first_frame=False)}},
        },
        figures,
    )


def _fastvggt() -> Entry:
    """FastVGGT as its code has it."""
    tokens = {"method": "merge", "ratio": 0.9, "cell": (2, 2), "cells": "seeded", "protect": 0.1, "metric": "input"}
    return Entry(
        "fastvggt",
        "in every global layer two thirds of the tokens merge into similar ones",
        "FastVGGT, arXiv 2509.02560",
        {
            "layers": {"*": {"tokens": {**tokens, "reference": True}}},
            "families": {"pi3": {"*": {"tokens": {**tokens, "reference": False}}}},
        },
        "VGGT, 500 frames of ScanNet-50, A800: Chamfer distance 0.420 → 0.411, 3.2 times as fast",
    )


def _httm() -> Entry:
    tokens = {"method": "merge_heads", "queries": 0.9, "outliers": 0.1, "keys": 0.7, "patches": 128, "frames": 30}
    return Entry(
        "httm",
        "in every global layer each head merges 90 % of its queries, save the worst tenth, and 70 % of its keys",
        "HTTM, arXiv 2511.21317",
        {"layers": {"*": {"tokens": tokens}}},
        "VGGT, A100: 100 frames 2.1, 300 frames 3.7, 1000 frames 7.0 times as fast; NRGBD Acc 0.010 → 0.012",
    )


_CELLS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3), 12: (3, 4)}
"""Cells of so many patches, as square as can be."""


def _spark3r(name: str, frames: int, queries: int, figures: str) -> Entry:
    """Spark3R for up to so many frames: rates of queries as in the paper, of keys ⌈frames / 40⌉ above 100 frames.

    Both are three times as high outside layers 11-16 of VGGT.
    """
    keys = 1 if frames <= 100 else -(-frames // 40)

    def policy(factor: int) -> dict:
        tokens = {"method": "merge_queries", "cell": _CELLS[queries * factor], "frames": 20}
        return {"tokens": tokens, "keys": {"method": "grid", "stride": (1, 1), "frames": keys * factor}}

    layers = {"0-45.83%,70.83-100%": policy(3)}
    return Entry(
        name,
        f"up to {frames} frames: outside layers 11-16, {3 * queries} queries of 20 frames merge into one and one of "
        f"{3 * keys} frames has keys of patches; in these layers it is {queries} and {keys}",
        f"Spark3R, arXiv 2605.06270, for up to {frames} frames",
        {"layers": layers if keys == queries == 1 else {**layers, "45.83-70.83%": policy(1)}},
        figures,
    )


def _regime() -> Entry:
    """RegimeVGGT without its saliency: a tenth of the patches is protected evenly instead."""

    def policy(ratio: float, tile: tuple[int, int] | None, reference: bool) -> dict:
        tokens = {"method": "merge", "ratio": ratio, "cells": "seeded", "seed": 33, "metric": "input"}
        made: dict[str, Any] = {"tokens": {**tokens, "reference": reference, "weight": "log_count"}}
        if tile is not None:
            size, kept = tile
            made["keys"] = {"method": "grid", "stride": (size, size), "kept": (kept, kept), "phase": "shifted"}
        return made

    def layers(reference: bool) -> dict:
        return {
            "0-41.67%": policy(0.99, (3, 2), reference),
            "41.67-58.33%": policy(0.5, None, reference),
            "58.33-75%": policy(0.5, (4, 3), reference),
            "75-100%": policy(0.99, (5, 3), reference),
        }

    return Entry(
        "regime",
        "tokens merge, fewer of them in layers 10-17, and weigh as much as they stand for; outside layers 10-13 keys "
        "that are left are thinned on a grid that moves from frame to frame",
        "RegimeVGGT, arXiv 2606.18439",
        {"layers": layers(reference=True), "families": {"pi3": layers(reference=False)}},
        "VGGT, H800: 6.7 times as fast; ScanNet-50, 1000 frames: Chamfer distance 0.472 in 71.7 s",
    )


ENTRIES: tuple[Entry, ...] = (
    Entry("dense", "nothing is rewritten: the model in one graph, memory-lean", "the model's own paper", {}),
    Entry(
        "g2f",
        "early global layers attend inside their frame: layers 0-8 of VGGT, the first 10 global ones of π³, "
        "as many in proportion at other depths",
        "AVGGT, arXiv 2512.02541, its first step (G2F)",
        {"layers": {"0-37.5%": _G2F}, "families": {"pi3": {"0-55%": _G2F}}},
        "VGGT, 10 frames of RealEstate10K: AUC@30 88.1 → 88.0",
    ),
    _avggt("avggt", (2, 2), "the same as `avggt-4`"),
    _avggt("avggt-2", (1, 2), "VGGT, 10 frames of RealEstate10K: AUC@30 88.1 → 87.8"),
    _avggt("avggt-4", (2, 2), "VGGT, 90 frames of TUM-dynamics: ATE 0.012 → 0.012, 2.1 times as fast"),
    _avggt("avggt-6", (2, 3), ""),
    _avggt("avggt-9", (3, 3), "VGGT, 800 frames of 7-Scenes: AUC@30 74.2 → 77.4, 7.9 times as fast"),
    _fastvggt(),
    _httm(),
    _spark3r("spark3r", 300, 2, "the same as `spark3r-300`"),
    _spark3r("spark3r-100", 100, 1, ""),
    _spark3r("spark3r-300", 300, 2, ""),
    _spark3r("spark3r-500", 500, 3, ""),
    _spark3r("spark3r-1000", 1000, 4, "H20, 1000 frames: VGGT 27, π³ 24 times as fast; ScanNet ATE 0.156 → 0.065"),
    _regime(),
    _faster_vggt(25, keep=0.5, cdf=0.9, measured="25.5 %"),
    _faster_vggt(50, keep=0.5, cdf=0.7, measured="45 %"),
    _faster_vggt(75, keep=0.2, cdf=0.4, measured="74.8 %"),
)
