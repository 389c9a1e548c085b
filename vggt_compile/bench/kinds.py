"""Kernels of a call by what they do, read off their names: which of two compiled models spends more, and on what."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypedDict

from vggt_compile.bench.parts import Kernel

TRITON, ORDER, CONVOLUTIONS, OTHER = "triton", "order", "convolutions", "other"
"""Inductor's kernels; copies of one order of dimensions into another; convolutions of a library; all else."""

KINDS = (
    (TRITON, re.compile(r"triton_")),
    (ORDER, re.compile(r".*([Nn](chw|hwc)To|convertTensor)")),
    (CONVOLUTIONS, re.compile(r".*((?<!flash_)fprop|dgrad|implicit_gemm|convolve)")),
)


class Sum(TypedDict):
    """How many kernels, and what they took in milliseconds."""

    kernels: int
    ms: float


def kind_of(name: str) -> str:
    return next((kind for kind, names in KINDS if names.match(name)), OTHER)


def by_kind(kernels: Iterable[Kernel]) -> dict[str, Sum]:
    """The sums of each kind that there is."""
    found: dict[str, Sum] = {}
    for kernel in kernels:
        one = found.setdefault(kind_of(kernel.name), {"kernels": 0, "ms": 0.0})
        one["kernels"] += 1
        one["ms"] += kernel.milliseconds
    return {kind: {"kernels": one["kernels"], "ms": round(one["ms"], 2)} for kind, one in sorted(found.items())}
