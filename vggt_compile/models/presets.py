"""Models by name: the released sizes, a small one to train and ship, and a tiny one for tests."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from vggt_compile.models.camera import CameraConfig
from vggt_compile.models.dpt import DPTConfig
from vggt_compile.models.encoder import ViTConfig
from vggt_compile.models.pi3 import Pi3, Pi3Config
from vggt_compile.models.vggt import VGGT, VGGTConfig

Config = TypeVar("Config", VGGTConfig, Pi3Config)

# "small": 224² images, heads 64 wide as in the large models, so that it runs the same kernels; below 8 M parameters.
SMALL_ENCODER = ViTConfig(depth=2, heads=3, mlp_ratio=2.0, registers=4, grid=16)
TINY_ENCODER = ViTConfig(depth=1, heads=2, mlp_ratio=2.0, registers=2, grid=4)

VGGT_PRESETS: Mapping[str, VGGTConfig] = {
    "1b": VGGTConfig(),
    "small": VGGTConfig(
        embed_dim=192,
        depth=8,
        heads=3,
        mlp_ratio=2.0,
        layer_scale=0.1,
        encoder=SMALL_ENCODER,
        camera=CameraConfig(depth=1, heads=6, mlp_ratio=1.0, layer_scale=0.1),
        dpt=DPTConfig(layers=(1, 3, 5, 7), channels=(32, 48, 64, 96), features=32, chunk=None),
    ),
    "tiny": VGGTConfig(
        embed_dim=64,
        depth=4,
        heads=2,
        mlp_ratio=2.0,
        encoder=TINY_ENCODER,
        camera=CameraConfig(depth=1, heads=4, mlp_ratio=2.0, steps=2),
        dpt=DPTConfig(layers=(0, 1, 2, 3), channels=(8, 8, 16, 16), features=16, chunk=None),
    ),
}

PI3_PRESETS: Mapping[str, Pi3Config] = {
    "large": Pi3Config(),
    "small": Pi3Config(
        embed_dim=192,
        depth=16,
        heads=3,
        mlp_ratio=2.0,
        layer_scale=0.1,
        encoder=SMALL_ENCODER,
        readout_depth=2,
        readout_dim=128,
        readout_heads=2,
        camera_dim=128,
    ),
    "tiny": Pi3Config(
        embed_dim=64,
        depth=4,
        heads=2,
        mlp_ratio=2.0,
        encoder=TINY_ENCODER,
        readout_depth=1,
        readout_dim=64,
        readout_heads=2,
        camera_dim=32,
    ),
}


def vggt(config: str | VGGTConfig = "1b", **overrides: Any) -> VGGT:
    """A VGGT with fresh weights.

    Args:
        config: "1b" (the released model), "small", "tiny", or a config.
        overrides: fields of `VGGTConfig` to replace.

    Raises:
        ValueError: no such name, or fields that contradict each other.
    """
    return VGGT(replace(named(config, VGGT_PRESETS), **overrides))


def pi3(config: str | Pi3Config = "large", **overrides: Any) -> Pi3:
    """A π³ with fresh weights.

    Args:
        config: "large" (the released model), "small", "tiny", or a config.
        overrides: fields of `Pi3Config` to replace.

    Raises:
        ValueError: no such name, or fields that contradict each other.
    """
    return Pi3(replace(named(config, PI3_PRESETS), **overrides))


def named(config: str | Config, presets: Mapping[str, Config]) -> Config:
    """The preset of that name, or the config itself."""
    if not isinstance(config, str):
        return config
    if config not in presets:
        near = difflib.get_close_matches(config.lower(), presets, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no model named {config!r}, only {', '.join(map(repr, presets))}{hint}")
    return presets[config]
