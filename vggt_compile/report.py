"""What was done: one row for each attention site, and the reason wherever nothing was done."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from vggt_compile.growth import Growth, frames_symbol


@dataclass(frozen=True)
class Row:
    """One attention site. Sizes and FLOPs are those of the inputs that were traced with.

    Attributes:
        axes: what acted, axis → setting; empty where the attention is as the model wrote it.
        implementation: `sdpa`; our own operator as `block-sparse` where queries read listed blocks of keys, as
            `weighted` where keys differ in what they count, and as `hopper` where its kernel is faster than `sdpa`; or
            `spelled out` for products around a softmax that were left as they are.
        flops_before, flops_after: of the two products, 4·H·D for a query-key pair.
        reason: why the site was left alone, or an axis of its policy was; None where the plan was applied in full.
        keys: that a query reads, mean over queries; None where the site could not be read.
        at_least: the data decide how much is computed, and `flops_after` is the least.
        measured: each run of the graph hands out how much it was, see `collect_densities`.
        dense_below: for fewer tokens the graph computes what the model does; 0 where the plan acts on all it serves.
        growth: FLOPs for other numbers of frames; None where the site could not be read.
    """

    path: str
    layer: int | None
    scope: str
    batch: int
    frames: int | None
    per_frame: int | None
    special: int | None
    heads: int
    head_dim: int
    dtype: str
    axes: dict[str, Any]
    implementation: str
    flops_before: int
    flops_after: int
    reason: str | None
    at_least: bool = False
    measured: bool = False
    dense_below: int = 0
    keys: float | None = None
    growth: Growth | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Region:
    """What one pass over regions did to the graph.

    Attributes:
        count: how often it was applied, of what `did` says in words.
        left: where it might have been, module path → why it was not; under "" a reason for all of them.
    """

    name: str
    count: int
    did: str
    left: dict[str, str]

    def __str__(self) -> str:
        reasons: dict[str, int] = {}
        for reason in self.left.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        parts = [f"{self.count} {self.did}"] if self.count else []
        parts += [reason if "" in self.left else f"not at {n}: {reason}" for reason, n in reasons.items()]
        return f"{self.name}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Observed:
    """A measure of the plan at one attention: each run of the graph hands out its quantities, see `collect_probes`."""

    layer: int
    path: str
    measure: str
    quantities: tuple[str, ...]


@dataclass
class Report:
    """What a rewrite did to one graph.

    Attributes:
        rows: one for each attention site, in execution order.
        regions: what passes over regions did around rewritten attentions; none where they had nothing to do.
        notes: sentences about the graph as a whole: layers that the plan names and the model lacks, graph breaks.
        dynamic: whether sizes were symbolic, so that the numbers in the rows are those of one example.
        observed: what the plan measures, in the order in which the graph hands it out.
    """

    plan: str = "dense"
    family: str = "generic"
    rows: list[Row] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dynamic: bool = False
    observed: list[Observed] = field(default_factory=list)

    @property
    def rewritten(self) -> list[Row]:
        return [row for row in self.rows if row.axes]

    @property
    def measured(self) -> list[Row]:
        """In the order in which the graph hands out their densities."""
        return [row for row in self.rows if row.measured]

    @property
    def global_rows(self) -> list[Row]:
        return [row for row in self.rows if row.scope == "global"]

    def attention_left(self, frames: int | None = None) -> float:
        """Share of the attention FLOPs of the graph that is left, 1.0 where nothing was saved.

        Args:
            frames: for so many, where not those that were traced with are meant; BadInput where their number is fixed
                in the graph. Its guards, as one of `min_tokens`, are not asked.
        """
        before, after = map(sum, zip(*self._flops(frames), strict=True)) if self.rows else (0, 0)
        return after / before if before else 1.0

    def _flops(self, frames: int | None) -> list[tuple[int, int]]:
        """Before and after, of each row."""
        if frames is None:
            return [(row.flops_before, row.flops_after) for row in self.rows]
        growths = [row.growth for row in self.rows if row.growth is not None]
        symbol = frames_symbol(growths, frames)
        return [growth.at(symbol, frames) for growth in growths]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: every row and note."""
        told = asdict(self) | {"attention_left": self.attention_left()}
        for row in told["rows"]:
            del row["growth"]
        return told

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self, *, every: bool = False) -> str:
        """The global sites, and with `every` all others too."""
        shown = self.rows if every else [row for row in self.rows if row.scope == "global" or row.axes]
        return tabulate(map(_cells, shown), headers=_HEADERS, disable_numparse=True)

    def __str__(self) -> str:
        lines = [
            f"vggt_compile: plan {self.plan!r}, family {self.family!r}{', dynamic shapes' if self.dynamic else ''}"
        ]
        if any(row.scope == "global" or row.axes for row in self.rows):
            lines.append(self.table())
        rest = [row for row in self.rows if row.scope != "global" and not row.axes]
        if rest:
            kinds = {scope: sum(row.scope == scope for row in rest) for scope in ("frame", "other")}
            lines.append(f"not over frames, left alone: {kinds['frame']} inside frames, {kinds['other']} others")
        least = "at least " if any(row.at_least for row in self.rows) else ""
        lines.append(
            f"{len(self.rewritten)} of {len(self.rows)} attentions rewritten; "
            f"{least}{self.attention_left():.1%} of the attention FLOPs left"
        )
        if self.observed:
            names = dict.fromkeys(entry.measure for entry in self.observed)
            lines.append(f"measured at layers {spans({entry.layer for entry in self.observed})}: {', '.join(names)}")
        return "\n".join([*lines, *map(str, self.regions), *(f"note: {note}" for note in self.notes)])


_HEADERS = ("layer", "path", "scope", "B", "frames × tokens", "heads × dim", "dtype", "done", "by", "GFLOP", "reason")


def _cells(row: Row) -> tuple[str, ...]:
    layout = f"{row.frames} × {row.per_frame}" if row.frames is not None else ""
    if row.special is not None:
        layout += f" ({row.special} special)"
    before, after = f"{row.flops_before / 1e9:.3g}", f"{row.flops_after / 1e9:.3g}"
    return (
        "" if row.layer is None else str(row.layer),
        row.path,
        row.scope,
        str(row.batch),
        layout,
        f"{row.heads} × {row.head_dim}",
        row.dtype,
        ", ".join(f"{axis}: {_setting(setting)}" for axis, setting in row.axes.items()) or "–",
        row.implementation,
        before if before == after else f"{before} → {'≥ ' if row.at_least else ''}{after}",
        row.reason or "",
    )


def spans(layers: set[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    starts = sorted(layer for layer in layers if layer - 1 not in layers)
    ends = sorted(layer for layer in layers if layer + 1 not in layers)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _setting(setting: Any) -> str:
    if not isinstance(setting, dict):
        return str(setting)
    rest = ", ".join(f"{k}={v}" for k, v in setting.items() if k != "method")
    return f"{setting['method']}({rest})"


_listeners: ContextVar[tuple[list[Report], ...]] = ContextVar("vggt_compile_reports", default=())


@contextlib.contextmanager
def collect_reports() -> Iterator[list[Report]]:
    """Catch the reports of all compiles inside the block, one for each graph.

    >>> with collect_reports() as reports:
    ...     compiled(images)
    >>> print(reports[0])
    """
    reports: list[Report] = []
    token = _listeners.set((*_listeners.get(), reports))
    try:
        yield reports
    finally:
        _listeners.reset(token)


def publish(report: Report) -> None:
    """Hand a finished report to every `collect_reports` block that is open."""
    for reports in _listeners.get():
        reports.append(report)
