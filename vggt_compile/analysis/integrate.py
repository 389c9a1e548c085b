"""An ordinary differential equation is followed by steps whose error is estimated and kept below a tolerance.

Dormand and Prince, A family of embedded Runge-Kutta formulae (1980): order 5, with an embedded formula of order 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggt_compile.errors import BadInput

STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""What each stage adds of the slopes before it; the last row is also the step of order 5."""
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""The step of order 5 less that of order 4, in slopes."""

Field = Callable[[Tensor], Tensor]


def integrate(
    field: Field,
    start: Tensor,
    times: Sequence[float] | Tensor,
    rtol: float = 1e-8,
    atol: float = 1e-10,
    project: Field | None = None,
) -> Tensor:
    """The solution of ẏ = field(y) with y(0) = start, at times ≥ 0 that do not fall: [len(times), *start.shape].

    `project` brings a state back to where solutions live and is applied after every step, so that no returned state is
    off it by more than rounding. A step ends at each of `times`: nothing is interpolated.

    Raises:
        BadInput: times that fall or are negative; a solution that leaves the numbers.
    """
    moments = [float(time) for time in times]
    if any(later < earlier for earlier, later in zip([0.0, *moments], moments, strict=False)):
        raise BadInput("times of a solution must be zero or more and must not fall")
    now, state, found = 0.0, start.double(), []
    slope = float(field(state).abs().max())
    step = 0.01 * (1 + float(state.abs().max())) / max(slope, 1e-300)
    for moment in moments:
        while moment - now > 1e-14 * moment:
            size = min(step, moment - now)
            after, error = _attempt(field, state, size)
            share = float((error.abs() / (atol + rtol * torch.maximum(state.abs(), after.abs()))).max())
            factor = min(5.0, 0.9 * max(share, 1e-8) ** -0.2) if share == share else 0.1
            if share <= 1:
                now, state = now + size, after if project is None else project(after)
                # A step cut short, to end at a moment, can only tell that a longer one would do.
                step = size * factor if size == step else max(step, size * factor)
            elif size < 1e-12 * max(1.0, moment):
                raise BadInput(f"the solution leaves the numbers at time {now:g}")
            else:
                step = size * max(0.1, factor)
        found.append(state)
    return torch.stack(found)


def _attempt(field: Field, state: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """The state after one step, and an estimate of its error."""
    slopes, after = [field(state)], state
    for row in STAGES:
        after = state + size * sum(weight * slope for weight, slope in zip(row, slopes, strict=True) if weight)
        slopes.append(field(after))
    error = size * torch.stack([weight * slope for weight, slope in zip(ERROR, slopes, strict=True)]).sum(0)
    return after, error
