"""Cosines, ‖JX‖ / ‖X‖ and depth that the equiangular map makes of a profile's measured steps and temperatures."""

from __future__ import annotations

from torch import Tensor

from vggt_compile.analysis import fit as fits
from vggt_compile.analysis.misfits import misfits
from vggt_compile.analysis.power_law import depth, fit_power_law
from vggt_compile.analysis.prediction import Prediction
from vggt_compile.analysis.profile import Profile
from vggt_compile.analysis.profiles import Measured
from vggt_compile.analysis.records import MEASURE, measured_layers, records, values
from vggt_compile.errors import BadInput


def predict_cosines(profile: Profile, found: Prediction) -> None:
    """Add them, from the first layer on and from each layer's own input, at pace 1 and at the fitted one.

    Raises:
        BadInput: measures are missing, or numbers are such as no tokens have.
    """
    if found.reading is None:
        raise BadInput(f"that takes the measure {MEASURE['itself']} or {MEASURE['scale']}")
    given = records(profile, found.reading)
    measured = Measured.of(given)
    gaps = fits.predict(measured)
    found.add("cosine", profile, measured.layers, 1 - gaps)
    if found.reading == "itself" and "scale" in found.mixed:
        by_scale = Measured.of(records(profile, "scale"))
        found.add("cosine_by_scale", profile, by_scale.layers, 1 - fits.predict(by_scale))
    best = fits.fit(given)
    fitted = fits.predict(measured, best.values["pace"])
    found.add("cosine_fitted", profile, measured.layers, 1 - fitted, best.cosine_intervals)
    after = measured.gap[:, 1:] / fits.one_layer(measured).exp()
    found.add("next_cosine", profile, measured.layers[1:], 1 - after)
    found.factors["pace"] = (best.values["pace"], best.intervals.get("pace"))
    found.explained = best.explained
    found.misfits += misfits(given, best)
    everything = fits.predict(Measured.of(records(profile, found.reading, all_keys=True)))
    found.change = float((everything - gaps)[:, -1].mean())
    _ratio(profile, found, measured, gaps)
    _depth(profile, found, measured)


def _ratio(profile: Profile, found: Prediction, measured: Measured, gaps: Tensor) -> None:
    """‖JX‖² / ‖X‖² of unit tokens is (1 − ρ) (n − 1) / n; those of a model differ in length."""
    layers = [layer for layer in measured_layers(profile, "residual_ratio") if layer in measured.layers]
    if layers:
        columns = [measured.layers.index(layer) for layer in layers]
        share = (profile.tokens - 1) / profile.tokens
        found.add("residual_ratio", profile, layers, (gaps[:, columns] * share).sqrt())


def _depth(profile: Profile, found: Prediction, measured: Measured) -> None:
    if "token_length" not in profile.quantities:
        found.notes.append("absolute depth takes the measure length")
        return
    depths = depth(measured.step, values(profile, "token_length", measured.layers))
    found.depth = dict(zip(measured.layers, depths.mean(0).tolist(), strict=True))
    if len(measured.layers) < 4:
        return
    found.power = law = fit_power_law(measured.gap, depths)
    span = "" if law.interval is None else f" ({law.interval[0]:.2g} to {law.interval[1]:.2g})"
    found.misfits.append(f"1 − ρ = C (t + t0)^−p over absolute depth t: p is {law.exponent:.2g}{span}, of the theory 2")
