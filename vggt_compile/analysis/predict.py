"""What theory makes of a measured profile: from its steps, logit scales and numbers of keys, everything at once.

The equiangular map gives cosines and ‖JX‖ / ‖X‖ at every layer after the first, and D̂ of one attention; closed forms
give entropy, stable rank and σ2/σ1 of attention. Each is a mean over the scenes of the profile, as what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator

from vggt_compile.analysis.lines import sentences
from vggt_compile.analysis.mixed import mixed
from vggt_compile.analysis.one_attention import one_attention
from vggt_compile.analysis.predicted_cosines import predict_cosines
from vggt_compile.analysis.predicted_spectra import predict_spectra
from vggt_compile.analysis.prediction import WORDS, Prediction
from vggt_compile.analysis.profile import Profile
from vggt_compile.analysis.records import QUANTITY, Reading
from vggt_compile.errors import BadInput
from vggt_compile.report import spans


def predict(profile: Profile) -> Prediction:
    """Everything for which the measures are there; what is missing is a note."""
    found = Prediction(profile.plan, profile.frames, profile.tokens)
    for reading in QUANTITY:
        if layers := mixed(profile, reading):
            found.mixed[reading] = layers
    predict_spectra(profile, found)
    found.reading = next(iter(found.mixed), None)
    try:
        predict_cosines(profile, found)
    except BadInput as error:
        found.notes.append(f"cosines are not predicted: {error}")
    if found.reading is not None:
        _one_attention(profile, found, found.reading)
    for quantity, entries in found.lines.items():
        found.misfits += sentences(WORDS[quantity], entries)
    found.misfits += _mixing(found)
    return found


def _one_attention(profile: Profile, found: Prediction, reading: Reading) -> None:
    alone = one_attention(profile, reading)
    if alone is None:
        found.notes.append("D̂ of one attention takes the measures residual and step")
        return
    found.add("residual_contraction", profile, alone.layers, alone.predicted)
    found.factors["pace of one attention"] = (alone.pace, alone.interval)


def _mixing(found: Prediction) -> Iterator[str]:
    """What the plan does to mixing where it leaves fewer keys, in words."""
    layers = [one for one in found.mixed.get("itself", ()) if one.keys < one.tokens]
    if not layers:
        return
    most = min(layers, key=lambda one: one.slowed)
    free = {one.layer for one in layers if one.saturated}
    where = f"saturated at layers {spans(free)}" if free else "saturated nowhere"
    moved = "" if found.change is None else f", and the last layer's predicted cosine changes by {found.change:+.1g}"
    yield (
        f"fewer keys: mixing is {where}; at layer {most.layer}, where they do most, D falls from {most.mixing:.4f} to "
        f"{most.kept:.4f} with {most.keys:.0f} of {most.tokens} keys and is saturated from {most.saturates:.0f} on"
        f"{moved}"
    )
