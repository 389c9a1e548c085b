"""The operator `attention` on this GPU: every way to cut the kernel, and others' kernels, by length and density.

`python -m vggt_compile.bench.attention --out DIR` writes attention.json and attention.md. Each way is checked against
the reference on a small case, then timed; what fails has its error in its row, and what `--budget` has no time for says
so. Rates count the multiplications of listed blocks only, so that they compare between densities.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from vggt_compile.bench.versions import versions
from vggt_compile.errors import BadInput
from vggt_compile.ops import hopper
from vggt_compile.ops.attention import reference
from vggt_compile.ops.operands import Operands
from vggt_compile.ops.tiles import Tile

Q_BLOCK, K_BLOCK, HEADS, HEAD_DIM = 128, 64, 16, 64
DENSITIES = (0.05, 0.1, 0.25, 0.5, 1.0)
TOKENS = (32 * 1041, 100 * 1041, 300 * 1041)
"""Of so many frames of 392×518 pixels; a dense call of the longest takes about a second."""
TILES = {
    "Triton, 128×128, 4 warps, 3 stages": Tile(128, 128, warps=4, stages=3),
    "the same, in order": Tile(128, 128, warps=4, stages=3, longest_first=False),
    "Triton, 128×64, 4 warps, 3 stages, TMA": Tile(128, 64, warps=4, stages=3, descriptors=True),
}
Way = Callable[[Operands], Callable[[], Tensor]]
SPARGE_BLOCKS = (64, 128)
"""Queries and keys of SpargeAttn's blocks on Hopper, as many pairs as one of ours has."""
BLOCKS = dict.fromkeys(("SpargeAttn (int8)", "SpargeAttn (int8), kernel alone"), SPARGE_BLOCKS)


@dataclass(frozen=True)
class Setting:
    tokens: int
    density: float
    blocks: tuple[int, int] = (Q_BLOCK, K_BLOCK)

    def of(self, way: str) -> Setting:
        """The same in the blocks that this way can compute."""
        return replace(self, blocks=BLOCKS.get(way, self.blocks))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vggt_compile.bench.attention", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for JSON and page")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="N")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES), metavar="SHARE")
    parser.add_argument("--budget", type=float, default=450, metavar="S", help="start nothing after so many seconds")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("the benchmark of attention needs a CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"machine": versions(), "checks": [], "rows": []}
    settings = [Setting(n, d) for n in args.tokens for d in args.densities]
    with torch.inference_mode():
        for kind, row in measured(settings, time.monotonic() + args.budget):
            print(kind, json.dumps(row, ensure_ascii=False), flush=True)
            record[kind].append(row)
            (args.out / "attention.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            (args.out / "attention.md").write_text(page(record))
    print(page(record))


def measured(settings: list[Setting], until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of checks, then of times, as they come."""
    small = Setting(1000, 0.4)
    for name, way in ways(dense=False).items():
        yield "checks", {"way": name} | _caught(error, way, operands(small.of(name), heads=2))
    for setting in settings:
        made = functools.cache(operands)  # once for all ways that share blocks
        for name, way in ways(dense=setting.density == 1).items():
            row = {"way": name, "tokens": setting.tokens, "density": setting.density}
            if time.monotonic() > until:
                yield "rows", row | {"failed": "out of time"}
            else:
                yield "rows", row | _caught(times, way, made(setting.of(name)))


def _caught(measure: Callable[[Way, Operands], dict[str, float]], way: Way, x: Operands) -> dict[str, Any]:
    """A way that does not work here is a row that says why, and no reason to lose the others."""
    try:
        return measure(way, x)
    except Exception as problem:
        return {"failed": f"{type(problem).__name__}: {problem}"[:300]}


def error(way: Way, x: Operands) -> dict[str, float]:
    """Largest deviation from the reference, in units of the deviation that rounding it to its dtype makes."""
    wide = Operands(**(vars(x) | {name: getattr(x, name).double() for name in "qkv"}))
    want = reference(wide)
    rounded = (want.to(x.v.dtype).double() - want).abs().max()
    return {"error": float((way(x)().double() - want).abs().max() / rounded)}


def times(way: Way, x: Operands) -> dict[str, float]:
    """Milliseconds, the least of some calls after two, and 10¹² operations a second."""
    assert x.block_count is not None
    call = way(x)
    call()
    once = timed(call)
    least = min(timed(call) for _ in range(max(1, min(20, int(300 / once)))))
    return {"ms": least, "tflops": 4 * HEAD_DIM * x.q_block * x.k_block * int(x.block_count.sum()) / least / 1e9}


def timed(call: Callable[[], Tensor]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def operands(setting: Setting, heads: int = HEADS, device: str = "cuda") -> Operands:
    """q, k, v as views of one fused projection, as in the models; random blocks, the worst order for a cache."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, setting.tokens, 3, heads, HEAD_DIM)
    fused = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    index, count = lists(setting, heads, generator)
    blocks = (index, count, 0, *setting.blocks)
    return Operands(q, k, v, *blocks, key_log_weight=None, own_k=None, own_v=None, own=None, scale=HEAD_DIM**-0.5)


def lists(setting: Setting, heads: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each query block other blocks, ascending; counts vary by half to both sides of the density."""
    rows, columns = (-(-setting.tokens // length) for length in setting.blocks)
    device = generator.device
    if setting.density == 1:
        index = torch.arange(columns, device=device, dtype=torch.int32).expand(1, heads, rows, columns)
        return index.contiguous(), torch.full((1, heads, rows), columns, device=device, dtype=torch.int32)
    factor = 0.5 + torch.rand(1, heads, rows, generator=generator, device=device)
    count = (setting.density * factor * columns).round().clamp(1, columns).int()
    index = torch.empty(1, heads, rows, int(count.max()), device=device, dtype=torch.int32)
    slots = torch.arange(index.shape[3], device=device)
    for head in range(heads):  # one after the other: random numbers for all pairs of blocks take gigabytes
        drawn = torch.rand(rows, columns, generator=generator, device=device).topk(index.shape[3]).indices
        used = slots < count[0, head, :, None]
        index[0, head] = drawn.where(used, columns).sort(-1).values.where(used, 0)
    return index, count


def ways(dense: bool) -> dict[str, Way]:
    """Every kernel by its name; those of others that know no blocks only where all blocks are read."""
    found: dict[str, Way] = {"Hopper": _hopper} | {name: _ours(tile) for name, tile in TILES.items()}
    if dense:
        found |= {"SDPA cuDNN": _sdpa("CUDNN_ATTENTION"), "SDPA FlashAttention-2": _sdpa("FLASH_ATTENTION")}
        found |= {"FlashAttention-3": _flash3, "Hopper without lists": _without_lists}
    return found | {
        "FlexAttention": _flex({}),
        "FlexAttention, TMA": _flex({"USE_TMA": True}),
        "SpargeAttn (int8)": _sparge,
        "SpargeAttn (int8), kernel alone": _sparge_kernel,
    }


def _ours(tile: Tile) -> Way:
    def way(x: Operands) -> Callable[[], Tensor]:
        from vggt_compile.ops.attention_kernel import launch

        return lambda: launch(x, tile)

    return way


def _hopper(x: Operands) -> Callable[[], Tensor]:
    return lambda: hopper.attend(x)


def _without_lists(x: Operands) -> Callable[[], Tensor]:
    return _hopper(Operands(**(vars(x) | {"block_index": None, "block_count": None})))


def _sdpa(backend: str) -> Way:
    def way(x: Operands) -> Callable[[], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def call() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(x.q, x.k, x.v)

        return call

    return way


def _flash3(x: Operands) -> Callable[[], Tensor]:
    import fa3_fwd_interface

    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))

    def call() -> Tensor:
        out = fa3_fwd_interface.flash_attn_func(q, k, v)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def _flex(more: dict[str, Any]) -> Way:
    # Its own choice of tiles is larger than the blocks; of those that fit, four and eight warps were equally fast.
    options: Any = {"BLOCK_M": Q_BLOCK, "BLOCK_N": K_BLOCK, "num_warps": 8, "num_stages": 3} | more

    def way(x: Operands) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        index, count = x.block_index, x.block_count
        assert index is not None
        assert count is not None
        columns = -(-x.k.shape[2] // K_BLOCK)
        index = F.pad(index, (0, columns - index.shape[3]))
        mask = BlockMask.from_kv_blocks(
            torch.zeros_like(count),
            index,
            full_kv_num_blocks=count,
            full_kv_indices=index,
            BLOCK_SIZE=(Q_BLOCK, K_BLOCK),
            seq_lengths=(x.q.shape[2], x.k.shape[2]),
            compute_q_blocks=False,
        )
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(x.q, x.k, x.v, block_mask=mask, kernel_options=options)

    return way


def _sparge(x: Operands) -> Callable[[], Tensor]:
    """Its public call: rounding to int8 and fp8 and a list made of the mask are in it."""
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    mask = block_mask(x)
    q, k, v = (y.contiguous() for y in (x.q, x.k, x.v))
    return lambda: block_sparse_sage2_attn_cuda(q, k, v, mask_id=mask)


def block_mask(x: Operands) -> Tensor:
    """The lists as a mask (batch, heads, query blocks, key blocks) of int8."""
    index, count = x.block_index, x.block_count
    assert index is not None
    assert count is not None
    columns = -(-x.k.shape[2] // x.k_block)
    used = torch.arange(index.shape[3], device=index.device) < count.unsqueeze(-1)
    mask = torch.zeros(*count.shape, columns + 1, dtype=torch.int8, device=index.device)
    mask.scatter_(3, index.where(used, columns).long(), 1)  # what is not used goes beyond the last column
    return mask[..., :columns].contiguous()


def _sparge_kernel(x: Operands) -> Callable[[], Tensor]:
    """What its public call launches last, on operands rounded and lists made beforehand, as ours has its lists."""
    from spas_sage_attn import core

    name = "qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_with_pv_threshold_sm90"
    kernel = getattr(core.qattn, name)
    with mock.patch.object(core.qattn, name, wraps=kernel) as launched:
        _sparge(x)()
    given = launched.call_args.args

    def call() -> Tensor:
        kernel(*given)
        return given[3]  # the output

    return call


def page(record: dict[str, Any]) -> str:
    """Markdown: machine, a table of rates for each length, deviations, and what failed."""
    rows = record["rows"]
    lengths = dict.fromkeys(row["tokens"] for row in rows)
    return "\n".join(
        [
            "# The operator `attention`\n",
            f"{HEADS} heads of {HEAD_DIM}, bf16, query blocks of {Q_BLOCK}, key blocks of {K_BLOCK}, random lists "
            f"(SpargeAttn: {SPARGE_BLOCKS[0]} and {SPARGE_BLOCKS[1]}).",
            "Made by `python -m vggt_compile.bench.attention`. Milliseconds, and TFLOP/s on the listed blocks.\n",
            ", ".join(f"{name} {value}" for name, value in record["machine"].items()) + ".",
            *(f"\n## {n} tokens\n\n{rates([row for row in rows if row['tokens'] == n])}" for n in lengths),
            "\n## Deviation from float64, in roundings of the result\n",
            tabulate(((r["way"], _deviation(r)) for r in record["checks"]), ("way", "deviation"), tablefmt="github"),
            "\n## What failed\n",
            *(f"- {way}: {why}" for way, why in failures(record)),
            *(f"\n{note}" for note in record.get("notes", ())),
            "",
        ]
    )


def rates(rows: list[dict[str, Any]]) -> str:
    """A row for each way, a column for each density."""
    densities = sorted({row["density"] for row in rows})
    cells: dict[str, dict[float, str]] = {}
    for row in rows:
        shown = f"{row['ms']:.2f} ({row['tflops']:.0f})" if "ms" in row else "failed"
        cells.setdefault(row["way"], {})[row["density"]] = shown
    table = [(way, *(shown.get(density, "") for density in densities)) for way, shown in cells.items()]
    return tabulate(table, ("way", *map(str, densities)), tablefmt="github", disable_numparse=True)


def failures(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Each reason once for each way."""
    failed = (
        (row["way"], row["failed"].splitlines()[0]) for row in record["checks"] + record["rows"] if "failed" in row
    )
    return list(dict.fromkeys(failed))


def _deviation(row: dict[str, Any]) -> str:
    return f"{row['error']:.2f}" if "error" in row else "failed"


if __name__ == "__main__":
    main()
