"""What choosing blocks costs beside the attention that reads them, by frame count and density.

`python -m vggt_compile.bench.selection --out DIR` writes selection.json and selection.md. The choice runs as a model
runs it, compiled by Inductor, pooling included; queries and keys are random views of one fused projection.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from vggt_compile.bench.attention import HEAD_DIM, HEADS, K_BLOCK, Q_BLOCK, timed
from vggt_compile.bench.versions import versions
from vggt_compile.errors import BadInput
from vggt_compile.ops.attention import attention
from vggt_compile.ops.select_blocks import select_blocks

FRAMES = (32, 100, 300, 1000)
PATCHES = 28 * 37  # of a frame of 392×518 pixels
CHOICES = ((0.25, 0.0), (0.1, 0.0), (0.1, 0.9))
"""`keep` and `cdf`; with random queries the mass asks for more blocks than `most` = 0.5 allows."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vggt_compile.bench.selection", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for JSON and page")
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES), metavar="N")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("the benchmark of selection needs a CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"machine": versions(), "rows": []}
    with torch.inference_mode():
        for frames in args.frames:
            for keep, cdf in CHOICES:
                record["rows"].append(measured(frames, keep, cdf))
                print(json.dumps(record["rows"][-1]), flush=True)
                (args.out / "selection.json").write_text(json.dumps(record, indent=2) + "\n")
                (args.out / "selection.md").write_text(page(record))
    print(page(record))


def measured(frames: int, keep: float, cdf: float) -> dict[str, Any]:
    """Milliseconds, the least of some calls after two, and MiB beyond queries and keys."""
    shape = (1, frames * PATCHES, 3, HEADS, HEAD_DIM)
    fused = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    choose = torch.compile(select_blocks, dynamic=True)
    choose(q, k, keep, cdf)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    index, count = choose(q, k, keep, cdf)
    repeats = range(3 if frames <= 300 else 1)
    peak, lists = torch.cuda.max_memory_allocated() - before, index.nbytes + count.nbytes
    return {
        "frames": frames,
        "keep": keep,
        "cdf": cdf,
        "density": float(count.float().mean()) * K_BLOCK / q.shape[2],
        "selection_ms": min(timed(lambda: choose(q, k, keep, cdf)[1]) for _ in repeats),
        "attention_ms": min(_attention(q, k, v, index, count) for _ in repeats),
        "peak_mib": peak / 2**20,
        "lists_mib": lists / 2**20,
    }


def _attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor) -> float:
    return timed(lambda: attention(q, k, v, index, count, 0, Q_BLOCK, K_BLOCK))


def page(record: dict[str, Any]) -> str:
    """The Markdown page of a record."""
    table = [
        (
            r["frames"],
            f"{r['keep']:g}",
            f"{r['cdf']:g}" if r["cdf"] else "",
            f"{r['density']:.3f}",
            f"{r['selection_ms']:.2f}",
            f"{r['attention_ms']:.2f}",
            f"{100 * r['selection_ms'] / r['attention_ms']:.1f} %",
            f"{r['peak_mib']:.0f}",
            f"{r['lists_mib']:.0f}",
        )
        for r in record["rows"]
    ]
    headers = ("frames", "keep", "cdf", "density", "choice, ms", "attention, ms", "share", "peak MiB", "of it lists")
    return "\n".join(
        [
            "# Choosing blocks\n",
            f"{HEADS} heads of {HEAD_DIM}, bf16, {PATCHES} patches a frame, blocks of {Q_BLOCK}×{K_BLOCK},",
            "random queries and keys. Made by `python -m vggt_compile.bench.selection`. The choice includes pooling.\n",
            ", ".join(f"{name} {value}" for name, value in record["machine"].items()) + ".\n",
            tabulate(table, headers, tablefmt="github", disable_numparse=True),
            *(f"\n{note}" for note in record.get("notes", ())),
            "",
        ]
    )


if __name__ == "__main__":
    main()
