"""The Markdown page of a record: tables against the truth and against the dense output, and what each layer matters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from vggt_compile.bench.accuracy.plans import CONTROLS
from vggt_compile.bench.accuracy.score import METRICS
from vggt_compile.bench.accuracy.statistics import POOLED

FRACTIONS = ("ATE", "AbsRel", "chamfer")
"""Metrics of which less is better, and that are no percentages."""
INTRODUCTION = """# Accuracy under each plan

AUC, RRA, RTA and δ < 1.25 in percent, more is better; AbsRel as a fraction, ATE and chamfer in metres (recordings: in
their unit), less is better. Each number is a mean over scenes with its 95 % bootstrap interval over scenes in brackets.
`FLOPs` is the share of the attention FLOPs of the whole model that the plan leaves. Frames are consecutive ones of a
trajectory. How to run it, and what it cannot say, is in docs/accuracy.md.
"""


def page(record: Mapping[str, Any]) -> str:
    """The whole page, from nothing but the record."""
    forms = {form: [e for e in record["entries"] if e["form"] == form] for form in ("plans", "layers")}
    parts = [INTRODUCTION]
    if forms["plans"]:
        parts += controls_section(forms["plans"])
        parts.append(FRONT)
        parts.append(f"![Accuracy over attention FLOPs]({record['pictures']}/accuracy.png)\n")
        parts += map(plans_section, forms["plans"])
    if forms["layers"]:
        parts += ["## What each layer matters\n", LAYERS]
        parts.append(f"![AUC@30 lost by each layer]({record['pictures']}/layers.png)\n")
        parts += map(layers_section, forms["layers"])
    return "\n".join([*parts, *(f"{note}\n" for note in record.get("notes", ()))])


CAN_IT_TELL = """## Can it tell?

Where no frame sees another, cameras can only be guessed, so `frame only` must be far below dense. `random blocks` and
`predicted blocks` read equally many keys; how far one is above the other is what choosing them by score is worth.
AUC@30 under each:
"""
FRONT = """## Accuracy over attention FLOPs

A dot for each plan, one colour for each kind of scene; its line joins the plans that nothing cheaper reaches, which are
named and have their interval. Kinds are drawn a little beside each other.
"""
LAYERS = """One global layer at a time is turned to attention inside frames, the others stay dense; `frame only` turns
all. Differences to dense on the same scenes, in points of the metric.
"""


def controls_section(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """AUC@30 of dense and of each control side by side; nothing where no entry has a control."""
    entries = list(entries)
    ran = [name for name in CONTROLS if any(name in entry["plans"] for entry in entries)]
    cells = []
    for entry in entries:
        found = {(row["scene"], row["plan"]): row["truth"].get("AUC@30") for row in entry["rows"]}
        for scene in scenes(entry["rows"]):
            numbers = (cell(found.get((scene, name)), "AUC@30") for name in ("dense", *ran))
            cells.append((entry["model"], str(entry["frames"]), scene, *numbers))
    headers = ("model", "frames", "scenes", "dense", *ran)
    return [CAN_IT_TELL, tabulate(cells, headers, tablefmt="github", disable_numparse=True) + "\n"] if ran else []


def plans_section(entry: Mapping[str, Any]) -> str:
    """Against the truth, as paired differences to dense, and against dense's output."""
    rows = entry["rows"]
    return "\n".join(
        [
            f"## {entry['model']}, {entry['frames']} frames\n",
            setting(entry) + "\n",
            *(f"- `{name}`: `{json.dumps(plan)}`" for name, plan in entry["plans"].items()),
            "\nAgainst the true geometry:\n",
            table(rows, "truth") + "\n",
            "Difference to dense on the same scenes, both against the true geometry:\n",
            table(without(rows, "dense"), "difference") + "\n",
            "Against the output of dense, that is how much a plan changes, whether for better or worse:\n",
            table(without(rows, "dense"), "baseline") + "\n",
        ]
    )


def layers_section(entry: Mapping[str, Any]) -> str:
    rows = without([row for row in entry["rows"] if row["scene"] == scenes(entry["rows"])[-1]], "dense")
    shown = ("AUC@30", "AUC@15", "AUC@5", "AbsRel", "chamfer")
    title = f"### {entry['model']}, {entry['frames']} frames\n"
    return "\n".join([title, setting(entry) + "\n", table(rows, "difference", shown) + "\n"])


def table(rows: Sequence[Mapping[str, Any]], side: str, metrics: Sequence[str] = METRICS) -> str:
    """One row for each scene and plan; metrics that no row has are left out."""
    metrics = [name for name in metrics if any(name in row[side] for row in rows)]
    cells = [
        (
            row["scene"],
            row["plan"],
            str(row["count"]) + (f" ({row['failed']} failed)" if row["failed"] else ""),
            f"{row['attention_left']:.0%}",
            *(cell(row[side].get(name), name, signed=side == "difference") for name in metrics),
        )
        for row in rows
    ]
    headers = ("scenes", "plan", "n", "FLOPs", *(name.replace("delta", "δ<") for name in metrics))
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def cell(found: Sequence[float | None] | None, metric: str, *, signed: bool = False) -> str:
    """Mean and interval, with digits that suit the metric."""
    if found is None:
        return ""
    digits, sign = 3 if metric in FRACTIONS else 1, "+" if signed else ""
    mean, low, high = ("" if x is None else f"{x + 0.0:{sign}.{digits}f}" for x in found)
    return f"{mean} [{low}, {high}]" if low else mean


def setting(entry: Mapping[str, Any]) -> str:
    """One line on how and where an entry was made."""
    told = entry["settings"] | entry["machine"]
    how = "compiled" if told.pop("compiled") else "rewritten graphs run in eager"
    return ", ".join([how, *(f"{name} {value}" for name, value in told.items() if value is not None)]) + "."


def scenes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Kinds of scene in order, all of them together last where there is more than one."""
    return list(dict.fromkeys(row["scene"] for row in rows))


def kinds(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Kinds of scene, without all of them together."""
    return [scene for scene in scenes(rows) if scene != POOLED]


def without(rows: Iterable[Mapping[str, Any]], plan: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["plan"] != plan]
