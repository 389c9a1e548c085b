"""The trained small models that come with the package; weights/README.md says what they saw and what they can do."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files

import safetensors.torch

from vggt_compile.models.pi3 import Pi3
from vggt_compile.models.presets import pi3, vggt
from vggt_compile.models.vggt import VGGT

BUILDERS: dict[str, Callable[[str], VGGT | Pi3]] = {"vggt-small": vggt, "pi3-small": pi3}


def available() -> tuple[str, ...]:
    """Names that `pretrained` takes."""
    folder = files("vggt_compile.models") / "weights"
    return tuple(name for name in BUILDERS if (folder / f"{name}.safetensors").is_file())


def pretrained(name: str) -> VGGT | Pi3:
    """A small trained model in evaluation mode, fp32 on the CPU, for images of 224×224 pixels.

    Raises:
        ValueError: no weights of that name come with the package.
    """
    if name not in available():
        raise ValueError(f"no trained {name!r} comes with the package, only {', '.join(map(repr, available()))}")
    model = BUILDERS[name]("small")
    with as_file(files("vggt_compile.models") / "weights" / f"{name}.safetensors") as path:
        state = safetensors.torch.load_file(path)
    model.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    model.eval()
    return model
