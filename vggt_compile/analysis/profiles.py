"""A profile is what was measured of each global attention of one run, in order: the input of a prediction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vggt_compile.errors import BadInput, UnknownName


@dataclass(frozen=True)
class LayerProfile:
    """One global attention. Only the first five are needed to predict cosines."""

    layer: int
    tokens: int  # of the attention, frames × tokens of a frame, or what merging left of them
    cosine: float  # ρ, the mean over pairs of different tokens, as they come in
    step: float  # ‖attention's update‖_F / ‖tokens‖_F, after LayerScale
    beta: float = 0.0  # of logits β⟨x_i, x_j⟩; 0 where attention does not look at cosines
    logit_std: float | None = None  # s, the standard deviation of logits in a row
    queries: int | None = None  # rows that the numbers below are of; None is all
    entropy: float | None = None  # of a row of the attention, over log n
    stable_rank: float | None = None  # of the attention matrix
    second: float | None = None  # its σ2/σ1
    token_rank: float | None = None  # stable rank of the tokens, each scaled to length one

    def __post_init__(self) -> None:
        where = f"layer {self.layer} of a profile"
        for name, value in vars(self).items():
            if value is not None and not math.isfinite(value):
                raise BadInput(f"{where} has {name} {value}: the model gave values that are not finite")
        if self.tokens < 2 or self.step < 0 or self.beta < 0:
            raise BadInput(f"{where} needs 2 or more tokens, a step and a beta of 0 or more")
        if not -1 / (self.tokens - 1) <= self.cosine < 1:
            raise BadInput(f"{where} has mean cosine {self.cosine:g}, which {self.tokens} tokens cannot have")

    @staticmethod
    def read(data: Mapping[str, Any]) -> LayerProfile:
        """From JSON; keys that are not fields are an error."""
        known = [field.name for field in dataclasses.fields(LayerProfile)]
        for name in data:
            if name not in known:
                raise UnknownName("measured quantity", name, known)
        missing = [name for name in ("layer", "tokens", "cosine", "step") if name not in data]
        if missing:
            raise BadInput(f"a layer of a profile needs {', '.join(missing)}")
        return LayerProfile(**data)


Profile = Sequence[LayerProfile]


def read_profiles(scenes: Iterable[Iterable[Mapping[str, Any]]]) -> list[list[LayerProfile]]:
    """Scenes × layers from JSON."""
    return [[LayerProfile.read(layer) for layer in scene] for scene in scenes]


@dataclass(frozen=True)
class Measured:
    """Profiles of S scenes and L layers as tensors [S, L]."""

    layers: tuple[int, ...]
    gap: Tensor
    step: Tensor
    tokens: Tensor
    beta: Tensor

    @staticmethod
    def of(profiles: Sequence[Profile]) -> Measured:
        """Of profiles with the same layers, two or more.

        Raises:
            BadInput: no profile, a single layer, or scenes that differ in their layers.
        """
        if not profiles or len(profiles[0]) < 2:
            raise BadInput("a prediction needs profiles of at least one scene with two global attentions")
        layers = tuple(entry.layer for entry in profiles[0])
        if any(tuple(entry.layer for entry in profile) != layers for profile in profiles):
            raise BadInput("profiles of several scenes must be of the same layers")

        def column(name: str) -> Tensor:
            return torch.tensor([[getattr(entry, name) for entry in profile] for profile in profiles]).double()

        gap = torch.tensor([[1 - entry.cosine for entry in profile] for profile in profiles], dtype=torch.float64)
        return Measured(layers, gap, column("step"), column("tokens"), column("beta"))
