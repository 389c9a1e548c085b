"""Run a model dense and rewritten on a rendered scene or your images: times, memory, errors and a picture."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggt_compile.cli.options import add_dtype, add_plan, add_size, check_frames, check_size, read_device, read_plan

if TYPE_CHECKING:
    import torch

    from vggt_compile.cli.experiment import Result
    from vggt_compile.cli.images import Frames

HELP = "run a model dense and rewritten, compare, draw a picture"
SCENE = (8, (224, 224))
"""Frames and size of the rendered scene; the models that come with the package know this size."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pi3-small", help="vggt- or pi3- and a size (default: pi3-small)")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights (default: those of the package, else random)")
    parser.add_argument("--images", metavar="DIR", help="a folder of images instead of a rendered scene")
    parser.add_argument("--resize", action="store_true", help="resize images to --size or the nearest that fits")
    parser.add_argument(
        "--scene", choices=("orbit", "video", "wide", "rig", "rooms"), default="orbit", help="(default: orbit)"
    )
    parser.add_argument("--frames", type=int, metavar="N", help=f"(default: {SCENE[0]} of a scene, all of a folder)")
    add_size(parser, default="{} {}, or that of the images".format(*SCENE[1]))
    parser.add_argument("--seed", type=int, default=0, help="of the scene and of random weights (default: 0)")
    add_plan(parser)
    add_dtype(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument(
        "--compile-dense",
        action=argparse.BooleanOptionalAction,
        help="also compile the model without a plan, to tell the gain of compiling from that of the plan "
        "(default: on a GPU; on a CPU it takes a minute)",
    )
    parser.add_argument(
        "--out", metavar="DIR", default="demo_out", help="for demo.png and demo.json (default: demo_out)"
    )


def run(args: argparse.Namespace) -> int:
    say = silent if args.json else progress
    plan, device = read_plan(args.plan), read_device(args.device)
    if args.frames is not None:
        check_frames(args.frames)
    from vggt_compile.cli import doctor, experiment, picture, subject

    picture.check_installed()
    doctor.check_compiler()
    folder = output_folder(args.out)
    frames = load_frames(args, subject.patch_size(args.model), device, say)
    say(f"building {args.model}")
    model = subject.named(args.model, device, args.seed, args.checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="vggt_compile:")  # the report shows these notes
        both = device.type == "cuda" if args.compile_dense is None else args.compile_dense
        result = experiment.run(model, frames, plan, device, args.dtype, say, both)
    path = folder / "demo.png"
    picture.draw(result, path)
    record = result.to_dict() | {"picture": str(path)}
    (folder / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2) if args.json else text(result, path))
    return 0


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def silent(line: str) -> None:
    del line


def output_folder(name: str) -> Path:
    """The folder `--out`, made now rather than after minutes of work."""
    from vggt_compile.errors import BadInput

    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder --out {name}: {error.strerror}") from error
    return Path(name)


def load_frames(args: argparse.Namespace, patch: int, device: torch.device, say: Callable[[str], None]) -> Frames:
    from vggt_compile.cli.images import Frames, load_folder

    size = tuple(args.size) if args.size else None
    if size:
        check_size(size, patch)
    if args.images is not None:
        frames = load_folder(args.images, patch, limit=args.frames, size=size, resize=args.resize)
        for note in frames.notes:
            say(f"note: {note}")
        return frames
    from vggt_compile.bench.accuracy.cases import rendered_case
    from vggt_compile.scenes import HELD_OUT_SEEDS, render

    count, size = args.frames or SCENE[0], size or SCENE[1]
    say(f"rendering {count} frames of {size[0]}×{size[1]}, a scene that no shipped model was trained on")
    scene = rendered_case(render(HELD_OUT_SEEDS[args.seed], count, size, trajectory=args.scene, device=device))
    return Frames(scene.images, [f"frame {i}" for i in range(count)], truth=scene.truth.to("cpu"))


def text(result: Result, path: Path) -> str:
    """What people read: the report, both tables, and what to make of them."""
    parts = [str(result.report), times_table(result), errors_table(result)]
    if result.scores:
        parts.append(scores_table(result))
    return "\n\n".join([*parts, *(f"note: {note}" for note in result.notes), f"picture: {path}"])


def times_table(result: Result) -> str:
    from tabulate import tabulate

    dense = result.runs[0].warm_s
    rows: list[tuple[Any, ...]] = [
        (run.name, seconds(run.first_s), seconds(run.warm_s), f"{dense / run.warm_s:.2f}×", memory(run.peak_bytes))
        for run in result.runs
    ]
    peak = "peak memory" if result.device.type == "cuda" else "memory growth"
    return tabulate(rows, headers=("run", "first call", "warm", "speed", peak), disable_numparse=True)


def errors_table(result: Result) -> str:
    from tabulate import tabulate

    rows = [
        (run, name, f"{d.relative:.2e}", f"{d.largest:.2e}")
        for run, deviations in result.deviations.items()
        for name, d in deviations.items()
    ]
    return tabulate(rows, headers=("against eager dense", "", "‖a−b‖/‖b‖", "max|a−b|/max|b|"), disable_numparse=True)


def scores_table(result: Result) -> str:
    from tabulate import tabulate

    names = next(iter(result.scores.values()))
    rows = [(run, *(f"{found[name]:.3g}" for name in names)) for run, found in result.scores.items()]
    return tabulate(rows, headers=("against the true scene", *names), disable_numparse=True)


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def memory(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
