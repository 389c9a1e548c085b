"""Predictions of measured profiles: what the theory itself makes is given back, what it does not is said to be off."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from hypothesis import given, settings
from hypothesis import strategies as st

from vggt_compile import Plan
from vggt_compile.analysis import closed_forms, equiangular, merging
from vggt_compile.analysis.lines import Line, lines, sentences
from vggt_compile.analysis.mixed import mixed
from vggt_compile.analysis.predict import predict
from vggt_compile.analysis.prediction import Prediction
from vggt_compile.analysis.profile import Profile, profile
from vggt_compile.cli.profile_text import text
from vggt_compile.probes import Probe
from vggt_compile.report import Row

TOKENS, WIDTH, LAYERS = 400, 16, 6
COSINES = [0.3, 0.4, 0.5]


def row(layer: int, keys: float) -> Row:
    sizes = {"batch": 1, "frames": 4, "per_frame": TOKENS // 4, "special": 0, "heads": 1, "head_dim": WIDTH}
    left = {"dtype": "float32", "axes": {}, "implementation": "sdpa", "flops_before": 1, "flops_after": 1}
    return Row(f"blocks.{layer}", layer, "global", **sizes, **left, reason=None, keys=keys)


def made(scenes: Sequence[Sequence[Mapping[str, float]]], keys: float = TOKENS) -> Profile:
    """Scenes × layers of quantity → value, as if measured exactly on a model of one head."""
    found = [
        {
            i: {name: Probe(i, "", name, value, 0.0, (value,), 1) for name, value in one.items()}
            for i, one in enumerate(s)
        }
        for s in scenes
    ]
    return Profile("made", 4, TOKENS, found, sites={i: row(i, keys) for i in range(len(scenes[0]))}, queries=64)


def stack(cosine: float, pace: float = 1.0, beta: float = 4.0, keys: float = TOKENS, noise: float = 0.0) -> list[dict]:
    """What probes see of a stack that is the equiangular map, if its steps were `pace` times what is measured."""
    gap, found = torch.tensor(1 - cosine).double(), []
    generator = torch.Generator().manual_seed(int(1000 * cosine))
    for layer in range(LAYERS):
        step = 0.1 + 0.03 * (layer % 3)
        after = equiangular.layer(gap, torch.tensor(pace * step).double(), keys, beta)
        measured = 1 - float(gap) * math.exp(noise * torch.randn(1, generator=generator).item())
        found.append(
            {
                "cosine": measured,
                "step": step,
                "to_itself": float(equiangular.shares(gap, TOKENS, beta)[0]),
                "residual_ratio": math.sqrt(float(gap) * (TOKENS - 1) / TOKENS),
                "residual_contraction": 0.5 * math.log(float(gap / after)),
                "token_length": 1.0,
            }
        )
        gap = after
    return found


# What the theory makes, it gives back


@settings(max_examples=20)
@given(st.floats(0.05, 0.9), st.floats(0, 8), st.sampled_from([50, 150, TOKENS]))
def test_a_stack_of_the_map_itself_is_predicted_exactly(cosine: float, beta: float, keys: int) -> None:
    found = predict(made([stack(cosine, beta=beta, keys=keys)], keys))
    for name in ("cosine", "next_cosine", "residual_ratio", "residual_contraction"):
        for line in found.lines[name]:
            assert line.predicted == pytest.approx(line.measured, rel=1e-6, abs=1e-9)
    assert found.factors["pace"] == (pytest.approx(1, abs=1e-3), None)
    assert found.factors["pace of one attention"] == (pytest.approx(1, abs=1e-3), None)


@pytest.mark.parametrize("pace", [1.0, 0.4, -0.3])
def test_paces_are_recovered_with_intervals_also_where_tokens_part(pace: float) -> None:
    found = predict(made([stack(cosine, pace, noise=0.01) for cosine in COSINES]))
    for value, span in found.factors.values():
        assert value == pytest.approx(pace, abs=0.05)
        assert span is not None
        assert span[0] <= value <= span[1]
    assert found.explained == pytest.approx(1, abs=0.05)
    parts = any("tokens part" in line for line in found.misfits)
    assert parts == (pace < 0)


def test_measured_spectra_that_are_those_of_the_formulas_fit() -> None:
    spread, shown = 0.5, torch.tensor(0.5).double()
    entries = {
        "logit_scale": spread,
        "entropy": float(closed_forms.entropy_share(TOKENS, shown)),
        "attention_stable_rank": float(closed_forms.stable_rank(shown)),
        "attention_sigma_ratio": float(closed_forms.second_share(TOKENS, shown, 64)),
    }
    found = predict(made([[entries] * 2]))
    for name in list(entries)[1:]:
        for line in found.lines[name]:
            assert line.predicted == pytest.approx(line.measured)
    assert not any("beyond their range" in line for line in found.misfits)
    wide = predict(made([[entries | {"logit_scale": 3.0}] * 2]))
    assert any("more than 1 at layers 0-1" in line for line in wide.misfits)
    assert all(line.predicted == 64 for line in wide.lines["attention_stable_rank"])  # no matrix of 64 rows has more
    assert all(line.predicted == 1 for line in wide.lines["attention_sigma_ratio"])


def test_formulas_are_means_over_heads_and_not_of_a_mean_head() -> None:
    given = made([[{"logit_scale": 1.0, "attention_stable_rank": 2.0}] * 2])
    scenes = [
        {i: {n: Probe(i, "", n, p.value, 0.0, (0.5, 1.5), 1) for n, p in layer.items()} for i, layer in s.items()}
        for s in given.scenes
    ]
    found = predict(Profile("two", 4, TOKENS, scenes, sites=given.sites))
    want = (math.exp(0.25) + math.exp(2.25)) / 2
    assert [line.predicted for line in found.lines["attention_stable_rank"]] == pytest.approx([want] * 2)


# Fewer keys


@settings(max_examples=30)
@given(st.floats(0.05, 0.9), st.floats(0, 6), st.integers(2, TOKENS))
def test_mixing_with_fewer_keys_is_that_of_the_same_temperature(cosine: float, beta: float, keys: int) -> None:
    layers = mixed(made([stack(cosine, beta=beta)], keys), "itself")
    first, gap = layers[0], 1 - cosine
    assert first.critical == pytest.approx(merging.critical_count(beta, gap), rel=1e-6)
    assert first.mixing == pytest.approx(float(merging.mixing(TOKENS, beta, gap)), rel=1e-6)
    assert first.kept == pytest.approx(float(merging.mixing(keys, beta, gap)), rel=1e-6)
    assert float(merging.mixing(first.saturates, beta, gap)) == pytest.approx(0.99)
    assert first.saturated == (keys >= first.saturates)
    assert first.slowed <= 1 + 1e-12


def test_what_fewer_keys_do_is_told() -> None:
    cold = predict(made([stack(0.3, beta=8.0, keys=40)], 40))  # e^{βδ} is 270: far below it, mixing goes with keys
    assert cold.change is not None
    assert cold.change < -0.01
    assert any(line.startswith("fewer keys: mixing is saturated nowhere; at layer 0") for line in cold.misfits)
    warm = predict(made([stack(0.3, beta=0.5, keys=200)], 200))
    assert warm.change == pytest.approx(0, abs=1e-2)
    assert any(line.startswith("fewer keys: mixing is saturated at layers 0-5") for line in warm.misfits)
    assert not any(line.startswith("fewer keys") for line in predict(made([stack(0.3)])).misfits)


def test_the_temperature_of_the_logit_scale_is_that_of_random_tokens() -> None:
    """Logits β⟨x_i, x_j⟩ of tokens with a common part have a spread from which β comes back, in a head's width."""
    beta, gap = 3.0, 0.6
    spread = float(closed_forms.logit_spread(gap, beta, WIDTH))
    (layer, *_) = mixed(made([[{"logit_scale": spread, "cosine": 1 - gap, "step": 0.1}] * 2]), "scale")
    assert layer.critical == pytest.approx(math.exp(beta * gap))


# Where it does not fit


def test_a_line_fits_where_zero_lies_in_its_interval() -> None:
    measured = torch.tensor([[1.0, 2.0], [1.2, 2.4]], dtype=torch.float64)
    predicted = torch.tensor([[1.1, 1.0], [1.1, 1.0]], dtype=torch.float64)
    first, second = lines([3, 5], measured, predicted, torch.zeros(2, 2))
    assert (first.layer, first.fits, second.fits) == (3, True, False)
    assert (second.low, second.residual, second.high) == pytest.approx((1.0, 1.2, 1.4))
    (alone,) = lines([0], measured[:1, :1], predicted[:1, :1], torch.tensor([[0.06]], dtype=torch.float64))
    assert (alone.low, alone.high) == pytest.approx((-0.22, 0.02))
    (known,) = lines([0], measured[:, :1], predicted[:, :1], torch.zeros(2, 1), [(-3.0, 3.0)])
    assert (known.low, known.high) == (-3, 3)


def test_sentences_say_where_and_by_how_much() -> None:
    off, fits = Line(4, 0.3, 0.8, -0.6, -0.4), Line(5, 0.5, 0.5, -0.1, 0.1)
    assert list(sentences("x", [fits])) == ["x: fits within its interval at every layer"]
    (mixed_one,) = sentences("x", [Line(2, 0.5, 0.7, -0.3, -0.1), off, fits])
    assert mixed_one == (
        "x: fits at layers 5, is off at layers 2,4; most at layer 4: measured 0.3, theory 0.8, difference -0.5 "
        "(-0.6 to -0.4)"
    )
    assert next(sentences("x", [off])).startswith("x: is off at every layer; most at layer 4")


def test_cosines_that_the_theory_cannot_have_are_told() -> None:
    scenes = [stack(cosine, noise=0.01) for cosine in COSINES]
    for scene in scenes:
        scene[4]["cosine"] -= 0.3
    found = predict(made(scenes))
    assert any(line.startswith("the mean cosine falls after layers 3") for line in found.misfits)
    assert any(re.search(r"at layers .*3, 4.*; most at layer [34]: log\(1 − ρ\) by", line) for line in found.misfits)
    assert not found.lines["next_cosine"][3].fits


# Of a model, and of what is missing


@pytest.fixture(scope="module")
def of_model() -> tuple[list[Profile], list[Prediction]]:
    torch._dynamo.reset()
    spec = Spec(head_dim=16)
    model, scenes = build(spec), [alternating.images(spec, 1, 4, (5, 7)) * scale for scale in (1, 2)]
    measures = ["cosine", "length", "step", "residual", "logits", "itself", "entropy", "spectrum"]
    thin = Plan.read({"layers": {"*": {"tokens": {"method": "merge", "ratio": 0.5}}}}, "merge")
    with torch.no_grad():
        found = [profile(model, scenes, plan, measures) for plan in (Plan(name="dense"), thin)]
    return found, [predict(one) for one in found]


def test_a_model_is_predicted_from_its_own_probes(of_model: Any) -> None:
    (dense, thin), (one, other) = of_model
    assert [layer.keys for layer in one.mixed["itself"]] == [dense.tokens] * 2
    assert all(layer.keys < dense.tokens for layer in other.mixed["itself"])
    for found, measured in ((one, dense), (other, thin)):
        assert found.reading == "itself"
        for name in ("residual_ratio", "entropy", "attention_stable_rank", "attention_sigma_ratio"):
            for line in found.lines[name]:
                assert line.measured == pytest.approx(measured.curve(name)[line.layer].value)
        assert found.curve("cosine")[0].value == pytest.approx(measured.curve("cosine")[0].value)
        assert list(found.depth) == [0, 1]
        record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert record["lines"]["cosine"][1]["fits"] in (True, False)


def test_tables_have_measured_beside_predicted(of_model: Any) -> None:
    page = text(*of_model, [], "a title", page=True)
    line = of_model[1][0].lines["residual_ratio"][1]
    assert f"{line.measured:.3g} {'=' if line.fits else '→'} {line.predicted:.3g}" in page
    assert page.startswith("# a title")
    assert page.count("| keys that saturate") == 2


def test_what_a_prediction_lacks_is_a_note() -> None:
    bare = predict(made([[{"entropy": 0.9}] * 2]))
    assert bare.lines == {}
    assert any("takes the measure itself or logits" in note for note in bare.notes)
    assert any("closed forms take the measure logits" in note for note in bare.notes)
    short = predict(made([stack(0.3)[:1]]))
    assert any("two global attentions" in note for note in short.notes)
    broken = stack(0.3)
    broken[2]["cosine"] = math.nan
    assert any("not finite" in note for note in predict(made([broken])).notes)
    by_scale = predict(made([[{"cosine": 0.4, "step": 0.1, "logit_scale": 0.2}] * 3]))
    assert by_scale.reading == "scale"
    assert by_scale.curve("cosine")
    assert any("absolute depth takes the measure length" in note for note in by_scale.notes)
