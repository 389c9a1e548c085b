"""A fit gives back what profiles were made with, its interval holds the truth, and it says where the theory fails."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from vggt_compile.analysis import closed_forms, equiangular
from vggt_compile.analysis.bootstrap import interval, resampled
from vggt_compile.analysis.fit import fit
from vggt_compile.analysis.least_squares import least_squares
from vggt_compile.analysis.misfits import misfits, spectrum
from vggt_compile.analysis.particles import Attention, gap, unit
from vggt_compile.analysis.power_law import depth, fit_power_law
from vggt_compile.analysis.profiles import LayerProfile, Measured, read_profiles
from vggt_compile.errors import BadInput, UnknownName

LAYERS = 12


def simulated(seed: int, pace: float, sharpness: float, beta: float, tokens: int = 48, width: int = 768) -> list:
    """Layers of attention on particles with the norm before it, as probes would see them.

    They report β and steps that are those of the simulation over `sharpness` and `pace`, steps with 3 % of noise.
    """
    generator = torch.Generator().manual_seed(seed)
    y = unit(torch.randn(tokens, width, dtype=torch.float64, generator=generator))
    y[:, 0] += 0.4 + 0.4 * torch.rand(1, generator=generator).item()
    profile = []
    for layer in range(LAYERS):
        x = unit(y)
        update = 0.2 * Attention(beta * sharpness)(x)
        step = float(update.norm() / y.norm()) / pace * (1 + 0.03 * torch.randn(1, generator=generator).item())
        profile.append(LayerProfile(layer, tokens, 1 - float(gap(x)), step, beta))
        y = y + update
    return profile


def drawn(seed: int, pace: float, noise: float = 0.03) -> list[LayerProfile]:
    """Profiles of the map itself, with noise on what is measured."""
    generator = torch.Generator().manual_seed(seed)
    now, profile = torch.tensor(0.4 + 0.4 * torch.rand(1, generator=generator).item()).double(), []
    for layer in range(LAYERS // 2):
        step = 0.1 + 0.2 * torch.rand(1, generator=generator).item()
        seen = float(now) * math.exp(noise * torch.randn(1, generator=generator).item())
        profile.append(LayerProfile(layer, 500, 1 - seen, step, 1.0))
        now = equiangular.layer(now, torch.tensor(pace * step), 500, 1.0)
    return profile


# What was put in comes out


@pytest.mark.parametrize("pace", [1.0, 0.6])
def test_the_pace_of_simulated_particles_is_recovered(pace: float) -> None:
    found = fit([simulated(seed, pace, 1.0, 2.0) for seed in range(10)], samples=300)
    low, high = found.intervals["pace"]
    assert low <= pace <= high
    assert high - low < 0.1 * pace
    assert found.explained > 0.99


def test_pace_and_sharpness_of_simulated_particles_are_recovered() -> None:
    profiles = [simulated(seed, 0.7, 1.5, 3.0) for seed in range(10)]
    found = fit(profiles, ("pace", "sharpness"), samples=300)
    for name, truth in (("pace", 0.7), ("sharpness", 1.5)):
        low, high = found.intervals[name]
        assert low <= truth <= high
        assert high - low < 0.2 * truth
    assert fit(profiles).explained < found.explained


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held, widths = 0, []
    for trial in range(20):
        found = fit([drawn(100 * trial + seed, 0.6) for seed in range(10)], samples=200)
        low, high = found.intervals["pace"]
        held += low <= 0.6 <= high
        widths.append(high - low)
    assert held >= 16  # 95 % less what a bootstrap of ten loses; fewer than 16 of 20 has a chance of 0.3 % at 95 %
    assert max(widths) < 0.12


def test_predicted_cosines_and_ranks_are_those_of_the_particles() -> None:
    profile = simulated(3, 1.0, 1.0, 2.0)
    found = fit([profile])
    assert found.intervals == {}
    assert found.jump_intervals == []
    error = max(abs(a - b) for a, b in zip(found.predicted, found.measured, strict=True))
    assert error < 0.02
    assert found.token_rank[0] == pytest.approx(48 / (1 + 47 * profile[0].cosine))
    assert found.token_rank == sorted(found.token_rank, reverse=True)


def test_least_squares_solves_each_problem_with_its_own_weights() -> None:
    x = torch.linspace(0, 1, 9, dtype=torch.float64)
    y = torch.stack((torch.exp(0.7 * x), torch.exp(-1.3 * x)))
    weights = torch.eye(2, dtype=torch.float64)[..., None]
    found = least_squares(lambda p: (p[..., None] * x).exp() - y, weights, torch.zeros(2, 1, dtype=torch.float64))
    torch.testing.assert_close(found[:, 0], torch.tensor([0.7, -1.3], dtype=torch.float64))


def test_bootstrap_samples_have_as_many_scenes_and_are_the_same_each_time() -> None:
    counts = resampled(5, 2000, seed=1)
    assert (counts.sum(1) == 5).all()
    assert torch.equal(counts, resampled(5, 2000, seed=1))
    values = counts @ torch.tensor([0.0, 1, 2, 3, 4], dtype=torch.float64) / 5
    low, high = interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(2 / 5), rel=0.1)


# Where it fails


def test_it_says_where_cosines_fall_and_that_the_pace_is_not_one() -> None:
    profiles = [simulated(seed, 0.5, 1.0, 2.0) for seed in range(6)]
    assert any("the pace is 0.5" in line and "less than" in line for line in misfits(profiles, fit(profiles)))
    spread = [
        [dataclasses.replace(entry, cosine=entry.cosine - 0.3 * (entry.layer == 7)) for entry in profile]
        for profile in profiles
    ]
    lines = misfits(spread, fit(spread))
    assert any(line.startswith("the mean cosine falls after layers 6:") for line in lines)
    assert any("beyond its interval at layers" in line and "6, 7" in line for line in lines)


def test_it_is_silent_where_the_theory_fits() -> None:
    profiles = [simulated(seed, 1.0, 1.0, 2.0) for seed in range(10)]
    lines = misfits(profiles, fit(profiles))
    assert not any("pace" in line or "falls" in line or "no description" in line for line in lines)


def test_a_temperature_that_does_not_matter_is_named() -> None:
    profiles = [drawn(seed, 0.6) for seed in range(4)]
    assert any(
        "do not tell the sharpness" in line for line in misfits(profiles, fit(profiles, ("pace", "sharpness"), 50))
    )


def test_measured_spectra_stand_beside_their_closed_forms() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = closed_forms.measure(closed_forms.sample(300, 300, 0.5, generator))
    entry = dataclasses.replace(drawn(0, 1.0)[0], tokens=300, logit_std=0.5, **seen)
    ratio = spectrum(entry)
    assert ratio is not None
    assert ratio.solid
    assert [ratio.entropy, ratio.stable_rank, ratio.second] == pytest.approx([1, 1, 1], rel=0.05)
    structured = dataclasses.replace(entry, second=0.9, logit_std=1.4)
    profile = [structured, *drawn(0, 1.0)[1:]]
    lines = misfits([profile], fit([profile]))
    assert any("σ2/σ1 of attention is over 2 times off" in line for line in lines)
    assert any("spread by more than 1 at layers 0" in line for line in lines)
    assert spectrum(drawn(0, 1.0)[0]) is None


def test_tokens_that_are_not_equiangular_are_told_by_their_rank() -> None:
    profile = simulated(0, 1.0, 1.0, 2.0)
    found = fit([profile])
    ranks = zip(profile, found.token_rank, strict=True)
    even = [dataclasses.replace(entry, token_rank=0.9 * rank) for entry, rank in ranks]
    assert not any("equal cosines" in line for line in misfits([even], found))
    two = [dataclasses.replace(even[0], cosine=-0.02, token_rank=1.0), *even[1:]]  # half opposite to the others
    assert any("equal cosines at layers 0:" in line for line in misfits([two], found))


# One over depth


def laws(radius: float | None) -> tuple[Tensor, Tensor]:
    moments = torch.arange(1.0, 25.0, dtype=torch.float64)
    gaps = [equiangular.solve(cosine, moments, 1e4, 1.0, radius) for cosine in (0.1, 0.2, 0.3, 0.4, 0.5)]
    return torch.stack(gaps), moments.expand(5, -1)


def test_a_power_law_finds_the_exponent_of_a_stack_with_the_norm_before_its_layers() -> None:
    gaps, depths = laws(1.0)
    for index in range(5):  # each start has an offset of its own
        found = fit_power_law(gaps[index : index + 1, 8:], depths[:1, 8:])
        assert found.exponent == pytest.approx(2, abs=0.02)
        assert found.error < 1e-3
    exact = fit_power_law(3 * (depths + 2.0) ** -2, depths)
    assert exact.exponent == pytest.approx(2, abs=0.02)
    assert exact.offset == pytest.approx(2, rel=0.03)


def test_a_power_law_does_not_pretend_that_exponential_collapse_is_one() -> None:
    found = fit_power_law(*laws(None))
    assert found.one_over_depth is False
    assert found.exponent > 10


def test_noise_leaves_an_interval_around_the_exponent() -> None:
    depths = torch.arange(1.0, 25.0, dtype=torch.float64).expand(12, -1)
    noise = torch.randn(12, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = fit_power_law((depths + 1.0) ** -2 * (0.1 * noise).exp(), depths)
    assert found.one_over_depth is True
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] < 0.8
    assert fit_power_law(depths[:1] ** -2.0, depths[:1]).one_over_depth is None


def test_depth_is_relative_steps_times_how_much_longer_tokens_are() -> None:
    """Particles with the norm before the layer and updates of one length: depth grows evenly though steps shrink."""
    radius = torch.tensor([[2.0, 2.5, 3.0, 3.5]], dtype=torch.float64)
    torch.testing.assert_close(depth(0.5 / radius, radius), torch.tensor([[0.0, 0.25, 0.5, 0.75]]).double())


# Input


def test_profiles_are_json() -> None:
    profile = drawn(0, 1.0)
    text = json.dumps([[dataclasses.asdict(entry) for entry in profile]])
    assert read_profiles(json.loads(text)) == [profile]


def test_bad_profiles_say_what_is_wrong() -> None:
    good = dataclasses.asdict(drawn(0, 1.0)[0])
    with pytest.raises(UnknownName, match="did you mean 'cosine'"):
        LayerProfile.read({**good, "cosin": 0.1})
    with pytest.raises(BadInput, match="needs tokens, step"):
        LayerProfile.read({"layer": 0, "cosine": 0.5})
    with pytest.raises(BadInput, match=r"layer 3 of a profile has cosine nan: .*not finite"):
        LayerProfile.read({**good, "layer": 3, "cosine": math.nan})
    with pytest.raises(BadInput, match="which 500 tokens cannot have"):
        LayerProfile.read({**good, "cosine": -0.5})
    with pytest.raises(BadInput, match="two global attentions"):
        Measured.of([drawn(0, 1.0)[:1]])
    with pytest.raises(BadInput, match="the same layers"):
        fit([drawn(0, 1.0), drawn(1, 1.0)[1:]])
    with pytest.raises(UnknownName, match="did you mean 'sharpness'"):
        fit([drawn(0, 1.0)], ("sharpnes",))
    with pytest.raises(BadInput, match="four layers"):
        fit_power_law(torch.ones(1, 3), torch.ones(1, 3))
