"""Judge plans by the geometry that a trained model finds under them: against the truth and against the dense model.

Rendered scenes come with the package; `--images` takes a recording with known poses in the layout of TUM RGB-D,
7-Scenes or COLMAP text. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggt_compile.cli.options import add_dtype, check_frames, nearest_size, read_device
from vggt_compile.errors import BadInput

if TYPE_CHECKING:
    import torch

    from vggt_compile.bench.accuracy.cases import Source
    from vggt_compile.bench.accuracy.run import Bench
    from vggt_compile.models import VGGT, Pi3

HELP = "accuracy of plans over attention FLOPs, on scenes or on your recording"


@dataclass(frozen=True)
class Amount:
    """How much is run where the arguments do not say."""

    frames: str
    scenes: str
    count: int


FULL = Amount("10", "orbit,video,wide,rig,rooms", 8)
QUICK = Amount("2,6", "orbit,video", 2)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pi3-small", help="trained in this package, or any with --checkpoint")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for it, such as upstream's")
    parser.add_argument("--plans", metavar="PLAN,…", help="recipes, JSON files or JSON, NAME=… (default: all recipes)")
    parser.add_argument("--layers", action="store_true", help="instead of plans: each global layer inside frames alone")
    parser.add_argument("--frames", metavar="N,…", help=f"(default: {FULL.frames})")
    parser.add_argument("--scenes", metavar="SCENE,…", help=f"as orbit or orbit/objects (default: {FULL.scenes})")
    parser.add_argument("--count", type=int, metavar="N", help=f"scenes of each kind (default: {FULL.count})")
    parser.add_argument("--textures", choices=("training", "held_out"), default="training", help="(default: training)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="a recording instead of rendered scenes")
    parser.add_argument("--poses", type=Path, metavar="PATH", help="its poses, where they are not with the images")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="take every Nth frame of it (default: 1)")
    parser.add_argument("--size", type=int, metavar="N", help="longer side in pixels (default: the model's own)")
    parser.add_argument(
        "--quick", action="store_true", help=f"a check: frames {QUICK.frames} of {QUICK.count} scenes each"
    )
    parser.add_argument("--compiled", action="store_true", help="compile with Inductor rather than run in eager")
    add_dtype(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--work", type=Path, metavar="FILE", help="results line by line (default: OUT/MODEL.jsonl)")
    parser.add_argument("--out", type=Path, default=Path("accuracy_out"), metavar="DIR", help="for JSON and page")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="for pictures (default: as --out)")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from vggt_compile.bench.accuracy import picture, record
    from vggt_compile.bench.accuracy.run import measure, total
    from vggt_compile.journal import Journal

    picture.check_installed()
    bench = build(args)
    record.read(args.out / "accuracy.json")
    journal = Journal(args.work or args.out / f"{args.model}.jsonl", bench.settings())
    with warnings.catch_warnings(), tqdm(total=total(bench), unit="run", file=sys.stderr, disable=args.json) as bar:
        warnings.filterwarnings("ignore", message="vggt_compile:")
        rows = list(measure(bench, journal, bar.update))
    entries = record.entries(bench, rows, "layers" if args.layers else "plans")
    page = record.write(entries, args.out, args.pictures or args.out)
    print(json.dumps({"entries": entries}, indent=2) if args.json else page)
    return 0


def build(args: argparse.Namespace) -> Bench:
    """What the arguments ask for, everything checked that can be before the first case is run."""
    from vggt_compile.bench.accuracy.plans import layer_plans, read_plans
    from vggt_compile.bench.accuracy.run import Bench

    defaults = QUICK if args.quick else FULL
    frames = read_frames(args.frames or defaults.frames)
    if args.layers and args.plans is not None:
        raise BadInput("--layers makes its own plans, one for each global layer; leave --plans out")
    plans = read_plans(args.plans)
    device = read_device(args.device)
    model, weights = load(args.model, args.checkpoint, device)
    source = read_source(args, model, device)
    for count in frames:
        source.keys(count)  # says so now where a recording is too short
    if args.layers:
        plans = layer_plans(global_layers(model))
    return Bench(model, args.model, weights, source, frames, plans, device, args.dtype, args.compiled)


def read_source(args: argparse.Namespace, model: VGGT | Pi3, device: torch.device) -> Source:
    from vggt_compile.bench.accuracy.cases import Recorded, Rendered, read_scenes

    defaults, patch = QUICK if args.quick else FULL, model.config.patch_size
    count = defaults.count if args.count is None else args.count
    size = native_size(model) if args.size is None else args.size
    if count < 1 or args.stride < 1:
        raise BadInput(f"--count {count} --stride {args.stride}: both are at least 1")
    if size < patch or size % patch:
        near = nearest_size((size, size), patch)[0]
        raise BadInput(f"--size {size} is not a multiple of the {patch} px patch; nearest: --size {near}")
    if args.images is None:
        if args.poses is not None:
            raise BadInput("--poses belong to --images DIR, which is missing")
        return Rendered(read_scenes(args.scenes or defaults.scenes), count, size, args.textures, device)
    if args.scenes is not None:
        raise BadInput("--scenes are rendered, --images are recorded; give one of them")
    return Recorded(args.images, args.poses, count, size, patch, args.stride)


def native_size(model: VGGT | Pi3) -> int:
    """Side in pixels of the images that the stored position embedding is for, 518 where there is none."""
    return int(getattr(model.config.encoder, "grid", 37)) * model.config.patch_size


def load(name: str, checkpoint: str | None, device: torch.device) -> tuple[VGGT | Pi3, str]:
    """A trained model and a fingerprint of its weights; BadInput where there are none to load."""
    from vggt_compile.cli import subject
    from vggt_compile.models import available

    subject.patch_size(name)  # names the nearest model for an unknown one
    if checkpoint is None and name not in available():
        raise BadInput(
            f"no trained weights of {name} come with the package, only of {', '.join(available())}; "
            "pass --checkpoint FILE (random weights find no geometry that a plan could harm)"
        )
    model: Any = subject.named(name, device, checkpoint=checkpoint).model
    return model, fingerprint(model)


def fingerprint(model: torch.nn.Module) -> str:
    """Twelve digits that tell one set of weights from another."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def global_layers(model: VGGT | Pi3) -> int:
    """How many global attentions a model has, from a trace of two small frames."""
    import torch

    from vggt_compile.dry_run import explain

    side = model.config.patch_size * 2
    images = torch.zeros(1, 2, 3, side, side, device=next(model.parameters()).device)
    with torch.no_grad():
        return sum(row.layer is not None for row in explain(model, images, plan="dense").global_rows)


def read_frames(text: str) -> tuple[int, ...]:
    """Comma-separated frame counts in increasing order."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise BadInput(f"--frames {text}: not numbers between commas, such as 2,8,16") from error
    return tuple(map(check_frames, counts))
