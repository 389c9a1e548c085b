"""The four predictions of collapse hold each other to account: each function is one comparison, a row a refinement.

Rates are slopes of log error over log size, by least squares. Seeds are fixed, so a comparison is the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vggt_compile.analysis import closed_forms, equiangular, merging
from vggt_compile.analysis.axisymmetric import rings
from vggt_compile.analysis.clouds import cloud, gathered
from vggt_compile.analysis.meanfield import MeanField
from vggt_compile.analysis.particles import Attention, flow, gap, unit
from vggt_compile.analysis.particles import equiangular as equiangular_tokens

Row = dict[str, float]


def slope(rows: Iterable[Row], size: str, value: str) -> float:
    """The least-squares slope of log |value| over log size."""
    pairs = [(math.log(row[size]), math.log(abs(row[value]))) for row in rows]
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def grid_against_exact(cells: Sequence[int], time: float = 1.5, start: float = 0.3) -> list[Row]:
    """Finite volumes on the circle at β = 0, where the solution is known.

    There ẋ = P_x ∫ y dμ, the Kuramoto flow of equal oscillators: from a Poisson kernel of mean a it stays one, with
    ȧ = a (1 − a²) / 2 (Ott and Antonsen 2008).
    """
    odds = start**2 / (1 - start**2) * math.exp(time)
    mean = math.sqrt(odds / (1 + odds))
    rows = []
    for count in cells:
        field = MeanField.on(count, dimension=2, beta=0.0)
        end = field.solve(field.masses(lambda c: 1 / (1 - 2 * start * c + start**2)), [time])[0]
        share = 2 / torch.pi * torch.atan((1 + mean) / (1 - mean) * torch.tan(field.faces / 2))
        rows.append({"cells": count, "error": float((end - share.diff()).abs().sum()), **_conserved(end)})
    return rows


def grid_against_rings(cells: Sequence[int], beta: float = 4.0, time: float = 2.0) -> list[Row]:
    """Finite volumes against characteristics, two solvers of one equation: the gap 1 − |∫ x dμ|² on S²."""
    angles, mass = rings(gathered(1.0), [time], 3, beta)
    want = 1 - float((mass * angles[0].cos()).sum()) ** 2
    rows = []
    for count in cells:
        field = MeanField.on(count, 3, beta)
        end = field.solve(field.masses(gathered(1.0)), [time])[0]
        found = 1 - float((end * field.centres.cos()).sum()) ** 2
        rows.append({"cells": count, "gap": found, "rings": want, "error": abs(found - want), **_conserved(end)})
    return rows


def _conserved(mass: Tensor) -> Row:
    return {"mass − 1": float(mass.sum()) - 1, "least mass": float(mass.min())}


def particles_against_field(counts: Sequence[int], seeds: int, beta: float = 1.0, time: float = 0.5) -> list[Row]:
    """Independent particles against the mean field: the root of the mean square difference in the gap, over seeds."""
    angles, mass = rings(gathered(1.0), [time], 3, beta)
    want = 1 - float((mass * angles[0].cos()).sum()) ** 2
    rows = []
    for count in counts:
        found = gap(flow(cloud(count, seeds), [time], Attention(beta), rtol=1e-5, atol=1e-7)[0])
        error = float((found - want).square().mean().sqrt())
        rows.append({"tokens": count, "gap": float(found.mean()), "mean field": want, "error": error})
    return rows


def particles_against_equation(tolerances: Sequence[float], tokens: int = 12, beta: float = 2.0) -> list[Row]:
    """Particles that start equiangular against the equation of their cosine, as the tolerance of steps falls."""
    times, rows = (1.0, 3.0, 6.0), []
    for tolerance in tolerances:
        row: Row = {"tolerance": tolerance}
        for norm, radius in (("after", None), ("before", 1.0)):
            start = equiangular_tokens(tokens, 0.3)
            found = flow(start, times, Attention(beta), norm, tolerance, tolerance * 1e-2)  # type: ignore[arg-type]
            want = equiangular.solve(0.3, times, tokens, beta, radius, rtol=1e-13)
            row[f"norm {norm}"] = float((gap(unit(found)) / want - 1).abs().max())
        rows.append(row)
    return rows


def clouds_against_equation(widths: Sequence[int], tokens: int = 64, seeds: int = 8, beta: float = 2.0) -> list[Row]:
    """Random tokens of mean cosine 0.3 in more and more dimensions, where cosines gather around their mean."""
    times = (1.0, 2.0, 4.0)
    rows = []
    for width in widths:
        generator = torch.Generator().manual_seed(width)
        noise = unit(torch.randn(seeds, tokens, width, dtype=torch.float64, generator=generator))
        noise[..., 0] += math.sqrt(0.3 / 0.7)
        found = gap(flow(noise, times, Attention(beta), rtol=1e-6))
        want = equiangular.solve(0.3, times, tokens, beta)
        rows.append({"width": width, "error": float((found / want[:, None]).log().square().mean().sqrt())})
    return rows


def spectra(counts: Sequence[int], spread: float, seeds: int = 2) -> list[Row]:
    """Softmax matrices of Gaussian logits against their closed forms."""
    rows = []
    for count in counts:
        generator = torch.Generator().manual_seed(count)
        found = [closed_forms.measure(closed_forms.sample(count, count, spread, generator)) for _ in range(seeds)]
        row: Row = {"tokens": count, "s": spread}
        want = {
            "entropy": closed_forms.entropy_share(count, spread),
            "stable_rank": closed_forms.stable_rank(spread),
            "second": closed_forms.second_share(count, spread),
        }
        for name, value in want.items():
            row[name] = sum(entry[name] for entry in found) / seeds
            row[f"{name}, formula"] = float(value)
        rows.append(row)
    return rows


def merged(tokens: float, kept: Sequence[float], beta: float, start: float = 0.7) -> list[Row]:
    """Mixing and depth of collapse as more of the tokens are merged away."""
    rows = []
    for count in kept:
        found = merging.merge(tokens, count, beta, start)
        row = {"kept": count, "kept / critical": count / merging.critical_count(beta, start)}
        rows.append(row | {"mixing": found.mixing_kept, "slowed to": found.slowed, "delay": found.delay})
    return rows
