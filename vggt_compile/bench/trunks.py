"""Trunks of published size with random weights, and random operands of one of their attentions over frames."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vggt_compile.models import pi3, vggt
from vggt_compile.models.presets import PI3_PRESETS, VGGT_PRESETS

SIZE = (392, 518)
"""Height and width of the images in pixels."""


@dataclass(frozen=True)
class Trunk:
    """A model as a benchmark of its attentions over frames sees it.

    Attributes:
        title: what is built, for pages.
        build: the model, with other fields of its config where they are given.
        layers: attentions over frames.
        special: tokens of a frame before its patches.
        patch: side of one in pixels.
    """

    title: str
    build: Callable[..., nn.Module]
    layers: int
    heads: int
    width: int
    special: int
    patch: int

    @property
    def per_frame(self) -> int:
        """Tokens of a frame of SIZE."""
        return self.special + SIZE[0] // self.patch * (SIZE[1] // self.patch)

    def operands(self, frames: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
        """What a measure may read at a layer."""
        generator, tokens = torch.Generator(device).manual_seed(0), frames * self.per_frame

        def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        heads = (1, self.heads, tokens, self.width // self.heads)
        found: dict[str, Any] = {name: random(*heads) for name in ("q", "k", "v", "out")}
        found |= {"x": random(1, tokens, self.width, dtype=torch.float32)}
        found |= {"update": random(1, tokens, self.width)}
        return found | {"scale": None, "frames": frames, "special": self.special}


def _vggt() -> Trunk:
    config = VGGT_PRESETS["1b"]
    return Trunk(
        "VGGT-1B with its camera head",
        functools.partial(vggt, "1b", outputs=("camera",)),
        layers=config.depth,
        heads=config.heads,
        width=config.embed_dim,
        special=1 + config.registers,
        patch=config.patch_size,
    )


def _pi3() -> Trunk:
    config = PI3_PRESETS["large"]
    return Trunk(
        "π³ with all its heads",
        functools.partial(pi3, "large"),
        layers=config.depth // 2,
        heads=config.heads,
        width=config.embed_dim,
        special=config.registers,
        patch=config.patch_size,
    )


TRUNKS = {"vggt": _vggt(), "pi3": _pi3()}
