"""Loops in a library: what torch 2.11's writer of C++ forgets of one that writes into what it carries.

Such a loop has an output for each carried value, of which those written in place are kept apart. That writer pairs the
carried values with the other outputs alone and then finds too few; later ones pair them as is done here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

SETTINGS = {"unbacked_symint_fallback": 0}
"""Of Inductor. It tries kernels out while it writes a library, those in a loop as if in this turn: every loop has it.
By default that is turn 8192, whose memory would lie far behind what is there."""


@contextmanager
def written_whole() -> Iterator[None]:
    """Compiles inside the block write such loops, whichever torch this is."""
    if hasattr(CppWrapperCpu, "_get_while_loop_carried_output_names"):
        yield
        return
    write = CppWrapperCpu.codegen_while_loop

    def codegen_while_loop(self: Any, loop: Any, stack_output: bool = False) -> None:
        in_place = {name: output for output in loop.mutation_outputs for name in output.get_mutation_names()}
        before, others = loop.outputs, iter(loop.outputs)
        loop.outputs = [in_place.get(carried.get_name()) or next(others) for carried in loop.carried_inputs]
        try:
            write(self, loop, stack_output)
        finally:
            loop.outputs = before

    with mock.patch.object(CppWrapperCpu, "codegen_while_loop", codegen_while_loop):
        yield
