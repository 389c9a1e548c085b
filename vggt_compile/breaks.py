"""What keeps a plan from the model: graph breaks and a full cache of Dynamo's; say where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch._dynamo import eval_frame, symbolic_convert
from torch._dynamo.output_graph import GraphCompileReason
from torch._dynamo.utils import graph_break_reasons
from torch.fx import GraphModule

from vggt_compile.families.shim import Shim
from vggt_compile.graph import dialect
from vggt_compile.graph.enclosing import parts
from vggt_compile.report import Report
from vggt_compile.site import LOST


def is_fragment(gm: GraphModule) -> bool:
    """Whether this graph is a piece of a broken frame that holds no attention, so that a plan cannot mean it."""
    if any(dialect.is_attention_like(node) for part in parts(gm) for node in part.gm.graph.nodes):
        return False
    return _ends_in_break(gm) or bool(graph_break_reasons)


def describe(gm: GraphModule, report: Report, late: Sequence[Shim]) -> list[str]:
    """Notes on lost module paths and broken trunks, naming the line and the remedy; empty where all is well."""
    where = _break_near(gm)
    lost = [row for row in report.rows if row.path == LOST]
    beside = bool(report.rows) and not report.global_rows
    # Dynamo skips a frame that breaks in a loop without a word, and compiles what it calls one by one.
    in_pieces = bool(late) and not report.global_rows
    if not lost and not in_pieces and not (where and beside):
        return []
    if lost:
        what = (
            f"{len(lost)} of {len(report.rows)} attentions reached the backend without a module path, so layers cannot "
            "be told apart"
        )
    else:
        what = "this graph holds attention, but none over frames" if beside else "this graph holds no attention"
    if late:
        names = ", ".join(shim.name for shim in late)
        return [f"{what}: {names} became known too late for this trace. {_AGAIN}"]
    if where is None:
        return [f"{what}. Compile the whole model, not single blocks"]
    return [
        f"{what}: the graph broke at {where}. Change that line so that it does not read a tensor's values. {_AGAIN}"
    ]


def full_cache() -> list[str]:
    """A note when the compile in progress takes the last place for its code: the next plan or shape will run eager.

    All plans of one class of models share these places, and Dynamo tells nobody but its log when it gives up.
    """
    tracer = getattr(symbolic_convert.tls, "current_tx", None)
    if tracer is None:  # called by hand
        return []
    code, limit = tracer.output.root_tx.f_code, torch._dynamo.config.recompile_limit
    if len(_versions(code)) + 1 < limit:
        return []
    return [
        f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno}) now has {limit} compiled versions, all that "
        "torch._dynamo.config.recompile_limit allows: the next plan or shape will run eager, without any plan. Raise "
        "the limit, call torch.compiler.reset() between plans, or compile with fullgraph=True to make that an error"
    ]


def _versions(code: CodeType) -> list[Any]:
    """Compiled versions that count towards the limit: under `isolate_recompiles` those of this torch.compile only."""
    region = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_isolate_recompiles_id", lambda: -1)()
    if region >= 0:
        return eval_frame._get_cache_entries_for_region(code, region)
    return eval_frame._debug_get_cache_entry_list(code)


_AGAIN = "vggt_compile.prepare(model) lists what could be made traceable; after it, torch._dynamo.reset() and run again"


def _ends_in_break(gm: GraphModule) -> bool:
    return bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False))


def _break_near(gm: GraphModule) -> str | None:
    """The latest recorded break in code that shares a source file with this graph."""
    own = _user_files(getattr(gm, "compile_subgraph_reason", None))
    for reason in reversed(graph_break_reasons):
        if own & _user_files(reason):
            frame = reason.user_stack[-1]
            return f"{frame.filename}:{frame.lineno} in {frame.name} ({str(reason.reason).splitlines()[0]})"
    return None


def _user_files(reason: GraphCompileReason | None) -> set[str]:
    stack = (reason.user_stack or []) if reason is not None else []
    return {frame.filename for frame in stack if not frame.filename.startswith(_NOT_USER)}


_NOT_USER = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
