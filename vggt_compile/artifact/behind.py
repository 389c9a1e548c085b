"""Weights go behind the code of a library, where it maps them from, by way of one copy.

Torch 2.11 copies them three times, and no other thread may run Python meanwhile. Here torch makes a library whose
weights have no bytes; these are collected while g++ works, and follow.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import codecache, config
from torch._inductor.utils import ALIGN_BYTES, determine_aoti_mmap_flags

from vggt_compile.artifact.later import Later

Flags = tuple[bool, bool]
"""Whether weights are in a file of their own, and whether they are behind the code and mapped."""


class Weights:
    """Those of one library, in a `with` statement around its compile.

    Attributes:
        flags: what torch decides for them; known once they are taken.
    """

    def __init__(self) -> None:
        self.flags: Flags = False, False
        self._torch = ExitStack()
        self._taken: Later[Tensor] | None = None

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._torch.close()

    def take(self, graph: Any) -> None:
        """The weights of a graph whose code is written; those that would not be mapped are left to torch."""
        names = [name for name in graph.constants if name not in graph.folded_constants]
        inside = config.aot_inductor.package_constants_in_so
        held = [graph.get_original_value_of_constant(name) for name in names if inside]
        aligned = 1 if all(x.is_cuda for x in held) else ALIGN_BYTES
        held = [x for x in held if x.numel()]
        self.flags = determine_aoti_mmap_flags(sum(_size(x) for x in held))
        if held and self.flags == (False, True) and not any(x.is_mkldnn for x in held):
            self._torch.enter_context(config.patch({"aot_inductor.package_constants_in_so": False}))
            decide = mock.Mock(return_value=self.flags)
            self._torch.enter_context(mock.patch.object(codecache, "determine_aoti_mmap_flags", decide))
            self._taken = Later(partial(_in_a_row, held, aligned))
            self._taken.begin()

    def put_behind(self, library: Path) -> None:
        """Into the file of a library that has none."""
        if self._taken is not None:
            put_behind(library, self._taken.result())


def put_behind(library: Path, weights: Tensor) -> None:
    """A library ends in its weights and a number, which it also has inside, after the size of both."""
    number = struct.calcsize("q")
    with library.open("r+b") as file:
        end = file.seek(-number, 2)
        magic = file.read(number)
        with mmap.mmap(file.fileno(), 0) as content:
            place = content.find(struct.pack("q", number) + magic)
            assert 0 <= place < end - number, "a library of torch has the size of its weights inside"
            content[place : place + number] = struct.pack("q", weights.numel() + number)
        file.seek(end)
        file.write(_view(weights))
        file.write(magic)


def _size(x: Tensor) -> int:
    return x.untyped_storage().nbytes() if not x.is_mkldnn else 0


def _in_a_row(tensors: Sequence[Tensor], aligned: int) -> Tensor:
    """The bytes of tensors, each from a multiple of so many on."""
    sizes = [-(-_size(x) // aligned) * aligned for x in tensors]
    row = torch.empty(sum(sizes), dtype=torch.uint8)
    for x, part in zip(tensors, row.split(sizes), strict=True):
        size = _size(x)
        part[:size] = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
        part[size:] = 0
    return row


def _view(row: Tensor) -> memoryview:
    return memoryview((ctypes.c_char * row.numel()).from_address(row.data_ptr()))
