"""Kernels that a compiler cannot take into its own code, as C++ for one program: what its artifact takes along."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch.fx import GraphModule

from vggt_compile.attentions import attentions
from vggt_compile.ops import hopper
from vggt_compile.ops.hopper_variant import Variant

Functions = dict[torch._ops.OpOverload, list[str]]
"""C functions by the operators that they are."""

OPTION = "aot_inductor.custom_ops_to_c_shims"


@contextmanager
def called_as_functions(gm: GraphModule) -> Iterator[None]:
    """A compile inside the block calls such kernels of a program, of which machine code is made meanwhile.

    That takes the kernel for Hopper 2 seconds. Inductor asks when it writes code, half of a compile later.
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
    from vggt_compile.ops.hopper_code_kernel import code  # Gluon may be missing where there is no GPU
    from vggt_compile.ops.hopper_launch import c_function

    return {torch.ops.vggt_compile.attention_hopper.default: [c_function(map(code, made_for))]}
