"""How the kernel of `attention` is cut: a table by generation of GPU and width of a head, fitted to what a device has.

The table is by hand, from `python -m vggt_compile.bench.attention`; nothing is tuned when a model runs, so that no
number of tokens costs a search or another compilation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vggt_compile.ops.operands import Operands


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut and scheduled; every choice gives the same result.

    `rows` queries meet `keys` keys at a time in `warps` warps, with `stages` tiles of keys in flight. `longest_first`
    starts query blocks with long lists first; `programs` for each multiprocessor stay and walk over the tiles (0: one
    program a tile). `descriptors` loads keys through tensor descriptors (TMA, sm_90 and later).
    """

    rows: int = 128
    keys: int = 64
    warps: int = 4
    stages: int = 3
    longest_first: bool = True
    programs: int = 0
    descriptors: bool = False


# By major compute capability and width of a head, filled up to a power of two; for 16-bit numbers. No tile here spills
# registers inside a loop, which a larger one does: tests/test_attention_kernel.py compiles them all.
TILES = {
    (8, 32): Tile(128, 64, warps=4, stages=3),
    (8, 64): Tile(128, 64, warps=4, stages=3),
    (8, 128): Tile(128, 32, warps=8, stages=3),
    (9, 32): Tile(128, 128, warps=8, stages=3),
    (9, 64): Tile(64, 128, warps=4, stages=3),
    (9, 128): Tile(128, 64, warps=8, stages=3),
    (12, 32): Tile(128, 64, warps=4, stages=3),
    (12, 64): Tile(128, 64, warps=8, stages=3),
    (12, 128): Tile(128, 32, warps=8, stages=2),
}
# Without tensor cores for float32 the tile lives in registers.
SINGLE = Tile(64, 32, warps=4, stages=2)


def chosen(x: Operands) -> Tile:
    """The tile for the device, head width and dtype of these operands."""
    return fitted(tabled(x, torch.cuda.get_device_capability(x.q.device)[0]), x, shared_memory(x.q.device))


def tabled(x: Operands, major: int) -> Tile:
    """What the table has for a major compute capability."""
    if x.q.dtype == torch.float32:
        return SINGLE
    generation = max((known for known, _ in TILES if known <= major), default=8)
    return TILES[generation, width(x)]


def width(x: Operands) -> int:
    """The head dimension as the kernel has it, a power of two from 32 to 128."""
    head_dim = x.q.shape[3]
    if head_dim > 128:
        raise ValueError(f"vggt_compile::attention: the kernel is written for a head_dim up to 128, not {head_dim}")
    return max(32, 1 << (head_dim - 1).bit_length())


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may hold in shared memory; Triton's interpreter, on the CPU, has no limit."""
    if device.type == "cpu":
        return 2**31
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)  # AMD has no other


def fitted(tile: Tile, x: Operands, limit: int) -> Tile:
    """The tile cut down to the blocks of the lists and to `limit` bytes of shared memory."""
    if x.block_index is not None:
        tile = replace(tile, rows=min(tile.rows, _power_of_two_in(x.q_block)), keys=_keys(tile.keys, x.k_block))
    if tile.descriptors and not describable(tile, x):
        tile = replace(tile, descriptors=False)
    while needed(tile, x) > limit and tile.stages > 1:
        tile = replace(tile, stages=tile.stages - 1)
    while needed(tile, x) > limit and tile.keys > 16:
        tile = replace(tile, keys=tile.keys // 2)
    return tile


def needed(tile: Tile, x: Operands) -> int:
    """Bytes of shared memory for a tile of queries and `stages` tiles of keys and values."""
    return (tile.rows + 2 * tile.stages * tile.keys) * width(x) * x.q.element_size()


def describable(tile: Tile, x: Operands) -> bool:
    """Whether the hardware can address keys and values by descriptors: one run a tile, everything on 16 bytes."""
    aligned = all(stride * y.element_size() % 16 == 0 for y in (x.k, x.v) for stride in y.stride()[:-1])
    one_run = x.block_index is None or tile.keys <= x.k_block
    return aligned and one_run and x.k.stride(3) == x.v.stride(3) == 1


def longest_first(count: Tensor) -> Tensor:
    """Query blocks of each head by falling count, [B, H, blocks], int32: the order in which they start.

    Heads stay one after the other: programs that run at one time read one head's keys, which the cache may hold. Of
    equal counts the first ones come first, so that neighbours stay together.
    """
    return count.argsort(dim=-1, descending=True, stable=True).int()


def _keys(keys: int, k_block: int) -> int:
    """A tile of keys is a part of a block, a block, or two."""
    whole = _power_of_two_in(k_block)
    return min(keys, 2 * whole) if whole == k_block else min(keys, whole)


def _power_of_two_in(size: int) -> int:
    power = size & -size
    if power < 16:
        raise ValueError(f"vggt_compile::attention: blocks are multiples of 16, not {size}")
    return power
