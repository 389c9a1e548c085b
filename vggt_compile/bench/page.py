"""The page of a whole model is made from its record and nothing else, so that it can be written again at any time."""

from __future__ import annotations

import json
from typing import Any

from tabulate import tabulate

from vggt_compile.bench import length
from vggt_compile.bench.model import MODELS, PHASES
from vggt_compile.bench.parts import PARTS
from vggt_compile.bench.variants import WITHOUT

OUTPUTS = {
    **{"pose_enc": "camera", "depth": "depth", "world_points": "points"},
    **{"camera_poses": "camera", "conf": "confidence", "local_points": "points"},
}
"""What the outputs of the models are, by the names that these give them."""
LEFT = "attention_left"
"""Where a row has its share of the attention FLOPs."""


def page(record: dict[str, Any]) -> str:
    """The Markdown page of a record: what was run, seconds and memory, compile times, deviation, notes by hand."""
    machine, settings, rows = record["machine"], record["settings"], {phase: record[phase] for phase in PHASES}
    model = MODELS[settings.get("model", "vggt")]
    source = f"unmodified upstream {model}" if settings["upstream"] else f"{model} as written here"
    height, width = settings["size"]
    setting = ", ".join(f"{name} {value}" for name, value in machine.items())
    return "\n".join(
        [
            f"# A whole model: {model}\n",
            f"{source}, random weights, all heads but tracking, {height}×{width} pixels, bf16 autocast.",
            f"{setting}.",
            "Frames are a dynamic dimension in every compiled variant. Made by `python -m vggt_compile bench`.\n",
            "`eager` is the model as it comes (cuDNN attention), `compile` plain `torch.compile`, `dense` this backend",
            "with nothing rewritten, `sparse-…` a plan whose patch queries leave out so many percent of the key blocks",
            "in every global layer, time to choose them included; other names are [recipes](../recipes.md).",
            *_about_passes(rows),
            *plans_section(settings),
            "## Seconds and peak memory, warm\n",
            speed_table(rows["warm"]),
            *_about_flops(rows["warm"]),
            *parts_section(record),
            *length.section(rows["warm"]),
            "\n## First call: tracing, compiling, running\n",
            "Cold: all caches empty, the variants compile side by side. Warm, where there are such rows: a new process",
            "on the caches of the first, which reads code from disk. Rows of a variant are in the order of the calls",
            "in one process, but plain `compile`, which compiles again for every count, has a process for each. In",
            "ours, counts below 24 frames and the others are two graphs; a count that an earlier graph serves shows",
            "its running time only.\n",
            compile_table(rows),
            *deviation_section(rows["warm"]),
            *(f"\n{note}" for note in record.get("notes", ())),
            "",
        ]
    )


def _about_passes(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    off = any(WITHOUT in row["variant"] for measured in rows.values() for row in measured)
    return ["`…@without-…` is a recipe with these [passes](../passes.md) switched off.\n"] if off else [""]


def plans_section(settings: dict[str, Any]) -> list[str]:
    """The variants that are no recipes, as one would write them."""
    plans = {
        name: {key: part for key, part in plan.items() if part} for name, plan in settings.get("plans", {}).items()
    }
    return ["", *(f"- `{name}`: `{json.dumps(plan)}`" for name, plan in plans.items()), ""] if plans else []


def _about_flops(rows: list[dict[str, Any]]) -> list[str]:
    if not any(LEFT in row for row in rows):
        return []
    return [
        "\nAttention FLOPs left: what a plan leaves of the two products of all attentions of a model. Attention",
        "inside frames, in encoder, trunk and heads, counts too; choosing blocks and matching tokens do not. With ≥",
        "the images decide, and this is the least.",
    ]


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Speed is over eager, or over dense where eager did not run; attention FLOPs where a row has them."""
    base = "eager" if any(row["variant"] == "eager" for row in rows) else "dense"
    seconds = {row["frames"]: row.get("warm_s") for row in rows if row["variant"] == base}
    counted = any(LEFT in row for row in rows)
    table = []
    for row in sorted(rows, key=lambda r: r["frames"]):
        cells = _timed(row, seconds.get(row["frames"]))
        table.append((row["frames"], row["variant"], *cells, *([_left(row)] if counted else []), row["graphs"]))
    flops = ["attention FLOPs left"] if counted else []
    headers = ("frames", "variant", "seconds", f"speed-up over {base}", "peak GiB", *flops, "graphs so far")
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def _timed(row: dict[str, Any], before: float | None) -> tuple[str, str, str]:
    """Seconds, speed-up, GiB; why there are none where a row was not timed."""
    if "warm_s" not in row:
        return "out of memory" if row.get("out_of_memory") else "not timed alone", "", ""
    ratio = f"{before / row['warm_s']:.2f}×" if before else ""
    return f"{row['warm_s']:.3f}", ratio, f"{row['peak_gib']:.1f}"


def _left(row: dict[str, Any]) -> str:
    """As a share; empty where no plan ran."""
    return f"{'≥ ' * row.get('attention_at_least', False)}{row[LEFT]:.1%}" if LEFT in row else ""


def parts_section(record: dict[str, Any]) -> list[str]:
    """Seconds on the GPU by part; nothing where no row has them."""
    rows = sorted((row for row in record["warm"] if "parts" in row), key=lambda row: row["frames"])
    if not rows:
        return []
    table = [(row["frames"], row["variant"], *(f"{row['parts'][part]:.3f}" for part in PARTS)) for row in rows]
    return [
        "\n## Where the time goes\n",
        "Seconds of kernels in one more call under a profiler, by what launched them.\n",
        tabulate(table, ("frames", "variant", *PARTS), tablefmt="github", disable_numparse=True),
        f"\n![Seconds by part]({record['name']}-parts.png)",
    ]


def compile_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """First calls in the order in which they were made; a count served by an earlier graph shows its running time."""
    table = [
        (phase, row["variant"], row["frames"], f"{row['first_s']:.0f}")
        for phase, measured in rows.items()
        for row in measured
        if row["variant"] != "eager" and "first_s" in row
    ]
    return tabulate(table, ("caches", "variant", "frames", "first call, s"), tablefmt="github", disable_numparse=True)


def deviation_section(rows: list[dict[str, Any]]) -> list[str]:
    """How far the outputs are from those of eager, where it ran."""
    table = [
        (r["variant"], r["frames"], *(f"{value:.1e}" for value in r["deviation"].values()))
        for r in rows
        if r.get("deviation")
    ]
    if not table:
        return []
    outputs = next(row["deviation"] for row in rows if row.get("deviation"))
    headers = ("variant", "frames", *(OUTPUTS[name] for name in outputs))
    return [
        "\n## Deviation from eager, ‖a − b‖ / ‖b‖\n",
        "Of bf16 runs with random weights: for `dense` this is rounding, for `g2f` the price of the rewrite on",
        "untrained weights, which says nothing about trained ones.\n",
        tabulate(table, headers, tablefmt="github", disable_numparse=True),
    ]
