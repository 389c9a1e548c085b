"""Export: each span becomes a program, each program a library, and all of them one file with one set of weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.pt2_archive import PT2ArchiveWriter

from vggt_compile import recipes
from vggt_compile.artifact.archive import CONSTANTS, ENTRY, MANIFEST, digest, digest_of_weights
from vggt_compile.artifact.manifest import Entry, Manifest, made_here
from vggt_compile.artifact.program import Program, program
from vggt_compile.artifact.request import Range, Size, Span, read_precision, read_range, spans
from vggt_compile.errors import BadInput
from vggt_compile.plan import Plan
from vggt_compile.sources import source_hash

FIRST = "model"
"""The entry with the most frame counts, under the name that torch loads by itself."""


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
    inductor: Mapping[str, Any] | None = None,
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
        inductor: settings of Inductor for this compile.

    Returns:
        The manifest that is in the file.

    Raises:
        BadInput, PlanError, NotRewritten, and ExportFailed where one graph cannot serve a range.
    """
    chosen, device = recipes.resolve(plan), images.device
    wanted = _wanted(model, images, frames, batch, sizes)
    read_precision(precision)
    _check_path(Path(path))
    with tempfile.TemporaryDirectory(prefix="vggt_compile-") as folder:
        libraries: list[Library] = []
        for made in _programs(model, wanted, chosen, precision, device, strict):
            name = FIRST if not libraries else made.span.name
            libraries.append(_library(made, name, Path(folder), libraries[:1], dict(inductor or {})))
        manifest = Manifest(
            **made_here(device),
            precision=precision,
            plan_name=chosen.name,
            plan=chosen.to_json(),
            weights=digest_of_weights(model.state_dict()),
            entries=tuple(library.entry for library in libraries),
        )
        return _write(libraries, manifest, Path(path))


@dataclass(frozen=True)
class Library:
    """A compiled program: its files, and the tensors that it reads beside its input."""

    entry: Entry
    files: list[str]
    constants: Mapping[str, Tensor]


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


def _programs(
    model: nn.Module, wanted: list[Span], plan: Plan, precision: str, device: torch.device, strict: bool
) -> Iterator[Program]:
    """One for each span, which is cut where `min_tokens` of the plan divides its frame counts."""
    waiting = list(wanted)
    while waiting:
        span = waiting.pop(0)
        made = program(model, span, plan, precision, device, strict)
        parts = _cut(span, made, plan)
        if len(parts) == 1:
            yield made
        waiting[:0] = parts[1:] if len(parts) == 1 else parts


def _cut(span: Span, made: Program, plan: Plan) -> list[Span]:
    """A compile sees the frame count and compares; a graph for many counts cannot."""
    tokens = {row.per_frame for row in made.report.global_rows if row.per_frame}
    fewest = -(-plan.min_tokens // max(tokens)) if tokens and not plan.dense else 0
    low, high = span.frames
    if not low < fewest <= high:
        return [span]
    above, below = (spans(counts, span.batch, span.size) for counts in ((fewest, high), (low, fewest - 1)))
    return [*above, *below]


def _library(made: Program, name: str, folder: Path, first: list[Library], inductor: dict[str, Any]) -> Library:
    """Compile a program. The first one holds its weights, others are given them when they are loaded."""
    settings = {
        **inductor,
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(folder / name),
        "aot_inductor.package_constants_in_so": not first,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",  # adds a list of them to the files
        "aot_inductor.metadata": {"vggt_compile.span": str(made.span), "vggt_compile.plan": made.report.plan},
    }
    exported = made.exported
    assert exported.example_inputs is not None
    args, kwargs = exported.example_inputs
    tag = f"{torch.compiler.config.cache_key_tag}vggt_compile-{source_hash()}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        found = torch._inductor.aot_compile(exported.module(check_guards=False), args, kwargs, options=settings)
    assert isinstance(found, list)
    files = [file for file in found if isinstance(file, str) and file]
    constants = {key: tensor for file in found if not isinstance(file, str) for key, (tensor, _) in file.items()}
    known = first[0].constants if first else constants
    own = tuple(sorted(key for key, tensor in constants.items() if not _same(tensor, known.get(key))))
    return Library(Entry(name, made.span, own, made.report.to_dict()), files, constants)


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor, other)


def _write(libraries: list[Library], manifest: Manifest, path: Path) -> Manifest:
    """Write beside the path, then move: who reads it meanwhile has the old file or the new one."""
    records: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix=".vggt_compile-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        with PT2ArchiveWriter(str(partial)) as writer:
            for name, content in _records(libraries):
                writer.write_bytes(name, content)
                records[name] = digest(content)
            manifest = replace(manifest, records=records)
            writer.write_string(MANIFEST, manifest.to_json())
        os.replace(partial, path)
    return manifest


def _records(libraries: list[Library]) -> Iterator[tuple[str, bytes]]:
    for library in libraries:
        name = library.entry.name
        for file in library.files:
            yield ENTRY.format(name) + Path(file).name, Path(file).read_bytes()
        if library.entry.own_constants:
            content = BytesIO()
            torch.save({key: library.constants[key] for key in library.entry.own_constants}, content)
            yield CONSTANTS.format(name), content.getvalue()
