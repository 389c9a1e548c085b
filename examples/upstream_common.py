"""What the upstream examples share: a checkout, a checkpoint and images in; the report, differences and times out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vggt_compile
from vggt_compile.scenes import render


def arguments(description: str | None, repository: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, metavar="DIR", help=f"a clone of {repository}")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="*.pt or *.safetensors; else random weights")
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder of images; else a rendered scene")
    parser.add_argument("--frames", type=int, default=16, metavar="N", help="at most so many (default: 16)")
    parser.add_argument("--size", type=int, nargs=2, default=(392, 518), metavar=("H", "W"), help="of a rendered scene")
    parser.add_argument("--plan", default="g2f", help="a recipe's name or the path of a JSON file (default: g2f)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--explain", action="store_true", help="only report what the plan would do; runs no kernel")
    return parser.parse_args()


def load_weights(model: nn.Module, checkpoint: Path | None) -> nn.Module:
    if checkpoint is None:
        print("random weights: reports and times hold, the geometry means nothing")
    elif checkpoint.suffix == ".safetensors":
        from safetensors.torch import load_file

        model.load_state_dict(load_file(checkpoint))
    else:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    return model.eval()


def seconds(call: Callable[[], Any], device: str, runs: int = 3) -> float:
    """Shortest time of a call, after one that does not count."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def run(
    description: str | None,
    repository: str,
    build: Callable[[], nn.Module],
    read_folder: Callable[[Path, int], Tensor],
    outputs: tuple[str, ...],
) -> None:
    """Compare a model of a checkout with itself under a plan.

    Args:
        build: makes the model, once the checkout can be imported.
        read_folder: folder, most frames → [frames, 3, H, W] in 0..1, as the checkout reads images.
        outputs: what of the model's dictionary is compared.
    """
    args = arguments(description, repository)
    sys.path.insert(0, str(args.checkout.expanduser()))
    model = load_weights(build(), args.checkpoint).to(args.device)
    scene = args.images is None
    images = render(0, args.frames, tuple(args.size)).images if scene else read_folder(args.images, args.frames)[None]
    images = images.to(args.device)
    kind = torch.device(args.device).type
    with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        if args.explain:
            print(vggt_compile.explain(model, images, plan=args.plan))
            return
        fast = torch.compile(model, backend=vggt_compile.vggt_sparse, options={"plan": args.plan})
        print("compiling, minutes the first time …", flush=True)
        with vggt_compile.collect_reports() as reports:
            got = fast(images)
        print(*reports, sep="\n\n")
        want = model(images)
        for name in outputs:
            difference = (got[name] - want[name]).norm() / want[name].norm()
            print(f"{name:12s} relative difference to the model as it is: {float(difference):.2e}")
        print(f"as it is: {seconds(lambda: model(images), args.device):.2f} s")
        print(f"compiled: {seconds(lambda: fast(images), args.device):.2f} s")
