"""One quantity at one layer, predicted beside measured: the residual with its interval says whether theory fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from vggt_compile.analysis.bootstrap import Interval, interval, resampled
from vggt_compile.report import spans


@dataclass(frozen=True)
class Line:
    """Means over scenes; the interval is of measured less predicted, over bootstrap samples of scenes.

    With one scene it is what drawing rows leaves open, two standard errors, and nothing where the measure is exact.
    """

    layer: int
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def residual(self) -> float:
        return self.measured - self.predicted

    @property
    def fits(self) -> bool:
        return self.low <= 0 <= self.high


def lines(
    layers: Sequence[int],
    measured: Tensor,
    predicted: Tensor,
    errors: Tensor,
    ends: Sequence[Interval] = (),
    samples: int = 1000,
) -> list[Line]:
    """Of [scenes, layers] each; errors are those of drawing in a single scene, `ends` are intervals that are known."""
    ends = ends or _intervals(measured - predicted, errors, samples)
    means = zip(layers, measured.mean(0).tolist(), predicted.mean(0).tolist(), ends, strict=True)
    return [Line(layer, seen, wanted, *span) for layer, seen, wanted, span in means]


def _intervals(residual: Tensor, errors: Tensor, samples: int) -> list[Interval]:
    if len(residual) == 1:
        return [(float(r - 2 * e), float(r + 2 * e)) for r, e in zip(residual[0], errors[0], strict=True)]
    drawn = resampled(len(residual), samples, seed=0) @ residual / len(residual)
    return [interval(column) for column in drawn.T]


def sentences(what: str, found: Sequence[Line]) -> Iterator[str]:
    """Where a quantity is beyond its interval, and by how much at the worst layer; that it fits where it does."""
    off = [line for line in found if not line.fits]
    if not off:
        yield f"{what}: fits within its interval at every layer"
        return
    worst = max(off, key=lambda line: abs(line.residual))
    well = [line.layer for line in found if line.fits]
    where = f"fits at layers {spans(set(well))}, is off" if well else "is off at every layer"
    yield (
        f"{what}: {where}{f' at layers {spans({line.layer for line in off})}' if well else ''}; most at layer "
        f"{worst.layer}: measured {worst.measured:.3g}, theory {worst.predicted:.3g}, difference {worst.residual:+.2g} "
        f"({worst.low:+.2g} to {worst.high:+.2g})"
    )
