"""A program becomes a library: machine code, and the tensors that it reads beside its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from vggt_compile import caches
from vggt_compile.artifact import blocks, bodies, convolutions, early, kept, kernels, listed, loops, scopes, unchanged
from vggt_compile.artifact.behind import Weights
from vggt_compile.artifact.headers import Headers
from vggt_compile.artifact.later import Later
from vggt_compile.artifact.manifest import Entry
from vggt_compile.artifact.program import Program
from vggt_compile.graph.code import written_when_run
from vggt_compile.graph.launchers import launchers_side_by_side
from vggt_compile.graph.outline import outline_blocks
from vggt_compile.graph.scalar_code import scalar_beside_a_gpu
from vggt_compile.report import Region

AT_ONCE = "-pipe --param ggc-min-expand=1000 --param ggc-min-heapsize=2000000"
"""For g++: the assembler runs beside it, and nothing is looked through for garbage. 7.0 s and not 8.0 for an H200."""

PLAIN = {
    "aot_inductor.compile_wrapper_opt_level": ("O1", f"O0 {AT_ONCE}"),
    "aot_inductor.enable_line_tables": (True, False),
}
"""What Inductor has g++ do to the C++ that calls kernels, 13,000 lines for VGGT on a CPU, and what we have. Without
optimisation it takes a third of the time, and calls take as long."""


@dataclass(frozen=True)
class Library:
    """A compiled program: its files, and the tensors that it reads beside its input, which may be in the files."""

    entry: Entry
    files: list[str]
    constants: Mapping[str, Tensor]
    holds_weights: bool

    @property
    def path(self) -> Path:
        """Of the machine code."""
        return _machine_code(self.files)


def library(
    made: Program,
    name: str,
    folder: Path,
    first: list[Library],
    inductor: Mapping[str, Any],
    heads: bool = False,
    meanwhile: Sequence[Later[Any]] = (),
) -> Library:
    """Compile a program. The first one holds its weights, others are given them when they are loaded.

    Args:
        meanwhile: begun once code is written, to go on while g++ works.
    """
    settings = {
        **loops.SETTINGS,
        **plain_calls(),
        **inductor,
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(folder / name),
        "aot_inductor.package_constants_in_so": not first,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",  # adds a list of them to the files
        "aot_inductor.metadata": {"vggt_compile.span": str(made.span), "vggt_compile.plan": made.report.plan},
    }
    gm = outlined(made, inductor, heads)
    with made.stages.stage("compile"):
        found = _compiled(gm, made.images, settings, meanwhile)
    files = [file for file in found if isinstance(file, str) and file]
    constants = {key: tensor for file in found if not isinstance(file, str) for key, (tensor, _) in file.items()}
    known = first[0].constants if first else constants
    own = tuple(sorted(key for key, tensor in constants.items() if not serves(known.get(key), tensor)))
    return Library(Entry(name, made.span, own, made.report.to_dict()), files, constants, not first)


def plain_calls() -> dict[str, Any]:
    """Settings that have g++ take calls of kernels as they are written, where nobody has changed them."""
    now = torch._inductor.config.get_config_copy()
    return {name: ours for name, (usual, ours) in PLAIN.items() if now.get(name) == usual}


def outlined(made: Program, inductor: Mapping[str, Any], heads: bool = False) -> GraphModule:
    """The graph of a program, with equal blocks as calls of one, and parts of dense heads; its report says how many."""
    with made.stages.stage("find equal blocks"), torch._inductor.config.patch(dict(inductor)), written_when_run():
        gm = _copied(made.graph)
        done = outline_blocks(gm, heads=heads)
    made.report.regions.append(Region("outline_blocks", done.count, done.did, done.left))
    return gm


def _copied(gm: GraphModule) -> GraphModule:
    """The same operations in a graph of its own, which a compile may change; weights are shared."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.set_codegen(gm.graph._codegen)
    return GraphModule(gm, graph)


def _compiled(gm: GraphModule, images: Tensor, settings: dict[str, Any], meanwhile: Sequence[Later[Any]]) -> list[Any]:
    with ExitStack() as stack:
        stack.enter_context(caches.told())
        stack.enter_context(kernels.called_as_functions(gm))
        stack.enter_context(unchanged.read_off())
        stack.enter_context(kept.values_kept())
        stack.enter_context(bodies.copied())
        stack.enter_context(convolutions.of_any_number())
        stack.enter_context(loops.written_whole())
        stack.enter_context(scopes.apart())
        stack.enter_context(listed.in_tables())
        stack.enter_context(blocks.called(gm))
        stack.enter_context(scalar_beside_a_gpu([images]))
        stack.enter_context(launchers_side_by_side())
        headers = stack.enter_context(Headers(gm, images.device.type, settings))
        weights = stack.enter_context(Weights())
        stack.enter_context(early.begun_early(headers, weights, meanwhile))
        found = torch._inductor.aot_compile(gm, (images,), options=settings)
        assert isinstance(found, list)
        weights.put_behind(_machine_code(found))
    return found


def _machine_code(files: Sequence[Any]) -> Path:
    return Path(next(file for file in files if isinstance(file, str) and file.endswith(".so")))


def serves(tensor: Tensor | None, other: Tensor) -> bool:
    """Whether code for the second can be given the first, which may lie in another place: strides are in the code."""
    if tensor is None or tensor.dtype != other.dtype or tensor.stride() != other.stride():
        return False
    return torch.equal(tensor, other)
