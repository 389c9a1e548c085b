"""Kernels that a compiler cannot take into its own code, as C++ for one program: what its artifact takes along."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from vggt_compile.attentions import attentions
from vggt_compile.ops import hopper

Functions = dict[torch._ops.OpOverload, list[str]]
"""C functions by the operators that they are, for `aot_inductor.custom_ops_to_c_shims`."""


def c_functions(gm: GraphModule) -> Functions:
    """The kernel for Hopper in the variants that a program may run; none where it runs none."""
    variants = dict.fromkeys(made_for for made_for, _ in hopper.variants(attentions(gm)))
    if not variants:
        return {}
    from vggt_compile.ops.hopper_code_kernel import code  # Gluon may be missing where there is no GPU
    from vggt_compile.ops.hopper_launch import c_function

    return {torch.ops.vggt_compile.attention_hopper.default: [c_function(map(code, variants))]}
