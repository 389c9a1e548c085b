"""The record of a run: settings, versions, and the rows of both phases as the workers wrote them, by variant."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vggt_compile.bench import bars
from vggt_compile.bench.model import PHASES, Settings
from vggt_compile.bench.page import page
from vggt_compile.bench.variants import all_variants, split_variant
from vggt_compile.bench.versions import versions


def write(settings: Settings, work: Path, out: Path, name: str = "model") -> str:
    """JSON with everything and the page made from it, which is returned; `name` is that of both files."""
    rows = {phase: read(work, phase, settings) for phase in PHASES}
    record = {"machine": versions(), "name": name, "settings": asdict(settings), **rows}
    text = page(record)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / f"{name}.md").write_text(text)
    bars.draw(rows["warm"], out / f"{name}-parts.png")
    return text


def read(work: Path, phase: str, settings: Settings) -> list[dict[str, Any]]:
    found = {file.stem.split(".")[1] for file in work.glob(f"{phase}.*.jsonl")}
    order = dict.fromkeys((*all_variants(), *settings.plans, *sorted(split_variant(name)[0] for name in found)))
    names = sorted(found, key=lambda name: (list(order).index(split_variant(name)[0]), name))
    files = [file for name in names for file in sorted(work.glob(f"{phase}.{name}.*.jsonl"), key=_first_count)]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _first_count(file: Path) -> int:
    return int(file.stem.split(".")[2].split("-")[0])
