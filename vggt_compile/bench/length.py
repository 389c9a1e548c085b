"""How many frames fit: peak memory is a line in the number of frames, so a few counts tell where a card is full.

Nothing in a rewritten model grows faster than its tokens. The line through the measured peaks is a model: it is said as
one, and `check` is the largest error that it makes on what was measured. Counts that dense heads see at once are on a
steeper line, which says nothing of longer ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from vggt_compile.families.forms import FEW_FRAMES

CARDS = {24: 24.0, 48: 48.0, 80: 80.0, 141: 139.8}
"""GiB on cards by the number on their box, as their drivers tell it to within a few hundredths."""
RESERVE = 1.5
"""GiB that a process has no use of: its context, and room between allocations."""


@dataclass(frozen=True)
class Line:
    """Peak GiB = fixed + per_frame · frames, by least squares.

    Attributes:
        check: largest difference in GiB between the line and a measured peak.
        measured: frame counts that were measured.
    """

    fixed: float
    per_frame: float
    check: float
    measured: tuple[int, ...]

    def frames(self, gib: float) -> int:
        """The most frames that fit into so much memory."""
        return max(0, int((gib - RESERVE - self.fixed) / self.per_frame))


def line(peaks: Mapping[int, float]) -> Line:
    """The line through peaks in GiB by frame count, two of them at least."""
    frames, gib = np.array(sorted(peaks)), np.array([peaks[n] for n in sorted(peaks)])
    per_frame, fixed = np.polyfit(frames, gib, 1)
    check = np.abs(fixed + per_frame * frames - gib).max()
    return Line(float(fixed), float(per_frame), float(check), tuple(sorted(peaks)))


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The most frames by variant and card; nothing of variants that were measured at fewer than three long counts."""
    peaks: dict[str, dict[int, float]] = {}
    for row in rows:
        if "peak_gib" in row and row["frames"] >= FEW_FRAMES:
            peaks.setdefault(row["variant"], {})[row["frames"]] = row["peak_gib"]
    lines = {name: line(found) for name, found in peaks.items() if len(found) >= 3}
    cells = [
        (name, f"{one.fixed:.1f} + {one.per_frame:.4f} n", f"{one.check:.2f}", *(one.frames(g) for g in CARDS.values()))
        for name, one in lines.items()
    ]
    headers = ("variant", "peak GiB of n frames", "off by", *(f"{name} GB" for name in CARDS))
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True) if cells else ""


def section(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """How many frames fit on which card, for a page; nothing where too few counts were measured."""
    found = table(rows)
    about = (
        "A line through the measured peaks, and the frames at which it reaches what a card has, less "
        f"{RESERVE:g} GiB.\nUp to the largest count above it is measured; beyond it is this model."
    )
    return ["\n## How many frames fit\n", about, "", found] if found else []
