"""The Dynamo entry point: options → Plan → rewrite → Inductor."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch._dynamo
from torch._logging import trace_structured
from torch.fx import GraphModule

from vggt_compile import breaks, caches, densities, probes, recipes
from vggt_compile.attentions import attentions
from vggt_compile.errors import PlanError, UnknownName
from vggt_compile.families import trace
from vggt_compile.garbage import few_collections
from vggt_compile.graph.launchers import launchers_side_by_side
from vggt_compile.graph.outline import outline_blocks
from vggt_compile.graph.scalar_code import scalar_beside_a_gpu
from vggt_compile.graph.schemas import asked_once
from vggt_compile.graph.turns import numbered_turns
from vggt_compile.handouts import Receiver, handing_out
from vggt_compile.ops.hopper import compile_beside
from vggt_compile.plan import Plan
from vggt_compile.report import Region, Report, publish
from vggt_compile.rewrite import rewrite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What `torch.compile(options=…)` may hold.

    Attributes:
        plan: a recipe's name, the path of a JSON file, a dictionary, or a Plan.
        strict: raise where a layer that the plan names was not rewritten.
        densities: runs hand out how much of its attentions over blocks the model computes, for `collect_densities`.
        outline: compile equal blocks of the model once, for a shorter first call.
        outline_heads: what dense heads do alike too; as `outline` unless given.
        inductor: handed on to Inductor as configuration for this compile.
    """

    plan: Plan
    strict: bool = False
    densities: bool = False
    outline: bool = True
    outline_heads: bool = True
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> Options:
        given = dict(given or {})
        for key in given:
            if key not in (known := [field.name for field in fields(cls)]):
                raise UnknownName("option", key, known)
        given.setdefault("outline_heads", given.get("outline", cls.outline))
        switches = {name: given.get(name, getattr(cls, name)) for name in cls._switches()}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise PlanError(f"{name} is True or False, not {value!r}")
        if switches["outline_heads"] and not switches["outline"]:
            raise PlanError("outline_heads goes with outline: leave outline on, or outline_heads off")
        inductor = given.get("inductor", {})
        if not isinstance(inductor, Mapping):
            raise PlanError(f"inductor is a dictionary of Inductor settings, not {inductor!r}")
        settings = torch._inductor.config.get_config_copy()
        inductor = {str(key).replace("-", "_"): value for key, value in inductor.items()}
        for key in inductor:
            if key not in settings:
                raise UnknownName("Inductor setting", key, settings)
        return cls(recipes.resolve(given.get("plan")), **switches, inductor=inductor)

    @classmethod
    def _switches(cls) -> list[str]:
        return [field.name for field in fields(cls) if isinstance(field.default, bool)]


@few_collections()
def vggt_sparse(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend for torch.compile: rewrite the global attentions by a plan, then compile with Inductor.

    Args:
        gm, example_inputs: what Dynamo hands over.
        options: see `Options`.
        mode: of torch.compile, as for Inductor.

    Raises:
        PlanError: options that cannot be meant; Dynamo wraps it in BackendCompilerFailed.
        NotRewritten: under `strict`.
    """
    from torch._inductor.compile_fx import compile_fx

    chosen = Options.read(options)
    with torch._inductor.config.patch(dict(chosen.inductor)):  # `disabled_passes` may be among them
        report = reported_rewrite(gm, chosen)
    compile_beside(attentions(gm))
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **chosen.inductor}
    with caches.told(), numbered_turns(), asked_once(), scalar_beside_a_gpu(example_inputs), launchers_side_by_side():
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
        return handing_out(compiled, _receivers(report))


def vggt_sparse_eager(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """`vggt_sparse` without Inductor: the rewritten graph runs node by node, as the model itself does.

    For checking what a plan does, where compiling would take longer than running. Inductor's settings and `mode` have
    no effect, except that `disabled_passes` is heeded. Equal blocks stay as they are unless `outline` is given.
    """
    del example_inputs, mode
    chosen = Options.read({"outline": False, **(options or {})})
    with torch._inductor.config.patch(dict(chosen.inductor)):
        report = reported_rewrite(gm, chosen)
    return handing_out(gm.forward, _receivers(report))


def _receivers(report: Report) -> list[Receiver]:
    """For what the driver appends to a graph's outputs, in its order."""
    return [*densities.receivers(report.measured), *probes.receivers(report.observed)]


def reported_rewrite(gm: GraphModule, options: Options) -> Report:
    """Rewrite one graph of Dynamo's; log, trace and publish its report."""
    _listen()
    late = trace.arm()
    _emit("vggt_compile_graph_before", "string", lambda: gm.print_readable(print_output=False))
    strict = options.strict and not breaks.is_fragment(gm)
    report = rewrite(gm, options.plan, strict=strict, densities=options.densities, probes=True)
    report.notes += breaks.describe(gm, report, late) + breaks.full_cache()
    if options.outline:
        done = outline_blocks(gm, heads=options.outline_heads)
        report.regions.append(Region("outline_blocks", done.count, done.did, done.left))
    _emit("vggt_compile_graph_after", "string", lambda: gm.print_readable(print_output=False))
    _emit("vggt_compile_plan", "json", lambda: json.dumps(options.plan.to_json()))
    _emit("vggt_compile_report", "json", lambda: json.dumps(report.to_dict()))
    if report.rows:
        log.info("%s", report)
    for note in report.notes:
        warnings.warn(f"vggt_compile: {note}", stacklevel=2)
    publish(report)
    return report


def _emit(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """An artifact of TORCH_TRACE, so of tlparse; written out only where somebody traces."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def _arm_what_was_imported_since(_: object) -> None:
    trace.arm()


def _listen() -> None:
    """Arm new classes at every compile start. `torch._dynamo.reset()` forgets callbacks, so each compile asks again."""
    handler = torch._dynamo.callback_handler
    if _arm_what_was_imported_since not in handler.start_callbacks:
        handler.register_start_callback(_arm_what_was_imported_since)


trace.arm()
_listen()
