"""Writes the tables of docs/theory.md and its picture, all from fixed seeds.

python docs/theory.py            # writes them
python docs/theory.py --check    # exits with 1 where a table is old; leaves the picture alone
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tabulate import tabulate

from vggt_compile.analysis import agreement
from vggt_compile.analysis.agreement import Row, slope
from vggt_compile.analysis.collapse import collapse

PAGE = Path(__file__).parent / "theory.md"
PICTURE = Path(__file__).parent / "pictures" / "theory.png"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
CELLS = (25, 50, 100, 200)
COUNTS = (16, 32, 64, 128, 256)
DEPTHS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
MERGED = (1e6, 3e5, 1e5, 3e4, 1e4, 3e3, 1e3)


def table(rows: Sequence[Row], rates: Sequence[tuple[str, str]] = (), last: int | None = None) -> str:
    """Rows to three digits, and below them the slopes of columns, over the `last` rows where it is given."""
    shown = [[shortened(name, value) for name, value in row.items()] for row in rows]
    if rates:
        found = {value: f"**{slope(rows[-last:] if last else rows, size, value):.2f}**" for size, value in rates}
        shown.append([found.get(name, "" if index else "slope") for index, name in enumerate(rows[0])])
    return tabulate(shown, headers=list(rows[0]), tablefmt="github", disable_numparse=True) + "\n"


def shortened(name: str, value: float) -> str:
    """Three digits; only the size of a rounding error."""
    if name == "mass − 1":
        return "0" if value == 0 else f"{abs(value):.0e}"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"


def exact() -> str:
    return table(agreement.grid_against_exact(CELLS), [("cells", "error")])


def grid() -> str:
    return table(agreement.grid_against_rings(CELLS), [("cells", "error")])


def particles() -> str:
    return table(agreement.particles_against_field(COUNTS, seeds=128), [("tokens", "error")])


def equation() -> str:
    rows = agreement.particles_against_equation((1e-4, 1e-6, 1e-8, 1e-10))
    return table(rows, [("tolerance", "norm after"), ("tolerance", "norm before")])


def clouds() -> str:
    return table(agreement.clouds_against_equation((16, 64, 256, 1024)), [("width", "error")])


def depth() -> str:
    rows = collapse(DEPTHS)
    return table(rows, [("depth", name) for name in rows[0] if name != "depth"], last=3)


def spectra() -> str:
    narrow = agreement.spectra((125, 250, 500, 1000), 0.5)
    wide = agreement.spectra((1000,), 1.0) + agreement.spectra((1000,), 1.5)
    return table(narrow, [("tokens", "second"), ("tokens", "second, formula")]) + "\n" + table(wide)


def merging() -> str:
    parts = (f"β = {beta:g}:\n\n{table(agreement.merged(1e6, MERGED, beta))}" for beta in (4.0, 12.0))
    return "\n" + "\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (exact, grid, particles, equation, clouds, depth, spectra, merging)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is old")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    filled = MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)
    if check:
        print("old: docs/theory.md" if filled != text else "docs/theory.md is as computed")
        return int(filled != text)
    PAGE.write_text(filled, encoding="utf-8")
    from theory_picture import draw

    draw(PICTURE)
    print(f"{PAGE.name} and {PICTURE.name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
