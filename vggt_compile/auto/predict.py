"""How errors of single layers combine to that of a plan: they add, each times a factor of its candidate.

The factor is what a candidate's error is at all layers together, over the sum of what it is at each alone. It is below
1 where changes partly cancel, as those of independent directions do, and far above 1 where each layer makes up for the
others: attention inside frames costs little in one layer and everything in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Errors = Mapping[int, Mapping[str, float]]
"""Layer → candidate → error of the outputs with that candidate at that layer alone."""


def factors(errors: Errors, together: Mapping[str, float]) -> dict[str, float]:
    """Candidate → factor; `together` has the error of each at all layers that tried it. 1 where nothing changed."""
    found = {}
    for name, whole in together.items():
        total = sum(tried[name] for tried in errors.values() if name in tried)
        found[name] = whole / total if 0 < total < math.inf else 1.0
    return found


def predicted(errors: Errors, scale: Mapping[str, float], choice: Mapping[int, str]) -> float:
    """The error of a choice of candidates, by the sum."""
    return sum(errors[layer][name] * scale.get(name, 1.0) for layer, name in choice.items())
