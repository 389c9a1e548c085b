"""Particles, the equation of their cosine and the mean field agree, and each at the rate that its method has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vggt_compile.analysis import agreement, equiangular
from vggt_compile.analysis.agreement import slope
from vggt_compile.analysis.axisymmetric import Pull, coordinate, pre_norm_time, rings
from vggt_compile.analysis.clouds import gathered
from vggt_compile.analysis.collapse import collapse
from vggt_compile.analysis.integrate import integrate
from vggt_compile.analysis.meanfield import CFL, MeanField
from vggt_compile.analysis.particles import Attention, energy, flow, gap, tangent, unit
from vggt_compile.analysis.particles import equiangular as equiangular_tokens
from vggt_compile.errors import BadInput

EPS = torch.finfo(torch.float64).eps
few = settings(max_examples=15, deadline=None)


def tokens(seed: int, count: int = 7, width: int = 4, mean: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, dtype=torch.float64, generator=generator)
    x[:, 0] += mean
    return unit(x)


# Steps


def test_the_error_of_a_solution_falls_with_its_tolerance() -> None:
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    rows = []
    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
        found = integrate(lambda y: turn @ y, torch.tensor([0.0, 1.0]), [1.0, 7.0], tolerance, tolerance)
        rows.append({"tolerance": tolerance, "error": float((found[1, 0] - math.sin(7.0)).abs())})
    assert 0.8 < slope(rows, "tolerance", "error") < 1.3


def test_times_must_not_fall_and_solutions_must_stay_numbers() -> None:
    with pytest.raises(BadInput, match="must not fall"):
        integrate(torch.neg, torch.ones(1), [2.0, 1.0])
    with pytest.raises(BadInput, match="leaves the numbers at time"):
        integrate(torch.square, torch.ones(1), [2.0])  # 1 / (1 − t)


# Particles


def test_attention_is_its_formula() -> None:
    x, beta = tokens(0), 1.7
    for divide in ("softmax", "count"):
        share = torch.exp(beta * x @ x.T)
        share = share / (share.sum(1, keepdim=True) if divide == "softmax" else len(x))
        torch.testing.assert_close(Attention(beta, divide)(x), share @ x)


def test_given_matrices_take_the_place_of_the_identity() -> None:
    x = tokens(1)
    q, k, v = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = torch.softmax(2.0 * (x @ q.T) @ (x @ k.T).T, -1) @ (x @ v.T)
    torch.testing.assert_close(Attention(2.0, query=q, key=k, value=v)(x), want)


@few
@given(st.integers(0, 1000), st.floats(0, 8), st.sampled_from(["softmax", "count"]))
def test_tokens_stay_on_the_sphere_and_energy_grows(seed: int, beta: float, divide: str) -> None:
    path = flow(tokens(seed), [0.0, 0.1, 0.5, 1.0, 3.0], Attention(beta, divide), rtol=1e-8)  # type: ignore[arg-type]
    assert float((path.norm(dim=-1) - 1).abs().max()) <= 4 * EPS
    if beta:
        levels = energy(path, beta)
        assert (levels.diff() >= -1e-9 * levels[:-1]).all()


@few
@given(st.integers(0, 1000), st.floats(0, 6))
def test_merging_equal_tokens_changes_nothing_where_they_weigh_what_they_stand_for(seed: int, beta: float) -> None:
    x, times = tokens(seed, 3), [0.5, 2.0]
    counts = torch.tensor([1, 4, 2])
    whole = flow(x.repeat_interleave(counts, 0), times, Attention(beta), "before")
    few = flow(x, times, Attention(beta, weights=counts.double()), "before")
    torch.testing.assert_close(whole, few.repeat_interleave(counts, 1), rtol=1e-6, atol=1e-8)
    plain = flow(x, times, Attention(beta), "before")
    assert not torch.allclose(plain, few, rtol=1e-4)


def test_the_norm_before_a_layer_is_a_radius_that_divides() -> None:
    x, attention = tokens(3), Attention(1.5)

    def polar(state: Tensor) -> Tensor:
        angle, radius = state[:, :-1], state[:, -1:]
        pull = attention(angle)
        return torch.cat((tangent(angle, pull) / radius, (angle * pull).sum(-1, keepdim=True)), -1)

    start = torch.cat((x, torch.full((len(x), 1), 2.0, dtype=torch.float64)), -1)
    both = integrate(polar, start, [1.0, 4.0])
    torch.testing.assert_close(flow(2 * x, [1.0, 4.0], attention, "before"), both[..., :-1] * both[..., -1:])


# The equation of one cosine


def test_equiangular_particles_follow_the_equation_as_closely_as_their_steps() -> None:
    rows = agreement.particles_against_equation((1e-4, 1e-6, 1e-8, 1e-10))
    for norm in ("after", "before"):
        assert 0.8 < slope(rows, "tolerance", f"norm {norm}") < 1.2
        assert rows[-1][f"norm {norm}"] < 1e-8


def test_the_equation_without_a_softmax() -> None:
    start, times = equiangular_tokens(6, 0.2), [0.3, 1.0]
    for norm, radius in (("after", None), ("before", 1.0)):
        found = gap(unit(flow(start, times, Attention(0.7, "count"), norm)))  # type: ignore[arg-type]
        torch.testing.assert_close(found, equiangular.solve(0.2, times, 6, 0.7, radius, "count"), rtol=1e-6, atol=0)


def test_clouds_come_nearer_to_the_equation_in_more_dimensions() -> None:
    rows = agreement.clouds_against_equation((16, 64, 256))
    assert -1.2 < slope(rows, "width", "error") < -0.5


def test_a_layer_is_the_step_that_tokens_make() -> None:
    x = equiangular_tokens(9, 0.35)
    update = Attention(3.0)(x)
    moved = unit(x + 0.4 * unit(update))
    cosines = (moved @ moved.T)[~torch.eye(9, dtype=torch.bool)]
    found = equiangular.layer(torch.tensor(0.65, dtype=torch.float64), torch.tensor(0.4), 9, 3.0)
    torch.testing.assert_close(1 - cosines, found.expand(72))


def test_layers_become_the_equation_in_relative_time_as_steps_shrink() -> None:
    """In time s with ds = dt |A| / r, log δ and log r obey equations that layers approach at order 1."""
    n, beta, end = 20, 2.0, 1.5

    def field(state: Tensor) -> Tensor:  # particles, whose updates have the length of the token
        return tangent(unit(state), unit(Attention(beta)(unit(state))))

    want = gap(integrate(field, equiangular_tokens(n, 0.3), [end], project=unit)[0])
    rows = []
    for count in (8, 16, 32, 64):
        now = torch.tensor(0.7, dtype=torch.float64)
        for _ in range(count):
            now = equiangular.layer(now, torch.tensor(end / count), n, beta)
        rows.append({"layers": count, "error": float((now / want).log())})
    assert -1.15 < slope(rows, "layers", "error") < -0.85


@few
@given(st.integers(0, 1000), st.floats(-1, 4))
def test_the_rank_of_equiangular_tokens_bounds_that_of_others(seed: int, mean: float) -> None:
    x = tokens(seed, 9, 5, mean)
    values = torch.linalg.svdvals(x).square()
    assert float(values.sum() / values[0]) <= float(equiangular.stable_rank(gap(x), 9)) * (1 + 1e-12)
    even = torch.linalg.svdvals(equiangular_tokens(9, 0.4)).square()
    assert float(even.sum() / even[0]) == pytest.approx(9 / (1 + 8 * 0.4))


# The mean field


def test_a_coordinate_of_an_even_point_has_its_moments() -> None:
    for dimension in (1, 2, 3, 5, 20):
        nodes, weights = coordinate(dimension, 12)
        assert float(weights.sum()) == pytest.approx(1)
        assert float(weights @ nodes**2) == pytest.approx(1 / dimension)
        assert float(weights @ nodes**4) == pytest.approx(3 / (dimension * (dimension + 2)))
    nodes, weights = coordinate(2)  # a mean over the circle
    assert float(weights @ (5 * nodes).exp()) == pytest.approx(float(torch.special.i0(torch.tensor(5.0).double())))


def test_the_field_converges_to_a_known_solution_at_order_two() -> None:
    rows = agreement.grid_against_exact((25, 50, 100, 200))
    assert -2.2 < slope(rows, "cells", "error") < -1.8
    assert max(abs(row["mass − 1"]) for row in rows) < 1e-14


@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_the_field_converges_to_characteristics_at_order_two(beta: float) -> None:
    rows = agreement.grid_against_rings((25, 50, 100, 200), beta)
    assert -2.2 < slope(rows, "cells", "error") < -1.8


@few
@given(
    st.integers(0, 10**6),
    st.sampled_from([2, 3, 7]),
    st.floats(0, 12),
    st.sampled_from(["softmax", "count"]),
    st.sampled_from([None, 1e-3]),
)
def test_mass_is_kept_and_stays_positive(
    seed: int, dimension: int, beta: float, divide: str, finest: float | None
) -> None:
    field = MeanField.on(24, dimension, beta, divide, finest)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(24, dtype=torch.float64, generator=generator) ** 8
    mass[torch.rand(24, generator=generator) < 0.5] = 0.0
    mass = (mass + 1e-300) / (mass + 1e-300).sum()
    end, _ = field.step(mass, 1e-3)
    for moment in (1e-3, 0.05):
        end, size = field.step(end, moment)
        assert size > 0
        assert float(end.min()) >= -EPS
        assert float(end.sum()) == pytest.approx(1, abs=24 * EPS)


def test_a_step_beyond_the_condition_would_take_more_than_a_cell_has() -> None:
    field = MeanField.on(40, 3, 2.0)
    mass = torch.zeros(40, dtype=torch.float64)
    mass[[0, 20]] = 0.5
    velocity = field.velocity(mass)
    size = CFL / field.outflow(velocity)
    assert float((mass + size * field.gain(mass, velocity)).min()) >= 0
    assert float((mass + 8 * size * field.gain(mass, velocity)).min()) < 0


def test_bad_fields_are_refused() -> None:
    with pytest.raises(BadInput, match="4 or more cells"):
        MeanField.on(3)
    with pytest.raises(BadInput, match="finest cell below"):
        MeanField.on(10, finest=1.0)


def test_particles_become_the_field_at_the_rate_of_independent_samples() -> None:
    rows = agreement.particles_against_field((16, 32, 64, 128, 256), seeds=64)
    assert -0.62 < slope(rows, "tokens", "error") < -0.38
    assert abs(rows[-1]["gap"] - rows[-1]["mean field"]) < 4 * rows[-1]["error"] / 64**0.5


# Collapse over depth


def test_collapse_is_one_over_depth_in_every_description() -> None:
    rows = collapse((64.0, 128.0, 256.0, 512.0))
    for name in ("1 − ρ, equation", "1 − ρ, particles"):
        assert slope(rows, "depth", name) == pytest.approx(-2, abs=0.02)
    for name in ("W2, particles", "W2, rings", "W2, field"):
        assert slope(rows, "depth", name) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize(("cosine", "radius"), [(0.3, 1.0), (0.6, 2.5)])
def test_the_constant_of_collapse_is_the_first_gap_times_its_radius_squared(cosine: float, radius: float) -> None:
    """With many tokens; a thousand miss it by 1/700, and early depths by more."""
    depths = [8.0, 1e5]
    early, late = (equiangular.solve(cosine, depths, 1e9, 1.0, radius) * torch.tensor(depths).double() ** 2).tolist()
    assert late == pytest.approx((1 - cosine) * radius**2, rel=1e-4)
    assert early < 0.99 * late
    fewer = float(equiangular.solve(0.3, [1e5], 1000, 1.0, 1.0)[0]) * 1e10
    assert fewer == pytest.approx(0.701, abs=5e-4)


def test_what_starts_near_the_antipode_sets_the_distance_in_few_dimensions() -> None:
    """With the norm after the layer, W2² ~ e^{−t} on the circle, t e^{−2t} on S², e^{−2t} from four dimensions on."""
    times = torch.tensor([6.0, 8.0, 10.0], dtype=torch.float64)

    def squares(dimension: int, kappa: float) -> Tensor:
        field = MeanField.on(400, dimension, 1.0, finest=2e-6)
        return field.distance_to_pole(field.solve(field.masses(gathered(kappa)), times)).square()

    even = torch.full((2,), 1.0, dtype=torch.float64)
    torch.testing.assert_close(-squares(2, 1.0).log().diff() / 2, even, rtol=0.02, atol=0)
    torch.testing.assert_close(-squares(8, 4.0).log().diff() / 2, 2 * even, rtol=0.02, atol=0)
    first, second = (squares(3, 1.0) * torch.exp(2 * times)).diff().tolist()
    assert first > 10  # against 70 to 180 in all
    assert second == pytest.approx(first, rel=0.05)


def test_collapse_with_the_norm_after_the_layer_is_exponential() -> None:
    times = torch.tensor([6.0, 8.0, 10.0], dtype=torch.float64)
    found = equiangular.solve(0.3, times, 1e3, 1.0)
    torch.testing.assert_close(found.log().diff() / 2, torch.full((2,), -2.0, dtype=torch.float64), rtol=1e-4, atol=0)
    x = unit(tokens(5, 12, 3, 3.0))
    path = gap(flow(x, times, Attention(1.0), rtol=1e-9, atol=1e-13))
    torch.testing.assert_close(path.log().diff() / 2, torch.full((2,), -2.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_one_radius_is_exact_for_equiangular_tokens() -> None:
    """Alignment along a solution with the norm after the layer gives back the one with the norm before it."""
    n, beta = 30, 1.0
    times = torch.linspace(0, 3, 2001, dtype=torch.float64)
    gaps = equiangular.solve(0.3, times, n, beta)
    itself, other = equiangular.shares(gaps, n, beta)
    depths, _ = pre_norm_time(times, itself + (n - 1) * other * (1 - gaps), 1.0)
    torch.testing.assert_close(
        equiangular.solve(0.3, depths[1::400], n, beta, radius=1.0), gaps[1::400], rtol=1e-5, atol=0
    )


def test_few_rings_are_many_rings() -> None:
    means = []
    for count in (32, 64):
        angles, mass = rings(gathered(2.0), [1.0], 5, 3.0, count)
        means.append(float(mass @ angles[0].cos()))
    assert means[0] == pytest.approx(means[1], rel=1e-8)


def test_the_pull_is_an_average_over_the_sphere() -> None:
    at, to = torch.tensor([0.7]).double(), torch.tensor([1.9]).double()
    pull = Pull.of(at, to, 3, 2.5)
    turn = torch.linspace(0, 2 * torch.pi, 65, dtype=torch.float64)[:-1]
    x = torch.stack((at.sin(), at * 0, at.cos()), -1)
    y = torch.stack((to.sin() * turn.cos(), to.sin() * turn.sin(), to.cos().expand(64)), -1)
    share = torch.softmax(2.5 * (x * y).sum(-1), 0)
    along = (share[:, None] * y).sum(0)
    east = torch.tensor([at.cos(), 0.0, -at.sin()]).double()
    torch.testing.assert_close(pull.velocity(torch.ones(1).double())[0], along @ east)
    torch.testing.assert_close(pull.alignment(torch.ones(1).double())[0], along @ x[0])
