"""Queries and keys of every global attention while a model runs, found as a plan finds them: by graph, not by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from vggt_compile.dry_run import fresh_call
from vggt_compile.errors import BadInput
from vggt_compile.families import trace
from vggt_compile.rewrite import attention_sites
from vggt_compile.site import Site

See = Callable[[Site, Tensor, Tensor], None]


def watch(model: nn.Module, *inputs: Any, see: See) -> Any:
    """Run `model(*inputs)`, dense, and call `see(site, q, k)` at each global attention that a plan could act on.

    The model is traced as for torch.compile and run node by node: nothing is compiled, and no more is kept than in the
    model itself. q and k are [B, H, frames · tokens, D] as the attention gets them, after norms and positions.

    Returns:
        What the model returns.

    Raises:
        BadInput: none was met. `explain` says why.
    """
    met: list[Site] = []

    def backend(gm: GraphModule, _: Any) -> Callable[..., Any]:
        sites = [site for site in attention_sites(gm) if site.scope == "global" and site.refusal is None]
        met.extend(sites)
        return _Watched(gm, sites, see).run

    trace.arm()
    with torch.no_grad():
        outputs = torch.compile(fresh_call(), backend=backend, dynamic=False)(model, *inputs)
    if not met:
        raise BadInput("no attention over frames was met; print(vggt_compile.explain(model, images)) says why")
    return outputs


class _Watched(Interpreter):
    """A graph that runs node by node and shows the operands of some attentions before they are computed."""

    def __init__(self, gm: GraphModule, sites: Sequence[Site], see: See) -> None:
        # Of a spelled-out attention the queries may be gone once its last product comes.
        super().__init__(gm, garbage_collect_values=not any(site.call.spelled_out for site in sites))
        self.sites = {site.call.node: site for site in sites}
        self.see = see

    def run_node(self, n: Node) -> Any:
        if n in self.sites:
            site = self.sites[n]
            self.see(site, self.env[site.call.q], self.env[site.call.k])
        return super().run_node(n)
