"""How much of its attention a compiled model really computed, where the data decide: read after runs, not during them.

A graph that is compiled with `options={"densities": True}` hands out one small tensor more for each attention over
blocks. They never leave the device unless somebody asks, so a run waits for nothing. Without the option the graph has
none of this. The option is part of what Dynamo compares, and the outputs are part of the key of Inductor's caches: code
that was compiled with it is never used without it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from vggt_compile.handouts import Receiver
from vggt_compile.report import Row


@dataclass(frozen=True)
class Density:
    """Share of the query-key pairs of one dense attention that were computed, over all runs.

    Attributes:
        density: over batch items and heads.
        least, most: of single heads, over batch items.
        runs: how many there were.
    """

    layer: int | None
    path: str
    density: float
    least: float
    most: float
    runs: int


class Densities:
    """What the runs inside a `collect_densities` block computed. Reading it waits for the device.

    Layers without blocks are not in it: what a `Report` says of them is exact.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int | None, str], list[Tensor]] = {}

    def add(self, layer: int | None, path: str, density: Tensor) -> None:
        """One run of one attention; `density` is [B, H] on any device."""
        # A later replay of a CUDA graph overwrites its outputs.
        self._found.setdefault((layer, path), []).append(density.clone())

    @property
    def rows(self) -> list[Density]:
        """One for each attention, in the order of their first run."""
        return [_row(layer, path, found) for (layer, path), found in self._found.items()]

    def mean(self) -> float:
        """Over all attentions with blocks, each with equal weight; 1.0 where none was measured."""
        rows = self.rows
        return sum(row.density for row in rows) / len(rows) if rows else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"rows": [asdict(row) for row in self.rows], "mean": self.mean()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> str:
        return tabulate(map(_cells, self.rows), headers=_HEADERS, disable_numparse=True)

    def __str__(self) -> str:
        if not self._found:
            return (
                "vggt_compile: no densities: nothing ran that was compiled with options={'densities': True} and a plan "
                "that chooses blocks"
            )
        return f"{self.table()}\n{self.mean():.1%} of the pairs of these attentions computed"


_HEADERS = ("layer", "path", "pairs computed", "least head", "most head", "runs")


def _row(layer: int | None, path: str, found: Sequence[Tensor]) -> Density:
    heads = torch.stack([density.double().mean(0).cpu() for density in found]).mean(0)
    return Density(layer, path, heads.mean().item(), heads.min().item(), heads.max().item(), len(found))


def _cells(row: Density) -> tuple[str, ...]:
    shares = (f"{share:.1%}" for share in (row.density, row.least, row.most))
    return ("" if row.layer is None else str(row.layer), row.path, *shares, str(row.runs))


_listeners: ContextVar[tuple[Densities, ...]] = ContextVar("vggt_compile_densities", default=())


@contextlib.contextmanager
def collect_densities() -> Iterator[Densities]:
    """Catch what runs inside the block compute, of models that were compiled with `options={"densities": True}`.

    >>> compiled = torch.compile(model, backend="vggt_sparse", options={"plan": "faster_vggt-50", "densities": True})
    >>> with collect_densities() as densities:
    ...     compiled(images)
    >>> print(densities)

    Runs of several models, or of one under several plans, need a block each: attentions are told apart by their layer
    and path.
    """
    densities = Densities()
    token = _listeners.set((*_listeners.get(), densities))
    try:
        yield densities
    finally:
        _listeners.reset(token)


def receivers(rows: Sequence[Row]) -> list[Receiver]:
    """What becomes of the densities of `rows` once a run has them."""

    def receiver(row: Row) -> Receiver:
        def receive(density: Tensor) -> None:
            for densities in _listeners.get():
                densities.add(row.layer, row.path, density)

        return receive

    return [receiver(row) for row in rows]
