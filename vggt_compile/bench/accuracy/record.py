"""The JSON behind the page: one entry for each model, form and frame count, which a new run replaces."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vggt_compile.bench.accuracy import page, picture
from vggt_compile.bench.accuracy.run import BASELINE, Bench
from vggt_compile.bench.accuracy.statistics import summaries
from vggt_compile.errors import BadInput

FORMS = ("plans", "layers")
"""What a run compares: whole plans, or each layer's part."""
NAMES = ("model", "form", "frames")
"""What tells entries apart."""


def entries(bench: Bench, rows: Sequence[dict[str, Any]], form: str) -> list[dict[str, Any]]:
    """One entry for each frame count of a run."""
    policies = {name: plan.to_json() for name, plan in bench.plans.items()}
    common = {"model": bench.name, "form": form}
    told = {"settings": bench.settings(), "plans": policies}
    found = []
    for n in bench.frames:
        of_count = [row for row in rows if row["frames"] == n]
        where = {"machine": ran_on(of_count), "rows": summaries(of_count, BASELINE)}
        found.append(common | {"frames": n} | told | where)
    return found


def ran_on(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The machine of the rows; where a resumed run saw several, what differs is joined by " and "."""
    machines = [row["machine"] for row in rows]
    return {key: " and ".join(dict.fromkeys(seen[key] for seen in machines)) for key in machines[0]}


def write(new: Sequence[dict[str, Any]], out: Path, pictures: Path) -> str:
    """Update accuracy.json, the page and the pictures in their folders; returns the page."""
    record = merged(read(out / "accuracy.json"), new) | {"pictures": os.path.relpath(pictures, out)}
    for folder in (out, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    (out / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    text = page.page(record)
    (out / "accuracy.md").write_text(text)
    picture.draw(record, pictures)
    return text


def read(path: Path) -> dict[str, Any]:
    """The record that is there, or an empty one; BadInput for another file of that name."""
    if not path.exists():
        return {"entries": []}
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        sorted(map(_order, record["entries"]))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not a record of this bench; move it away, or take another --out") from error
    return record


def merged(record: dict[str, Any], new: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kept = {tuple(entry[name] for name in NAMES): entry for entry in (*record["entries"], *new)}
    return record | {"entries": sorted(kept.values(), key=_order)}


def _order(entry: dict[str, Any]) -> tuple[int, str, int]:
    return FORMS.index(entry["form"]), entry["model"], entry["frames"]
