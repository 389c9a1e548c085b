"""Closed forms of attention matrices and of mixing hold where they claim to, at computed rates, and fail elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vggt_compile.analysis import agreement, closed_forms, equiangular
from vggt_compile.analysis.agreement import slope
from vggt_compile.analysis.merging import critical_count, merge, mixing, time_until
from vggt_compile.analysis.particles import Attention, unit
from vggt_compile.analysis.particles import equiangular as equiangular_tokens

FORMS = ("entropy", "stable_rank", "second")


def test_second_singular_values_fall_as_one_over_the_root_of_the_tokens() -> None:
    rows = agreement.spectra((64, 128, 256, 512), 0.5, seeds=4)
    assert slope(rows, "tokens", "second") == pytest.approx(-0.5, abs=0.04)
    assert slope(rows, "tokens", "second, formula") == pytest.approx(-0.5)
    assert rows[-1]["second"] == pytest.approx(rows[-1]["second, formula"], rel=0.02)


@pytest.mark.parametrize("name", ["entropy", "stable_rank"])
def test_errors_of_the_closed_forms_vanish_with_many_tokens(name: str) -> None:
    rows = agreement.spectra((32, 64, 128, 256), 0.7, seeds=16)
    for row in rows:
        row["error"] = row[name] - row[f"{name}, formula"]
    assert slope(rows, "tokens", "error") < -0.7
    assert abs(rows[-1]["error"]) < 0.02 * rows[-1][f"{name}, formula"]


def test_heavy_tails_raise_the_second_singular_value_but_not_the_stable_rank() -> None:
    (row,) = agreement.spectra((1000,), 1.5, seeds=1)
    assert row["second"] > 1.3 * row["second, formula"]
    assert row["stable_rank"] == pytest.approx(row["stable_rank, formula"], rel=0.2)


def test_a_sample_of_queries_has_a_formula_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    found = closed_forms.measure(closed_forms.sample(150, 900, 0.5, generator))
    assert found["second"] == pytest.approx(float(closed_forms.second_share(900, 0.5, 150)), rel=0.05)
    assert found["second"] > 1.2 * float(closed_forms.second_share(900, 0.5))


def test_the_spread_of_logits_follows_from_the_gap() -> None:
    generator = torch.Generator().manual_seed(1)
    width, gap = 33, 0.4
    across = unit(torch.randn(800, width - 1, dtype=torch.float64, generator=generator))
    x = torch.cat((torch.full((800, 1), math.sqrt(1 - gap)).double(), math.sqrt(gap) * across), 1)
    logits = 5.0 * (x @ x.T)[~torch.eye(800, dtype=torch.bool)]
    assert float(logits.std()) == pytest.approx(float(closed_forms.logit_spread(gap, 5.0, width)), rel=0.01)


def test_merging_raises_the_second_singular_value_by_the_root_of_the_ratio() -> None:
    rows = agreement.spectra((125, 500), 0.5, seeds=4)
    assert rows[0]["second"] / rows[1]["second"] == pytest.approx(2, rel=0.05)


# Mixing and merging


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 40), st.floats(0, 20), st.floats(0.01, 0.95))
def test_mixing_is_the_attention_that_leaves_a_token(count: int, beta: float, cosine: float) -> None:
    kept = Attention(beta).matrix(equiangular_tokens(count, cosine)).diagonal()
    torch.testing.assert_close(mixing(count, beta, 1 - cosine).expand(count), 1 - kept, rtol=1e-9, atol=1e-12)


def test_mixing_is_proportional_to_few_tokens_and_saturates_with_many() -> None:
    beta, gap = 16.0, 0.7
    critical = critical_count(beta, gap)
    assert float(mixing(1 + critical, beta, gap)) == pytest.approx(0.5)
    few = [{"n": n, "D": float(mixing(1 + n, beta, gap))} for n in (critical * s for s in (1e-4, 1e-3, 1e-2))]
    many = [{"n": n, "rest": 1 - float(mixing(1 + n, beta, gap))} for n in (critical * s for s in (1e2, 1e3, 1e4))]
    assert slope(few, "n", "D") == pytest.approx(1, abs=0.01)
    assert slope(many, "n", "rest") == pytest.approx(-1, abs=0.01)


def test_time_until_inverts_the_equation() -> None:
    for tokens, beta in ((50.0, 1.0), (1e4, 8.0)):
        moment = time_until(0.02, tokens, beta, 0.7)
        assert float(equiangular.solve(0.3, [moment], tokens, beta, radius=1.0)) == pytest.approx(0.02, rel=1e-6)


def test_merging_delays_collapse_near_the_critical_count_and_not_far_above_it() -> None:
    beta, gap, tokens = 8.0, 0.7, 1e7
    critical = critical_count(beta, gap)
    rows = []
    for share in (10.0, 100.0, 1000.0):
        rows.append({"kept": share, "delay": merge(tokens, share * critical, beta, gap).delay - 1})
    assert slope(rows, "kept", "delay") == pytest.approx(-1, abs=0.15)
    assert rows[-1]["delay"] < 1e-3
    near = merge(tokens, critical, beta, gap)
    assert near.slowed == pytest.approx(0.5, abs=0.01)
    assert near.delay > 1.2


def test_ninety_percent_merged_is_felt_only_where_tokens_see_themselves() -> None:
    cold, warm = merge(1e4, 1e3, 16.0, 0.7), merge(1e4, 1e3, 1.0, 0.7)
    assert cold.delay > 100
    assert 1 < warm.delay < 1.01
