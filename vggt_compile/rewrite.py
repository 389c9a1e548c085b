"""The driver: find the attention sites, run the plan's methods in axis order, lower, verify, report.

With its last step, `lower`, it is the only place that changes a graph. Passes see a site and an attention state and
answer with a new state or a Skip; what they add to the graph before a Skip is taken back.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import statically_known_true

from vggt_compile import registry
from vggt_compile.errors import NotRewritten
from vggt_compile.graph import dialect
from vggt_compile.graph.edit import Editor
from vggt_compile.graph.enclosing import Part, parts
from vggt_compile.graph.layout import find_sites
from vggt_compile.graph.rotary import expand_rotations
from vggt_compile.graph.switches import DISABLED, disabled_passes
from vggt_compile.graph.symbols import Symbols, times
from vggt_compile.lower import Lowering
from vggt_compile.observe import Observers
from vggt_compile.passes import lift_attention
from vggt_compile.plan import Plan, Policy
from vggt_compile.provider import provided
from vggt_compile.report import Region, Report, Row
from vggt_compile.rows import refused_row, row_of
from vggt_compile.site import AttentionCall, AttentionState, Lowered, Outcome, Site, Size, Skip
from vggt_compile.unmet import missing_layers, unmet

log = logging.getLogger(__name__)


def rewrite(
    gm: GraphModule,
    plan: Plan,
    *,
    strict: bool = False,
    guard: bool = True,
    densities: bool = False,
    probes: bool = False,
) -> Report:
    """Apply a plan to a traced graph, in place.

    Args:
        gm: as Dynamo hands it to a backend, or `exported.module()` of torch.export.
        strict: raise NotRewritten where a layer that the plan names is not rewritten.
        guard: whether `min_tokens` may add a guard. An export cannot: where sizes are on either side of it the plan is
            applied, and what stays dense for few tokens as the graph runs says so in its row of the report.
        densities: append outputs to the graph, the density [B, H] of each row of the report that is `measured`.
        probes: append what the plan measures, one output for each entry of the report's `observed`.

    Returns:
        The report. With a dense plan the graph is left as it is, to the node, but for what is appended.
    """
    report = Report(plan=plan.name)
    for part in parts(gm):
        whole = part.gm is gm
        _GraphRewrite(part, plan, guard, report, densities and whole, probes and whole).run()
    if densities and any(row.implementation == "block-sparse" and not row.measured for row in report.rows):
        report.notes.append("densities of attentions in sub-graphs are not handed out")
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


class _GraphRewrite:
    """One graph on its way through the driver."""

    def __init__(self, part: Part, plan: Plan, guard: bool, report: Report, densities: bool, probes: bool) -> None:
        self.gm, self.calls, self.plan, self.guard, self.report = part.gm, part.calls, plan, guard, report
        self.symbols = Symbols(self.gm.graph)
        self.edit = Editor(part, self.symbols)
        self.lowering = Lowering(self.edit, densities=densities)
        self.lowered: list[Lowered] = []
        self.observers = Observers(plan.probe if probes else (), self.edit, self.symbols, report)

    def run(self) -> None:
        if not self.plan.dense:
            self._expand_functional()
            expand_rotations(self.gm.graph, self.edit)
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
        if appended := [*(self.lowering.densities or ()), *self.observers.nodes]:
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
            return row_of(site, state, before, reason, self.symbols)
        with self.edit.before(site.call.node):
            outcome = self._run_methods(replace(site, dense_below=self._dense_below(site.tokens)), state, policy)
            if isinstance(outcome, Skip):
                self.edit.undo()
                return row_of(site, state, before, outcome.reason, self.symbols)
            outcome = provided(site, outcome, self.edit)
            self.lowering.lower(site, outcome)
        self.lowered.append(Lowered(site, outcome))
        measured = outcome.blocks is not None and self.lowering.densities is not None
        return row_of(site, outcome, before, reason, self.symbols, lifted=site.call.spelled_out, measured=measured)

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

    def _dense_below(self, tokens: Size) -> int:
        """`min_tokens` where a graph without guards serves fewer tokens as well, else 0."""
        enough = statically_known_true(self.symbols.symint(tokens) >= self.plan.min_tokens)
        return 0 if self.guard or enough else self.plan.min_tokens

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


def _find_calls(gm: GraphModule) -> tuple[list[AttentionCall], list[Row]]:
    calls: list[AttentionCall] = []
    refused: list[Row] = []
    for node in gm.graph.nodes:
        call = dialect.attention_call(node) or lift_attention.lift(node)
        if isinstance(call, Skip):
            refused.append(refused_row(node, call.reason))
        elif call is not None:
            calls.append(call)
    return calls, refused


def _without_disabled(policy: Policy) -> tuple[Policy, str | None]:
    """The policy without the methods that Inductor's user switched off, and a reason where that took something away."""
    names = disabled_passes()
    off = [axis for axis, setting in policy.settings() if names & registry.find_method(axis, setting.method).aliases]
    if not off:
        return policy, None
    reason = f"{', '.join(off)} {DISABLED}"
    return replace(policy, **dict.fromkeys(off)), reason
