"""What measuring collapse costs: a dense VGGT-1B with every probe beside one without, and each measure by itself.

`python -m vggt_compile.bench.probes --out DIR` writes probes.json and probes.md. Weights are random, which changes no
time. The rewritten graph runs node by node unless `--compiled`; the model is built with its camera head alone, so that
nearly all of the time is that of the trunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from vggt_compile import registry, vggt_sparse
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.bench.attention import HEAD_DIM, HEADS
from vggt_compile.bench.versions import versions
from vggt_compile.bench.worker import timed
from vggt_compile.errors import BadInput
from vggt_compile.models import vggt

FRAMES = (100, 300)
SIZE = (392, 518)
PER_FRAME = 5 + 28 * 37
LAYERS = 24


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vggt_compile.bench.probes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for JSON and page")
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES), metavar="N")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="warm calls (default: 2)")
    parser.add_argument("--compiled", action="store_true", help="compile with Inductor")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("the benchmark of probes needs a CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"machine": versions(), "compiled": args.compiled, "models": [], "measures": []}

    def keep(kind: str, row: dict[str, Any]) -> None:
        record[kind].append(row)
        print(json.dumps(row), flush=True)
        (args.out / "probes.json").write_text(json.dumps(record, indent=2) + "\n")
        (args.out / "probes.md").write_text(page(record))

    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for frames in args.frames:
            for entry in registry.measures():
                keep("measures", one_measure(entry, frames))
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = vggt("1b", outputs=("camera",)).eval()
        for probe in ([], [entry.name for entry in registry.measures()]):
            for frames in args.frames:
                keep("models", whole_model(model, frames, probe, args.repeats, args.compiled))
    print(page(record))


def whole_model(model: nn.Module, frames: int, probe: list[str], repeats: int, compiled: bool) -> dict[str, Any]:
    """Seconds of a warm call and GiB at its peak, with a list of measures."""
    images = torch.rand(1, frames, 3, *SIZE, generator=torch.Generator().manual_seed(1)).cuda()
    backend = vggt_sparse if compiled else vggt_sparse_eager
    options: Any = {"plan": {"probe": probe}}
    run = torch.compile(model, backend=backend, options=options, dynamic=False)
    row: dict[str, Any] = {"frames": frames, "probes": len(probe)}
    try:
        run(images)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        row["seconds"] = statistics.median(timed(run, images) for _ in range(repeats))
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except torch.OutOfMemoryError:
        row["out_of_memory"] = True
    torch._dynamo.reset()
    return row


def one_measure(entry: registry.Measure, frames: int) -> dict[str, Any]:
    """Milliseconds of a second call at one layer, and GiB beyond its operands."""
    given = operands(frames, "cuda", torch.bfloat16)

    def call(_: Tensor) -> Tensor:
        return entry.operator(*(given[name] for name in entry.reads))

    call(given["x"])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = timed(call, given["x"])
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"frames": frames, "measure": entry.name, "ms": 1e3 * seconds, "peak_gib": peak}


def operands(frames: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a measure may read at a layer of VGGT-1B."""
    generator, tokens = torch.Generator(device).manual_seed(0), frames * PER_FRAME

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    found: dict[str, Any] = {name: random(1, HEADS, tokens, HEAD_DIM) for name in ("q", "k", "v", "out")}
    found |= {"x": random(1, tokens, HEADS * HEAD_DIM, dtype=torch.float32)}
    found |= {"update": random(1, tokens, HEADS * HEAD_DIM)}
    return found | {"scale": None, "frames": frames, "special": 5}


def page(record: dict[str, Any]) -> str:
    """The Markdown page of a record."""
    dense = {row["frames"]: row.get("seconds") for row in record["models"] if not row["probes"]}

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        name = f"{row['probes']} measures" if row["probes"] else "none"
        if row.get("out_of_memory"):
            return (str(row["frames"]), name, "out of memory", "", "")
        plain = dense.get(row["frames"])
        times = "" if plain is None else f"{row['seconds'] / plain:.2f}"
        return (str(row["frames"]), name, f"{row['seconds']:.2f}", times, f"{row['peak_gib']:.1f}")

    counts = list(dict.fromkeys(row["frames"] for row in record["measures"]))
    by_name: dict[str, dict[int, str]] = {}
    for row in record["measures"]:
        by_name.setdefault(row["measure"], {})[row["frames"]] = f"{row['ms']:.1f} ms, {row['peak_gib']:.2f} GiB"
    table = [(f"`{name}`", *(found.get(count, "") for count in counts)) for name, found in by_name.items()]
    backend = "compiled with Inductor" if record["compiled"] else "run node by node"
    return "\n".join(
        [
            "# What probes cost\n",
            f"VGGT-1B with random weights and its camera head, bf16 autocast, {SIZE[0]}×{SIZE[1]} images, {backend}.",
            "Made by `python -m vggt_compile.bench.probes`.\n",
            ", ".join(f"{name} {value}" for name, value in record["machine"].items()) + ".\n",
            tabulate(
                map(cells, record["models"]),
                ("frames", "probes", "seconds", "times dense", "peak GiB"),
                tablefmt="github",
                disable_numparse=True,
            ),
            f"\nEach measure at one of the {LAYERS} layers, on random operands: time, and memory beyond them.\n",
            tabulate(table, ("measure", *(f"{n} frames" for n in counts)), tablefmt="github", disable_numparse=True),
            "",
        ]
    )


if __name__ == "__main__":
    main()
