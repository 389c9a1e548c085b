"""What is predicted of a measured profile: curves beside it, fitted factors, and sentences on where theory is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vggt_compile.analysis.bootstrap import Interval
from vggt_compile.analysis.lines import Line, lines
from vggt_compile.analysis.mixed import Mixed
from vggt_compile.analysis.power_law import PowerLaw
from vggt_compile.analysis.profile import Point, Profile, finite
from vggt_compile.analysis.records import Reading, values

WORDS = {
    "cosine": "mean cosine from the first layer's, pace 1",
    "cosine_by_scale": "mean cosine from the first layer's, pace 1, temperature by the logit scale",
    "cosine_fitted": "mean cosine from the first layer's, fitted pace",
    "next_cosine": "mean cosine from the layer before, pace 1",
    "residual_ratio": "‖JX‖ / ‖X‖ from the first layer's cosine, pace 1",
    "residual_contraction": "D̂ of one attention with the residual, pace 1",
    "entropy": "entropy / log n by the logit scale",
    "attention_stable_rank": "stable rank of attention by the logit scale",
    "attention_sigma_ratio": "σ2/σ1 of attention by the logit scale",
    "to_itself": "attention to oneself by the logit scale",
}


@dataclass
class Prediction:
    """Of one profile.

    Attributes:
        reading: which temperature the map is given.
        lines: quantity → layers where it is predicted.
        factors: name → value and interval over scenes.
        explained: share of the variance of log(1 − ρ) that the fitted pace explains.
        depth: absolute depth t at each layer, from steps and token lengths.
        power: 1 − ρ = C (t + t0)^{−p} over that depth.
        mixed: mixing with all tokens and with the keys that the plan leaves, by each reading.
        change: of the last layer's predicted cosine by reading n' instead of n keys.
        misfits: sentences on where theory fits, and where not and by how much.
        notes: what is not predicted, and why.
    """

    plan: str
    frames: int
    tokens: int
    reading: Reading | None = None
    lines: dict[str, list[Line]] = field(default_factory=dict)
    factors: dict[str, tuple[float, Interval | None]] = field(default_factory=dict)
    explained: float | None = None
    depth: dict[int, float] = field(default_factory=dict)
    power: PowerLaw | None = None
    mixed: dict[Reading, list[Mixed]] = field(default_factory=dict)
    change: float | None = None
    misfits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def curve(self, quantity: str) -> dict[int, Point]:
        """Layer → point, as of a measured profile; predictions have no error of their own."""
        return {line.layer: Point(line.predicted, 0.0) for line in self.lines.get(quantity, ())}

    def add(
        self, name: str, profile: Profile, layers: Sequence[int], predicted: Tensor, ends: Sequence[Interval] = ()
    ) -> None:
        """Put predicted values [scenes, layers] beside the measured ones; `ends` are intervals that are known."""
        quantity = "cosine" if "cosine" in name else name
        errors = [[scene[layer][quantity].error for layer in layers] for scene in profile.scenes]
        measured = values(profile, quantity, layers)
        self.lines[name] = lines(layers, measured, predicted, torch.tensor(errors, dtype=torch.float64), ends)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = asdict(self)
        for name, entries in self.lines.items():
            found["lines"][name] = [asdict(line) | {"fits": line.fits} for line in entries]
        for reading, layers in self.mixed.items():
            found["mixed"][reading] = [asdict(one) | {"saturated": one.saturated} for one in layers]
        return _plain(found)


def _plain(value: Any) -> Any:
    """JSON-ready: tuples as lists, None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return finite(value) if isinstance(value, float) else value
