"""Which candidates are not worth a run, by what probes of the dense model say of a layer.

Blocks that keep a share k of the key blocks: where 90 % of the mass needs more than 2·k of them, most of what queries
read is lost however well the blocks are chosen.

Other candidates have no such rule. What thinning and merging lose depends on the values, which statistics of weights do
not see. Nor does the mass that goes to other frames tell what `scope: frame` costs: in the small trained π³ it is 86 to
89 % in every layer, and most layers can do without it as long as the others keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vggt_compile.auto.runner import Runner
from vggt_compile.plan import Plan, Policy
from vggt_compile.probes import Probe, collect_probes

PROBE = ({"measure": "sparsity", "rows": 512},)
SPREAD = 2.0
"""How many times more blocks than are kept may hold 90 % of the mass."""


def hopeless(runner: Runner, images: Tensor, policies: Mapping[str, Policy]) -> dict[int, dict[str, str]]:
    """Layer → candidate → why it is not tried."""
    kept = {name: share for name, policy in policies.items() if (share := kept_blocks(policy)) is not None}
    if not kept:
        return {}
    with collect_probes() as probes:
        runner(Plan.read({"probe": list(PROBE)}), images)
    return {layer: reasons(found, kept) for layer, found in probes.layers.items()}


def reasons(found: Mapping[str, Probe], kept: Mapping[str, float]) -> dict[str, str]:
    """By the statistics of one layer; those that were not measured rule nothing out."""
    needed = found.get("blocks_90")
    if needed is None:
        return {}
    why = f"90 % of the mass needs {needed.value:.0%} of the blocks"
    return {name: why for name, share in kept.items() if needed.value > SPREAD * share}


def kept_blocks(policy: Policy) -> float | None:
    """The share of key blocks that a policy reads, None where it is no fixed one."""
    if policy.blocks is None or policy.blocks.method != "predict":
        return None
    given = dict(policy.blocks.parameters)
    return given["keep"] if given["cdf"] == 0 else None
