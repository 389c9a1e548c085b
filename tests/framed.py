"""A small alternating model, images for it, and the model with `scope: frame` written by hand."""

from __future__ import annotations

from collections.abc import Callable

import alternating
import torch
from alternating import Spec, images
from harness import in_frames, swapped
from torch import Tensor, nn

SPEC = Spec()


def scene(spec: Spec = SPEC, batch: int = 1, frames: int = 3, grid: tuple[int, int] = (2, 3)) -> Tensor:
    return images(spec, batch, frames, grid)


def by_hand(model: nn.Module, x: Tensor, core: Callable = alternating.sdpa) -> Tensor:
    """The model with an explicit reshape around every global attention."""
    with torch.no_grad(), swapped(model, in_frames(x.shape[1], core)):
        return model(x)
