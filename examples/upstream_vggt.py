"""Upstream VGGT, unmodified, from your own checkout: the same model compiled with a plan, next to the model as it is.

    python examples/upstream_vggt.py --checkout ~/vggt --checkpoint model.pt --images my_images
    python examples/upstream_vggt.py --checkout ~/vggt --explain

Install what the checkout's requirements ask for, except its pin of torch. Without --images a scene is rendered; without
--checkpoint the weights are random, so reports and times hold and the geometry means nothing.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from upstream_common import run


def build() -> nn.Module:
    from vggt.models.vggt import VGGT

    return VGGT()


def read_folder(folder: Path, frames: int) -> Tensor:
    from vggt.utils.load_fn import load_and_preprocess_images

    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return load_and_preprocess_images([str(path) for path in files[:frames]])


if __name__ == "__main__":
    run(__doc__, "facebookresearch/vggt", build, read_folder, ("pose_enc", "depth", "world_points"))
