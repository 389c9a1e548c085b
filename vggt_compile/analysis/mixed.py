"""What fewer keys do to mixing at each layer of a measured profile, and from how many on they do nothing.

D(n) = 1 − the share that a token gives itself (see merging.py). Here D of all n tokens is measured, and that of the n'
keys which a plan leaves follows at the same e^{βδ}. Above n = 1 + 99 e^{βδ} D is over 0.99 and saturated: neither
more nor fewer tokens change the pace of the theory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vggt_compile.analysis.profile import Profile
from vggt_compile.analysis.records import QUANTITY, Reading, excess, keys, measured_layers

SATURATED = 0.99


@dataclass(frozen=True)
class Mixed:
    """One layer, means over scenes.

    Attributes:
        critical: e^{βδ}, the number of other tokens at which half of the attention leaves the token.
        mixing, kept: D with all tokens and with the keys that are left.
        saturates: the number of keys from which on D is over 0.99.
    """

    layer: int
    tokens: int
    keys: float
    critical: float
    mixing: float
    kept: float
    saturates: float

    @property
    def slowed(self) -> float:
        """D(n') / D(n); 1 is no effect."""
        return self.kept / self.mixing if self.mixing else math.nan

    @property
    def saturated(self) -> bool:
        return self.keys >= self.saturates


def mixed(profile: Profile, reading: Reading) -> list[Mixed]:
    """Of every layer where what the reading takes was measured."""
    return [_layer(profile, layer, reading) for layer in measured_layers(profile, QUANTITY[reading])]


def _layer(profile: Profile, layer: int, reading: Reading) -> Mixed:
    found = [excess(profile, scene[layer][QUANTITY[reading]], reading) for scene in profile.scenes]
    critical, left = math.exp(sum(found) / len(found)), max(1.0, keys(profile, layer))

    def share(count: float) -> float:
        return (count - 1) / (count - 1 + critical)

    saturates = 1 + critical * SATURATED / (1 - SATURATED)
    return Mixed(layer, profile.tokens, left, critical, share(profile.tokens), share(left), saturates)
