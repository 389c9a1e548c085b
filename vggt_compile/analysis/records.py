"""Measured profiles as the input of the equiangular map: which temperature it is given, and how many keys.

The map has logits β⟨x_i, x_j⟩. Trained attention has not, so β is a substitute, for which there are two readings. With
δ = 1 − ρ of the layer, β δ is how much larger a token's logit with itself is than with another:

    itself    from the share a of its own attention that a token is measured to get: e^{βδ} = (n − 1) a / (1 − a)
    scale     from the spread s of logits, as if tokens were random in the width w of a head: β δ = s √(w − 1)

Where a plan leaves n' of n keys to a query, n' take part, at the β of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from vggt_compile.analysis.profile import Profile
from vggt_compile.analysis.profiles import LayerProfile
from vggt_compile.probes import Probe

Reading = Literal["itself", "scale"]
QUANTITY: dict[Reading, str] = {"itself": "to_itself", "scale": "logit_scale"}
MEASURE: dict[Reading, str] = {"itself": "itself", "scale": "logits"}

TINY, LARGEST = 1e-300, 700.0
"""The ends of fp64: of a share, and of an exponent."""


def measured_layers(profile: Profile, *quantities: str) -> list[int]:
    """Where all of these were measured."""
    return [layer for layer in profile.layers if all(name in profile.scenes[0][layer] for name in quantities)]


def values(profile: Profile, quantity: str, layers: Iterable[int]) -> Tensor:
    """[scenes, layers], means over heads."""
    found = [[scene[layer][quantity].value for layer in layers] for scene in profile.scenes]
    return torch.tensor(found, dtype=torch.float64)


def keys(profile: Profile, layer: int) -> float:
    """How many a query reads at a layer, with its own."""
    found = profile.sites[layer].keys if layer in profile.sites else None
    return profile.tokens if found is None else found


def excess(profile: Profile, probe: Probe, reading: Reading) -> float:
    """β δ of the mean over heads, 0 where a token gets less from itself than from another."""
    if reading == "scale":
        found = probe.value * math.sqrt(profile.sites[probe.layer].head_dim - 1)
    else:
        share = min(max(probe.value, TINY), 1 - 1e-16)
        found = math.log((profile.tokens - 1) * share / (1 - share))
    return min(max(found, 0.0), LARGEST)


def records(profile: Profile, reading: Reading, *, all_keys: bool = False) -> list[list[LayerProfile]]:
    """Scenes × layers, those where cosine, step and what the reading takes were measured.

    Args:
        all_keys: as if no key had been merged or left out.

    Raises:
        BadInput: numbers that no tokens can have.
    """
    wanted = measured_layers(profile, "cosine", "step", QUANTITY[reading])
    return [
        [
            LayerProfile(
                layer,
                tokens=profile.tokens if all_keys else max(2, round(keys(profile, layer))),
                cosine=scene[layer]["cosine"].value,
                step=scene[layer]["step"].value,
                beta=excess(profile, scene[layer][QUANTITY[reading]], reading) / (1 - scene[layer]["cosine"].value),
            )
            for layer in wanted
        ]
        for scene in profile.scenes
    ]
