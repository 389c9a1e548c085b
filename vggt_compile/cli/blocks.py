"""Compare the blocks of keys that `predict` reads with where attention truly lies, in every global layer.

A trained model sees a rendered scene that it was not trained on. For each layer: the share of the attention to patches
that the chosen blocks cover, beside as many random ones and as many of the best.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggt_compile.cli.options import check_frames, read_device
from vggt_compile.errors import BadInput

if TYPE_CHECKING:
    from vggt_compile.analysis.blocks import LayerBlocks

HELP = "what the blocks that a plan would choose cover of the true attention"
SIZES = (16, 32, 64, 128, 256)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pi3-small", help="trained in this package, or any with --checkpoint")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for it, such as upstream's")
    parser.add_argument("--scene", default="orbit", help="as orbit or orbit/objects (default: orbit)")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="which held-out scene, and random blocks (default: 0)")
    parser.add_argument("--keep", type=float, default=0.25, metavar="SHARE", help="of key blocks (default: 0.25)")
    parser.add_argument("--q-block", type=int, choices=SIZES, default=128, help="queries of a block (default: 128)")
    parser.add_argument("--k-block", type=int, choices=SIZES, default=64, help="keys of a block (default: 64)")
    parser.add_argument("--order", choices=("raster", "hilbert"), default="raster", help="of patches (default: raster)")
    parser.add_argument("--head", type=int, metavar="N", help="draw this head's maps (default: the mean over heads)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--out", default="analyze_out", metavar="DIR", help="for blocks.png and blocks.json")


def run(args: argparse.Namespace) -> int:
    check_frames(args.frames)
    if not 0 <= args.keep <= 1:
        raise BadInput(f"--keep {args.keep:g}: a share of the blocks, from 0 to 1")
    device = read_device(args.device)
    from vggt_compile.analysis import picture
    from vggt_compile.analysis.blocks import Blocks, analyze_blocks
    from vggt_compile.cli.accuracy import load, native_size
    from vggt_compile.cli.demo import output_folder

    picture.check_installed()
    scene = read_scene(args.scene)
    folder = output_folder(args.out)
    model, weights = load(args.model, args.checkpoint, device)
    images = render(scene, args.seed, args.frames, (native_size(model),) * 2).to(device)
    blocks = Blocks(args.keep, args.q_block, args.k_block, args.order)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="vggt_compile:")
        layers = analyze_blocks(model, images, blocks, args.seed)
    heads = layers[0].mass.shape[0]
    if args.head is not None and not 0 <= args.head < heads:
        raise BadInput(f"--head {args.head}: the layers have heads 0 to {heads - 1}")
    whose = f"mean over {heads} heads" if args.head is None else f"head {args.head}"
    title = (
        f"{args.model}, {scene}, {args.frames} frames of {images.shape[-2]}×{images.shape[-1]}: blocks of "
        f"{args.q_block} queries and {args.k_block} keys, {args.order} order, {args.keep:.0%} read; {whose}"
    )
    picture.draw(layers, blocks, title, folder / "blocks.png", args.head)
    settings = {"model": args.model, "weights": weights, "scene": scene, "seed": args.seed, "frames": args.frames}
    settings |= {"size": list(images.shape[-2:]), **vars(blocks)}
    record = {"settings": settings, "layers": [layer.to_dict() for layer in layers]}
    (folder / "blocks.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1) if args.json else _text(layers, title, folder))
    return 0


def read_scene(text: str) -> str:
    from vggt_compile.bench.accuracy.cases import read_scenes

    scenes = read_scenes(text)
    if len(scenes) != 1:
        raise BadInput(f"--scene {text}: one scene, such as orbit or orbit/objects")
    return scenes[0]


def render(scene: str, seed: int, frames: int, size: tuple[int, int]) -> Any:
    """Images [1, S, 3, H, W] of a scene that no shipped model was trained on."""
    from vggt_compile import scenes

    if not 0 <= seed < len(scenes.HELD_OUT_SEEDS):
        raise BadInput(f"--seed {seed}: there are {len(scenes.HELD_OUT_SEEDS)} held-out scenes, from 0 on")
    trajectory, _, kind = scene.partition("/")
    return scenes.render(scenes.HELD_OUT_SEEDS[seed], frames, size, trajectory, kind).images


def _text(layers: Sequence[LayerBlocks], title: str, folder: Path) -> str:
    from tabulate import tabulate

    rows = [layer.to_dict() for layer in layers]
    table = [
        (str(row["layer"]), row["path"], *map(_percent, (row["special"], *row["covered"].values(), row["agree"])))
        for row in rows
    ]
    names = list(rows[0]["covered"])
    means = [sum(row["covered"][name] for row in rows) / len(rows) for name in names]
    table.append(("", "mean", "", *map(_percent, means), ""))
    headers = ("layer", "path", "to special keys", *names, "among the best")
    note = (
        "Shares of the attention of patches: to special keys, which are always read; and, of the rest, what the blocks "
        "cover that\n`predict` reads, as many random ones, and as many of the best. The last column: how many of the "
        "predicted are among the best."
    )
    printed = tabulate(table, headers=headers, disable_numparse=True)
    return f"{title}\n\n{printed}\n\n{note}\n\nwritten: {folder / 'blocks.png'}, {folder / 'blocks.json'}"


def _percent(share: float) -> str:
    return f"{share:.1%}"
