"""What of a GPU's graph runs on the CPU is compiled as it is: without vectors, and without headers compiled ahead.

A loop counts its turns on the CPU, and upstream's VGGT makes a few zeros there. Before Inductor writes C++ for them, it
finds out which vector instructions work: it compiles a program for each sort and starts a Python with torch for each
program, also where all of them are compiled already. On an H200's host that was 57 of the 155 seconds of a first call
(docs/benchmarks/compile-time.md). Headers that it then compiles ahead take 3 seconds, which no other work goes on in,
and a few such kernels, or one library, gain less by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._inductor import cpu_vec_isa

AS_THEY_ARE = {"cpp_cache_precompile_headers": False, "aot_inductor.precompile_headers": False}
"""Settings of Inductor, which one that a user gives for a compile or an export goes before."""


@contextmanager
def scalar_beside_a_gpu(tensors: Iterable[object]) -> Iterator[None]:
    """For one compile, where any of its tensors is on a GPU. What Inductor knows of the CPU already stays as it is."""
    if not any(isinstance(x, Tensor) and x.is_cuda for x in tensors):
        yield
        return
    inductor: Any = cpu_vec_isa
    find, inductor.valid_vec_isa_list = inductor.valid_vec_isa_list, list
    try:
        with torch._inductor.config.patch(AS_THEY_ARE):
            yield
    finally:
        inductor.valid_vec_isa_list = find
