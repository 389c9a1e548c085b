"""Find a plan for a model from what each of its layers can spare on given images, and write it as a JSON file.

Every candidate is tried at every global layer by itself; then the choice is made that reaches the target with the least
change of cameras, depth and points, and it is run as a whole. With --work, other targets need that last run only.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggt_compile.cli.options import add_dtype, add_size, check_frames, check_size, read_device
from vggt_compile.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vggt_compile.auto.calibration import Calibration
    from vggt_compile.auto.find import Found

HELP = "find a plan for a model on your images"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="trained in this package, any with --checkpoint, module:callable"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for it, such as upstream's")
    parser.add_argument("--target", action="append", required=True, metavar="WHAT=N", help="speedup=, flops= or error=")
    parser.add_argument("--images", type=Path, nargs="+", metavar="DIR", help="folders of images, one scene each")
    parser.add_argument(
        "--scenes", default="orbit,wide,video", metavar="SCENE,…", help="else, rendered training scenes"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first of them (default: 0)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="scenes of each kind (default: 1)")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="of each scene (default: 8)")
    parser.add_argument("--for-frames", type=int, metavar="N", help="count FLOPs at so many frames (default: --frames)")
    parser.add_argument("--cost", choices=("auto", "flops", "time"), default="auto", help="(default: auto)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="measure again around the plan found")
    parser.add_argument(
        "--only", metavar="NAME,…", help="candidates to try, by their names in the table (default: all)"
    )
    parser.add_argument("--every", action="store_true", help="also try what probes call hopeless")
    add_size(parser, default="the model's own")
    add_dtype(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--work", type=Path, metavar="FILE", help="results line by line, to go on after a break")
    parser.add_argument("--out", type=Path, default=Path("plan.json"), metavar="FILE", help="(default: plan.json)")


def run(args: argparse.Namespace) -> int:
    import torch

    from vggt_compile.auto.calibration import calibrate
    from vggt_compile.auto.find import find
    from vggt_compile.auto.target import Target
    from vggt_compile.cli.profile import load_model

    targets = [Target.read(text) for text in args.target]
    check_frames(args.frames)
    device = read_device(args.device)
    model, weights, patch = load_model(args.model, args.checkpoint, device)
    scenes = read_scenes(args, model, patch, device)
    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
        warnings.filterwarnings("ignore", message="vggt_compile:")
        calibration = calibrate(
            model,
            scenes,
            frames=args.for_frames,
            cost=args.cost,
            work=args.work,
            policies=None if args.only is None else [name.strip() for name in args.only.split(",")],
            prune=not args.every,
            progress=not args.json,
        )
        found, paths = [], []
        for target in targets:
            found.append(find(calibration, target, rounds=args.rounds, progress=not args.json))
            paths.append(write(found[-1], args.out, several=len(targets) > 1))
    if args.json:
        told = {"model": args.model, "weights": weights, "found": [entry.to_dict() for entry in found]}
        print(json.dumps(told | {"files": list(map(str, paths)), **record(calibration)}, indent=1))
    else:
        print(text(calibration, found, paths))
    return 0


def read_scenes(args: argparse.Namespace, model: Any, patch: int, device: torch.device) -> list[Tensor]:
    """Images [1, F, 3, H, W] of each scene."""
    from vggt_compile import scenes
    from vggt_compile.bench.accuracy import cases
    from vggt_compile.cli.accuracy import native_size
    from vggt_compile.cli.images import load_folder

    size = tuple(args.size) if args.size else None
    if args.images is not None:
        found = [load_folder(f, patch, limit=args.frames, size=size, resize=size is not None) for f in args.images]
        return [frames.images.to(device) for frames in found]
    if args.count < 1 or args.seed < 0:
        raise BadInput(f"--count {args.count} --seed {args.seed}: one scene or more, from 0 on")
    if size is None and ":" in args.model:
        raise BadInput(f"--size H W is needed: the own size of {args.model} is not known")
    height, width = check_size(size or (native_size(model),) * 2, patch)
    made = []
    for name in cases.read_scenes(args.scenes):
        trajectory, _, kind = name.partition("/")
        for seed in scenes.TRAINING_SEEDS[args.seed : args.seed + args.count]:
            made.append(scenes.render(seed, args.frames, (height, width), trajectory, kind, device).images)
    return made


def write(found: Found, out: Path, *, several: bool) -> Path:
    """The plan as a file; where there are several, the target is part of their names."""
    path = out.with_stem(f"{out.stem}-{str(found.target).replace('=', '-')}") if several else out
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found.plan.to_json(), indent=1) + "\n")
    except OSError as error:
        raise BadInput(f"--out {path}: {error.strerror}") from error
    return path


def record(calibration: Calibration) -> dict[str, Any]:
    """JSON-ready: the table behind the choice."""
    return {
        "errors": {str(layer): dict(found) for layer, found in calibration.errors.items()},
        "costs": {str(layer): dict(found) for layer, found in calibration.costs.layers.items()},
        "left_out": {str(layer): dict(found) for layer, found in calibration.left_out.items()},
        "together": dict(calibration.together),
    }


def text(calibration: Calibration, found: list[Found], paths: list[Path]) -> str:
    from tabulate import tabulate

    layers = list(calibration.errors)
    rows = [
        (name, *(_cell(calibration.errors[layer].get(name)) for layer in layers), _cell(calibration.together.get(name)))
        for name in calibration.policies
        if any(name in tried for tried in calibration.errors.values())
    ]
    table = tabulate(rows, headers=("error of one layer", *map(str, layers), "all"), disable_numparse=True)
    plans = [
        (
            str(entry.target),
            f"{entry.flops:.1%}",
            f"{entry.speedup:.2f}",
            f"{entry.predicted:.4f}",
            f"{entry.measured:.4f}",
            str(path),
        )
        for entry, path in zip(found, paths, strict=True)
    ]
    headers = ("target", "FLOPs left", "speedup", "predicted", "measured", "file")
    return f"{table}\n\n{tabulate(plans, headers=headers, disable_numparse=True)}"


def _cell(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"
