"""What a plan asked of a graph and did not get, in words."""

from __future__ import annotations

from vggt_compile.plan import Plan
from vggt_compile.registry import families
from vggt_compile.report import Report, spans
from vggt_compile.site import SPECIAL_ONLY


def unmet(report: Report, plan: Plan) -> list[str]:
    """Layers that the plan names and that were not rewritten, each with its reason.

    Where the plan leaves nothing out, the model's own attention is what it asks for.
    """
    placed = plan.at(_depth(report))
    refused = [
        f"layer {row.layer} ({row.path}): {row.reason}"
        for row in report.global_rows
        if row.layer is not None and not row.axes and placed.policy(row.layer, report.family).leaves_out
    ]
    missing = missing_layers(report, plan)
    return [missing, *refused] if missing else refused


def missing_layers(report: Report, plan: Plan) -> str | None:
    """A line on the layers that the plan names and the model lacks, None where there are none.

    A share of the depth does not mean blocks of special tokens only that lie in it: their index names them, or nothing.
    """
    found = _found(report)
    shared = _closed(plan.at(_depth(report)), report.family) - _of_special_tokens(report)
    missing = (_closed(plan, report.family) | shared) - found
    if not missing:
        named = any(not policy.dense for _, policy in plan.rules_for(report.family))
        return "no global layers were found, of which the plan names a share" if named and not found else None
    noun = "layer" if len(missing) == 1 else "layers"
    return f"{noun} {spans(missing)}: no such layer (global layers found: {spans(found) or 'none'})"


def _found(report: Report) -> set[int]:
    return {row.layer for row in report.global_rows if row.layer is not None}


def _depth(report: Report) -> int:
    return 1 + max(_found(report), default=-1)


def _closed(plan: Plan, family: str) -> set[int]:
    """Layers that rules name one by one; shares name theirs once they are placed."""
    return {layer for layers, policy in plan.rules_for(family) if not policy.dense for layer in layers.closed()}


def _of_special_tokens(report: Report) -> set[int]:
    """Layers in the family's count whose blocks see special tokens only, as some of VGGT-Ω."""
    claims = [
        family.claim(row.path)
        for family in families()
        for row in report.rows
        if family.name == report.family and row.reason == SPECIAL_ONLY
    ]
    return {claim[1] for claim in claims if claim is not None and claim[1] is not None}
