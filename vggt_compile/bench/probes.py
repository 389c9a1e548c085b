"""What measuring collapse costs: a dense model with every probe beside one without, and each measure by itself.

`python -m vggt_compile.bench.probes --out DIR` writes probes.json and probes.md, or probes-pi3 of π³. Weights are
random, which changes no time. The rewritten graph runs node by node unless `--compiled`; VGGT-1B is built with its
camera head alone, so that nearly all of the time is that of the trunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggt_compile import registry, vggt_sparse
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.bench.probes_page import page
from vggt_compile.bench.trunks import SIZE, TRUNKS, Trunk
from vggt_compile.bench.versions import versions
from vggt_compile.bench.worker import timed
from vggt_compile.errors import BadInput
from vggt_compile.recipes import read_named

FRAMES = (100, 300)
EVERY = [entry.name for entry in registry.measures()]
Run = Callable[[Tensor], Any]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vggt_compile.bench.probes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for JSON and page")
    parser.add_argument("--model", choices=TRUNKS, default="vggt", help="(default: vggt)")
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES), metavar="N")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="warm calls (default: 2)")
    parser.add_argument("--compiled", action="store_true", help="compile with Inductor")
    help_ = "run every measure at these counts too, once, fewest first, until one does not fit"
    parser.add_argument("--longest", type=int, nargs="+", default=[], metavar="N", help=help_)
    help_ = "plan of --longest, as NAME={…}: measures read all queries and keys under any (default: dense)"
    parser.add_argument("--longest-plan", default="dense", metavar="PLAN", help=help_)
    return parser


def main() -> None:
    args = arguments().parse_args()
    name, plan = read_named(args.longest_plan)
    if not torch.cuda.is_available():
        raise BadInput("the benchmark of probes needs a CUDA device")
    if args.repeats < 1:
        raise BadInput(f"--repeats {args.repeats}: a time is that of one warm call at least")
    args.out.mkdir(parents=True, exist_ok=True)
    trunk, to = TRUNKS[args.model], args.out / ("probes" if args.model == "vggt" else f"probes-{args.model}")
    record: dict[str, Any] = {"machine": versions(), "model": args.model, "compiled": args.compiled}
    record |= {"longest_plan": plan.to_json() if args.longest and not plan.dense else None}
    record |= {"models": [], "longest": [], "measures": []}
    backend = vggt_sparse if args.compiled else vggt_sparse_eager

    def compiled(model: nn.Module, layers: Any, probe: list[str]) -> Run:
        options: Any = {"plan": {**layers, "probe": probe}, "strict": bool(layers.get("layers"))}
        return torch.compile(model, backend=backend, options=options, dynamic=False)

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for frames in args.frames:
            yield from (("measures", one_measure(entry, trunk, frames)) for entry in registry.measures())
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = trunk.build().eval()
        for probe in ([], EVERY):
            for frames in args.frames:
                yield "models", whole_model(compiled(model, {}, probe), frames, len(probe), args.repeats)
        run = compiled(model, plan.to_json(), EVERY)
        yield from (("longest", {"plan": name, **row}) for row in longest(run, args.longest, len(EVERY)))

    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for kind, row in rows():
            record[kind].append(row)
            print(kind, json.dumps(row), flush=True)
            to.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
            to.with_suffix(".md").write_text(page(record))
    print(page(record))


def whole_model(run: Run, frames: int, probes: int, repeats: int) -> dict[str, Any]:
    """Seconds of a warm call and GiB at its peak; without repeats the first call is all, and its time tells nothing."""
    row: dict[str, Any] = {"frames": frames, "probes": probes}
    try:
        images = torch.rand(1, frames, 3, *SIZE, device="cuda")
        if repeats:
            run(images)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        times = [timed(run, images) for _ in range(max(1, repeats))]
        row |= {"seconds": statistics.median(times)} if repeats else {}
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except torch.OutOfMemoryError:
        row["out_of_memory"] = True
    torch._dynamo.reset()
    return row


def longest(run: Run, counts: list[int], probes: int) -> Iterator[dict[str, Any]]:
    """A row for each count, ascending, up to the first that does not run; libraries have errors of their own for it."""
    for frames in sorted(counts):
        try:
            row = whole_model(run, frames, probes, repeats=0)
        except RuntimeError as error:
            row = {"frames": frames, "probes": probes, "failed": str(error).partition("\n")[0]}
        yield row
        if "peak_gib" not in row:
            return


def one_measure(entry: registry.Measure, trunk: Trunk, frames: int) -> dict[str, Any]:
    """Milliseconds of a second call at one layer, and GiB beyond its operands."""
    given = trunk.operands(frames, "cuda", torch.bfloat16)

    def call(_: Tensor) -> Tensor:
        return entry.operator(*(given[name] for name in entry.reads))

    call(given["x"])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = timed(call, given["x"])
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"frames": frames, "measure": entry.name, "ms": 1e3 * seconds, "peak_gib": peak}


if __name__ == "__main__":
    main()
