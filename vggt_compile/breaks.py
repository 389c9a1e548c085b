"""Graph breaks: a plan needs the whole trunk in one graph, so say which line took it apart and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from torch._dynamo.utils import graph_break_reasons
from torch.fx import GraphModule

from vggt_compile.families.trace import Shim
from vggt_compile.graph import dialect
from vggt_compile.report import Report


def is_fragment(gm: GraphModule) -> bool:
    """Whether this graph is a piece of a broken frame that holds no attention, so that a plan cannot mean it."""
    if any(dialect.is_attention_like(node) for graph, _ in dialect.graphs(gm) for node in graph.graph.nodes):
        return False
    return _broken(gm) or bool(graph_break_reasons)


def describe(gm: GraphModule, report: Report, late: Sequence[Shim]) -> list[str]:
    """Notes on lost module paths and broken trunks, naming the line and the remedy; empty where all is well."""
    lost = [row for row in report.rows if row.path.startswith("(")]
    broken = report.rows and not report.global_rows and (graph_break_reasons or _broken(gm))
    if not lost and not broken:
        return []
    what = (
        f"{len(lost)} of {len(report.rows)} attentions reached the backend without a module path, so layers cannot be told apart"
        if lost
        else "this graph holds attention, but none over frames"
    )
    if late:
        names = ", ".join(shim.name for shim in late)
        return [f"{what}: {names} was imported too late for this compile; call vggt_compile.prepare(model) first"]
    where = _first_break()
    if where is None:
        return [f"{what}; compile the whole model, not single blocks"]
    return [
        f"{what}: the graph broke at {where}. Call vggt_compile.prepare(model) and see whether it lists that class, "
        "or change that line so that it does not read a tensor's values"
    ]


def _broken(gm: GraphModule) -> bool:
    return bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False))


def _first_break() -> str | None:
    for reason in graph_break_reasons:
        if reason.user_stack:
            frame = reason.user_stack[-1]
            return f"{frame.filename}:{frame.lineno} in {frame.name} ({str(reason.reason).splitlines()[0]})"
    return None
