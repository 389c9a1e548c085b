"""Print what a plan would do to each attention of a model; nothing is computed, so the largest needs no memory."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from typing import TYPE_CHECKING

from vggt_compile.cli.options import add_dtype, add_plan, add_size, check_frames, check_size, read_plan

if TYPE_CHECKING:
    from vggt_compile.cli.subject import Subject
    from vggt_compile.plan import Plan
    from vggt_compile.report import Report

HELP = "what a plan would do to each attention of a model"
SIZE = (392, 518)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a name as for `demo`, or module:callable that gives an nn.Module"
    )
    parser.add_argument("--frames", type=int, default=16, metavar="N", help="(default: 16)")
    add_size(parser, default="{} {}".format(*SIZE))
    add_plan(parser)
    add_dtype(parser)
    parser.add_argument("--dynamic", action="store_true", help="trace with symbolic sizes")
    parser.add_argument("--every", action="store_true", help="show attentions inside frames too")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a layer that the plan names stays dense")


def run(args: argparse.Namespace) -> int:
    plan = read_plan(args.plan)
    check_frames(args.frames)
    size = tuple(args.size) if args.size else SIZE
    from vggt_compile.cli import subject
    from vggt_compile.unmet import unmet

    model = subject.outline(args.model)
    check_size(size, model.patch)
    report = trace(model, args.frames, size, plan, args.dtype, args.dynamic)
    left = unmet(report, plan)
    if args.json:
        print(json.dumps({"model": args.model, "unmet": left} | report.to_dict(), indent=2))
    else:
        print(report)
        if args.every:
            print(f"\nevery attention:\n{report.table(every=True)}")
    if args.strict and left:
        why = "; ".join(left)
        print(f"vggt_compile: error: --strict: the plan names what is not rewritten: {why}", file=sys.stderr)
        return 1
    return 0


def trace(model: Subject, frames: int, size: tuple[int, int], plan: Plan, dtype: str, dynamic: bool = False) -> Report:
    """The report for `[1, frames, 3, H, W]` on the CPU; memory is reserved but never touched."""
    import torch

    from vggt_compile.dry_run import explain

    images = torch.empty(1, frames, 3, *size)
    with warnings.catch_warnings(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        warnings.filterwarnings("ignore", message="vggt_compile:")  # the report shows these notes
        return explain(model.model, images, plan=plan, dynamic=True if dynamic else None)
