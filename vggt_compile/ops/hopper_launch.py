"""The kernel for Hopper as a piece of C++, which a compiler of artifacts puts into its own code.

Inductor calls an operator by a C function where it is told of one: a declaration, which it copies word for word into
`extern "C" { … }`. Here the whole function follows, with the machine code in it, so that an artifact needs no other
library; what is not C stands outside the braces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vggt_compile.ops.hopper_code_kernel import Code

WIDTH = 100
"""Bytes of machine code in a line."""


def c_function(codes: Iterable[Code]) -> str:
    """What Inductor's `aot_inductor.custom_ops_to_c_shims` is to have for `hopper.attention_hopper`."""
    text = source(codes)
    declared = re.search(r'^extern "C" (AOTITorchError \w+\([^)]*\)) \{$', text, re.MULTILINE)
    assert declared is not None
    return f'{declared[1]} __attribute__((visibility("hidden")));\n}}\n{text}\nextern "C" {{\n'


def source(codes: Iterable[Code]) -> str:
    """C++ that defines the function, for the variants whose machine code is given."""
    codes = tuple(codes)
    images = (f"alignas(64) const char image_{i}[] =\n{_literal(one.image)};" for i, one in enumerate(codes))
    kernels = ", ".join(_kernel(one, f"image_{i}") for i, one in enumerate(codes))
    table = f"namespace {{ namespace hopper {{\n{chr(10).join(images)}\n}} }}\n#define KERNELS_FOR_HOPPER {kernels}\n"
    return table + files(__package__).joinpath("hopper_launch.cpp").read_text()


def _kernel(code: Code, image: str) -> str:
    """An initializer of `Kernel`."""
    made_for = code.variant
    kind = (made_for.dtype == torch.bfloat16, made_for.head_dim, made_for.q_block, made_for.k_block)
    numbers = (*kind, made_for.lists, made_for.own)
    box = ", ".join(map(str, code.box))
    swizzle = f"static_cast<CUtensorMapSwizzle>({code.swizzle})"
    values = [*(str(int(number)) for number in numbers), image, f'"{code.name}"', str(32 * code.warps)]
    return f"{{{', '.join(values)}, {code.shared}, {swizzle}, {{{box}}}}}"


def _literal(image: bytes) -> str:
    """Bytes as strings side by side: a compiler reads them a hundred times as fast as numbers in braces."""
    return "\n".join(f'"{line}"' for line in _lines(image))


def _lines(image: bytes) -> Iterator[str]:
    for start in range(0, len(image), WIDTH):
        yield "".join(chr(x) if chr(x).isalnum() and x < 128 else f"\\{x:03o}" for x in image[start : start + WIDTH])
