"""Run an artifact on a folder of images and save what it gives."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

HELP = "run an artifact on a folder of images"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="a file that `export` wrote")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="a folder of images")
    parser.add_argument("--frames", type=int, metavar="N", help="take the first N images")
    parser.add_argument("--out", type=Path, metavar="FILE", help="save the outputs with torch.save")
    parser.add_argument("--resize", action="store_true", help="resize images to the size that the artifact serves")


def run(args: argparse.Namespace) -> int:
    import torch

    from vggt_compile import load
    from vggt_compile.cli.images import load_folder

    start = time.perf_counter()
    artifact = load(args.artifact)
    loaded = time.perf_counter() - start
    size = artifact.manifest.entries[0].span.size
    frames = load_folder(args.images, 1, limit=args.frames, size=size if args.resize else None, resize=args.resize)
    start = time.perf_counter()
    outputs = artifact(frames.images.to(artifact.device))
    if artifact.device.type == "cuda":
        torch.cuda.synchronize()
    shapes = _shapes(outputs)
    facts = {
        "images": frames.names,
        "notes": frames.notes,
        "load_s": round(loaded, 3),
        "first_answer_s": round(time.perf_counter() - start, 3),
        "outputs": shapes,
    }
    if args.out:
        torch.save(outputs, args.out)
        facts["saved"] = str(args.out)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for note in frames.notes:
        print(note)
    print(f"loaded in {loaded:.2f} s, {len(frames.names)} images answered in {facts['first_answer_s']:.2f} s")
    for name, shape in shapes.items():
        print(f"  {name}: {shape}")
    return 0


def _shapes(outputs: Any) -> dict[str, str]:
    from torch import Tensor
    from torch.utils._pytree import keystr, tree_leaves_with_path

    def text(x: Tensor) -> str:
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"

    return {keystr(path): text(x) for path, x in tree_leaves_with_path(outputs) if isinstance(x, Tensor)}
