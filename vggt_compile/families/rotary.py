"""Rotary embeddings and the grids of positions beside them, if their traceable form gives the same bits on a probe."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vggt_compile.families.forms import grid_positions, rotary
from vggt_compile.families.shim import Shim, by_name, names_in
from vggt_compile.ops.rotate import rotate

log = logging.getLogger(__name__)


def recognise(cls: type) -> Iterator[Shim]:
    """Shims for a rotary embedding and its companions; none for any other class."""
    if _reads_largest_position(cls):
        yield from _rope(cls)
        for helper in _companions(cls):
            yield from positions_shim(helper)


def _reads_largest_position(cls: type) -> bool:
    """forward(tokens, positions) that turns `positions.max()` into an int: a table-driven rotary embedding."""
    return {"int", "max", "chunk"} <= names_in(cls, "forward", 2)


def _companions(rope: type) -> list[type]:
    """Classes beside the rotary embedding whose __call__(batch, height, width, device) lists grid positions."""
    beside = vars(sys.modules.get(rope.__module__, object)).values()
    return [c for c in beside if isinstance(c, type) and "cartesian_prod" in names_in(c, "__call__", 4)]


def _rope(cls: type) -> Iterator[Shim]:
    base = next((name for name in _numbers_of(cls) if _rotates_alike(cls, name)), None)
    if base is None:
        log.warning("%s looks like a rotary embedding but computes something else; tracing will break there", cls)
        return

    def form(self: Any, tokens: Tensor, positions: Tensor) -> Tensor:
        return rotary(tokens, positions, getattr(self, base))

    forward = vars(cls)["forward"]
    what = "rotary angles from positions, without their maximum and without a cache"
    yield Shim(cls, "forward", forward, by_name(forward, form), what)


def _numbers_of(cls: type) -> list[str]:
    try:
        return [name for name, value in vars(cls()).items() if type(value) in (int, float)]
    except TypeError:  # its constructor wants arguments that we cannot guess
        return []


def _rotates_alike(cls: type, base: str) -> bool:
    """Whether `rotate` with this attribute as base gives the bits of the class, whatever its other numbers are."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 40, (2, 9, 2), generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        tokens = torch.randn(2, 3, 9, 16, generator=generator).to(dtype)
        probe = cls()
        for name in _numbers_of(cls):
            setattr(probe, name, getattr(probe, name) + (7.0 if name == base else 1.0))
        with torch.no_grad():
            if not torch.equal(probe(tokens, positions), rotate(tokens, positions, getattr(probe, base))):
                return False
    return True


def positions_shim(cls: type) -> Iterator[Shim]:
    """The shim of a class that lists grid positions; none, and a warning, if it lists them in another order."""
    cpu = torch.device("cpu")
    if not torch.equal(cls()(2, 3, 5, device=cpu), grid_positions(2, 3, 5, cpu)):
        log.warning("%s looks like a grid of positions but computes something else; tracing will keep its cache", cls)
        return

    def form(self: Any, batch: int, height: int, width: int, device: torch.device) -> Tensor:
        return grid_positions(batch, height, width, device)

    call = vars(cls)["__call__"]
    yield Shim(cls, "__call__", call, by_name(call, form), "patch positions from the grid, without a cache")
