"""What a plan's probes measured while a compiled model ran: read after runs, not during them.

A graph that is compiled under a plan with `probe` hands out one small tensor more for each measure and attention. They
never leave the device unless somebody asks, so a run waits for nothing but the measuring. A plan without `probe` has
none of this in its graphs.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from vggt_compile.handouts import Receiver
from vggt_compile.report import Observed


@dataclass(frozen=True)
class Probe:
    """One quantity at one attention, over all runs.

    Attributes:
        value: mean over runs, batch items and heads.
        error: of that mean, where the errors of its parts are independent; heads share drawn queries, so they are taken
            not to be, and theirs are averaged. 0 where the quantity is exact.
        heads: mean over runs and batch items of each; one entry where the quantity has no heads.
        runs: how many there were.
    """

    layer: int
    path: str
    quantity: str
    value: float
    error: float
    heads: tuple[float, ...]
    runs: int


class Probes:
    """What the runs inside a `collect_probes` block measured. Reading it waits for the device."""

    def __init__(self) -> None:
        self._found: dict[Observed, list[Tensor]] = {}

    def add(self, observed: Observed, found: Tensor) -> None:
        """One run; `found` is [B, H, quantities, 2] on any device, values and errors."""
        # A later replay of a CUDA graph overwrites its outputs.
        self._found.setdefault(observed, []).append(found.clone())

    @property
    def rows(self) -> list[Probe]:
        """One for each quantity and attention, attentions in the order of their first run."""
        return [row for observed, found in self._found.items() for row in _rows(observed, found)]

    @property
    def layers(self) -> dict[int, dict[str, Probe]]:
        """Layer → quantity → what was found. A model that runs a layer twice keeps the last."""
        found: dict[int, dict[str, Probe]] = {}
        for row in self.rows:
            found.setdefault(row.layer, {})[row.quantity] = row
        return dict(sorted(found.items()))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not finite are None."""
        return {"rows": [_json(row) for row in self.rows]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> str:
        """A row for each layer, a column for each quantity."""
        names = list(dict.fromkeys(row.quantity for row in self.rows))
        cells = [(str(layer), *(_cell(found.get(name)) for name in names)) for layer, found in self.layers.items()]
        headers = ("layer", *(name.replace("_", "\n") for name in names))
        return tabulate(cells, headers=headers, disable_numparse=True)

    def __str__(self) -> str:
        if not self._found:
            return (
                "vggt_compile: no probes: nothing ran that was compiled under a plan with a list of measures as 'probe'"
            )
        return self.table()


def _rows(observed: Observed, found: Sequence[Tensor]) -> Iterator[Probe]:
    runs = torch.stack([entry.double().cpu() for entry in found])  # [runs, B, H, quantities, 2]
    values, squares = runs[..., 0], runs[..., 1].mean(2).square()
    for index, quantity in enumerate(observed.quantities):
        heads = values[..., index].mean((0, 1))
        error = squares[..., index].sum().sqrt() / squares[..., index].numel()
        yield Probe(
            observed.layer,
            observed.path,
            quantity,
            heads.mean().item(),
            error.item(),
            tuple(heads.tolist()),
            len(found),
        )


def _json(row: Probe) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in vars(row).items()}


def _cell(row: Probe | None) -> str:
    if row is None:
        return ""
    return f"{row.value:.4g}" if row.error == 0 else f"{row.value:.4g} ± {row.error:.1g}"


_listeners: ContextVar[tuple[Probes, ...]] = ContextVar("vggt_compile_probes", default=())


@contextlib.contextmanager
def collect_probes() -> Iterator[Probes]:
    """Catch what runs inside the block measure, of models that were compiled under a plan with `probe`.

    >>> compiled = torch.compile(model, backend="vggt_sparse", options={"plan": {"probe": ["entropy", "cosine"]}})
    >>> with collect_probes() as probes:
    ...     compiled(images)
    >>> print(probes)

    Runs of several models, or of one under several plans, need a block each: attentions are told apart by their layer
    and path.
    """
    probes = Probes()
    token = _listeners.set((*_listeners.get(), probes))
    try:
        yield probes
    finally:
        _listeners.reset(token)


def receivers(observed: Sequence[Observed]) -> list[Receiver]:
    """What becomes of the outputs of observers once a run has them."""

    def receiver(entry: Observed) -> Receiver:
        def receive(found: Tensor) -> None:
            for probes in _listeners.get():
                probes.add(entry, found)

        return receive

    return [receiver(entry) for entry in observed]
