"""The machine code of the kernel for Hopper, made ahead of time for an artifact; it takes no GPU.

Law: it is the kernel that `attention_hopper_kernel.launch` runs, but for what Triton would see of numbers at a launch:
here strides and sizes may be any.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from vggt_compile.ops.attention_hopper_kernel import WARPS, attention_hopper, constants, loaded_at_once
from vggt_compile.ops.hopper_variant import Variant

HOPPER = GPUTarget("cuda", 90, 32)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES = {"out": "T", "index": "i32", "count": "i32", "order": "i32", "longest": "fp32", "own_k": "T", "own_v": "T"}
"""What pointers point at, T being the dtype of the operands."""

DESCRIPTOR = ("map", *["u32"] * 4, *["u64"] * 4)  # its sizes and strides are handed over once more
PARAMETERS = (*DESCRIPTOR * 3, *["u64"] * 8, *["u64"] * 6, *["u32"] * 6, "f32")
"""What a launch hands over, as hopper_launch.cpp does: descriptors, pointers, strides of own keys, sizes, the scale."""
SCRATCH = 4
"""Beyond that, so many pointers at most to memory that this kernel does not ask for."""


@dataclass(frozen=True)
class Code:
    """Machine code and what a launch has to know. `swizzle` and `box`, innermost first, are of tensor maps."""

    variant: Variant
    image: bytes
    ptx: str
    name: str
    warps: int
    shared: int
    swizzle: int
    box: tuple[int, ...]


@functools.cache
def code(variant: Variant) -> Code:
    """RuntimeError where this Triton hands arguments over in a way that is not known here."""
    given = constants(variant)
    names = attention_hopper.arg_names
    signature = {name: "constexpr" if name in given else _type(name, variant) for name in names}
    values = {(names.index(name),): value for name, value in given.items()}
    aligned = {(names.index("out"),): [["tt.divisibility", 16]]}  # it is fresh memory; others may be views
    source = GluonASTSource(attention_hopper, signature, constexprs=values, attrs=aligned)
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # three quarters of the file
        kernel = triton.compile(source, target=HOPPER, options={"num_warps": WARPS})
    known = kernel.metadata
    (loads,) = {(one["swizzle"], *reversed(one["block_size"])) for one in known.tensordesc_meta}
    _check(parameters(kernel.asm["ptx"]), known)
    swizzle, *box = loads
    image, ptx = kernel.asm["cubin"], kernel.asm["ptx"]
    return Code(variant, image, ptx, known.name, known.num_warps, known.shared, swizzle, tuple(box))


def parameters(ptx: str) -> tuple[str, ...]:
    """The types of a kernel's parameters in their order; a tensor map is `map`."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None
    found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.\w+(?:\s+\d+)?)*\s+\w+(\[128\])?", entry[1])
    return tuple("map" if size else kind for kind, size in found)


def _type(name: str, variant: Variant) -> str:
    dtype = NAMES[variant.dtype]
    if name.endswith("_desc"):
        block, layout = loaded_at_once(variant.dtype, variant.head_dim)
        return f"tensordesc<{dtype}{block},{layout!r}>"
    if name in TYPES:
        return "*" + TYPES[name].replace("T", dtype)
    if name == "own":
        return "*i1"
    if name == "scale":
        return "fp32"
    return "i64" if name.startswith("own_") else "i32"


def _check(found: tuple[str, ...], known: Any) -> None:
    beyond = found[len(PARAMETERS) :]
    plain = not (known.global_scratch_size or known.profile_scratch_size or known.launch_pdl or known.num_ctas != 1)
    if found[: len(PARAMETERS)] != PARAMETERS or set(beyond) - {"u64"} or len(beyond) > SCRATCH or not plain:
        raise RuntimeError(
            f"Triton {triton.__version__} launches the kernel for Hopper in a way that an artifact does not know yet: "
            "export with Triton 3.6 to 3.9, or leave `blocks` out of the plan"
        )
