"""The tables of docs/theory.md are what the code computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_tables_of_the_theory_page_are_as_computed() -> None:
    subprocess.run([sys.executable, "docs/theory.py", "--check"], cwd=ROOT, check=True, timeout=600)
