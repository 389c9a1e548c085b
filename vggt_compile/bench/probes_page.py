"""The page of what probes cost is made from its record and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from vggt_compile.bench import length
from vggt_compile.bench.trunks import SIZE, TRUNKS

Row = Mapping[str, Any]


def page(record: Mapping[str, Any]) -> str:
    """The Markdown page of a record: whole models, how many frames fit, each measure by itself."""
    trunk = TRUNKS[record.get("model", "vggt")]
    backend = "compiled with Inductor" if record["compiled"] else "run node by node"
    return "\n".join(
        [
            "# What probes cost\n",
            f"{trunk.title}, random weights, bf16 autocast, {SIZE[0]}×{SIZE[1]} images, {backend}.",
            "Made by `python -m vggt_compile.bench.probes`.\n",
            ", ".join(f"{name} {value}" for name, value in record["machine"].items()) + ".\n",
            models_table(record["models"]),
            *frames_section(record),
            f"\nEach measure at one of the {trunk.layers} layers, on random operands: time, and memory beyond them.\n",
            measures_table(record["measures"]),
            "",
        ]
    )


def models_table(rows: list[Row]) -> str:
    dense = {row["frames"]: row.get("seconds") for row in rows if not row["probes"]}

    def cells(row: Row) -> tuple[str, ...]:
        if row.get("out_of_memory"):
            return (str(row["frames"]), _what(row), "out of memory", "", "")
        plain = dense.get(row["frames"])
        times = "" if plain is None else f"{row['seconds'] / plain:.2f}"
        return (str(row["frames"]), _what(row), f"{row['seconds']:.2f}", times, f"{row['peak_gib']:.1f}")

    headers = ("frames", "probes", "seconds", "times dense", "peak GiB")
    return tabulate(map(cells, rows), headers, tablefmt="github", disable_numparse=True)


def frames_section(record: Mapping[str, Any]) -> list[str]:
    """How many frames fit, and which counts were run for it; nothing where few counts are timed and no more run."""
    more = record.get("longest", [])
    rows = [{"variant": _what(row), **row} for row in (*record["models"], *more)]
    line = length.section(rows)
    if not line and not more:
        return []
    counts: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row["frames"]):
        counts.setdefault(row["variant"], []).append(_outcome(row))
    heading, *rest = line or ["\n## How many frames fit\n", "No kind of run has the three counts that a line needs."]
    return [
        heading,
        "Numbers of frames that were run, by probes:\n",
        *(f"- {name}: {', '.join(dict.fromkeys(found))}" for name, found in counts.items()),
        *_about_plan(record),
        "",
        *rest,
    ]


def measures_table(rows: list[Row]) -> str:
    counts = list(dict.fromkeys(row["frames"] for row in rows))
    by_name: dict[str, dict[int, str]] = {}
    for row in rows:
        by_name.setdefault(row["measure"], {})[row["frames"]] = f"{row['ms']:.1f} ms, {row['peak_gib']:.2f} GiB"
    table = [(f"`{name}`", *(found.get(count, "") for count in counts)) for name, found in by_name.items()]
    return tabulate(table, ("measure", *(f"{n} frames" for n in counts)), tablefmt="github", disable_numparse=True)


def _what(row: Row) -> str:
    plan = "" if row.get("plan", "dense") == "dense" else f", `{row['plan']}`"
    return (f"{row['probes']} measures" if row["probes"] else "none") + plan


def _about_plan(record: Mapping[str, Any]) -> list[str]:
    plan = {key: part for key, part in (record.get("longest_plan") or {}).items() if part}
    name = next((row["plan"] for row in record.get("longest", ())), "")
    said = f"\nThe plan `{name}` is `{json.dumps(plan)}`: attention is cheaper, and what is measured is not."
    return [said] if plan and name else []


def _outcome(row: Row) -> str:
    if "peak_gib" in row:
        return f"{row['frames']}"
    return f"not {row['frames']} ({'out of memory' if row.get('out_of_memory') else row['failed']})"
