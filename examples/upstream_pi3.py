"""Upstream π³, unmodified, from your own checkout: the same model compiled with a plan, next to the model as it is.

    python examples/upstream_pi3.py --checkout ~/Pi3 --checkpoint model.safetensors --images my_images
    python examples/upstream_pi3.py --checkout ~/Pi3 --explain

Install what the checkout's requirements ask for, except its pin of torch. Without --images a scene is rendered; without
--checkpoint the weights are random, so reports and times hold and the geometry means nothing.
"""

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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, metavar="DIR", help="a clone of yyfz/Pi3")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="*.pt or *.safetensors; else random weights")
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder of images; else a rendered scene")
    parser.add_argument("--frames", type=int, default=16, metavar="N", help="at most so many (default: 16)")
    parser.add_argument("--size", type=int, nargs=2, default=(392, 518), metavar=("H", "W"), help="of a rendered scene")
    parser.add_argument("--plan", default="g2f", help="a recipe's name or the path of a JSON file (default: g2f)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--explain", action="store_true", help="only report what the plan would do; runs no kernel")
    return parser.parse_args()


def load_model(checkpoint: Path | None) -> nn.Module:
    from pi3.models.pi3 import Pi3

    model = Pi3()
    if checkpoint is None:
        print("random weights: reports and times hold, the geometry means nothing")
    elif checkpoint.suffix == ".safetensors":
        from safetensors.torch import load_file

        model.load_state_dict(load_file(checkpoint))
    else:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    return model.eval()


def load_images(folder: Path | None, frames: int, size: tuple[int, int]) -> Tensor:
    """[1, frames, 3, H, W] in 0..1."""
    if folder is None:
        return render(seed=0, frames=frames, size=size).images
    from pi3.utils.basic import load_images_as_tensor

    return load_images_as_tensor(str(folder))[None, :frames]


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


def main() -> None:
    args = arguments()
    sys.path.insert(0, str(args.checkout.expanduser()))
    model = load_model(args.checkpoint).to(args.device)
    images = load_images(args.images, args.frames, tuple(args.size)).to(args.device)
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
        for name in ("camera_poses", "points", "local_points"):
            difference = (got[name] - want[name]).norm() / want[name].norm()
            print(f"{name:12s} relative difference to the model as it is: {float(difference):.2e}")
        print(f"as it is: {seconds(lambda: model(images), args.device):.2f} s")
        print(f"compiled: {seconds(lambda: fast(images), args.device):.2f} s")


if __name__ == "__main__":
    main()
