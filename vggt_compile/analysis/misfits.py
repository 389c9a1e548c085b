"""Where the theory does not fit, in sentences: each names layers, what was measured, and what the theory can do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vggt_compile.analysis import closed_forms
from vggt_compile.analysis.equiangular import stable_rank
from vggt_compile.analysis.fit import Fit
from vggt_compile.analysis.merging import mixing
from vggt_compile.analysis.profiles import LayerProfile, Profile

SOLID = 1.0
"""The logit spread up to which σ2/σ1 of independent logits follows its closed form."""


@dataclass(frozen=True)
class Spectrum:
    """One attention's measured numbers over those of independent Gaussian logits of the same spread; 1 is agreement."""

    layer: int
    entropy: float | None
    stable_rank: float | None
    second: float | None
    solid: bool  # whether the spread is small enough for the formula of σ2/σ1


def spectrum(entry: LayerProfile) -> Spectrum | None:
    """None where the logits' spread was not measured."""
    if entry.logit_std is None:
        return None
    wanted = {
        "entropy": closed_forms.entropy_share(entry.tokens, entry.logit_std),
        "stable_rank": closed_forms.stable_rank(entry.logit_std),
        "second": closed_forms.second_share(entry.tokens, entry.logit_std, entry.queries),
    }
    ratios = {}
    for name, value in wanted.items():
        found = getattr(entry, name)
        ratios[name] = None if found is None or float(value) == 0 else found / float(value)
    return Spectrum(entry.layer, solid=entry.logit_std <= SOLID, **ratios)


def misfits(profiles: Sequence[Profile], fit: Fit, factor: float = 2.0) -> list[str]:
    """What in these profiles the theory does not explain; `factor` is how far a closed form may be off."""
    found = []
    rises = [a for a, before, after in _pairs(fit) if after < before]
    if rises:
        found.append(
            f"the mean cosine falls after layers {_named(rises)}: attention of this theory only gathers tokens, "
            "so what lies between (MLP, frame attention, projections) spreads them there"
        )
    pace = fit.intervals.get("pace")
    if pace and not pace[0] <= 1 <= pace[1]:
        word = "less" if pace[1] < 1 else "more"
        does = "tokens part" if pace[1] < 0 else f"updates gather tokens {word} than with V = identity"
        found.append(f"the pace is {fit.values['pace']:.3g} ({pace[0]:.3g} to {pace[1]:.3g}), not 1: {does}")
    jumps = zip(fit.layers, fit.jumps, fit.jump_intervals, strict=False)
    off = {layer: (jump, low, high) for layer, jump, (low, high) in jumps if low > 0 or high < 0}
    if off:
        worst = max(off, key=lambda layer: abs(off[layer][0]))
        jump, low, high = off[worst]
        found.append(
            "as fitted, one layer from its own measured input is off beyond its interval at layers "
            f"{_named(off)}; most at layer {worst}: log(1 − ρ) by {jump:+.2g} ({low:+.2g} to {high:+.2g})"
        )
    if fit.explained < 0.5:
        found.append(f"the prediction explains {fit.explained:.0%} of the variance of log(1 − ρ): it is no description")
    return [*found, *_clusters(profiles, factor), *_spectra(profiles, factor), *_untold(profiles, fit)]


def _pairs(fit: Fit) -> Iterable[tuple[int, float, float]]:
    return zip(fit.layers, fit.measured, fit.measured[1:], strict=False)


def _clusters(profiles: Sequence[Profile], factor: float) -> Iterable[str]:
    """Tokens whose rank is far below that of equal cosines with the same mean, which bounds it."""
    off = [
        entry.layer
        for profile in profiles
        for entry in profile
        if entry.token_rank is not None
        and entry.token_rank * factor < float(stable_rank(torch.tensor(1 - entry.cosine), entry.tokens))
    ]
    if off:
        yield f"tokens are far from equal cosines at layers {_named(off)}: they spread along a few directions"


def _spectra(profiles: Sequence[Profile], factor: float) -> Iterable[str]:
    """Attention matrices that are not those of independent Gaussian logits."""
    known = [ratio for profile in profiles for ratio in map(spectrum, profile) if ratio is not None]
    words = {"entropy": "entropy", "stable_rank": "the stable rank of attention", "second": "σ2/σ1 of attention"}
    for name, word in words.items():
        pairs = [(ratio.layer, getattr(ratio, name)) for ratio in known]
        off = [layer for layer, value in pairs if value is not None and not 1 / factor <= value <= factor]
        if off:
            yield f"{word} is over {factor:g} times off that of independent Gaussian logits at layers {_named(off)}"
    wide = [ratio.layer for ratio in known if not ratio.solid and ratio.second is not None]
    if wide:
        yield f"logits spread by more than {SOLID:g} at layers {_named(wide)}: the formula of σ2/σ1 is too low there"


def _untold(profiles: Sequence[Profile], fit: Fit) -> Iterable[str]:
    """Temperatures that the cosines do not depend on."""
    shares = [float(mixing(entry.tokens, entry.beta, 1 - entry.cosine)) for profile in profiles for entry in profile]
    if "sharpness" in fit.values and min(shares) > 0.99:
        yield "more than 99 % of attention leaves the token at every layer: these profiles do not tell the sharpness"
    if "pace" in fit.values and max(shares) < 0.01:
        yield "less than 1 % of attention leaves the token at any layer: these profiles do not tell the pace"


def _named(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(layers))))
