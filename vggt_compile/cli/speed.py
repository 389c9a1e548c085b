"""Time VGGT-1B or π³ on this GPU: eager, torch.compile, this backend with any plan; writes JSON and a page."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from vggt_compile.bench.model import MODELS, PHASES, VARIANTS, Settings, all_variants, known_variant, run_phase, write
from vggt_compile.errors import BadInput

HELP = "time a whole model on the GPU and write the benchmark page"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", choices=(*PHASES, "all"), default="all", help="(default: all)")
    parser.add_argument("--model", choices=MODELS, default="vggt", help="(default: vggt)")
    parser.add_argument("--upstream", default="", metavar="DIR", help="its checkout; else the model written here")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for caches and raw results")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), metavar="DIR", help="for JSON and page")
    help_ = f"{', '.join(all_variants())}; RECIPE@without-PASS,… switches passes off"
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help=help_)
    parser.add_argument("--name", default="model", help="of the files in --out (default: model)")
    parser.add_argument("--frames", type=int, nargs="+", default=list(Settings.frames), metavar="N")


def run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise BadInput("bench needs a CUDA device; `python -m vggt_compile doctor` says what is missing")
    for name in args.variants:
        known_variant(name)
    settings = Settings(args.upstream, args.model, tuple(args.frames))
    work = args.work or Path(tempfile.mkdtemp(prefix="vggt_compile-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    for phase in PHASES if args.phase == "all" else (args.phase,):
        run_phase(phase, args.variants, settings, work)
    page = write(settings, work, args.out, args.name)
    print((args.out / f"{args.name}.json").read_text() if args.json else page)
    return 0
