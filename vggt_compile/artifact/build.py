"""Export: each span becomes a program, each program a library, and all of them one file with one set of weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggt_compile import recipes
from vggt_compile.artifact import marks
from vggt_compile.artifact.archive import CONSTANTS, ENTRY, digest_of_weights
from vggt_compile.artifact.assumed import runs
from vggt_compile.artifact.check import Expected, checked
from vggt_compile.artifact.draft import Draft, drafted
from vggt_compile.artifact.later import Later
from vggt_compile.artifact.library import Library, library
from vggt_compile.artifact.manifest import Manifest, made_here
from vggt_compile.artifact.program import Program, program
from vggt_compile.artifact.request import Range, Size, Span, read_precision, read_range, spans
from vggt_compile.errors import BadInput
from vggt_compile.garbage import few_collections
from vggt_compile.plan import Plan

FIRST = "model"
"""The entry with the most frame counts, under the name that torch loads by itself."""


@few_collections()
@marks.of_this_thread()
def export(
    model: nn.Module,
    images: Tensor,
    *,
    plan: object = None,
    frames: int | Range = (3, 1024),
    batch: int | Range | None = None,
    sizes: Sequence[Size] | None = None,
    precision: str = "fp32",
    path: str | os.PathLike[str] = "model.pt2",
    strict: bool = False,
    check: bool = True,
    inductor: Mapping[str, Any] | None = None,
    outline_heads: bool = False,
) -> Manifest:
    """Rewrite a model by a plan, compile it for this machine, and write it to one file.

    The file runs with `vggt_compile.load`, with `torch._inductor.aoti_load_package` where this package is not, and
    from C++. The model is left as it was.

    Args:
        model: a model of images `[B, S, 3, H, W]` in evaluation mode, on the device that the artifact is for.
        images: such images; only shape, dtype and device matter.
        plan: see `vggt_compile.recipes.resolve`.
        frames: the frame counts to serve, a number or (least, greatest).
        batch: the batches to serve; that of `images` unless given.
        sizes: pairs (height, width) in pixels to serve; that of `images` unless given.
        precision: "fp32", or "autocast" for bf16 where `torch.autocast` has it, or "bf16" for the same numbers from
            weights that are kept in bf16 where autocast would round them at each call.
        strict: raise NotRewritten where a layer that the plan names is not rewritten.
        check: run each compiled graph on a small scene, and compare with its program run without a compiler.
        inductor: settings of Inductor for this compile.
        outline_heads: compile what dense heads do alike once. Off, as neither exports nor calls were seen to gain.

    Returns:
        The manifest that is in the file.

    Raises:
        BadInput, PlanError, NotRewritten; ExportFailed where one graph cannot serve a range; WrongCode, one of these,
        where a compiled graph gives other numbers than its program.
    """
    chosen, device = recipes.resolve(plan), images.device
    wanted = _wanted(model, images, frames, batch, sizes)
    read_precision(precision)
    _check_path(Path(path))
    weights = Later(partial(digest_of_weights, model.state_dict()))
    with tempfile.TemporaryDirectory(prefix="vggt_compile-") as folder, drafted(Path(path)) as draft:
        trace = partial(program, model, plan=chosen, precision=precision, device=device, strict=strict)
        compiled = partial(library, folder=Path(folder), inductor=inductor or {}, heads=outline_heads)
        expect = partial(Expected, precision=precision, device=device) if check else None
        libraries = _libraries(wanted, trace, compiled, expect, partial(_kept, draft, device), chosen, weights)
        return draft.finish(
            Manifest(
                **made_here(device),
                precision=precision,
                plan_name=chosen.name,
                plan=chosen.to_json(),
                weights=weights.result(),
                entries=tuple(library.entry for library in libraries),
            )
        )


def _wanted(
    model: nn.Module, images: Tensor, frames: int | Range, batch: int | Range | None, sizes: Sequence[Size] | None
) -> list[Span]:
    if model.training:
        raise BadInput("the model is in training mode: call model.eval() before an export")
    if images.ndim != 5 or images.shape[2] != 3 or images.dtype != torch.float32:
        raise BadInput(f"images are float32 [B, S, 3, H, W], not {images.dtype} {tuple(images.shape)}")
    counts = read_range("frames", frames)
    items = read_range("batch", images.shape[0] if batch is None else batch)
    height, width = images.shape[-2:]
    found = [span for size in sizes or [(height, width)] for span in spans(counts, items, (size[0], size[1]))]
    return sorted(found, key=lambda span: span.frames[0] - span.frames[1])  # the widest first, which keeps its order


def _check_path(path: Path) -> None:
    if path.suffix != ".pt2":
        raise BadInput(f"the path of an artifact ends in .pt2, not {path}")
    if not path.parent.is_dir():
        raise BadInput(f"no such folder: {path.parent}")


def _libraries(
    wanted: list[Span],
    trace: Callable[[Span], Program],
    compiled: Callable[..., Library],
    expect: Callable[[Program], Expected] | None,
    kept: Callable[[Program, Library, Expected | None], Library],
    plan: Plan,
    *later: Later[Any],
) -> list[Library]:
    """Each span traced, compiled and kept; one that a graph, or its compile, cannot serve as a whole is in parts."""
    done: list[Library] = []
    waiting, known = list(wanted), dict[Span, Program]()
    while waiting:
        span = waiting.pop(0)
        made = known.pop(span, None) or trace(span)
        parts = _cut(span, made, plan)
        if len(parts) > 1:
            applied = parts[0]
            if applied.frames[0] < applied.frames[1]:  # a single count has a trace of its own, without symbols
                known[applied] = made.for_some(applied)
        else:
            parts = _right(made)  # as far as a rewrite asked about sizes; a compile asks more
        if len(parts) == 1:
            want = expect(made) if expect else None
            meanwhile = (*later, want) if want else later
            one = compiled(made, span.name if done else FIRST, first=done[:1], meanwhile=meanwhile)
            parts = _right(made)
        if len(parts) == 1:
            done.append(kept(made, one, want))
        else:
            waiting[:0] = parts
    return done


def _right(made: Program) -> list[Span]:
    """The span of a program in parts, of which its graph is right for every second one."""
    return [replace(made.span, frames=run) for run in runs(made.graph, made.span)]


def _cut(span: Span, made: Program, plan: Plan) -> list[Span]:
    """A compile sees the frame count and compares; a graph for many counts cannot, unless its operators do.

    The first part is what the plan is applied to, as it was in a graph for all counts.
    """
    applied = (row for row in made.report.global_rows if row.axes and not row.dense_below)
    tokens = {row.per_frame for row in applied if row.per_frame}
    fewest = -(-plan.min_tokens // max(tokens)) if tokens else 0
    low, high = span.frames
    if not low < fewest <= high:
        return [span]
    above, below = (spans(counts, span.batch, span.size) for counts in ((fewest, high), (low, fewest - 1)))
    return [*above, *below]


def _kept(draft: Draft, device: torch.device, made: Program, one: Library, want: Expected | None) -> Library:
    """A library that goes into the file, which is written while it is compared."""
    for name, content in _records(one):
        draft.add(name, content)
    with made.stages.stage("check"):
        seen = checked(made, one, want, device) if want else {}
    return replace(one, entry=replace(one.entry, check=seen, seconds=made.stages.seconds))


def _records(one: Library) -> Iterator[tuple[str, bytes | Path]]:
    for file in map(Path, one.files):
        yield ENTRY.format(one.entry.name) + file.name, file
    if one.entry.own_constants:
        content = BytesIO()
        torch.save({key: one.constants[key] for key in one.entry.own_constants}, content)
        yield CONSTANTS.format(one.entry.name), content.getvalue()
