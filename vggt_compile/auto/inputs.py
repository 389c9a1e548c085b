"""What a calibration is given: scenes, candidates and the kind of cost, each checked before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vggt_compile.auto.candidates import DENSE
from vggt_compile.errors import BadInput, UnknownName
from vggt_compile.plan import Policy

COSTS = ("auto", "flops", "time")


def read_policies(
    given: Mapping[str, object] | Sequence[str] | None, known: Mapping[str, Policy]
) -> Mapping[str, Policy]:
    """The candidates that are meant, and the dense one; PlanError where that cannot be."""
    if given is None:
        return known
    if not isinstance(given, Mapping):
        for name in given:
            if name not in known:
                raise UnknownName("candidate", name, known)
        given = {name: known[name] for name in known if name in given}
    own = {name: policy if isinstance(policy, Policy) else Policy.read(policy) for name, policy in given.items()}
    return {DENSE: Policy()} | own


def checked(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Scenes [1, S, 3, H, W] of one shape; BadInput where they are not."""
    given = [images] if isinstance(images, Tensor) else list(images)
    scenes = [x[None] if x.ndim == 4 else x for x in given]
    if not scenes or any(x.ndim != 5 or x.shape[0] != 1 or x.shape != scenes[0].shape for x in scenes):
        shapes = ", ".join(str(list(x.shape)) for x in given) or "none"
        raise BadInput(f"images are [frames, 3, H, W], or a list of these of one shape, not {shapes}")
    if scenes[0].shape[1] < 2:
        raise BadInput("one frame only: a plan is about attention between frames, which needs two or more")
    return scenes


def by_time(cost: str, images: Tensor, other: bool) -> bool:
    if cost not in COSTS:
        raise UnknownName("cost", cost, COSTS)
    if cost == "time" and other:
        raise BadInput("cost 'time' is that of the images at hand: no other number of frames, or cost 'flops'")
    return cost == "time" or (cost == "auto" and images.device.type == "cuda" and not other)


def dtype(images: Tensor) -> str:
    device = images.device.type
    return str(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype)
