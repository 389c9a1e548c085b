"""Entropy, stable rank and σ2/σ1 that independent Gaussian logits of the measured scales would have.

Formulas are of each head's own scale, for they are far from straight in it. No matrix of m rows has a stable rank above
m, or σ2/σ1 above 1, so these ends are what a formula says at most. With them stands the share that a token would get of
its own attention if logits were β times cosines of random tokens in the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggt_compile.analysis import closed_forms, merging
from vggt_compile.analysis.misfits import SOLID
from vggt_compile.analysis.prediction import Prediction
from vggt_compile.analysis.profile import Profile
from vggt_compile.analysis.records import MEASURE, measured_layers, values
from vggt_compile.report import spans


def predict_spectra(profile: Profile, found: Prediction) -> None:
    """Add them where the logit scale was measured."""
    if "scale" not in found.mixed:
        found.notes.append(f"closed forms take the measure {MEASURE['scale']}")
        return
    rows = min(profile.queries or profile.tokens, profile.tokens)
    width = next(iter(profile.sites.values())).head_dim - 1
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "entropy": lambda s: closed_forms.entropy_share(profile.tokens, s).clamp(min=0),
        "attention_stable_rank": lambda s: closed_forms.stable_rank(s).clamp(max=rows),
        "attention_sigma_ratio": lambda s: closed_forms.second_share(profile.tokens, s, rows).clamp(max=1),
        "to_itself": lambda s: 1 - merging.mixing(profile.tokens, s * math.sqrt(width), 1.0),
    }
    for quantity, formula in formulas.items():
        if layers := measured_layers(profile, quantity, "logit_scale"):
            found.add(quantity, profile, layers, _over_heads(profile, layers, formula))
    _range(profile, found)


def _over_heads(profile: Profile, layers: Sequence[int], formula: Callable[[Tensor], Tensor]) -> Tensor:
    """[scenes, layers], means over heads."""
    scales = [[torch.tensor(scene[layer]["logit_scale"].heads) for layer in layers] for scene in profile.scenes]
    return torch.tensor([[float(formula(s.double()).mean()) for s in scene] for scene in scales]).double()


def _range(profile: Profile, found: Prediction) -> None:
    """Say where logits spread by more than the formulas are for."""
    layers = measured_layers(profile, "logit_scale")
    wide = {layer for layer, s in zip(layers, values(profile, "logit_scale", layers).mean(0), strict=True) if s > SOLID}
    if wide:
        found.misfits.append(
            f"logits spread by more than {SOLID:g} at layers {spans(wide)}: there the closed forms of σ2/σ1 and of the "
            "stable rank are beyond their range"
        )
