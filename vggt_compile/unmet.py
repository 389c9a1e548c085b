"""What a plan asked of a graph and did not get, in words."""

from __future__ import annotations

from vggt_compile.plan import Plan
from vggt_compile.report import Report, spans


def unmet(report: Report, plan: Plan) -> list[str]:
    """Layers that the plan names and that were not rewritten, each with its reason."""
    refused = [
        f"layer {row.layer} ({row.path}): {row.reason}"
        for row in report.global_rows
        if row.layer is not None and not row.axes and not plan.policy(row.layer, report.family).dense
    ]
    missing = missing_layers(report, plan)
    return [missing, *refused] if missing else refused


def missing_layers(report: Report, plan: Plan) -> str | None:
    """A line on the layers that the plan names and the model lacks, None where there are none."""
    found = {row.layer for row in report.global_rows if row.layer is not None}
    rules = plan.rules_for(report.family)
    missing = {layer for layers, policy in rules if not policy.dense for layer in layers.closed()} - found
    if not missing:
        return None
    noun = "layer" if len(missing) == 1 else "layers"
    return f"{noun} {spans(missing)}: no such layer (global layers found: {spans(found) or 'none'})"
