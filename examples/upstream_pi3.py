"""Upstream π³, unmodified, from your own checkout: the same model compiled with a plan, next to the model as it is.

    python examples/upstream_pi3.py --checkout ~/Pi3 --checkpoint model.safetensors --images my_images
    python examples/upstream_pi3.py --checkout ~/Pi3 --explain

Install what the checkout's requirements ask for, except its pin of torch. Without --images a scene is rendered; without
--checkpoint the weights are random, so reports and times hold and the geometry means nothing.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from upstream_common import run


def build() -> nn.Module:
    from pi3.models.pi3 import Pi3

    return Pi3()


def read_folder(folder: Path, frames: int) -> Tensor:
    from pi3.utils.basic import load_images_as_tensor

    return load_images_as_tensor(str(folder))[:frames]


if __name__ == "__main__":
    run(__doc__, "yyfz/Pi3", build, read_folder, ("camera_poses", "points", "local_points"))
