"""A π³ gives its cameras and its points in one unit, which averaged weights lose and this restores.

The unit itself is free, and the loss compares translations in the one that fits the points. It drifts while a model
learns; heads of weights that were averaged over the drift no longer agree on it.

    python examples/training/gauge.py weights.safetensors --model pi3-small
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch
from curriculum import Curriculum
from losses import between_frames, from_first_camera, scale_of_points, world_to_camera
from safetensors.torch import load_file, save_file

from vggt_compile.models import Pi3, pi3
from vggt_compile.scenes import Views

STEPS = 48
"""Training steps whose scenes are looked at."""


@torch.no_grad()
def length_factor(model: Pi3, batches: Iterable[Views]) -> float:
    """What the translations of a π³ have to be multiplied by: the median over batches of the least-squares factors."""
    factors = []
    for views in batches:
        truth, outputs = from_first_camera(views), model(views.images)
        poses = world_to_camera(outputs["camera_poses"], scale_of_points(outputs["local_points"], truth))
        found, true = between_frames(poses)[1], between_frames(truth.extrinsics)[1]
        factors.append(float((found * true).sum() / found.square().sum()))
    return statistics.median(factors)


def settle_lengths(weights: Path, preset: str, curriculum: Curriculum, device: torch.device) -> float:
    """Rewrite a file of π³'s weights so that translations are in the unit of the points; the factor that did it."""
    state = load_file(weights)
    model = pi3(preset)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.to(device).eval()
    factor = length_factor(model, (curriculum.views(curriculum.warm + step, 0, device) for step in range(STEPS)))
    for name in ("camera_head.fc_t.weight", "camera_head.fc_t.bias"):
        state[name] = (state[name].float() * factor).to(state[name].dtype)
    save_file(state, weights)
    return factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--model", default="pi3-small", help="pi3-small or pi3-tiny")
    parser.add_argument("--images", type=int, default=24, help="images a step")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    curriculum = Curriculum(0, args.images, tuple(args.size), 1, False)
    factor = settle_lengths(args.weights, args.model.partition("-")[2], curriculum, torch.device(args.device))
    print(f"translations times {factor:.3f}")


if __name__ == "__main__":
    main()
