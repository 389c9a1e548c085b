"""What a plan, or more frames, changes in a profile: paired by scenes, because scenes differ by more than plans do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vggt_compile.analysis.profile import Point, Profile, finite

SHOWN = (
    "entropy",
    "attention_effective_rank",
    "attention_sigma_ratio",
    "token_effective_rank",
    "cosine",
    "residual_ratio",
    "value_contraction",
)


@dataclass(frozen=True)
class Change:
    """How much larger quantities are in one profile than in another: means over layers, with the error over scenes."""

    of: str
    against: str
    quantities: dict[str, Point]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {
            name: {"value": finite(point.value), "error": finite(point.error)}
            for name, point in self.quantities.items()
        }
        return {"of": self.of, "against": self.against, "quantities": found}


def changes(profiles: Sequence[Profile]) -> list[Change]:
    """Every plan against the first one at equal frames, and the first one with more frames against its fewest."""
    return [
        Change(_name(one), _name(other), {name: change(one, other, name) for name in _common(one, other)})
        for one, other in _pairs(profiles)
    ]


def change(profile: Profile, base: Profile, quantity: str) -> Point:
    """The difference of means over layers, averaged over scenes; its error is that of the mean of the differences, and
    NaN for one scene."""
    found = [
        _mean(one, quantity) - _mean(other, quantity) for one, other in zip(profile.scenes, base.scenes, strict=True)
    ]
    values = torch.tensor(found, dtype=torch.float64)
    error = (values.std() / math.sqrt(len(found))).item() if len(found) > 1 else math.nan
    return Point(values.mean().item(), error)


def _mean(scene: Any, quantity: str) -> float:
    values = [found[quantity].value for found in scene.values() if quantity in found]
    return sum(values) / len(values)


def _pairs(profiles: Sequence[Profile]) -> Iterator[tuple[Profile, Profile]]:
    first = [profile for profile in profiles if profile.plan == profiles[0].plan]
    for profile in profiles:
        if profile.plan != profiles[0].plan:
            yield profile, next(base for base in first if base.frames == profile.frames)
    yield from ((more, first[0]) for more in first[1:])


def _common(one: Profile, other: Profile) -> list[str]:
    return [name for name in SHOWN if name in one.quantities and name in other.quantities]


def _name(profile: Profile) -> str:
    return f"{profile.plan}, {profile.frames} frames"
