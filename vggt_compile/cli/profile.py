"""Measure how far attention and tokens collapse, layer by layer: `analyze MODEL`, by numbers of frames and by plans.

Beside it stands what theory predicts from the measured steps and logits, and where it is off (docs/collapse.md).

MODEL is a trained model of this package, any written here with --checkpoint, or module:callable that gives an nn.Module
with its weights. It sees rendered scenes that the shipped models were not trained on, or the images of a folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggt_compile.cli.options import add_dtype, check_size, read_device
from vggt_compile.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vggt_compile.analysis.profile import Profile

HELP = "ranks, cosines and contraction at each global layer, measured and predicted (`analyze MODEL` is this)"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="such as pi3-small, vggt-small or module:callable")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for it, such as upstream's")
    parser.add_argument("--random", action="store_true", help="random weights, where none come with the package")
    parser.add_argument("--frames", default="8,32", metavar="N,…", help="(default: 8,32)")
    parser.add_argument("--plans", default="dense,fastvggt", metavar="PLAN,…", help="(default: dense,fastvggt)")
    parser.add_argument("--measures", metavar="NAME,…", help="(default: all; docs/collapse.md lists them)")
    parser.add_argument(
        "--rows", type=int, metavar="N", help="queries or tokens that are drawn (default: the measures')"
    )
    parser.add_argument("--scene", default="orbit", help="as orbit or orbit/objects (default: orbit)")
    parser.add_argument("--seed", type=int, default=0, help="the first held-out scene (default: 0)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="so many scenes from it on (default: 1)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder instead; its first images are taken")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels (default: the model's own)")
    add_dtype(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--out", default="analyze_out", metavar="DIR", help="for collapse.png and collapse.json")


def run(args: argparse.Namespace) -> int:
    from vggt_compile.analysis import picture, profile_picture
    from vggt_compile.analysis.changes import changes
    from vggt_compile.analysis.predict import predict
    from vggt_compile.analysis.profile import profile
    from vggt_compile.bench.accuracy.plans import read_plans
    from vggt_compile.cli.accuracy import read_frames
    from vggt_compile.cli.demo import output_folder
    from vggt_compile.cli.profile_text import text

    counts, plans, measures = read_frames(args.frames), read_plans(args.plans), read_measures(args)
    device = read_device(args.device)
    picture.check_installed()
    model, weights, patch = load_model(args.model, args.checkpoint, device, random=args.random)
    scenes = [_scenes(args, model, patch, count, device) for count in counts]
    folder = output_folder(args.out)
    profiles: list[Profile] = []
    import torch

    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
        warnings.filterwarnings("ignore", message="vggt_compile:")  # the record has these notes
        for name, plan in plans.items():
            for images in scenes:
                profiles.append(profile(model, images, replace(plan, name=name), measures))
                print(f"measured: {name}, {images[0].shape[1]} frames", file=sys.stderr)
    source = f"images of {args.images}" if args.images else _scene_text(args)
    height, width = scenes[0][0].shape[-2:]
    title = f"{args.model}{' with random weights' if args.random else ''}, {source}, {height}×{width}"
    predictions = [predict(found) for found in profiles]
    profile_picture.draw(profiles, title, folder / "collapse.png", predictions)
    settings: dict[str, Any] = {"model": args.model, "weights": weights, "source": source, "size": [height, width]}
    record: dict[str, Any] = {
        "settings": settings,
        "probe": measures,
        "profiles": [found.to_dict() for found in profiles],
        "predictions": [found.to_dict() for found in predictions],
    }
    compared = changes(profiles)
    record["changes"] = [found.to_dict() for found in compared]
    written = [folder / f"collapse.{kind}" for kind in ("png", "json", "md")]
    written[1].write_text(json.dumps(record, indent=1) + "\n")
    written[2].write_text(text(profiles, predictions, compared, title, page=True) + "\n")
    names = ", ".join(map(str, written))
    shown = f"{text(profiles, predictions, compared, title)}\n\nwritten: {names}"
    print(json.dumps(record, indent=1) if args.json else shown)
    return 0


def read_measures(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The `probe` part of a plan that --measures and --rows mean."""
    from vggt_compile.plan import read_probe
    from vggt_compile.registry import find_measure, measures

    names = [entry.name for entry in measures()] if args.measures is None else args.measures.split(",")
    found = [find_measure(name.strip()) for name in names]
    wanted: list[dict[str, Any]] = [{"measure": entry.name} for entry in found]
    if args.rows is not None:
        for entry, one in zip(found, wanted, strict=True):
            one |= {"rows": args.rows} if "rows" in entry.parameters else {}
    read_probe(wanted)
    return wanted


def load_model(
    name: str, checkpoint: str | None, device: torch.device, *, random: bool = False
) -> tuple[nn.Module, str, int]:
    """A model, a fingerprint of its weights, and the side of its patches."""
    from vggt_compile.cli import subject
    from vggt_compile.cli.accuracy import fingerprint, load

    if random:
        return _random(name, checkpoint, device)
    if ":" not in name:
        model, weights = load(name, checkpoint, device)
        return model, weights, model.config.patch_size
    if checkpoint is not None:
        raise BadInput(f"--checkpoint: {name} gives a model with its weights")
    found = subject.outline(name)
    return found.model.to(device), fingerprint(found.model), found.patch


def _random(name: str, checkpoint: str | None, device: torch.device) -> tuple[nn.Module, str, int]:
    """Random weights with the gains of residual branches at 1: what depth, width and frames do by themselves."""
    from vggt_compile.cli import subject
    from vggt_compile.models import available

    if ":" in name or checkpoint is not None or name in available():
        raise BadInput(f"--random: {name} has weights; it is for models of this package without any")
    found = subject.named(name, device)
    return found.model, "random", found.patch


def _scenes(args: argparse.Namespace, model: Any, patch: int, frames: int, device: torch.device) -> list[Tensor]:
    """Images [1, F, 3, H, W] of each scene."""
    from vggt_compile.cli.accuracy import native_size
    from vggt_compile.cli.blocks import read_scene, render
    from vggt_compile.cli.images import load_folder

    size = tuple(args.size) if args.size else None
    if args.images is not None:
        found = load_folder(args.images, patch, limit=frames, size=size, resize=size is not None)
        if found.images.shape[1] < frames:
            raise BadInput(f"--images {args.images}: {found.images.shape[1]} images, but --frames asks for {frames}")
        return [found.images.to(device)]
    if args.count < 1:
        raise BadInput(f"--count {args.count}: one scene or more")
    if size is None and ":" in args.model:
        raise BadInput(f"--size H W is needed: the own size of {args.model} is not known")
    height, width = size or (native_size(model),) * 2
    check_size((height, width), patch)
    seeds = range(args.seed, args.seed + args.count)
    return [render(read_scene(args.scene), seed, frames, (height, width)).to(device) for seed in seeds]


def _scene_text(args: argparse.Namespace) -> str:
    last = args.seed + args.count - 1
    which = f"scenes {args.seed}–{last}" if args.count > 1 else f"scene {args.seed}"
    return f"{args.scene}, held-out {which}"
