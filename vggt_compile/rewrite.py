"""The driver: find the attention sites, run the plan's methods in axis order, lower, verify, report.

It is the only place that changes a graph. Passes see a site and an attention state and answer with a new state or a
Skip; what they add to the graph before a Skip is taken back.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from vggt_compile import registry
from vggt_compile.errors import NotRewritten
from vggt_compile.graph import dialect
from vggt_compile.graph.edit import Editor, verify
from vggt_compile.graph.layout import find_sites
from vggt_compile.graph.switches import DISABLED, disabled_passes
from vggt_compile.graph.symbols import Symbols, hint, size_of, times
from vggt_compile.observe import Observers
from vggt_compile.ops import attention, density  # noqa: F401  # what a state is lowered to where PyTorch's cannot do it
from vggt_compile.passes import lift_attention
from vggt_compile.plan import Plan, Policy
from vggt_compile.report import Region, Report, Row, spans
from vggt_compile.site import LOST, AttentionCall, AttentionState, BlockLists, Lowered, Outcome, Site, Size, Skip

log = logging.getLogger(__name__)


def rewrite(
    gm: GraphModule,
    plan: Plan,
    *,
    strict: bool = False,
    guard: bool = True,
    densities: bool = False,
    portable: bool = False,
    probes: bool = False,
) -> Report:
    """Apply a plan to a traced graph, in place.

    Args:
        gm: as Dynamo hands it to a backend, or `exported.module()` of torch.export.
        strict: raise NotRewritten where a layer that the plan names is not rewritten.
        guard: whether `min_tokens` may add a guard; export cannot, and decides by what is known for all sizes.
        densities: append outputs to the graph, the density [B, H] of each row of the report that is `measured`.
        portable: use no operator that needs this package where the graph runs, as an artifact must.
        probes: append what the plan measures, one output for each entry of the report's `observed`.

    Returns:
        The report. With a dense plan the graph is left as it is, to the node, but for what is appended.
    """
    report = Report(plan=plan.name)
    for part in dialect.parts(gm):
        whole = part.gm is gm
        _GraphRewrite(part, plan, guard, report, densities and whole, probes and whole, portable).run()
    if densities and any(row.implementation == "block-sparse" and not row.measured for row in report.rows):
        report.notes.append("densities of attentions in sub-graphs are not handed out")
    plan = plan.at(1 + max((row.layer for row in report.global_rows if row.layer is not None), default=-1))
    if strict:
        failures = unmet(report, plan)
        if failures:
            raise NotRewritten(failures)
    elif report.global_rows and (missing := missing_layers(report, plan)):
        report.notes.append(f"the plan names {missing}")
    return report


def attention_sites(gm: GraphModule) -> list[Site]:
    """The attentions of a traced graph as a plan would meet them, in execution order; the graph is left as it is.

    Those that nobody can read as one call, and those in sub-graphs, are not among them.
    """
    return find_sites(gm, _find_calls(gm)[0], registry.families(), Symbols(gm.graph))


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


class _GraphRewrite:
    """One graph on its way through the driver."""

    def __init__(
        self,
        part: dialect.Part,
        plan: Plan,
        guard: bool,
        report: Report,
        densities: bool,
        probes: bool,
        portable: bool,
    ) -> None:
        self.gm, self.calls, self.plan, self.guard, self.report = part.gm, part.calls, plan, guard, report
        self.portable = portable
        self.symbols = Symbols(self.gm.graph)
        self.edit = Editor(part, self.symbols)
        self.densities: list[Node] | None = [] if densities else None
        self.lowered: list[Lowered] = []
        self.observers = Observers(plan.probe if probes else (), self.edit, self.symbols, report)

    def run(self) -> None:
        if not self.plan.dense:
            self._expand_functional()
        attentions, refused = _find_calls(self.gm)
        sites = find_sites(self.gm, attentions, registry.families(), self.symbols)
        known = [site.family for site in sites if site.family != "generic"]
        self.report.family = known[0] if known else self.report.family
        self.report.dynamic |= any(not isinstance(site.tokens, int) for site in sites)
        self.plan = self.plan.at(1 + max((site.layer for site in sites if site.layer is not None), default=-1))
        for site in sites:
            self.observers.around(site)
            self.report.rows.append(self._apply(site))
        self.report.rows += refused
        self.observers.note_skipped()
        if appended := [*(self.densities or ()), *self.observers.nodes]:
            dialect.append_outputs(self.gm.graph, appended)
        if self.lowered:
            self._act_on_regions()
        if appended or not self.plan.dense:
            self.gm.graph.lint()
            self.gm.recompile()

    def _act_on_regions(self) -> None:
        off = disabled_passes()
        for entry in registry.regions():
            if off & entry.aliases:
                done = Outcome(left={"": DISABLED})
            else:
                done = entry.run(self.gm.graph, self.lowered, self.edit)
            log.debug("%s: %s", entry.name, done)
            if done.count or done.left:
                self.report.regions.append(Region(entry.name, done.count, done.did, done.left))

    def _expand_functional(self) -> None:
        for node in list(self.gm.graph.nodes):
            given = dialect.multi_head_attention(node)
            if given is None:
                continue
            with self.edit.before(node):
                out = lift_attention.expand(node, given, self.edit)
                if isinstance(out, Skip):
                    self.edit.undo()
                    self.report.notes.append(
                        f"multi-head attention {dialect.module_path(node)} left alone: {out.reason}"
                    )
                    continue
            for user in list(node.users):
                if user.args[1:] == (0,):
                    user.replace_all_uses_with(out)
                self.gm.graph.erase_node(user)
            self.gm.graph.erase_node(node)

    def _apply(self, site: Site) -> Row:
        if site.scope == "global":
            self.edit.next_layer()
        before = times(site.batch, site.tokens, site.tokens)
        state = AttentionState(site.call.q, site.call.k, site.call.v, before)
        policy, reason = self._policy(site)
        if self.plan.dense or (policy.dense and not (site.call.spelled_out and site.refusal is None)):
            return self._row(site, state, before, reason)
        with self.edit.before(site.call.node):
            outcome = self._run_methods(site, state, policy)
            if isinstance(outcome, Skip):
                self.edit.undo()
                return self._row(site, state, before, outcome.reason)
            self._lower(site, outcome)
        self.lowered.append(Lowered(site, outcome))
        return self._row(site, outcome, before, reason, lifted=site.call.spelled_out)

    def _policy(self, site: Site) -> tuple[Policy, str | None]:
        """What the plan wants of a site, and why that is nothing where it is nothing."""
        if site.refusal is not None:
            return Policy(), site.refusal
        if site.scope != "global" or site.layer is None:
            return Policy(), {"frame": "inside frames already"}.get(site.scope, "not attention over frames")
        policy = self.plan.policy(site.layer, site.family)
        if policy.dense:
            return policy, "the plan leaves this layer dense"
        if self.calls > 1:
            return Policy(), f"its graph is shared by {self.calls} calls, so layers cannot be told apart"
        unknown = self.symbols.unknown(site.tokens)
        if unknown:
            return Policy(), f"no input of its graph gives the size {', '.join(sorted(unknown))}"
        if self._below_threshold(site.tokens):
            return Policy(), f"fewer tokens than min_tokens={self.plan.min_tokens}"
        return _without_disabled(policy)

    def _below_threshold(self, tokens: Size) -> bool:
        few = self.symbols.symint(tokens) < self.plan.min_tokens
        return bool(few) if self.guard else statically_known_true(few)

    def _run_methods(self, site: Site, state: AttentionState, policy: Policy) -> AttentionState | Skip:
        for axis, setting in policy.settings():
            run = registry.find_method(axis, setting.method).run
            outcome = run(site, state, self.edit, **dict(setting.parameters))
            if isinstance(outcome, Skip):
                log.debug("%s: %s refused: %s", site.path, axis, outcome.reason)
                return outcome
            log.debug("%s: %s applied: %s", site.path, axis, setting.to_json())
            state = outcome
        return state

    def _lower(self, site: Site, state: AttentionState) -> None:
        """Replace the site by the cheapest attention that computes the state."""
        out = self._attention(site, state)
        for restore in reversed(state.restores):
            out = restore(self.edit, out)
        verify(site.path, site.call.node, out)
        site.call.node.replace_all_uses_with(out)
        self.gm.graph.erase_node(site.call.node)

    def _attention(self, site: Site, state: AttentionState) -> Node:
        """Under autocast q and k may be wider than the attention's output; ask for what the model computes in."""
        q, k, v = (self.edit.cast(x, site.dtype) for x in (state.q, state.k, state.v))
        scale = site.call.scale
        given = self._beyond_sdpa(site, state)
        function = torch.ops.vggt_compile.attention.default if given else F.scaled_dot_product_attention
        out = self.edit.call(function, q, k, v, **given, scale=scale)
        if state.blocks is not None:
            self._measure(site, state, state.blocks)
        if state.dense_q is None:
            return out
        dense = replace(state, q=state.dense_q, k=k, v=v, dense_q=None, blocks=None, own=None)
        return self.edit.call(torch.cat, (self._attention(site, dense), out), 2)

    def _measure(self, site: Site, state: AttentionState, lists: BlockLists) -> None:
        """Note the density of an attention as an output of the graph, where those are asked for."""
        if self.densities is None:
            return
        given = (self._length(state.q), self._length(state.k), self.edit.size(lists.always))
        beside = (
            0 if state.dense_q is None else self._length(state.dense_q),
            0 if state.own is None else self.edit.size(state.own.reads),
            self.edit.size(site.tokens),
        )
        blocks = (lists.q_block, lists.k_block)
        share = torch.ops.vggt_compile.density.default
        self.densities.append(self.edit.call(share, lists.index, lists.count, *given, *blocks, *beside))

    def _length(self, x: Node) -> int | Node:
        """Tokens of [B, H, N, D] as an argument."""
        return self.edit.size(size_of(dialect.value(x).shape[2]))

    def _beyond_sdpa(self, site: Site, state: AttentionState) -> dict[str, Any]:
        """Arguments of our own operator for what PyTorch's attention cannot do, none where it can do all."""
        given: dict[str, Any] = {}
        if state.blocks is not None:
            lists, always = state.blocks, self.edit.size(state.blocks.always)
            given |= {"block_index": lists.index, "block_count": lists.count, "always": always}
            given |= {"q_block": lists.q_block, "k_block": lists.k_block}
        if state.own is not None:
            own_k, own_v = (self.edit.cast(x, site.dtype) for x in (state.own.k, state.own.v))
            given |= {"own_k": own_k, "own_v": own_v, "own": state.own.read}
        if state.key_log_weight is not None:
            given |= {"key_log_weight": state.key_log_weight}
        return given | {"portable": True} if given and self.portable else given

    def _row(self, site: Site, state: AttentionState, before: Size, reason: str | None, *, lifted: bool = False) -> Row:
        def number(size: Size) -> int:
            return hint(size, self.symbols)

        layout, per_pair = site.layout, 4 * number(site.heads) * number(site.head_dim)
        return Row(
            path=site.path,
            layer=site.layer,
            scope=site.scope,
            batch=number(site.batch),
            frames=None if layout is None else number(layout.frames),
            per_frame=None if layout is None else number(layout.per_frame),
            special=None if layout is None or layout.special is None else number(layout.special),
            heads=number(site.heads),
            head_dim=number(site.head_dim),
            dtype=str(site.dtype).removeprefix("torch."),
            axes=state.axes,
            implementation="spelled out" if site.call.spelled_out and not lifted else _implementation(state),
            flops_before=per_pair * number(before),
            flops_after=per_pair * number(state.pairs),
            reason=reason,
            at_least=state.at_least,
            measured=state.blocks is not None and self.densities is not None,
            keys=number(state.pairs) / queries if (queries := self._queries(state)) else None,
        )

    def _queries(self, state: AttentionState) -> int:
        """How many, over all batch items; 0 where inputs do not tell it."""
        shapes = [dialect.value(x).shape for x in (state.q, state.dense_q) if x is not None]
        return sum(hint(times(size_of(shape[0]), size_of(shape[2])), self.symbols) for shape in shapes)


def _find_calls(gm: GraphModule) -> tuple[list[AttentionCall], list[Row]]:
    calls: list[AttentionCall] = []
    refused: list[Row] = []
    for node in gm.graph.nodes:
        call = dialect.attention_call(node) or lift_attention.lift(node)
        if isinstance(call, Skip):
            refused.append(_refused_row(node, call.reason))
        elif call is not None:
            calls.append(call)
    return calls, refused


def _implementation(state: AttentionState) -> str:
    if state.blocks is not None:
        return "block-sparse"
    return "sdpa" if state.own is None and state.key_log_weight is None else "weighted"


def _without_disabled(policy: Policy) -> tuple[Policy, str | None]:
    """The policy without the methods that Inductor's user switched off, and a reason where that took something away."""
    names = disabled_passes()
    off = [axis for axis, setting in policy.settings() if names & registry.find_method(axis, setting.method).aliases]
    if not off:
        return policy, None
    reason = f"{', '.join(off)} {DISABLED}"
    return replace(policy, **dict.fromkeys(off)), reason


def _refused_row(node: Node, reason: str) -> Row:
    seen = dialect.value(node)
    path = dialect.module_path(node) or LOST
    dtype = str(seen.dtype).removeprefix("torch.")
    return Row(path, None, "other", 0, None, None, None, 0, 0, dtype, {}, "spelled out", 0, 0, reason)
