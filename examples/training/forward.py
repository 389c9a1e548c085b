"""A model on rendered views as training needs it: what it says, and of which frames it says all."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from vggt_compile.models import VGGT, Pi3
from vggt_compile.scenes import Views

MAPPED = 3
"""VGGT maps one in so many frames: its convolutions at full resolution cost as much as all else together, and pixels of
one scene say much the same."""


def forward(model: VGGT | Pi3, views: Views, dice: random.Random) -> tuple[Mapping[str, Any], list[int]]:
    """Outputs of the model, and the frames, ascending, that its dense maps are of."""
    frames = views.images.shape[1]
    if not isinstance(model, VGGT):
        return model(views.images), list(range(frames))
    mapped = sorted(dice.sample(range(frames), -(-frames // MAPPED)))
    features = model.aggregator(views.images)
    some = {layer: tokens[:, mapped] for layer, tokens in features.items()}
    size = views.images.shape[-2], views.images.shape[-1]
    return model.cameras(features) | model.maps(some, size), mapped
