"""Which attention the kernel for Hopper can do, and that kernel as an operator of its own.

It is opaque to compilers: Inductor can inline kernels of Triton, but not of Gluon. What it needs beside its operands is
computed before it, where compilers see it. `attention` calls it where it suits; in an artifact hopper_launch.cpp is the
operator.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from vggt_compile.ops.hopper_variant import Variant, variant
from vggt_compile.ops.operands import Operands
from vggt_compile.ops.tiles import longest_first

log = logging.getLogger(__name__)

ALIGNMENT = 16
"""Bytes: what the tensor memory accelerator asks of addresses and strides."""


def suits(x: Operands) -> bool:
    """Whether the kernel for Hopper computes these operands; sizes may be symbols."""
    if variant(x) is None or not here(x.q.device):
        return False
    own = (y for y in (x.own_k, x.own_v) if y is not None)
    return all(map(_loadable, (x.q, x.k, x.v))) and all(y.stride(-1) == 1 for y in own)


@functools.cache
def here(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU, and Triton has what the kernel is written in."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        return find_spec("triton.experimental.gluon.nvidia.hopper") is not None
    except ModuleNotFoundError:
        return False


def _loadable(x: Tensor) -> bool:
    *outer, inner = x.stride()
    aligned = all(stride * x.element_size() % ALIGNMENT == 0 for stride in outer)
    return bool(inner == 1 and aligned and x.storage_offset() * x.element_size() % ALIGNMENT == 0)


def variants(attentions: Iterable[Operands]) -> list[tuple[Variant, torch.device]]:
    """In which variants the kernel may run for operands, which may be fake, and where: each once."""
    found = ((variant(x), x.q.device) for x in attentions if here(x.q.device))
    return [(made_for, device) for made_for, device in dict.fromkeys(found) if made_for is not None]


def compile_beside(attentions: Iterable[Operands]) -> None:
    """Begin to compile the kernel as these will run it: that takes two seconds, beside other work."""
    for made_for, device in variants(attentions):
        threading.Thread(target=_compile_ahead, args=(made_for, device), name="attention_hopper").start()


def _compile_ahead(made_for: Variant, device: torch.device) -> None:
    from vggt_compile.ops.attention_hopper_kernel import compile_ahead  # Gluon may be missing where there is no GPU

    try:
        compile_ahead(made_for, device)
    except Exception:  # the launch that needs it says why
        log.debug("the kernel for Hopper could not be compiled ahead", exc_info=True)


def attend(x: Operands) -> Tensor:
    """`attention` of operands that `suits`."""
    from vggt_compile.ops.longest_key_kernel import longest_key  # Triton may be missing where there is no GPU

    lists: tuple[Tensor | None, ...] = (None, None, None)
    if x.block_index is not None and x.block_count is not None:
        lists = x.block_index.contiguous(), x.block_count.contiguous(), longest_first(x.block_count)
    own = None if x.own is None else x.own.contiguous()
    blocks = (x.always, x.q_block, x.k_block)
    return attention_hopper(x.q, x.k, x.v, *lists, longest_key(x.k), *blocks, x.own_k, x.own_v, own, x.scale)


@custom_op("vggt_compile::attention_hopper", mutates_args=())
def attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor | None,
    block_count: Tensor | None,
    order: Tensor | None,
    longest: Tensor,
    always: int,
    q_block: int,
    k_block: int,
    own_k: Tensor | None,
    own_v: Tensor | None,
    own: Tensor | None,
    scale: float,
) -> Tensor:
    """The kernel alone: `order` as `longest_first` gives it, `longest` as `longest_key` does; lists and `own` dense."""
    from vggt_compile.ops.attention_hopper_kernel import launch  # Gluon may be missing where there is no GPU

    blocks = (block_index, block_count, always, q_block, k_block)
    return launch(Operands(q, k, v, *blocks, None, own_k, own_v, own, scale), order, longest)


@attention_hopper.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    return v.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
