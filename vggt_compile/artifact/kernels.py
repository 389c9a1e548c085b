"""Kernels that a compiler cannot take into its own code, as C++ for one program: what its artifact takes along."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.graph import GraphLowering
from torch.fx import GraphModule

from vggt_compile.attentions import attentions
from vggt_compile.ops import hopper
from vggt_compile.ops.hopper_variant import Variant

log = logging.getLogger(__name__)

Functions = dict[torch._ops.OpOverload, list[str]]
"""C functions by the operators that they are."""

ASSEMBLER = "TRITON_PTXAS_PATH"
OPTION = "aot_inductor.custom_ops_to_c_shims"


@contextmanager
def called_as_functions(gm: GraphModule) -> Iterator[None]:
    """A compile inside the block calls such kernels of a program, of which machine code is made meanwhile.

    Inductor asks for it when it writes code, half of a compile later.
    """
    write = GraphLowering.codegen_with_cpp_wrapper
    with ThreadPoolExecutor(1) as beside:
        made = beside.submit(c_functions, variants(gm))

        def codegen_with_cpp_wrapper(graph: GraphLowering) -> Any:
            given = config.get_config_copy()[OPTION]
            with config.patch({OPTION: {**given, **made.result()}}):
                return write(graph)

        with mock.patch.object(GraphLowering, "codegen_with_cpp_wrapper", codegen_with_cpp_wrapper):
            yield


def variants(gm: GraphModule) -> list[Variant]:
    """Those of the kernel for Hopper that a program may run, each once."""
    return list(dict.fromkeys(made_for for made_for, _ in hopper.variants(attentions(gm))))


def c_functions(made_for: list[Variant]) -> Functions:
    """The kernel for Hopper in some variants; nothing where there is none."""
    if not made_for:
        return {}
    return {torch.ops.vggt_compile.attention_hopper.default: [in_a_worker(machine_code, made_for)]}


def machine_code(made_for: list[Variant]) -> str:
    """As C++ that needs nothing else."""
    from vggt_compile.ops.hopper_code_kernel import code  # Gluon may be missing where there is no GPU
    from vggt_compile.ops.hopper_launch import c_function

    return c_function(map(code, made_for))


def in_a_worker(work: Callable[[list[Variant]], str], made_for: list[Variant]) -> str:
    """What a function gives, in one of the processes that compile kernels for Inductor, where there are some.

    Much of Triton's compiler is Python: in a thread it and a compile would wait for each other.
    """
    if get_compile_threads() > 1:
        try:
            found = AsyncCompile.process_pool().submit(_as_elsewhere, os.environ.get(ASSEMBLER), work, made_for)
            return str(found.result())
        except Exception:  # if it fails here too, it says why
            log.info("machine code is made here, as no worker makes it", exc_info=True)
    return work(made_for)


def _as_elsewhere(assembler: str | None, work: Callable[[list[Variant]], str], made_for: list[Variant]) -> str:
    """With the assembler of the process that asks: a worker of Inductor has another one, of other machine code."""
    with mock.patch.dict(os.environ):
        os.environ.pop(ASSEMBLER, None)
        if assembler is not None:
            os.environ[ASSEMBLER] = assembler
        return work(made_for)
