"""The picture of docs/theory.md: how tokens gather, at which rate, how solvers agree, what merging changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vggt_compile.analysis import agreement, equiangular
from vggt_compile.analysis.clouds import cloud, gathered
from vggt_compile.analysis.collapse import collapse
from vggt_compile.analysis.meanfield import MeanField
from vggt_compile.analysis.merging import critical_count, merge
from vggt_compile.analysis.particles import Attention, flow

BETA = 4.0
PLACES = {"_depth": "lower left"}


def draw(path: Path) -> None:
    figure = Figure(figsize=(13.6, 3.7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, 4), (_gathering, _depth, _agreement, _merging), strict=True):
        panel(axis)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7.5, loc=PLACES.get(panel.__name__, "best"))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, format="png")


def _gathering(axis: Any) -> None:
    """The density over the angle at some times, of finite volumes and of particles."""
    times = [0.0, 1.0, 2.0, 3.0]
    field = MeanField.on(120, 3, BETA)
    masses = field.solve(field.masses(gathered(1.0)), times)
    tokens = flow(cloud(1000, 2), times, Attention(BETA), rtol=1e-4, atol=1e-6)
    angles = tokens[..., 0].clamp(-1, 1).acos().flatten(1)
    for index, (time, mass, angle) in enumerate(zip(times, masses, angles, strict=True)):
        colour = f"C{index}"
        axis.plot(field.centres.numpy(), (mass / field.faces.diff()).numpy(), color=colour, label=f"t = {time:g}")
        axis.hist(angle.numpy(), 40, (0, torch.pi), density=True, color=colour, alpha=0.2)
    axis.set(xlim=(0, torch.pi), xlabel="angle to the axis, rad", ylabel="density")
    axis.set_title(f"finite volumes (lines) and 2000 particles, S², β = {BETA:g}", fontsize=9)


def _depth(axis: Any) -> None:
    """1 − ρ over depth with either place of the norm, and the slope that theory says."""
    depths = torch.logspace(0, 3, 25, dtype=torch.float64)
    rows = collapse(depths.tolist())
    axis.loglog(depths, [row["1 − ρ, equation"] for row in rows], "C0", label="1 − ρ, equation from ρ = 0.3")
    axis.loglog(depths, [row["1 − ρ, particles"] for row in rows], "C0.", label="1 − ρ, particles on S⁷")
    axis.loglog(depths, [row["W2, field"] for row in rows], "C1", label="W2 to a point, finite volumes")
    axis.loglog(depths, [row["W2, particles"] for row in rows], "C1.", label="W2, particles")
    short = depths[depths < 12]
    axis.loglog(short, equiangular.solve(0.3, short, 1e4, 1.0), "C3--", label="1 − ρ, norm after the layer")
    axis.loglog(depths, 0.12 * depths**-2, "0.6", lw=1, ls=":", label="slopes −2 and −1")
    axis.loglog(depths, 3.0 / depths, "0.6", lw=1, ls=":")
    axis.set(xlabel="depth t", ylim=(1e-10, 10))
    axis.set_title("norm before the layer: collapse is O(1/depth)", fontsize=9)


def _agreement(axis: Any) -> None:
    """Errors over refinement."""
    for label, rows, size, marker in (
        ("cells → exact, −2", agreement.grid_against_exact((25, 50, 100, 200)), "cells", "o-"),
        ("cells → characteristics, −2", agreement.grid_against_rings((25, 50, 100, 200)), "cells", "s-"),
        ("particles → field, −1/2", agreement.particles_against_field((16, 64, 256), 64), "tokens", "^-"),
        ("width → equation", agreement.clouds_against_equation((16, 64, 256, 1024)), "width", "v-"),
    ):
        axis.loglog([row[size] for row in rows], [row["error"] for row in rows], marker, ms=4, label=label)
    axis.set(xlabel="cells, particles or width", ylabel="error")
    axis.set_title("the descriptions agree, each at its rate", fontsize=9)


def _merging(axis: Any) -> None:
    """How many times as deep collapse comes after merging, over what is left in critical counts."""
    tokens = 1e8
    for beta in (4.0, 8.0, 12.0):
        shares = torch.logspace(-0.7, 4, 24)
        critical = critical_count(beta, 0.7)
        found = [merge(tokens, 1 + float(share) * critical, beta, 0.7).delay for share in shares]
        axis.semilogx(shares, found, label=f"β = {beta:g}, n_c = {critical:.0f}")
    axis.axvline(1, color="0.7", lw=1, zorder=0)
    axis.set(xlabel="tokens left / n_c", ylabel="depth of collapse, times unmerged")
    axis.set_title("merging delays collapse only near n_c", fontsize=9)
