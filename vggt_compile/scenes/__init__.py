"""Procedural multi-view scenes whose images, depth, cameras and world points agree exactly, because one ray gives all.

    views = render(seed=[0, 1, 2], frames=8, size=(224, 224), trajectory="video", kind="indoor", device="cuda")
    views.images         # [3, 8, 3, 224, 224] in [0, 1]
    overlap(views)       # [3, 8, 8] what frame i shares with frame j

To add a texture, a trajectory or a kind of scene, write one function under `@texture`, `@trajectory` or `@kind`.
"""

import vggt_compile.scenes.unseen  # noqa: F401 (registers the held-out textures)
from vggt_compile.scenes.cameras import RIG, TRAJECTORIES, trajectory
from vggt_compile.scenes.dice import HELD_OUT_SEEDS, TRAINING_SEEDS
from vggt_compile.scenes.difficulty import DIFFICULTIES, Difficulty
from vggt_compile.scenes.layout import KINDS, Scene, kind
from vggt_compile.scenes.render import render
from vggt_compile.scenes.textures import HELD_OUT_TEXTURES, TEXTURES, TRAINING_TEXTURES, held_out, texture
from vggt_compile.scenes.trace import Hit, trace
from vggt_compile.scenes.views import Views, overlap, project, unproject

__all__ = [
    "DIFFICULTIES",
    "HELD_OUT_SEEDS",
    "HELD_OUT_TEXTURES",
    "KINDS",
    "RIG",
    "TEXTURES",
    "TRAINING_SEEDS",
    "TRAINING_TEXTURES",
    "TRAJECTORIES",
    "Difficulty",
    "Hit",
    "Scene",
    "Views",
    "held_out",
    "kind",
    "overlap",
    "project",
    "render",
    "texture",
    "trace",
    "trajectory",
    "unproject",
]
