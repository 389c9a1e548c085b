"""What Triton makes of a kernel for a target: how much shared memory there is, and the loops of the machine code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}
"""Bytes of shared memory of a multiprocessor by target."""


def loops(kernel: Any, folder: Path) -> dict[tuple[int, int], list[str]]:
    """Instructions of each loop by the places of its first and last one; skips where Triton came without the tool."""
    import triton

    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump")
    text = subprocess.run([tool, "-sass", binary], check=True, capture_output=True, text=True).stdout
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", text)]
    jumps = [(int(to[1], 16), at) for at, line in code if (to := re.search(r"BRA\S* .*?0x([0-9a-f]+)", line))]
    return {(start, end): [line for at, line in code if start <= at <= end] for start, end in jumps if start <= end}
