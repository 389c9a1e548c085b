"""Loops in a library: what torch 2.11's writer of C++ forgets, and later ones do as is done here.

A loop that writes into what it carries has an output for each carried value, of which those written in place are kept
apart. That writer pairs the carried values with the other outputs alone and then finds too few. And it asks how much
memory the operations of a body take as if they were those of the graph around, which may have fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import AllocateLine, EfficientPeakEstimate
from torch._inductor.virtualized import V

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

    with mock.patch.object(CppWrapperCpu, "codegen_while_loop", codegen_while_loop), _memory_of_each_graph():
        yield


@contextmanager
def _memory_of_each_graph() -> Iterator[None]:
    """Whether a buffer takes the memory of an older one is decided by how much the graph takes that both are in."""
    note, plan = AllocateLine.__post_init__, AllocateLine.plan
    estimates: dict[Any, EfficientPeakEstimate] = {}

    def __post_init__(line: Any) -> None:
        line.graph = V.graph
        note(line)

    def plan_in_its_graph(line: Any, state: Any) -> Any:
        if line.graph not in estimates:
            with V.set_graph_handler(line.graph):
                estimates[line.graph] = EfficientPeakEstimate()
        line.wrapper.estimate_peak = estimates[line.graph]
        return plan(line, state)

    with (
        mock.patch.object(AllocateLine, "__post_init__", __post_init__),
        mock.patch.object(AllocateLine, "plan", plan_in_its_graph),
    ):
        yield
