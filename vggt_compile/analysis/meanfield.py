"""The mean-field equation ∂μ + ∇·(μ v[μ]) = 0 around an axis, by finite volumes: no mass is lost, none is negative.

Of arXiv 2312.10794, on the sphere S^{d−1} with v[μ](x) = P_x ∫ e^{β⟨x,y⟩} y dμ(y), divided by ∫ e^{β⟨x,y⟩} dμ(y) for
softmax attention. For data around one axis it is one equation for the density f at angle θ from the axis:

    ∂_t (f sin^{d−2}θ) + ∂_θ (f sin^{d−2}θ w[f]) = 0 on [0, π], w = 0 at both poles.

Cells are bands between two angles, with volumes and faces of the sphere. What flows out of one flows into the next, so
the total stays to rounding. f at faces comes upwind from limited linear pieces (van Leer 1979), time from means of
three Euler steps (Shu and Osher 1988, order 3). Under the condition on the time step below, an Euler step takes no more
than a cell has, and so do their means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vggt_compile.analysis.axisymmetric import Pull, Relative, coordinate
from vggt_compile.errors import BadInput

CFL = 0.45
"""How much of a cell of even density may flow out at a face in a step. A limited piece is nowhere above twice the mean,
so up to 0.5 mass stays positive."""


@dataclass(frozen=True)
class MeanField:
    """Cells between `faces` [N + 1] from 0 to π, and the tables of their pull on each other."""

    dimension: int
    faces: Tensor
    areas: Tensor  # [N + 1] sin^{d−2} at faces
    volumes: Tensor  # [N] its integrals over cells
    centres: Tensor  # [N] of volume, where a cell's mass acts
    at_faces: Pull
    at_centres: Pull

    @staticmethod
    def on(
        cells: int,
        dimension: int = 3,
        beta: float = 1.0,
        divide: Literal["softmax", "count"] = "softmax",
        finest: float | None = None,
    ) -> MeanField:
        """Even cells; or, from a first one of width `finest` at the pole where mass gathers, wider by a factor each."""
        if cells < 4 or dimension < 2 or (finest is not None and not 0 < finest < torch.pi / cells):
            raise BadInput("a mean field needs 4 or more cells, 2 or more dimensions, a finest cell below π / cells")
        share = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
        faces = torch.pi * share
        if finest is not None:
            growth = 1.0  # the logarithm of the last width over the first
            for _ in range(60):
                growth = math.log1p(torch.pi * growth / (cells * finest))
            faces = torch.pi * torch.expm1(growth * share) / math.expm1(growth)
        nodes, weights = _inside(faces, dimension)
        volumes = weights.sum(0)
        centres = (weights * nodes).sum(0) / volumes
        areas = faces.sin().clamp(min=0) ** (dimension - 2)
        tables = (Pull.of(at, centres, dimension, beta, divide) for at in (faces, centres))
        return MeanField(dimension, faces, areas, volumes, centres, *tables)

    def masses(self, density: Relative) -> Tensor:
        """Masses of cells, one in total, from a density relative to the even one, of the cosine to the axis."""
        nodes, weights = _inside(self.faces, self.dimension)
        mass = (weights * density(nodes.cos())).sum(0)
        return mass / mass.sum()

    def solve(self, mass: Tensor, times: Sequence[float] | Tensor) -> Tensor:
        """Masses [times, N] from those at time 0."""
        now, found = 0.0, []
        for moment in map(float, times):
            while moment - now > 1e-12 * max(1.0, moment):
                mass, size = self.step(mass, moment - now)
                now += size
            found.append(mass)
        return torch.stack(found)

    def step(self, mass: Tensor, most: float) -> tuple[Tensor, float]:
        """Masses after one step, and how long it was: `most`, or what keeps mass positive."""
        velocity = self.velocity(mass)
        size = min(most, CFL / self.outflow(velocity))
        stage = mass + size * self.gain(mass, velocity)
        for share in (1 / 4, 2 / 3):
            velocity = self.velocity(stage)
            allowed = 0.5 / self.outflow(velocity)
            if size > allowed:  # mass has moved so that this Euler step would take too much
                return self.step(mass, 0.9 * allowed)
            stage = (1 - share) * mass + share * (stage + size * self.gain(stage, velocity))
        return stage, size

    def velocity(self, mass: Tensor) -> Tensor:
        """At faces [N + 1]. The poles' are zero by symmetry, and are made so to the last bit."""
        velocity = self.at_faces.velocity(mass)
        velocity[0] = velocity[-1] = 0.0
        return velocity

    def outflow(self, velocity: Tensor) -> float:
        """The largest flow out of a cell of even density through one face, in cells per time."""
        flow = velocity * self.areas
        out = torch.maximum(flow[1:].clamp(min=0), -flow[:-1].clamp(max=0))
        return max(float((out / self.volumes).max()), 1e-300)

    def gain(self, mass: Tensor, velocity: Tensor) -> Tensor:
        """What each cell gains per time: what flows in at one face less what flows out at the other."""
        density = mass / self.volumes
        slopes = self.slopes(density)
        after = (density + slopes * (self.faces[1:] - self.centres))[:-1]  # of each inner face, from the cell before
        before = (density - slopes * (self.centres - self.faces[:-1]))[1:]
        flow = (velocity * self.areas)[1:-1]
        flux = torch.nn.functional.pad(flow.clamp(min=0) * after + flow.clamp(max=0) * before, (1, 1))
        return -flux.diff()

    def slopes(self, density: Tensor) -> Tensor:
        """Of the linear pieces: monotone, zero at the poles, at faces between zero and twice the mean."""
        rise = density.diff() / self.centres.diff()
        before, after = rise[:-1], rise[1:]
        small = torch.minimum(2 * torch.minimum(before.abs(), after.abs()), (before + after).abs() / 2)
        slope = torch.where(before * after > 0, before.sign() * small, 0.0)
        most = density / torch.maximum(self.centres - self.faces[:-1], self.faces[1:] - self.centres)
        return torch.nn.functional.pad(slope, (1, 1)).clamp(-most, most)

    def distance_to_pole(self, mass: Tensor) -> Tensor:
        """W2 to the Dirac measure at the axis, in chords: of all couplings there is only one."""
        return (mass * (2 * (self.centres / 2).sin()).square()).sum(-1).sqrt()


def _inside(faces: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Angles [8, N] in cells, and weights that integrate over their volumes: Gauss and Legendre's rule."""
    nodes, weights = coordinate(3, 8)  # a coordinate of an even point on S² is even on [−1, 1]
    angles = (faces[1:] + faces[:-1]) / 2 + nodes[:, None] * faces.diff() / 2
    return angles, weights[:, None] * faces.diff() * angles.sin() ** (dimension - 2)
