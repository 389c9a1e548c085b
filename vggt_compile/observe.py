"""Adds observers to a graph: what a plan measures at each attention over frames, without changing what is computed.

An observer is a node that reads tensors which the graph has anyway, and whose value leaves the graph as one more
output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from vggt_compile import registry
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.residual import Residual, residual_around
from vggt_compile.graph.symbols import Symbols
from vggt_compile.plan import Setting
from vggt_compile.report import Observed, Report, spans
from vggt_compile.site import Site, Skip

BEFORE = frozenset(("q", "k", "scale", "frames", "special"))
"""What can be read before the attention, so that its operands need not be kept for longer."""


class Observers:
    """Those of one graph, in the order in which it will hand out their values."""

    def __init__(self, settings: tuple[Setting, ...], edit: Editor, symbols: Symbols, report: Report) -> None:
        self.settings, self.edit, self.symbols, self.report = settings, edit, symbols, report
        self.nodes: list[Node] = []
        self._skipped: dict[tuple[str, str], set[int]] = {}

    def around(self, site: Site) -> None:
        """Add every observer that the site has the tensors for. A plan may rewrite the attention afterwards."""
        if site.scope != "global" or site.layer is None:
            return
        residual = residual_around(site)
        for setting in self.settings:
            measure = registry.find_measure(setting.method)
            reason = self._refusal(site, residual, measure.reads)
            if reason is not None:
                self._skipped.setdefault((measure.name, reason), set()).add(site.layer)
                continue
            self._add(site, residual, measure, dict(setting.parameters))
            self.report.observed.append(Observed(site.layer, site.path, measure.name, measure.quantities))

    def note_skipped(self) -> None:
        """Tell the report which layers were not measured, and why."""
        for (name, reason), layers in self._skipped.items():
            self.report.notes.append(f"{name} is not measured at layers {spans(layers)}: {reason}")

    def _add(self, site: Site, residual: Residual | Skip, measure: registry.Measure, options: dict[str, Any]) -> None:
        early = BEFORE.issuperset(measure.reads)
        anchor = site.call.node if early or isinstance(residual, Skip) else residual.total
        with self.edit.before(anchor):
            operands = [self._operands(site, residual)[name]() for name in measure.reads]
            self.nodes.append(self.edit.call(measure.operator, *operands, **options))

    def _operands(self, site: Site, residual: Residual | Skip) -> dict[str, Callable[[], Any]]:
        """Under autocast q and k may be wider than what the attention reads."""
        call, layout = site.call, site.layout
        found: dict[str, Callable[[], Any]] = {
            "q": lambda: self.edit.cast(call.q, site.dtype),
            "k": lambda: self.edit.cast(call.k, site.dtype),
            "v": lambda: self.edit.cast(call.v, site.dtype),
            "out": lambda: call.node,
            "scale": lambda: call.scale,
        }
        if layout is not None:
            found["frames"] = lambda: self.edit.size(layout.frames)
        if layout is not None and layout.special is not None:
            special = layout.special
            found["special"] = lambda: self.edit.size(special)
        if isinstance(residual, Residual):
            found |= {"x": lambda: residual.stream, "update": lambda: residual.update}
        return found

    def _refusal(self, site: Site, residual: Residual | Skip, reads: tuple[str, ...]) -> str | None:
        if site.refusal is not None:
            return site.refusal
        if unknown := self.symbols.unknown(site.tokens):
            return f"no input of its graph gives the size {', '.join(sorted(unknown))}"
        if isinstance(residual, Skip) and not BEFORE.issuperset(reads):
            return residual.reason
        if "special" in reads and (site.layout is None or site.layout.special is None):
            return "the number of special tokens in a frame is unknown"
        return None
