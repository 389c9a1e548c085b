"""The kernel of `attention` under Triton's interpreter, where the variable TRITON_INTERPRET holds for the process.

Called by tests/test_attention_kernel.py; prints one JSON line for each case: its name and what is wrong, or nothing.
Memory that the kernel does not write stays NaN. The interpreter multiplies bit patterns of bfloat16, so there is none.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from attention_cases import Case, eager, operands, wanted
from numerics import assert_as_accurate

from vggt_compile.ops.attention_kernel import launch
from vggt_compile.ops.longest_key_kernel import longest_key
from vggt_compile.ops.operands import Operands
from vggt_compile.ops.tiles import Tile

SMALL = Tile(rows=32, keys=16)
EVERYTHING = Case(batch=2, weighted=True, own=True)
CASES: dict[str, tuple[Case, Tile]] = {
    "dense": (Case(density=None), SMALL),
    "dense with everything": (replace(EVERYTHING, density=None), SMALL),
    "lists": (Case(), SMALL),
    "lists with everything": (EVERYTHING, SMALL),
    "fused projection": (replace(EVERYTHING, fused=True), SMALL),
    "full lists": (replace(EVERYTHING, density=1), SMALL),
    "empty lists": (replace(EVERYTHING, density=0), SMALL),
    "no key at all": (Case(density=0, always=0), SMALL),
    "no key that all read": (Case(always=0), SMALL),
    "whole blocks only": (Case(queries=64, always=16, patches=96), SMALL),
    "one query": (Case(queries=1, own=True), SMALL),
    "fewer keys than a block": (Case(patches=5), SMALL),
    "tiles of two blocks": (EVERYTHING, Tile(rows=32, keys=32)),
    "tiles of half a block": (replace(EVERYTHING, k_block=32), SMALL),
    "half a query block": (EVERYTHING, Tile(rows=16, keys=16)),
    "blocks of 48": (replace(EVERYTHING, q_block=48, k_block=48), Tile(rows=32, keys=32)),
    "in the order of the queries": (EVERYTHING, Tile(rows=32, keys=16, longest_first=False)),
    "descriptors": (Case(dtype=torch.float16), Tile(rows=32, keys=16, descriptors=True)),
    "descriptors with everything": (EVERYTHING, Tile(rows=32, keys=16, descriptors=True)),
    "descriptors that cannot be": (Case(head_dim=32), Tile(rows=32, keys=32, descriptors=True)),
    **{f"head_dim {d}": (replace(EVERYTHING, head_dim=d), SMALL) for d in (64, 80, 96, 128)},
    "float16": (replace(EVERYTHING, dtype=torch.float16), SMALL),
}


def wrong(x: Operands, tile: Tile) -> str:
    got = launch(x, tile)
    try:
        assert_as_accurate(got, eager(x), wanted(x))
        assert got.transpose(1, 2).is_contiguous()
    except AssertionError as error:
        return repr(error)
    return ""


LONGEST = {"one key": (1, 1, 1, 32), "many runs": (2, 3, 2100, 32), "a width of 80": (1, 2, 65, 80)}


def wrong_length(shape: tuple[int, int, int, int]) -> str:
    """What bounds the logits of the kernel for Hopper, of keys that lie as in a fused projection."""
    batch, heads, tokens, width = shape
    k = torch.randn(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)[1]
    got, want = longest_key(k), k.double().square().sum(-1).amax(-1)
    return "" if torch.allclose(got.double(), want, rtol=1e-5, atol=0) else f"{got} is not {want}"


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    for name, (case, tile) in CASES.items():
        print(json.dumps([name, wrong(operands(case), tile)]), flush=True)
    for name, shape in LONGEST.items():
        print(json.dumps([name, wrong_length(shape)]), flush=True)
