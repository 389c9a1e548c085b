"""Time VGGT-1B or π³ on this GPU: eager, torch.compile, this backend with any plan; writes JSON and a page."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from vggt_compile.bench.model import COMPILE_WITH, MODELS, PHASES, TOGETHER, Settings, run_phase
from vggt_compile.bench.record import write
from vggt_compile.bench.variants import VARIANTS, WITHOUT, all_variants, check_passes, known_variant, split_variant
from vggt_compile.errors import BadInput
from vggt_compile.plan import Plan
from vggt_compile.recipes import read_named

HELP = "time a whole model on the GPU and write the benchmark page"


def arguments(parser: argparse.ArgumentParser) -> None:
    help_ = "together: one process for each variant, which compiles beside the others and is timed alone (default: all)"
    parser.add_argument("--phase", choices=(*PHASES, TOGETHER, "all"), default="all", help=help_)
    parser.add_argument("--model", choices=MODELS, default="vggt", help="(default: vggt)")
    parser.add_argument("--upstream", default="", metavar="DIR", help="its checkout; else the model written here")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for caches and raw results")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), metavar="DIR", help="for JSON and page")
    help_ = (
        f"{', '.join(all_variants())}, or a plan as NAME=FILE.json or NAME={{…}}; "
        f"VARIANT{WITHOUT}PASS,… switches passes off (default: {' '.join(VARIANTS)})"
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="VARIANT", help=help_)
    parser.add_argument("--parts", action="store_true", help="profile one more call: where time goes, with a picture")
    parser.add_argument(
        "--minutes", type=float, default=Settings.minutes, help="with together: what comes later is not timed"
    )
    help_ = "with together: one graph, of code for so many frames, serves all counts"
    parser.add_argument("--compile-for", type=int, default=Settings.compile_for, metavar="N", help=help_)
    parser.add_argument("--name", default="model", help="of the files in --out (default: model)")
    parser.add_argument("--frames", type=int, nargs="+", default=list(Settings.frames), metavar="N")


def run(args: argparse.Namespace) -> int:
    import torch

    plans = dict(map(read_variant, args.variants))
    if args.compile_for and (args.phase != TOGETHER or args.compile_for < COMPILE_WITH or "compile" in plans):
        raise BadInput(
            f"--compile-for {args.compile_for} needs --phase {TOGETHER}, {COMPILE_WITH} frames or more, as so many run "
            "to compile, and variants of this backend: plain `compile` makes code for each count"
        )
    if not torch.cuda.is_available():
        raise BadInput("bench needs a CUDA device; `python -m vggt_compile doctor` says what is missing")
    if args.model == "fastvggt" and (list(plans) != ["eager"] or not args.upstream):
        raise BadInput("--model fastvggt is its own code and needs --upstream DIR and --variants eager")
    settings = Settings(
        args.upstream,
        args.model,
        tuple(args.frames),
        plans={split_variant(name)[0]: plan.to_json() for name, plan in plans.items() if plan is not None},
        parts=args.parts,
        minutes=args.minutes,
        compile_for=args.compile_for,
    )
    work = args.work or Path(tempfile.mkdtemp(prefix="vggt_compile-bench-"))
    work = work.resolve()  # caches lie in it, and Inductor runs the C++ compiler in another folder
    work.mkdir(parents=True, exist_ok=True)
    try:
        for phase in PHASES if args.phase == "all" else (args.phase,):
            run_phase(phase, list(plans), settings, work)
    finally:  # what has been measured is not lost to a variant that fails
        page = write(settings, work, args.out, args.name)
    print((args.out / f"{args.name}.json").read_text() if args.json else page)
    return 0


def read_variant(text: str) -> tuple[str, Plan | None]:
    """A variant's name, and its plan where that is none of those with a name of their own."""
    if "=" not in text:
        return known_variant(text), None
    given, off = split_variant(text)
    name, plan = read_named(given)
    if not name.replace("-", "").replace("_", "").isalnum():
        raise BadInput(f"--variants {text}: {name!r} names files; write letters, digits, - and _")
    check_passes(off)
    return (f"{name}{WITHOUT}{off}" if off else name), plan
