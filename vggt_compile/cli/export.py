"""Write a model, rewritten by a plan and compiled for this machine, to one file that runs without this package."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from vggt_compile.cli.options import add_plan, add_size, check_size, read_device, read_plan
from vggt_compile.errors import BadInput

HELP = "compile a model ahead of time into one file"
SIZE = (392, 518)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a name as for `demo`, or module:callable that gives an nn.Module"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for a named model")
    parser.add_argument("--out", type=Path, default=Path("model.pt2"), metavar="FILE", help="(default: model.pt2)")
    parser.add_argument("--frames", default="3-64", metavar="N or A-B", help="frame counts to serve (default: 3-64)")
    parser.add_argument("--batch", default="1", metavar="N or A-B", help="batches to serve (default: 1)")
    add_size(parser, default="{} {}".format(*SIZE))
    add_plan(parser)
    parser.add_argument(
        "--precision",
        choices=("fp32", "autocast", "bf16"),
        default="fp32",
        help="autocast computes in bf16 where torch.autocast does, bf16 keeps the weights so too (default: fp32)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--strict", action="store_true", help="fail if a layer that the plan names stays dense")
    parser.add_argument("--no-check", action="store_true", help="do not compare compiled code with its program")


def run(args: argparse.Namespace) -> int:
    plan, device = read_plan(args.plan), read_device(args.device)
    frames, batch = (_range(name, getattr(args, name)) for name in ("frames", "batch"))
    size = tuple(args.size) if args.size else SIZE
    import torch

    from vggt_compile import export
    from vggt_compile.cli import subject
    from vggt_compile.cli.inspect import show

    if ":" in args.model:
        found = subject.outline(args.model)
        model = found.model.to(device)
    else:
        found = subject.named(args.model, device, checkpoint=args.checkpoint)
        model = found.model
    check_size(size, found.patch)
    images = torch.zeros(batch[0], 1, 3, *size, device=device)
    start = time.perf_counter()
    with _stages_told():
        made = export(
            model,
            images,
            plan=plan,
            frames=frames,
            batch=batch,
            precision=args.precision,
            path=args.out,
            strict=args.strict,
            check=not args.no_check,
        )
    show(args.out, made, args.json, {"seconds": round(time.perf_counter() - start, 1)})
    return 0


@contextlib.contextmanager
def _stages_told() -> Iterator[None]:
    """What an export inside the block is at goes to stderr."""
    logger, handler = logging.getLogger("vggt_compile.artifact.stages"), logging.StreamHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _range(name: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError as error:
        raise BadInput(f"--{name} {text}: a number, or two as in 3-64") from error
